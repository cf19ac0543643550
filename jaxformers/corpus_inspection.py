"""What a tokenized corpus holds, for people and for scripts: figures of each source, and rows as a model sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxformers.data.cache import DOCUMENTS, MANIFEST, TOKENIZER, TOKENS, TokenCache, damage_of, locate_cache, map_cache
from jaxformers.data.config import DataConfig
from jaxformers.data.conversations import ROLES
from jaxformers.data.corpus import open_corpus
from jaxformers.data.documents import fit_conversations
from jaxformers.data.figures import PERCENTILES, Histogram, Lengths, Segment, histogram_of, lengths_of, segments_of
from jaxformers.data.rows import PackedRows, Rows
from jaxformers.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_NAMES_SHOWN = 10
_NAMES_KEPT = 100
_COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")


@dataclass(frozen=True)
class Source:
    """The figures of one corpus; `frequent` is (id, text, count) of its most frequent tokens.

    Efficiency is the share of row positions that hold a token. `learned` counts the targets among the `row_tokens` of
    an epoch's rows. `turns` counts the messages of conversations by role; `too_long` those that no row has room for.
    """

    name: str
    directory: Path
    files: int
    documents: int
    tokens: int
    bytes: int
    empty: int
    skipped: int
    skipped_names: tuple[str, ...]
    lengths: Lengths
    histogram: Histogram
    vocab_size: int
    rows: int
    sequence_length: int
    efficiency: float
    frequent: tuple[tuple[int, str, int], ...]
    row_tokens: int
    learned: int
    conversations: int = 0
    turns: Mapping[str, int] = field(default_factory=dict)
    too_long: int = 0
    too_long_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A run of tokens of a row that are all learned or all not; padding is segment 0."""

    segment: int
    start: int
    tokens: int
    learned: bool
    text: str


@dataclass(frozen=True)
class ShownRow:
    """Row `number` of the training rows, from left to right."""

    number: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Inspection:
    sources: tuple[Source, ...]
    rows: tuple[ShownRow, ...]


def inspect_config(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    top: int = 10,
    rows: Sequence[int] = (),
    name: str = "CONFIG",
    rows_before: Callable[[int], int] | None = None,
) -> Inspection:
    """The figures of every source of a config, and some training rows of them all. `rows_before` as of `open_corpus`.

    Raises:
        ValueError: a source that has not been tokenized yet; `name` is how the line calls the config. A row past the
            last one.
    """
    caches = {}
    for source, own in config.by_source().items():
        directory = locate_cache(own, tokenizer)
        if why := damage_of(directory):
            state = f"damaged ({why})" if directory.exists() else "not tokenized yet"
            corpus = f"source {source!r}" if source else "this corpus"
            raise ValueError(f"{corpus} is {state}: run `jaxformers data tokenize {name}` first")
        caches[source] = map_cache(directory)
    corpus = open_corpus(config, tokenizer, rows_before=rows_before)
    trains = {source: own.train for source, own in (corpus.sources or {"": corpus}).items()}
    sources = tuple(_figures(source, cache, tokenizer, trains[source], top) for source, cache in caches.items())
    return Inspection(sources, tuple(_shown(corpus.train, number, tokenizer) for number in rows))


def inspect_cache(directory: Path, config: DataConfig, *, top: int = 10, rows: Sequence[int] = ()) -> Inspection:
    """The figures of a token cache, packed as the config says, and some rows of it.

    Raises:
        ValueError: the directory holds no whole cache; a row past the last one.
    """
    if not all((directory / name).is_file() for name in (MANIFEST, TOKENS, DOCUMENTS)):
        raise ValueError(f"{directory} is neither a config (.yaml) nor the folder of a token cache")
    if why := damage_of(directory):
        raise ValueError(f"the token cache {directory} is damaged ({why})")
    cache = map_cache(directory)
    tokenizer = load_tokenizer(directory / TOKENIZER)
    packed = PackedRows(cache, np.arange(len(cache.lengths)), config)
    return Inspection(
        (_figures("", cache, tokenizer, packed, top),), tuple(_shown(packed, number, tokenizer) for number in rows)
    )


def _figures(name: str, cache: TokenCache, tokenizer: Tokenizer, rows: PackedRows, top: int) -> Source:
    histogram = histogram_of(cache, top=top, vocab_size=tokenizer.vocab_size)
    known = cache.manifest
    return Source(
        name=name,
        directory=cache.directory,
        files=known.source_files,
        documents=known.documents,
        tokens=known.tokens,
        bytes=known.bytes,
        empty=known.empty,
        skipped=known.skipped,
        skipped_names=known.skipped_names,
        lengths=lengths_of(cache, sequence_length=rows.sequence_length),
        histogram=histogram,
        vocab_size=tokenizer.vocab_size,
        rows=rows.rows_per_epoch,
        sequence_length=rows.sequence_length,
        efficiency=rows.efficiency,
        frequent=tuple((i, _decode(tokenizer, [i]), count) for i, count in histogram.frequent),
        row_tokens=rows.tokens,
        learned=rows.learned,
        **_of_conversations(cache, rows.sequence_length),
    )


def _of_conversations(cache: TokenCache, row: int) -> dict[str, Any]:
    """The figures that only a cache of conversations has."""
    if cache.origins is None:
        return {}
    turns = cache.origins["turns"]
    long = fit_conversations(cache, np.arange(len(turns)), row=row, too_long="drop").too_long
    return {
        "conversations": int(turns.any(axis=1).sum()),
        "turns": dict(zip(ROLES, turns.sum(axis=0, dtype=np.int64).tolist(), strict=True)),
        "too_long": len(long),
        "too_long_names": tuple(map(cache.name_of, long[:_NAMES_KEPT].tolist())),
    }


def _shown(rows: Rows, number: int, tokenizer: Tokenizer) -> ShownRow:
    if number >= len(rows):
        raise ValueError(f"there is no row {number}: there are {len(rows)} rows")
    return ShownRow(number, tuple(_piece(segment, tokenizer) for segment in segments_of(rows[number])))


def _piece(segment: Segment, tokenizer: Tokenizer) -> Piece:
    text = _decode(tokenizer, segment.ids) if segment.segment else ""
    return Piece(segment.segment, segment.start, len(segment.ids), segment.learned, text)


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def show(inspection: Inspection, console: Console) -> None:
    """Prints tables and rows. Segments have colours, and what is not learned is dim; without a terminal, `[2|` begins
    segment 2 and `{...}` is not learned."""
    for source in inspection.sources:
        console.print(_figures_table(source))
        console.print(_frequent_table(source))
        for name in source.skipped_names[:_NAMES_SHOWN]:
            console.print(f"skipped {name}", highlight=False, markup=False, soft_wrap=True)
        for name in source.too_long_names[:_NAMES_SHOWN]:
            console.print(f"longer than a row: {name}", highlight=False, markup=False, soft_wrap=True)
    for row in inspection.rows:
        marked = not console.is_terminal
        console.print(_row_text(row, marked=marked), highlight=False, soft_wrap=True)
        console.print()


def _figures_table(source: Source) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _figure_rows(source):
        table.add_row(name, value)
    return table


def _figure_rows(source: Source) -> Iterator[tuple[str, str]]:
    lengths, histogram = source.lengths, source.histogram
    ranks = ", ".join(f"{p}%: {n:,}" for p, n in zip(PERCENTILES, lengths.percentiles, strict=True))
    sampled = "" if histogram.counted == source.tokens else f", seen in {histogram.counted:,} tokens"
    if source.name:
        yield "source", source.name
    yield "cache", str(source.directory)
    yield "documents", f"{source.documents:,} of {source.files:,} files"
    yield "tokens", f"{source.tokens:,}, {source.bytes / source.tokens:.2f} bytes each"
    yield "tokens a document", f"{lengths.shortest:,} to {lengths.longest:,}, mean {lengths.mean:,.1f}"
    yield "", ranks
    yield "longer than a row", f"{lengths.longer_than_a_row:.1%} of documents"
    yield "vocabulary used", f"{histogram.used:,} of {source.vocab_size:,} ids{sampled}"
    yield "rows", f"{source.rows:,} of {source.sequence_length:,} tokens an epoch, {source.efficiency:.1%} full"
    yield "trained on", f"{source.learned:,} of the {source.row_tokens:,} tokens of these rows, {_share(source):.1%}"
    if source.conversations:
        turns = ", ".join(f"{role}: {count:,}" for role, count in source.turns.items() if count)
        yield "conversations", f"{source.conversations:,}, {source.too_long:,} of them longer than a row"
        yield "turns", turns
    yield "left out", f"{source.skipped:,} records that are no text, {source.empty:,} empty ones"


def _share(source: Source) -> float:
    return source.learned / max(source.row_tokens, 1)


def _frequent_table(source: Source) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE)
    for title in ("id", "token", "count", "share"):
        table.add_column(title, justify="left" if title == "token" else "right")
    for i, text, count in source.frequent:
        table.add_row(str(i), Text(repr(text)), f"{count:,}", f"{count / source.histogram.counted:.1%}")
    return table


def _row_text(row: ShownRow, *, marked: bool) -> Text:
    from rich.text import Text

    text = Text()
    text.append(f"row {row.number}\n", style="bold")
    last = 0
    for piece in row.pieces:
        if not piece.segment:
            text.append(f"[{piece.tokens} of padding]" if marked else f"  {piece.tokens} of padding", style="dim")
            continue
        if marked and piece.segment != last:
            text.append(f"[{piece.segment}|")
        last = piece.segment
        colour = _COLOURS[(piece.segment - 1) % len(_COLOURS)]
        shown = f"{{{piece.text}}}" if marked and not piece.learned else piece.text
        text.append(shown, style=colour if piece.learned else f"dim {colour}")
    return text
