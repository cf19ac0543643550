"""A mixture of sources: which of them row n comes from, and which of its rows that is, for any n alone.

Row n draws u(n) = (n * g + offset) mod 2^64, g being 2^64 over the golden ratio, and the source whose interval of
[0, 2^64) holds u(n) gives its next row. Multiples of the golden ratio spread evenly, so after any number of rows every
source has given its share to within a few rows. How many of the first n draws fell into an interval is a difference of
sums of floors, which Euclid's algorithm gives in some forty steps: no row needs to know the ones before it.

Where weights change or a source is dropped, a new segment of the row line begins, with intervals of its own.
Knows no tokenizer, file, step or batch.
"""

import bisect
import functools
import hashlib
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np

from jaxformers.data.packing import GOLDEN, hash_of
from jaxformers.data.rows import PackedRows, Row, batch_of, only_row

WeightsBy = Literal["tokens", "documents", "rows"]
WhenExhausted = Literal["repeat", "stop", "drop"]

_DRAWS = 2**64
_ENDLESS = sys.maxsize
_BLOCK = 4096  # rows that are drawn at once
_STREAM = 4  # sets the offset apart from other hashes of the seed


class Place(NamedTuple):
    """Where a row of a mixture comes from: a source, and a row of it (which counts on through its epochs)."""

    source: str
    row: int


@dataclass(frozen=True)
class _Segment:
    """Rows [start, end) of a mixture: source members[i] gives those whose draw lies in [bounds[i], bounds[i + 1]).

    `counts[i]` is how many of the draws before `start` lie there, `given[k]` how many rows source k gave before.
    """

    start: int
    end: int
    members: tuple[int, ...]
    bounds: tuple[int, ...]
    counts: tuple[int, ...]
    given: tuple[int, ...]


class MixedRows:
    """Rows of several sources in the shares that weights say. Row n depends on the settings and n alone."""

    def __init__(
        self,
        sources: Mapping[str, PackedRows],
        weights: Mapping[int, Mapping[str, float]],
        *,
        weights_by: WeightsBy = "tokens",
        when_exhausted: WhenExhausted = "repeat",
        seed: int = 0,
    ):
        """`weights` are every source's from a row on, the first one row 0. A source's own `epochs` say when it is
        exhausted. The mixture ends when all that may still be drawn are, or with the first one (`stop`), or where
        weights leave only dropped ones (`drop`)."""
        self._names, self._sources = list(sources), list(sources.values())
        self._offset = int(hash_of(seed, _STREAM)[0])
        self._when_exhausted = when_exhausted
        self._limits = [len(rows) if rows.epochs is not None else None for rows in self._sources]
        per_row = [_per_row(rows, weights_by) for rows in self._sources]
        self._shares = [
            (row, [Fraction(named[name]) / per for name, per in zip(self._names, per_row, strict=True)])
            for row, named in sorted(weights.items())
        ]
        assert self._shares[0][0] == 0, "there are weights from the first row on"
        self._segments = self._cut()
        self._starts = [segment.start for segment in self._segments]
        self._prints = self._fingerprints(seed)
        self._block = functools.lru_cache(maxsize=8)(self._draw_block)
        self.sequence_length = self._sources[0].sequence_length

    @property
    def efficiency(self) -> float:
        """The share of all positions that hold a token rather than padding, under the first weights."""
        first = self._segments[0]
        widths = np.diff([float(bound) for bound in first.bounds]) / _DRAWS
        return float(sum(w * self._sources[k].efficiency for w, k in zip(widths, first.members, strict=True)))

    def fingerprint_before(self, n: int) -> str:
        """Equal exactly where all of the first n rows are equal; weights that change later may still be changed."""
        return self._prints[max(bisect.bisect_left(self._starts, n) - 1, 0)]

    def __len__(self) -> int:
        return self._segments[-1].end

    def __repr__(self) -> str:
        return f"MixedRows({dict(zip(self._names, self._sources, strict=True))})"

    def __getitem__(self, n: int) -> Row:
        """Row n. IndexError where the mixture has none."""
        return only_row(self.batch([n]))

    def batch(self, numbers: Sequence[int]) -> Row:
        """The rows of these numbers as arrays [B, T]. IndexError where the mixture has none."""
        return batch_of(self._sources, [self._find(int(n)) for n in numbers])

    def place(self, n: int) -> Place:
        """Where row n comes from. IndexError where the mixture has none."""
        source, row = self._find(n)
        return Place(self._names[source], row)

    def sources_of(self, numbers: Sequence[int]) -> np.ndarray:
        """Which source each of these rows comes from, as its place among them: int [len(numbers)]."""
        return np.array([self._find(int(n))[0] for n in numbers], np.int64)

    def rows_before(self, n: int) -> dict[str, int]:
        """How many of the first n rows each source gives."""
        given = self._given(self._segments[self._segment_of(max(n - 1, 0))], min(n, len(self)))
        return dict(zip(self._names, given, strict=True))

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the sources."""
        return tuple(self._names)

    def _find(self, n: int) -> tuple[int, int]:
        if not 0 <= n < len(self):
            raise IndexError(f"row {n} of {len(self)}")
        number, block = self._segment_of(n), n // _BLOCK
        members, rows = self._block(number, block)
        at = n - max(block * _BLOCK, self._starts[number])
        return int(members[at]), int(rows[at])

    def _segment_of(self, n: int) -> int:
        return bisect.bisect_right(self._starts, n) - 1

    def _draw_block(self, number: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [rows], twice: the source and the row of it for the rows of a segment that lie in a block."""
        segment = self._segments[number]
        first, end = max(block * _BLOCK, segment.start), min((block + 1) * _BLOCK, segment.end)
        draws = np.arange(first, end, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(self._offset)
        member = np.searchsorted(np.array(segment.bounds[1:-1], np.uint64), draws, side="right")
        source = np.array(segment.members)[member]
        given, row = self._given(segment, first), np.empty(len(draws), np.int64)
        for k in segment.members:
            mine = source == k
            row[mine] = given[k] + np.arange(mine.sum())
        return source, row

    def _given(self, segment: _Segment, n: int) -> list[int]:
        """How many of the first n rows each source gives, n being a row of the segment or its end."""
        given = list(segment.given)
        for i, k in enumerate(segment.members):
            given[k] += self._draws_within(segment, i, n) - segment.counts[i]
        return given

    def _draws_within(self, segment: _Segment, i: int, n: int) -> int:
        return self._draws_below(n, segment.bounds[i + 1]) - self._draws_below(n, segment.bounds[i])

    def _draws_below(self, n: int, bound: int) -> int:
        """How many of the first n draws are below the bound: those where taking it away borrows from the next 2^64."""
        if bound in (0, _DRAWS):
            return n if bound else 0
        borrowed = floor_sum(n, GOLDEN, self._offset - bound + _DRAWS, _DRAWS)
        return floor_sum(n, GOLDEN, self._offset, _DRAWS) - borrowed + n

    def _cut(self) -> list[_Segment]:
        """The row line, cut where weights change and where sources are exhausted."""
        segments: list[_Segment] = []
        exhausted: set[int] = set()
        row, given = 0, [0] * len(self._sources)
        while row < _ENDLESS and not self._is_over(row, exhausted):
            segment = self._segment_from(row, given, exhausted)
            if segment is None:
                break
            ends = {k: self._exhausted_at(segment, k) for k in segment.members if k not in exhausted}
            later = (start for start, _ in self._shares if start > row)
            end = min([*ends.values(), *later, _ENDLESS])
            segments.append(replace(segment, end=end))
            exhausted |= {k for k, last in ends.items() if last <= end < _ENDLESS}
            row, given = end, self._given(segment, end)
        return segments

    def _is_over(self, row: int, exhausted: set[int]) -> bool:
        if self._when_exhausted == "stop" and exhausted:
            return True
        now = bisect.bisect_right(self._shares, row, key=lambda entry: entry[0]) - 1
        return all(k in exhausted for _, shares in self._shares[now:] for k, share in enumerate(shares) if share)

    def _segment_from(self, row: int, given: list[int], exhausted: set[int]) -> _Segment | None:
        """What begins at a row, up to no end; None where nothing is left to draw from."""
        _, shares = self._shares[bisect.bisect_right(self._shares, row, key=lambda entry: entry[0]) - 1]
        dropped = exhausted if self._when_exhausted == "drop" else ()
        members = tuple(k for k, share in enumerate(shares) if share and k not in dropped)
        if not members:
            return None
        ends = list(itertools.accumulate(shares[k] for k in members))
        bounds = (0, *(int(_DRAWS * end / ends[-1]) for end in ends))
        segment = _Segment(row, _ENDLESS, members, bounds, (), tuple(given))
        return replace(segment, counts=tuple(self._draws_within(segment, i, row) for i in range(len(members))))

    def _exhausted_at(self, segment: _Segment, source: int) -> int:
        """The row before which the source has given its last one, if the segment goes on for as long."""
        limit, i = self._limits[source], segment.members.index(source)
        if limit is None or segment.bounds[i] == segment.bounds[i + 1]:
            return _ENDLESS
        target = limit - segment.given[source] + segment.counts[i]
        return bisect.bisect_left(
            range(_ENDLESS), target, lo=segment.start, key=lambda n: self._draws_within(segment, i, n)
        )

    def _fingerprints(self, seed: int) -> list[str]:
        """Of the rows up to each segment's end."""
        digest = hashlib.sha256(repr((seed, [rows.sequence_length for rows in self._sources[:1]])).encode())
        prints, before = [], None
        for segment in self._segments:
            drawn = [self._sources[k].fingerprint for k in segment.members], segment.bounds
            if drawn != before:  # a segment in which nothing changes is no change
                digest.update(repr((segment.start, drawn)).encode())
            before = drawn
            prints.append(digest.hexdigest()[:32])
        return prints


def _per_row(rows: PackedRows, weights_by: WeightsBy) -> Fraction:
    """How much of what weights are shares of a row of a source holds, on average over an epoch."""
    counted = {"tokens": rows.tokens, "documents": rows.documents, "rows": rows.rows_per_epoch}
    return Fraction(counted[weights_by], rows.rows_per_epoch)


def floor_sum(n: int, a: int, b: int, m: int) -> int:
    """The sum of (a i + b) // m over i = 0 .. n - 1, for whole numbers n, a, b >= 0 and m > 0.

    It counts lattice points below a line; swapping the axes shrinks the slope as in Euclid's algorithm.
    """
    total = 0
    while n > 0:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        n, b = divmod(a * n + b, m)
        a, m = m, a
    return total
