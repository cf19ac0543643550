"""What a config file may say about tokenizers and data. Knows no file, no array and no other package's settings."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

_OWN_SPECIAL_TOKENS = 3  # begin, end and padding: every tokenizer made here has them
_BYTES = 256
# Every field that some form of a conversation reads, by the name it usually has.
CHAT_FIELDS = (
    *("messages", "conversations", "tools", "system"),
    *("instruction", "input", "output", "history"),
    *("prompt", "completion", "text"),
    *("role", "content", "from", "value"),
)


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


class FimConfig(BaseModel):
    """Fill-in-the-middle (arXiv:2207.14255): documents to learn from as prefix, suffix, middle, between sentinels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: float = Field(0.0, ge=0, le=1, description="Share of documents that are rearranged; their text decides.")
    spm_rate: float = Field(
        0.5, ge=0, le=1, description="Share of those whose suffix comes first, prefix and middle then in one."
    )
    sentinels: tuple[str, str, str] | None = Field(
        None, description="The tokens before the prefix, the middle and the suffix; null: usual ones, if there are any."
    )


class ChatConfig(BaseModel):
    """Conversations instead of texts: how records hold them, how they are written out, and what of them is learned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["none", "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = Field(
        "none",
        description="none: records are texts. Else what they are: messages (role, content, tool_calls, and tools "
        "beside them), sharegpt (conversations of from, value), alpaca (instruction, input, output), prompt_completion "
        "(texts or lists of messages), text (learned whole, without a template); auto: each record's fields say it.",
    )
    fields: dict[str, str] = Field(
        {}, description="Other names of the records' fields, such as {prompt: question, completion: answer}."
    )
    roles: dict[str, Literal["system", "developer", "user", "assistant", "tool"]] = Field(
        {}, description="What other names of roles stand for, such as {bot: assistant}."
    )
    template: str | None = Field(
        None,
        description="A file with a Jinja chat template, or a built-in one (chatml, zephyr, plain), in place of the "
        "tokenizer's own; the run keeps it with its tokenizer.",
    )
    variables: dict[str, Any] = Field(
        {}, description="What the template may read besides, such as {enable_thinking: false}."
    )
    learn: Literal["assistant", "last", "all"] = Field(
        "assistant", description="The tokens with a loss: of all the assistant's turns, of its last one, or all tokens."
    )
    too_long: Literal["drop", "keep_start", "keep_end", "error"] = Field(
        "drop",
        description="Conversations longer than a row: leave out (counted and named), keep what fits of their start or "
        "of their end (counted), or refuse. They are never continued in another row.",
    )

    @field_validator("fields")
    @classmethod
    def _known_fields(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name not in CHAT_FIELDS:
                raise ValueError(
                    f"names {name!r}, which no form of a conversation has; known: {', '.join(CHAT_FIELDS)}"
                )
        return value

    @property
    def on(self) -> bool:
        """Whether records are conversations."""
        return self.format != "none"


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
    test_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of documents that no run learns from or validates on, decided likewise."
    )
    weight: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="The source's share of a mixture, relative to other weights."
    )
    epochs: int | None = Field(None, gt=0, description="Passes over the source; null: as many as the run asks for.")
    fim: FimConfig = Field(FimConfig(), description="Fill-in-the-middle, of what is learned from only.")
    chat: ChatConfig = Field(ChatConfig(), description="Conversations, rendered with the model's chat template.")

    @model_validator(mode="after")
    def _leave_something_to_learn_from(self) -> Self:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction {self.validation_fraction} and test_fraction {self.test_fraction} leave nothing "
                "to learn from; their sum must be below 1"
            )
        return self

    @model_validator(mode="after")
    def _refuse_what_conversations_exclude(self) -> Self:
        if self.chat.on and self.tokens_field is not None:
            raise ValueError(f"tokens_field is {self.tokens_field!r}, but conversations (chat.format) are no ready ids")
        if self.chat.on and self.fim.rate:
            raise ValueError(
                f"fim.rate is {self.fim.rate}, but conversations (chat.format) are not rearranged: set it to 0"
            )
        if self.chat.on and self.format in ("text", "megatron"):
            raise ValueError(f"chat.format is {self.chat.format}, but files of format {self.format} hold no records")
        return self

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
        {},
        description="Several corpora by name, in any order, each with the keys of one; a key that one lacks is taken "
        "from here.",
    )
    sequence_length: int = Field(1024, gt=0, description="Tokens in a row.")
    weights_by: Literal["tokens", "documents", "rows"] = Field(
        "tokens", description="What the weights of sources are shares of."
    )
    weights_at_step: dict[int, dict[str, float]] = Field(
        {},
        description="New weights from given steps on, by source; one that is not named keeps its weight. A step stands "
        "for the row that it begins with if all steps have had the batch sizes of `train`.",
    )
    weights_at_token: dict[int, dict[str, float]] = Field(
        {}, description="The same by tokens (rows times sequence_length), which no change of batch size moves."
    )
    when_exhausted: Literal["repeat", "stop", "drop"] = Field(
        "repeat",
        description="When a source of a mixture has had its epochs: repeat it until all have had theirs; stop there; "
        "or drop it and go on with the others.",
    )
    packing: Literal["first_fit", "best_fit", "concat", "none"] = Field(
        "first_fit",
        description="first_fit, best_fit: only documents longer than a row are cut, and share rows; none: they share "
        "none; concat: fill rows and cut wherever one ends.",
    )
    packing_window: int = Field(1024, gt=0, le=65536, description="Documents that are packed together.")
    attend_across_documents: bool = Field(False, description="Whether documents see those before them in their row.")
    reset_positions: bool = Field(True, description="Count positions from 0 in each document, or through the row.")
    end_of_text_loss: bool = Field(True, description="Whether the end-of-text token of texts is learned.")
    seed: int = Field(0, ge=0, lt=2**63, description="Decides the order of documents and rows, and nothing else.")
    shuffle: bool = Field(True, description="Shuffle documents, and rows anew every epoch; false keeps file order.")
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
        return values | {"sources": {name: _merged(shared, source) for name, source in sources.items()}}

    @field_validator("sources")
    @classmethod
    def _in_any_order(cls, sources: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
        """By name: which rows a mixture draws depends on the order of its sources, and that of keys says nothing."""
        return dict(sorted(sources.items()))

    @model_validator(mode="after")
    def _one_corpus_or_several(self) -> Self:
        if bool(self.paths) == bool(self.sources):
            raise ValueError("give either paths, for one corpus, or sources, for several, each with paths of its own")
        for name, source in self.sources.items():
            if not source.paths:
                raise ValueError(f"the required key sources.{name}.paths is missing")
        return self

    @model_validator(mode="after")
    def _conversations_that_stay_whole(self) -> Self:
        chats = [source.chat for source in (self.sources.values() or [self]) if source.chat.on]
        if chats and self.packing == "concat":
            raise ValueError("packing concat cuts documents anywhere, and conversations must stay whole: use first_fit")
        if len({chat.template for chat in chats}) > 1:
            raise ValueError("sources name different values of chat.template, but a model has one chat template")
        if not chats and self.chat != ChatConfig():
            raise ValueError("chat is set, but chat.format is none, so records are read as texts: set it to auto")
        return self

    @model_validator(mode="after")
    def _documents_that_see_each_other_have_an_order(self) -> Self:
        if self.attend_across_documents and self.reset_positions:
            raise ValueError(
                "attend_across_documents needs reset_positions=false: positions tell what comes before what in a row"
            )
        return self

    @model_validator(mode="after")
    def _weights_that_can_be_drawn(self) -> Self:
        if self.weights_at_step and self.weights_at_token:
            raise ValueError("give weights_at_step or weights_at_token, not both")
        key = "weights_at_step" if self.weights_at_step else "weights_at_token"
        for mark, weights in getattr(self, key).items():
            if mark < 1:
                raise ValueError(f"{key} has {mark}; marks are at least 1, weights from the start are the sources' own")
            for name, weight in weights.items():
                if name not in self.sources:
                    known = ", ".join(self.sources) or "none"
                    raise ValueError(f"{key}.{mark} names the source {name!r}; sources are: {known}")
                if not 0 <= weight < math.inf:
                    raise ValueError(f"{key}.{mark}.{name} is {weight}; a weight is a finite number, at least 0")
        for mark, weights in self.weights_from.items():
            if self.sources and not any(weights.values()):
                raise ValueError(f"all sources have weight 0 from {f'{key} {mark}' if mark else 'the start'} on")
        for name in self.sources:
            if not any(weights[name] for weights in self.weights_from.values()):
                raise ValueError(f"sources.{name}.weight is 0 and {key} never raises it: leave the source out")
        return self

    @model_validator(mode="after")
    def _a_source_that_ends(self) -> Self:
        endless = all(source.epochs is None for source in self.sources.values())
        if self.sources and endless and self.when_exhausted != "repeat":
            raise ValueError(f"when_exhausted is {self.when_exhausted}, but no source has epochs, so none ever ends")
        return self

    @property
    def weights_from(self) -> dict[int, dict[str, float]]:
        """Every source's weight from each mark (a step or a token, as the config says) on, the first mark being 0."""
        weights = {name: source.weight for name, source in self.sources.items()}
        changes = sorted((self.weights_at_step or self.weights_at_token).items())
        found = {0: weights}
        for mark, change in changes:
            found[mark] = weights = weights | change
        return found

    def by_source(self) -> dict[str, Self]:
        """Each corpus by name as a config of its own; a single one has the name ""."""
        if not self.sources:
            return {"": self}
        shared = {key: getattr(self, key) for key in type(self).model_fields.keys() - SourceConfig.model_fields.keys()}
        shared |= {"sources": {}, "weights_at_step": {}, "weights_at_token": {}}
        return {name: type(self)(**shared | dict(source)) for name, source in self.sources.items()}


def _merged(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A source's keys over the shared ones, also inside of a section that both have."""
    sections = {
        key: shared[key] | value
        for key, value in own.items()
        if isinstance(value, dict) and isinstance(shared.get(key), dict)
    }
    return shared | own | sections
