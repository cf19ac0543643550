"""From a config to rows: opens token caches, holds documents out, mixes sources, and says what it found.

Also gets the tokenizer a config asks for, training one where there is none. Knows no batch, process or device.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from jaxformers.data.cache import Progress, TokenCache, content_key, open_cache, writing_to
from jaxformers.data.config import DataConfig, TokenizerConfig
from jaxformers.data.conversations import said_in, wanted_fields
from jaxformers.data.documents import fit_conversations
from jaxformers.data.fim import make_fim
from jaxformers.data.home import cache_root
from jaxformers.data.mixture import MixedRows
from jaxformers.data.packing import permutation
from jaxformers.data.records import Entry
from jaxformers.data.rows import JoinedRows, PackedRows
from jaxformers.data.shards import plan_shards
from jaxformers.data.sources import SourceFile, files_of, read
from jaxformers.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_tokenizer

_NAMES_KEPT = 100


@dataclass(frozen=True)
class CorpusReport:
    """Counts of a corpus. Efficiency is the share of row positions that hold a token.

    `skipped` counts records that are no document, of which `skipped_names` names the first hundred; `empty` counts
    texts of nothing but white space, which are left out too. `bytes` is the documents' text as UTF-8, `learned_tokens`
    the targets among the training tokens. `conversations` counts all of them, `too_long` those longer than a row, which
    were cut or left out as `chat.too_long` says; `too_long_names` names the first hundred.
    """

    files: int
    train_documents: int
    validation_documents: int
    test_documents: int
    train_tokens: int
    validation_tokens: int
    test_tokens: int
    bytes: int
    empty: int
    skipped: int
    skipped_names: tuple[str, ...]
    train_efficiency: float
    validation_efficiency: float
    cache: Path
    learned_tokens: int = 0
    conversations: int = 0
    too_long: int = 0
    too_long_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """Rows to learn from, rows to validate on, rows that no run sees, and what is known of them.

    `bytes_per_token` is of the validation documents where there are any: bits per byte is
    loss in nats / ln 2 / bytes_per_token. `sources` are a mixture's, each by itself; one corpus has none.
    """

    train: PackedRows | MixedRows
    validation: PackedRows | JoinedRows
    test: PackedRows | JoinedRows
    report: CorpusReport
    bytes_per_token: float
    sources: Mapping[str, "Corpus"] = field(default_factory=dict)


def open_corpus(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    progress: Progress | None = None,
    rows_before: Callable[[int], int] | None = None,
) -> Corpus:
    """The corpus of a config, tokenized first where that has not been done: `progress(done, total)` counts bytes of a
    source. `rows_before(step)` says how many rows a run reads before a step; `weights_at_step` needs it.

    Raises:
        ValueError: whatever is wrong with the files, the tokenizer or the cache folder, in one line.
    """
    if not config.sources:
        return _open_source(config, tokenizer, progress)
    sources = {}
    for name, own in config.by_source().items():
        try:
            sources[name] = _open_source(own, tokenizer, progress)
        except ValueError as error:
            raise ValueError(f"data.sources.{name}: {error}") from error
    return _mix(config, sources, rows_before)


def _open_source(config: DataConfig, tokenizer: Tokenizer, progress: Progress | None) -> Corpus:
    fim = make_fim(config.fim, tokenizer, seed=config.seed)
    cache = open_cache(config, tokenizer, progress=progress)
    sides = split_documents(cache.hashes, validation=config.validation_fraction, test=config.test_fraction)
    in_order = config.model_copy(update={"shuffle": False})
    train = PackedRows(cache, sides.train, config, epochs=config.epochs, fim=fim)
    validation = PackedRows(cache, sides.validation, in_order, epochs=1)
    test = PackedRows(cache, sides.test, in_order, epochs=1)
    if not train.documents:
        said = f"every conversation is longer than a row of {config.sequence_length} tokens"
        raise ValueError(f"{said}: raise data.sequence_length, or set data.chat.too_long to keep_start or keep_end")
    measured = sides.validation if len(sides.validation) else sides.train
    return Corpus(
        train=train,
        validation=validation,
        test=test,
        report=_report(cache, sides, train, validation, test),
        bytes_per_token=float(cache.sizes[measured].sum() / cache.lengths[measured].sum()),
    )


def _mix(config: DataConfig, sources: Mapping[str, Corpus], rows_before: Callable[[int], int] | None) -> Corpus:
    weights = config.weights_from
    if config.weights_at_token:
        weights = {-(-mark // config.sequence_length): named for mark, named in weights.items()}
    elif config.weights_at_step:
        if rows_before is None:
            raise ValueError("data.weights_at_step counts steps of a run, and there is none here: use weights_at_token")
        weights = {rows_before(mark): named for mark, named in weights.items()}
    train = MixedRows(
        {name: corpus.train for name, corpus in sources.items()},
        weights,
        weights_by=config.weights_by,
        when_exhausted=config.when_exhausted,
        seed=config.seed,
    )
    validation = JoinedRows([corpus.validation for corpus in sources.values()])
    reports = [corpus.report for corpus in sources.values()]
    tokens = [report.validation_tokens or report.train_tokens for report in reports]
    texts = [corpus.bytes_per_token * count for corpus, count in zip(sources.values(), tokens, strict=True)]
    return Corpus(
        train=train,
        validation=validation,
        test=JoinedRows([corpus.test for corpus in sources.values()]),
        report=_sum_of(reports, train.efficiency, validation.efficiency),
        bytes_per_token=sum(texts) / sum(tokens),
        sources=sources,
    )


def _sum_of(reports: Sequence[CorpusReport], train_efficiency: float, validation_efficiency: float) -> CorpusReport:
    counted = [f.name for f in fields(CorpusReport) if f.type is int]
    return CorpusReport(
        **{name: sum(getattr(report, name) for report in reports) for name in counted},
        skipped_names=tuple(name for report in reports for name in report.skipped_names),
        too_long_names=tuple(name for report in reports for name in report.too_long_names),
        train_efficiency=train_efficiency,
        validation_efficiency=validation_efficiency,
        cache=reports[0].cache.parent,
    )


@dataclass(frozen=True)
class Sides:
    """Which documents are for what: int64 arrays of numbers, in order."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_documents(hashes: np.ndarray, *, validation: float, test: float) -> Sides:
    """The sides of documents by their hashes (uint64): low ones validate, high ones test, so neither share moves the
    other. Some document is always left to train on, if there is any."""
    validates = split(hashes, validation)
    rest = np.flatnonzero(~validates)
    tests = split(~hashes[rest], test)
    return Sides(rest[~tests], np.flatnonzero(validates), rest[tests])


def split(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """bool [documents]: which are held out. A document's hash (uint64) alone decides, so copies stay together and
    adding documents moves none.

    Where the hashes leave a side empty that should have something, the document nearest to it changes sides, with its
    copies. Where all are copies of one, none is held out.
    """
    held_out = hashes < np.uint64(int(fraction * 2**64))
    if fraction > 0 and len(hashes):
        if not held_out.any():
            held_out = hashes == hashes.min()
        if held_out.all():
            held_out = hashes != hashes.max()
    return held_out


def _report(
    cache: TokenCache, sides: Sides, train: PackedRows, validation: PackedRows, test: PackedRows
) -> CorpusReport:
    manifest = cache.manifest
    long = np.empty(0, np.int64)
    if cache.learned is None:
        tokens = {side: int(cache.lengths[getattr(sides, side)].sum()) for side in ("train", "validation", "test")}
    else:
        tokens = {"train": train.tokens, "validation": validation.tokens, "test": test.tokens}
        every = np.arange(len(cache.lengths))
        long = fit_conversations(cache, every, row=train.sequence_length, too_long="drop").too_long
    return CorpusReport(
        files=manifest.source_files,
        train_documents=train.documents,
        validation_documents=validation.documents,
        test_documents=test.documents,
        train_tokens=tokens["train"],
        validation_tokens=tokens["validation"],
        test_tokens=tokens["test"],
        bytes=manifest.bytes,
        empty=manifest.empty,
        skipped=manifest.skipped,
        skipped_names=manifest.skipped_names,
        train_efficiency=train.efficiency,
        validation_efficiency=validation.efficiency,
        cache=cache.directory,
        learned_tokens=train.learned,
        conversations=0 if cache.origins is None else int(cache.origins["turns"].any(axis=1).sum()),
        too_long=len(long),
        too_long_names=tuple(map(cache.name_of, long[:_NAMES_KEPT].tolist())),
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
    corpora = [(own, files_of(own)) for own in data.by_source().values()]
    if any(own.tokens_field is not None for own, _ in corpora):
        raise ValueError("data.tokens_field names ready ids: set tokenizer.kind to file, and path to what made them")
    every = [file for _, files in corpora for file in files]
    chats = [own.chat.model_dump(mode="json", include={"format", "fields"}) for own, _ in corpora if own.chat.on]
    fields = (own.text_field for own, _ in corpora)
    key = content_key(every, *fields, *chats, config.model_dump(mode="json"))
    directory = cache_root(data.cache_dir) / "tokenizers" / key
    if not directory.is_dir():
        with writing_to(directory.parent):
            _train_into(directory, config, corpora)
    return load_tokenizer(directory)


def _train_into(
    directory: Path, config: TokenizerConfig, corpora: Sequence[tuple[DataConfig, Sequence[SourceFile]]]
) -> None:
    tokenizer = train_tokenizer(
        _sample(corpora, config.max_bytes),
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


def _sample(corpora: Sequence[tuple[DataConfig, Sequence[SourceFile]]], max_bytes: int) -> Iterator[str]:
    """Texts from all over the corpora, in an order that does not favour the first files, up to `max_bytes` of text."""
    pieces = [(own, piece) for own, files in corpora for shard in plan_shards(files) for piece in shard]
    left = max_bytes
    for number in permutation(len(pieces)):
        own, piece = pieces[number]
        entries = wanted_fields(own.chat) if own.chat.on else ()
        for record in read(piece, text_field=own.text_field, entries=entries):
            text = said_in(record.value, own.chat) if isinstance(record, Entry) else getattr(record, "text", "")
            if not text.strip():
                continue
            yield text
            left -= len(text.encode())
            if left <= 0:
                return
    if left == max_bytes:
        paths = [path for own, _ in corpora for path in own.paths]
        raise ValueError(f"no text to train a tokenizer on in {', '.join(map(repr, paths))}")
