"""Which piece of which document lies in which row: arithmetic over document lengths, before any token is read.

Row n is a function of (lengths, settings, n) alone, so any row can be made without the ones before it. Documents are
shuffled once and cut into windows; a window's documents are packed together, the same way in every epoch, and every
epoch takes the windows, and the rows inside each, in a new order. The number of rows of an epoch is therefore fixed,
which is what makes row n of a run findable in constant time however many epochs come before it.

Knows no text, no file and no batch.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Packing = Literal["first_fit", "best_fit", "concat", "none"]

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, made odd: its multiples spread evenly over 64 bits
_WINDOWS_AT_ONCE = 1 << 22  # bound, in cells, on the table of free room that first-fit keeps for many windows


@dataclass(frozen=True)
class Pieces:
    """Parts of documents, side by side: int64 arrays [pieces]; `start` and `length` count tokens of the document."""

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray


@dataclass(frozen=True)
class _Window:
    """The pieces of all rows of a window, row after row; row r has pieces [bounds[r], bounds[r + 1])."""

    pieces: Pieces
    bounds: np.ndarray


class PackingPlan:
    """Rows of `sequence_length` tokens out of documents of the given lengths (int [documents], each at least 1).

    Every token lies in exactly one row of each epoch. `concat` lays a window's documents end to end and cuts at every
    row's end. The others cut only documents longer than a row, into full rows and a rest: `first_fit` puts each rest
    into the first row of its window with room for it, `best_fit` the longest rest first into the row with the least
    room for it (best-fit decreasing, arXiv:2404.10830), and `none` into a row of its own. In a row, documents keep the
    order that they have in their window.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        sequence_length: int,
        packing: Packing,
        window: int,
        seed: int,
        shuffle: bool,
    ):
        self.sequence_length = sequence_length
        self._lengths = np.asarray(lengths, np.int64)
        self._packing = packing
        self._size = window
        self._seed = seed
        self._shuffle = shuffle
        documents = len(self._lengths)
        self._order = permutation(documents, seed, 0) if shuffle else np.arange(documents)
        self._counts = self._count_rows()
        self.rows_per_epoch = int(self._counts.sum())
        self._window = functools.lru_cache(maxsize=4)(self._plan_window)
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)

    @property
    def efficiency(self) -> float:
        """The share of all positions that hold a token rather than padding."""
        return float(self._lengths.sum() / max(self.rows_per_epoch * self.sequence_length, 1))

    def pieces(self, row: int) -> Pieces:
        """What lies in a row, from left to right. Rows count on through the epochs."""
        epoch, within = divmod(row, self.rows_per_epoch)
        order, ends = self._epoch(epoch)
        slot = int(np.searchsorted(ends, within, side="right"))
        number = int(order[slot])
        row_in_window = within - int(ends[slot] - self._counts[number])
        window, rows = self._window(number), int(self._counts[number])
        if self._shuffle:
            row_in_window = int(_permutation_of_rows(rows, self._seed, epoch, number)[row_in_window])
        cells = slice(window.bounds[row_in_window], window.bounds[row_in_window + 1])
        whole = window.pieces
        return Pieces(whole.document[cells], whole.start[cells], whole.length[cells])

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The windows in this epoch's order, and the row each one ends before."""
        windows = len(self._counts)
        order = permutation(windows, self._seed, 1, epoch) if self._shuffle else np.arange(windows)
        return order, np.cumsum(self._counts[order])

    def _lengths_by_window(self, first: int, last: int) -> np.ndarray:
        """int64 [last - first, window]: the lengths of the documents of some windows, 0 where there is none."""
        documents = self._order[first * self._size : last * self._size]
        table = np.zeros((last - first) * self._size, np.int64)
        table[: len(documents)] = self._lengths[documents]
        return table.reshape(last - first, self._size)

    def _count_rows(self) -> np.ndarray:
        """int64 [windows]: how many rows each window's documents fill."""
        windows = -(-len(self._lengths) // self._size)
        step = max(_WINDOWS_AT_ONCE // self._size, 1)
        counts = [
            self._count_rows_of(self._lengths_by_window(first, min(first + step, windows)))
            for first in range(0, windows, step)
        ]
        return np.concatenate([*counts, np.empty(0, np.int64)])

    def _count_rows_of(self, lengths: np.ndarray) -> np.ndarray:
        if self._packing == "concat":
            return -(-lengths.sum(axis=1) // self.sequence_length)
        full, rest = np.divmod(lengths, self.sequence_length)
        return full.sum(axis=1) + _FITS[self._packing](rest, self.sequence_length).max(axis=1) + 1

    def _plan_window(self, number: int) -> _Window:
        documents = self._order[number * self._size : (number + 1) * self._size]
        lengths = self._lengths[documents]
        plan = self._concatenated if self._packing == "concat" else self._fitted
        row, local, start, length = plan(lengths)
        bounds = np.searchsorted(row, np.arange(self._counts[number] + 1))
        return _Window(Pieces(documents[local], start, length), bounds)

    def _fitted(self, lengths: np.ndarray) -> tuple[np.ndarray, ...]:
        """(row, index of the document, start, length) of every piece, by row: the full rows first, then the mixed."""
        capacity = self.sequence_length
        full, rest = np.divmod(lengths, capacity)
        cut = np.repeat(np.arange(len(lengths)), full)
        cut_start = (np.arange(len(cut)) - np.repeat(np.cumsum(full) - full, full)) * capacity
        mixed = np.flatnonzero(rest)
        mixed_row = len(cut) + _FITS[self._packing](rest[None, :], capacity)[0, mixed]
        by_row = np.argsort(mixed_row, kind="stable")
        mixed, mixed_row = mixed[by_row], mixed_row[by_row]
        return (
            np.concatenate([np.arange(len(cut)), mixed_row]),
            np.concatenate([cut, mixed]),
            np.concatenate([cut_start, full[mixed] * capacity]),
            np.concatenate([np.full(len(cut), capacity), rest[mixed]]),
        )

    def _concatenated(self, lengths: np.ndarray) -> tuple[np.ndarray, ...]:
        """(row, index of the document, start, length) of every piece: cuts at each document's and each row's start."""
        ends = np.cumsum(lengths)
        starts = ends - lengths
        cuts = np.union1d(starts, np.arange(0, ends[-1], self.sequence_length))
        document = np.searchsorted(starts, cuts, side="right") - 1
        return cuts // self.sequence_length, document, cuts - starts[document], np.diff(cuts, append=ends[-1])


def first_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each item when items come in order and each takes the first row of its window with room for it.

    Args:
        lengths: int [windows, items], none above `capacity`; an item of length 0 is no item.
        capacity: the room of a row.

    Returns:
        int64 [windows, items], -1 for no item. All windows advance together, one item a step.
    """
    windows, items = lengths.shape
    every = np.arange(windows)
    free = np.full((windows, items + 1), capacity, np.int32)
    rows = np.full((windows, items), -1, np.int64)
    opened = 0  # rows in use in the fullest window: only these and one fresh row need to be looked at
    for item in range(items):
        length = lengths[:, item]
        row = np.argmax(free[:, : opened + 1] >= length[:, None], axis=1)
        some = length > 0
        free[every[some], row[some]] -= length[some]
        rows[some, item] = row[some]
        opened = max(opened, int(rows[:, item].max()) + 1)
    return rows


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each item when the longest comes first and each takes the row of its window with the least room for
    it, the first of equals. Arguments and result as of `first_fit`.
    """
    windows, items = lengths.shape
    every = np.arange(windows)
    order = np.argsort(-lengths, axis=1, kind="stable")
    free = np.full((windows, items + 1), capacity, np.int32)
    rows = np.full((windows, items), -1, np.int64)
    opened = 0  # as in first_fit
    for item in order.T:
        length = lengths[every, item]
        # Seen without its sign, the room of a row that lacks some is larger than any other.
        room = (free[:, : opened + 1] - length[:, None].astype(np.int32)).view(np.uint32)
        row = np.argmin(room, axis=1)
        some = length > 0
        free[every[some], row[some]] -= length[some]
        rows[every[some], item[some]] = row[some]
        opened = max(opened, int(row[some].max(initial=-1)) + 1)
    return rows


def one_a_row(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each item when none shares its row. Arguments and result as of `first_fit`."""
    some = lengths > 0
    return np.where(some, np.cumsum(some, axis=1) - 1, -1)


_FITS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "first_fit": first_fit,
    "best_fit": best_fit,
    "none": one_a_row,
}


@functools.lru_cache(maxsize=8)
def _permutation_of_rows(rows: int, seed: int, epoch: int, window: int) -> np.ndarray:
    return permutation(rows, seed, 2, epoch, window)


def permutation(count: int, *key: int) -> np.ndarray:
    """int64 [count]: 0 .. count - 1 in an order that the key alone decides.

    Sorts by hashes (splitmix64, Steele et al. 2014) rather than asking numpy's generator, whose stream may change with
    its version: a run must find the same rows after an upgrade.
    """
    counters = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return np.argsort(splitmix64(counters + hash_of(*key)), kind="stable")


def hash_of(*key: int) -> np.ndarray:
    """uint64 [1]: a hash of some whole numbers below 2^64."""
    state = np.zeros(1, np.uint64)
    for word in key:
        state = splitmix64(state ^ np.uint64(word))
    return state


def splitmix64(x: np.ndarray) -> np.ndarray:
    """uint64 [...]: a hash of each number of a uint64 array, and a bijection."""
    x = x + np.uint64(GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
