"""From a config to rows: opens the token cache, holds documents out for validation, and says what it found.

Also gets the tokenizer a config asks for, training one where there is none. Knows no batch, process or device.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxformers.data.cache import Progress, TokenCache, cache_root, content_key, open_cache, writing_to
from jaxformers.data.config import DataConfig, TokenizerConfig
from jaxformers.data.packing import permutation
from jaxformers.data.rows import PackedRows
from jaxformers.data.shards import plan_shards
from jaxformers.data.sources import Document, SourceFile, files_of, read
from jaxformers.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_tokenizer


@dataclass(frozen=True)
class CorpusReport:
    """Counts of a corpus. Efficiency is the share of row positions that hold a token.

    `skipped` counts records that are no text, of which `skipped_names` names the first hundred; `empty` counts texts of
    nothing but white space, which are left out too. `bytes` is the documents' text as UTF-8.
    """

    files: int
    train_documents: int
    validation_documents: int
    train_tokens: int
    validation_tokens: int
    bytes: int
    empty: int
    skipped: int
    skipped_names: tuple[str, ...]
    train_efficiency: float
    validation_efficiency: float
    cache: Path


@dataclass(frozen=True)
class Corpus:
    """Rows to learn from, rows to validate on, and what is known of them.

    `bytes_per_token` is of the validation documents where there are any: bits per byte is
    loss in nats / ln 2 / bytes_per_token.
    """

    train: PackedRows
    validation: PackedRows
    report: CorpusReport
    bytes_per_token: float


def open_corpus(config: DataConfig, tokenizer: Tokenizer, *, progress: Progress | None = None) -> Corpus:
    """The corpus of a config, tokenized first where that has not been done: `progress(done, total)` counts bytes.

    Raises:
        ValueError: whatever is wrong with the files, the tokenizer or the cache folder, in one line.
    """
    cache = open_cache(config, tokenizer, progress=progress)
    held_out = split(cache.hashes, config.validation_fraction)
    train_documents, validation_documents = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    train = PackedRows(cache, train_documents, config, epochs=config.epochs)
    in_order = config.model_copy(update={"shuffle": False})
    validation = PackedRows(cache, validation_documents, in_order, epochs=1)
    measured = validation_documents if len(validation_documents) else train_documents
    return Corpus(
        train=train,
        validation=validation,
        report=_report(cache, train, validation, held_out),
        bytes_per_token=float(cache.sizes[measured].sum() / cache.lengths[measured].sum()),
    )


def split(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """bool [documents]: which are held out. A document's hash (uint64) alone decides, so copies stay together and
    adding documents moves none.

    Where the hashes leave a side empty that should have something, the document nearest to it changes sides.
    """
    held_out = hashes < np.uint64(int(fraction * 2**64))
    if fraction > 0 and len(hashes) > 1:
        if not held_out.any():
            held_out[np.argmin(hashes)] = True
        elif held_out.all():
            held_out[np.argmax(hashes)] = False
    return held_out


def _report(cache: TokenCache, train: PackedRows, validation: PackedRows, held_out: np.ndarray) -> CorpusReport:
    manifest = cache.manifest
    validation_tokens = int(cache.lengths[held_out].sum())
    return CorpusReport(
        files=manifest.source_files,
        train_documents=int((~held_out).sum()),
        validation_documents=int(held_out.sum()),
        train_tokens=manifest.tokens - validation_tokens,
        validation_tokens=validation_tokens,
        bytes=manifest.bytes,
        empty=manifest.empty,
        skipped=manifest.skipped,
        skipped_names=manifest.skipped_names,
        train_efficiency=train.efficiency,
        validation_efficiency=validation.efficiency,
        cache=cache.directory,
    )


def build_tokenizer(config: TokenizerConfig, data: DataConfig) -> Tokenizer:
    """The tokenizer a config asks for. A trained one is kept in the cache folder, keyed by the files and the settings.

    Raises:
        ValueError: no tokenizer at `path`; no text to learn from; a cache folder that cannot be written.
    """
    if config.kind == "bytes":
        return byte_tokenizer(config.special_tokens)
    if config.kind == "file":
        assert config.path is not None
        path = Path(config.path).expanduser()
        return load_tokenizer(path, bos_token=config.bos_token, eos_token=config.eos_token, pad_token=config.pad_token)
    if data.tokens_field is not None:
        raise ValueError("data.tokens_field names ready ids: set tokenizer.kind to file, and path to what made them")
    files = files_of(data)
    key = content_key(files, data.text_field, config.model_dump(mode="json"))
    directory = cache_root(data.cache_dir) / "tokenizers" / key
    if not directory.is_dir():
        with writing_to(directory.parent):
            _train_into(directory, config, data, files)
    return load_tokenizer(directory)


def _train_into(directory: Path, config: TokenizerConfig, data: DataConfig, files: Sequence[SourceFile]) -> None:
    tokenizer = train_tokenizer(
        _sample(files, data, config.max_bytes),
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=config.special_tokens,
    )
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        made = Path(temporary) / directory.name
        tokenizer.save(made)
        try:
            os.replace(made, directory)
        except OSError:
            if not directory.is_dir():  # otherwise another process was first, with the same tokenizer
                raise


def _sample(files: Sequence[SourceFile], data: DataConfig, max_bytes: int) -> Iterator[str]:
    """Texts from all over the corpus, in an order that does not favour the first files, up to `max_bytes` of text."""
    pieces = [piece for shard in plan_shards(files) for piece in shard]
    left = max_bytes
    for number in permutation(len(pieces)):
        for record in read(pieces[number], text_field=data.text_field):
            if not isinstance(record, Document) or not record.text.strip():
                continue
            yield record.text
            left -= len(record.text.encode())
            if left <= 0:
                return
    if left == max_bytes:
        raise ValueError(f"no text to train a tokenizer on in {', '.join(map(repr, data.paths))}")
