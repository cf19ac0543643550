"""Rows cut out of documents: everything a model needs to know of one sequence. T tokens in a row.

Knows no batch and no process; `len` and `[n]` are all that Grain asks of a data source.
"""

import bisect
import hashlib
import itertools
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Protocol, TypedDict

import numpy as np

from jaxformers.data.cache import TokenCache
from jaxformers.data.config import DataConfig
from jaxformers.data.documents import CachedDocuments, Documents
from jaxformers.data.fim import Fim, FimDocuments
from jaxformers.data.packing import PackingPlan


class Row(TypedDict):
    """One row [T], or a batch of rows [B, T].

    tokens: int32; 0 where there is padding.
    targets: int32; the token that follows in the same document, 0 where there is none.
    weights: float32; 1 where there is a target, 0 at a document's last token and at padding (and, by config, where the
        target would be the end-of-text token), and where the target is not to be learned, as a user's turn.
    positions: int32; counts from 0 in every piece of a document or, by config, through the row; 0 at padding.
    segment_ids: int32; 1, 2, ... for the pieces of a row from left to right or, by config, 1 for all; 0 at padding.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray


# What a batch of a mixture says beside its rows, where it is asked to: a one for the source of each, float32 [B, S].
SOURCES = "sources"


class Rows(Protocol):
    """What batches are made of: rows by number."""

    sequence_length: int

    def __len__(self) -> int:
        """How many rows there are; sys.maxsize where they never end."""

    def __getitem__(self, n: int) -> Row:
        """Row n. IndexError where there is none."""

    def batch(self, numbers: Sequence[int]) -> Row:
        """The rows of these numbers, which there are, as arrays [B, T]."""

    def fingerprint_before(self, n: int) -> str:
        """Equal exactly where all of the first n rows are equal."""


def empty_batch(rows: int, length: int) -> Row:
    """[B, T] of padding."""
    kinds = {name: np.float32 if name == "weights" else np.int32 for name in Row.__annotations__}
    return Row(**{name: np.zeros((rows, length), kind) for name, kind in kinds.items()})


def only_row(batch: Row) -> Row:
    """The row of a batch [1, T]."""
    return Row(**{name: values[0] for name, values in batch.items()})


class PackedRows:
    """Some documents of a cache as rows, by number. Row n depends on the documents, the settings and n alone.

    Where a document goes on in another row, its last token here still has its target, so cutting loses none. Documents
    in one row have segments of their own, none being meant to see another, unless the config says that they do.
    """

    def __init__(
        self,
        cache: TokenCache,
        documents: np.ndarray,
        config: DataConfig,
        *,
        epochs: int | None = None,
        fim: Fim | None = None,
    ):
        """Rows of `documents` (int64, indices into the cache), some of them rearranged as `fim` says; `epochs` None
        repeats them without end."""
        cached = CachedDocuments(cache, documents, row=config.sequence_length, too_long=config.chat.too_long)
        self._documents: Documents = cached if fim is None else FimDocuments(cached, fim)
        self._config = config
        self._plan = PackingPlan(
            self._documents.lengths,
            sequence_length=config.sequence_length,
            packing=config.packing,
            window=config.packing_window,
            seed=config.seed,
            shuffle=config.shuffle,
        )
        self._columns = np.arange(config.sequence_length, dtype=np.int32)
        self.epochs = epochs
        self.sequence_length = config.sequence_length

    @property
    def documents(self) -> int:
        """How many documents an epoch has."""
        return len(self._documents.lengths)

    @property
    def tokens(self) -> int:
        """How many tokens an epoch has."""
        return int(self._documents.lengths.sum())

    @property
    def learned(self) -> int:
        """How many tokens of an epoch are targets with a weight."""
        lengths = self._documents.lengths
        if self._documents.learns_all:
            return int(np.maximum(lengths - (1 if self._config.end_of_text_loss else 2), 0).sum())
        targets = lengths - 1
        every = np.arange(len(lengths))
        return int(self._documents.learned(every, np.ones_like(lengths), targets).sum())

    @property
    def rows_per_epoch(self) -> int:
        return self._plan.rows_per_epoch

    @property
    def efficiency(self) -> float:
        """The share of all positions that hold a token rather than padding."""
        return self._plan.efficiency

    @cached_property
    def fingerprint(self) -> str:
        """Equal exactly where row n is equal for every n: the same documents, tokenizer and settings."""
        c = self._config
        settings = (c.sequence_length, c.packing, c.packing_window, c.seed, c.shuffle)
        reading = (c.attend_across_documents, c.reset_positions, c.end_of_text_loss)
        digest = hashlib.sha256(repr((self._documents.settings, settings, reading)).encode())
        digest.update(self._documents.hashes.tobytes())
        digest.update(self._documents.lengths.tobytes())
        return digest.hexdigest()[:32]

    def fingerprint_before(self, n: int) -> str:
        """The fingerprint: what one source's first rows are decides all of them."""
        return self.fingerprint

    def __len__(self) -> int:
        endless = self.epochs is None and self.rows_per_epoch > 0
        return sys.maxsize if endless else self.rows_per_epoch * (self.epochs or 1)

    def __repr__(self) -> str:
        return f"PackedRows({self.documents} documents, {self.rows_per_epoch} rows of {self.sequence_length})"

    def __getitem__(self, n: int) -> Row:
        """Row n; epoch after epoch as n goes on.

        Raises:
            IndexError: n below 0, or at or past the last row of the last epoch.
        """
        if not 0 <= n < len(self):
            raise IndexError(f"row {n} of {len(self)}")
        return only_row(self.batch([n]))

    def batch(self, numbers: Sequence[int]) -> Row:
        """The rows of these numbers as arrays [B, T], as if there were no last epoch; faster than one by one."""
        batch = empty_batch(len(numbers), self.sequence_length)
        self.write(batch, range(len(numbers)), numbers)
        return batch

    def write(self, batch: Row, places: Sequence[int], numbers: Sequence[int]) -> None:
        """Writes the rows of these numbers into those places of an empty batch [B, T]."""
        found = [self._plan.pieces(int(n)) for n in numbers]
        document = np.concatenate([pieces.document for pieces in found])
        start = np.concatenate([pieces.start for pieces in found])
        length = np.concatenate([pieces.length for pieces in found])
        ends = self._documents.lengths[document]
        # One token more of each piece whose document goes on: its last token's target.
        read = length + (start + length < ends)
        ids = self._documents.read(document, start, read)
        learned = read - 1
        mask = None
        if not self._documents.learns_all:
            mask = self._documents.learned(document, start, read)
        elif not self._config.end_of_text_loss:
            learned = np.clip(ends - 2 - start, 0, learned)
        cuts = iter(zip(length.tolist(), read.tolist(), learned.tolist(), strict=True))
        first = 0
        for place, pieces in zip(places, found, strict=True):
            row = Row(**{name: values[place] for name, values in batch.items()})
            first = self._fill(row, itertools.islice(cuts, len(pieces.length)), ids, first, mask)

    def _fill(
        self, row: Row, cuts: Iterable[tuple[int, int, int]], ids: np.ndarray, first: int, mask: np.ndarray | None
    ) -> int:
        """Writes a row [T] from pieces of (tokens, ids, targets) that lie in `ids` from `first` on, and says where the
        next row's begin. Copying slices beats computing where each token goes, but for pieces of a few tokens. `mask`
        lies beside the ids, 1 for those to learn; None: all."""
        left = 0
        for segment, (length, read, learned) in enumerate(cuts, start=1):
            end = left + length
            row["tokens"][left:end] = ids[first : first + length]
            row["targets"][left : left + learned] = ids[first + 1 : first + 1 + learned]
            weights = 1 if mask is None else mask[first + 1 : first + 1 + learned]
            row["weights"][left : left + learned] = weights
            row["segment_ids"][left:end] = 1 if self._config.attend_across_documents else segment
            if self._config.reset_positions:
                row["positions"][left:end] = self._columns[:length]
            left, first = end, first + read
        if not self._config.reset_positions:
            row["positions"][:left] = self._columns[:left]
        return first


class JoinedRows:
    """The rows of several sources, one source behind the other. Each has to end."""

    def __init__(self, sources: Sequence[PackedRows]):
        assert sources
        self._sources = list(sources)
        self._ends = list(itertools.accumulate(map(len, sources)))
        self.sequence_length = sources[0].sequence_length

    @property
    def efficiency(self) -> float:
        """The share of all positions that hold a token rather than padding."""
        tokens = sum(rows.tokens for rows in self._sources)
        return float(tokens / max(len(self) * self.sequence_length, 1))

    @property
    def rows_per_epoch(self) -> int:
        return self._ends[-1]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, n: int) -> Row:
        if not 0 <= n < len(self):
            raise IndexError(f"row {n} of {len(self)}")
        return only_row(self.batch([n]))

    def batch(self, numbers: Sequence[int]) -> Row:
        """The rows of these numbers as arrays [B, T]."""
        sources = [bisect.bisect_right(self._ends, n) for n in numbers]
        begins = [0, *self._ends]
        return batch_of(self._sources, [(k, int(n) - begins[k]) for k, n in zip(sources, numbers, strict=True)])


def batch_of(sources: Sequence[PackedRows], rows: Sequence[tuple[int, int]]) -> Row:
    """Rows of several sources as arrays [B, T], each given by its source and its number there."""
    batch = empty_batch(len(rows), sources[0].sequence_length)
    by_source: dict[int, list[tuple[int, int]]] = {}
    for place, (source, row) in enumerate(rows):
        by_source.setdefault(source, []).append((place, row))
    for source, drawn in by_source.items():
        sources[source].write(batch, *zip(*drawn, strict=True))
    return batch
