"""What a config file may say about tokenizers and data. Knows no file, no array and no other package's settings."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_OWN_SPECIAL_TOKENS = 3  # begin, end and padding: every tokenizer made here has them
_BYTES = 256


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple, json_schema_input_type=str | list[str])]


class TokenizerConfig(BaseModel):
    """One of three ways to get a tokenizer: train one on the data, use raw bytes, or read an existing one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["train", "bytes", "file"] = Field(
        "train", description="train: learn a byte-level BPE from the data; bytes: one id per byte; file: read `path`."
    )
    path: str | None = Field(
        None, description="kind file: a tokenizer.json, or a Hugging Face directory that holds one."
    )
    vocab_size: int = Field(8192, gt=0, description="kind train: ids to learn, special tokens and bytes included.")
    max_bytes: int = Field(100_000_000, gt=0, description="kind train: bytes of text to learn from, at most.")
    min_frequency: int = Field(2, ge=1, description="kind train: how often a pair must occur to become a token.")
    special_tokens: Strings = Field((), description="kinds train and bytes: further tokens that text never splits.")
    bos_token: str | None = Field(None, description="kind file: the token that begins a text, if its files say none.")
    eos_token: str | None = Field(None, description="kind file: the token that ends a text, if its files say none.")
    pad_token: str | None = Field(None, description="kind file: the token that pads a batch, if its files say none.")

    @model_validator(mode="after")
    def _refuse_keys_of_another_kind(self) -> Self:
        belongs = {
            "path": ("file",),
            "vocab_size": ("train",),
            "max_bytes": ("train",),
            "min_frequency": ("train",),
            "special_tokens": ("train", "bytes"),
            "bos_token": ("file",),
            "eos_token": ("file",),
            "pad_token": ("file",),
        }
        for key, kinds in belongs.items():
            # A resolved config writes every key out, so only a value other than the default is a contradiction.
            if self.kind not in kinds and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"tokenizer.{key} is for kind {' or '.join(kinds)}, but tokenizer.kind is {self.kind}")
        if self.kind == "file" and self.path is None:
            raise ValueError("tokenizer.kind is file, so tokenizer.path must name a tokenizer.json or a directory")
        return self

    @model_validator(mode="after")
    def _refuse_a_vocabulary_without_room_for_bytes(self) -> Self:
        least = _BYTES + _OWN_SPECIAL_TOKENS + len(self.special_tokens)
        if self.kind == "train" and self.vocab_size < least:
            raise ValueError(f"tokenizer.vocab_size is {self.vocab_size}; bytes and special tokens alone need {least}")
        return self


class SourceConfig(BaseModel):
    """Which files to learn from and how to read documents out of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    paths: Strings = Field(
        (),
        description="Globs of files; `**` crosses folders, {stdlib} is the running Python's standard library, a URL "
        "such as s3:// or hf:// is read through fsspec. format huggingface: folders of save_to_disk, or names on the "
        "hub; format python: package.module:function.",
    )
    format: Literal[
        "auto", "text", "jsonl", "csv", "parquet", "arrow", "arrayrecord", "megatron", "huggingface", "python"
    ] = Field(
        "auto",
        description="How documents lie in the files; auto: as a file's name says (.jsonl, .csv, .tsv, .parquet, "
        ".arrow, .feather, .arrayrecord, .bin with .idx, a folder of save_to_disk); any other file is one document.",
    )
    exclude: Strings = Field(
        ("*/site-packages/*", "*/dist-packages/*", "*/__pycache__/*"),
        description="Globs of files to leave out, matched against the whole path; here `*` crosses folders.",
    )
    text_field: str = Field("text", description="The field or column of a record that holds the text.")
    tokens_field: str | None = Field(
        None,
        description="The field or column that holds ready ids, such as input_ids, instead of text; for ArrayRecord the "
        "type of the ids in its records: uint16, uint32, int32 or int64.",
    )
    subset: str | None = Field(None, description="Hugging Face names: the dataset's configuration, if it has several.")
    split: str | None = Field(None, description="Hugging Face datasets: the split to read, if there are several.")
    on_bad_text: Literal["skip", "error"] = Field(
        "skip",
        description="Records that are no document (not UTF-8, not JSON, without the field, null, ids that the "
        "tokenizer does not have): skip (counted and named in the report) or error.",
    )
    parse_special_tokens: bool = Field(
        False, description="Whether a special token spelled out in a document counts as that token or as plain text."
    )
    validation_fraction: float = Field(
        0.01, ge=0, lt=1, description="Share of documents held out; a document's content alone decides its side."
    )

    @model_validator(mode="after")
    def _refuse_keys_of_another_format(self) -> Self:
        readers = {
            "tokens_field": ("auto", "jsonl", "csv", "parquet", "arrow", "arrayrecord", "huggingface", "python"),
            "subset": ("auto", "huggingface"),
            "split": ("auto", "huggingface"),
        }
        for key, formats in readers.items():
            if getattr(self, key) is not None and self.format not in formats:
                raise ValueError(f"{key} is for format {', '.join(formats[1:])}, but format is {self.format}")
        return self


class DataConfig(SourceConfig):
    """One corpus (`paths`) or several (`sources`), and how their documents become rows of `sequence_length` tokens."""

    sources: dict[str, SourceConfig] = Field(
        {}, description="Several corpora by name, each with the keys of one; a key that one lacks is taken from here."
    )
    sequence_length: int = Field(1024, gt=0, description="Tokens in a row.")
    packing: Literal["first_fit", "concat"] = Field(
        "first_fit",
        description="first_fit: only documents longer than a row are cut; concat: fill rows and cut wherever one ends.",
    )
    packing_window: int = Field(1024, gt=0, le=65536, description="Documents that are packed together.")
    seed: int = Field(0, ge=0, lt=2**63, description="Decides the order of documents and rows, and nothing else.")
    shuffle: bool = Field(True, description="Shuffle documents, and rows anew every epoch; false keeps file order.")
    epochs: int | None = Field(None, gt=0, description="Passes over the data; none: as many as the run asks for.")
    cache_dir: Path | None = Field(
        None, description="Where tokenized data is kept; none: $JAXFORMERS_CACHE, or else the user's cache folder."
    )
    workers: int | None = Field(None, gt=0, description="Processes that tokenize; none: one per core.")

    @model_validator(mode="before")
    @classmethod
    def _sources_inherit(cls, values: Any) -> Any:
        sources = values.get("sources") if isinstance(values, dict) else None
        if not isinstance(sources, dict) or not all(isinstance(source, dict) for source in sources.values()):
            return values  # what is wrong with them is said where they are read
        shared = {key: value for key, value in values.items() if key in SourceConfig.model_fields and key != "paths"}
        return values | {"sources": {name: shared | source for name, source in sources.items()}}

    @model_validator(mode="after")
    def _one_corpus_or_several(self) -> Self:
        if bool(self.paths) == bool(self.sources):
            raise ValueError("give either paths, for one corpus, or sources, for several, each with paths of its own")
        for name, source in self.sources.items():
            if not source.paths:
                raise ValueError(f"the required key sources.{name}.paths is missing")
        return self

    def by_source(self) -> dict[str, Self]:
        """Each corpus by name as a config of its own; a single one has the name ""."""
        if not self.sources:
            return {"": self}
        shared = {key: getattr(self, key) for key in type(self).model_fields.keys() - SourceConfig.model_fields.keys()}
        return {name: type(self)(**shared | dict(source) | {"sources": {}}) for name, source in self.sources.items()}
