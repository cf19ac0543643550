"""Rows to batches, batches to devices: the last hop, and the only module of this package that imports jax.

Batches take the rows in order, each B of them, cut into contiguous shares where several processes feed it. The position
in the data is one number, the next row, so it means the same to any number of processes and any batch size.

B rows in a global batch, T tokens in a row.
"""

import functools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxformers.data.mixture import MixedRows
from jaxformers.data.rows import SOURCES, JoinedRows, PackedRows, Row, Rows

_PREFETCHED_BATCHES = 2


@dataclass(frozen=True)
class ProcessShare:
    """Share `index` of `count` equal, contiguous shares of every batch."""

    index: int = 0
    count: int = 1


@functools.lru_cache(maxsize=16)
def process_share(mesh: Mesh, spec: PartitionSpec) -> ProcessShare:
    """The share of a batch that this process feeds, for batches laid out by `spec` (its first entry is the batch dim).

    Processes whose devices hold the same rows, as under tensor parallelism across hosts, get the same share.
    """
    axes = spec[0] if len(spec) else None
    names = (axes,) if isinstance(axes, str) else axes or ()
    parts = math.prod(mesh.shape[name] for name in names)
    held = NamedSharding(mesh, PartitionSpec(axes)).addressable_devices_indices_map((parts,))
    mine = sorted({index[0].start or 0 for index in held.values()})
    first, width = mine[0], len(mine)
    assert mine == list(range(first, first + width)), f"this process holds parts {mine} of the batch, with gaps"
    assert parts % width == first % width == 0, f"this process holds parts {mine} of {parts}, an uneven share"
    return ProcessShare(first // width, parts // width)


def train_iterator(
    rows: Rows,
    *,
    batch_size: int,
    batch_ramp: Mapping[int, int] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    with_sources: bool = False,
) -> grain.DatasetIterator[Row]:
    """Batches of rows [B / process_count, T] from row 0 on, made by a background thread while the last one is used.

    `get_state` and `set_state` (and with them `grain.checkpoint`) hold {"next_row", "rows"}: the first row not handed
    out yet, and the fingerprint of the rows before it. Only whole batches come: a rest at the end is dropped.

    Args:
        batch_size: B, rows of the global batch over all processes.
        batch_ramp: other values of B, by the row from which on batches have them.
        process_index, process_count: which contiguous share of each batch to make.
        with_sources: of a mixture: whether batches say by `sources` whose each row is.

    Raises:
        ValueError: a batch that processes cannot share evenly, or more rows in it than there are; from `set_state`,
            a position in other data.
    """
    sizes = {0: batch_size} | dict(sorted((batch_ramp or {}).items()))
    for size in sizes.values():
        _check_share(size, process_index, process_count)
    if len(rows) < batch_size:
        raise ValueError(f"the data has {len(rows)} rows of {rows.sequence_length} tokens, a batch {batch_size} rows")
    assert isinstance(rows, MixedRows) or not with_sources
    batches = _Batches(rows, sizes, ProcessShare(process_index, process_count), with_sources)
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_PREFETCHED_BATCHES))


def validation_batches(
    rows: PackedRows | JoinedRows,
    *,
    batch_size: int,
    max_batches: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Sequence[Row]:
    """One epoch as batches [B / process_count, T], made when asked for; rows of weight 0 fill up the last one.

    Args:
        batch_size: B, rows of the global batch over all processes.
        max_batches: how many at most, None for all.

    Raises:
        ValueError: a batch that processes cannot share evenly.
    """
    _check_share(batch_size, process_index, process_count)
    count = -(-rows.rows_per_epoch // batch_size)
    count = count if max_batches is None else min(count, max_batches)
    return _ValidationBatches(rows, batch_size, count, ProcessShare(process_index, process_count))


def to_global(
    batch: Row, mesh: Mesh, spec: PartitionSpec, *, columns: np.ndarray | None = None
) -> dict[str, jax.Array]:
    """This process's share of a batch, together with all other processes' shares, as global arrays [B, T].

    The share must be the one `process_share(mesh, spec)` names. `columns` [T] is the order that every row's tokens are
    put in; None leaves them. Where the batch says what it is made of, `sources` [B, S] has no time to be split over.
    """
    sharding, of_rows = NamedSharding(mesh, spec), NamedSharding(mesh, PartitionSpec(*spec[:1]))
    count = process_share(mesh, spec).count

    def place(name: str, local: np.ndarray) -> jax.Array:
        local = local if columns is None or name == SOURCES else local[:, columns]
        shape = (local.shape[0] * count, *local.shape[1:])
        return jax.make_array_from_process_local_data(of_rows if name == SOURCES else sharding, local, shape)

    return {name: place(name, values) for name, values in batch.items()}


def _check_share(batch_size: int, process_index: int, process_count: int) -> None:
    assert 0 <= process_index < process_count
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"a batch of {batch_size} rows cannot be shared evenly by {process_count} processes")


def _share_of_batch(rows: Rows | JoinedRows, first: int, batch_size: int, share: ProcessShare) -> Row:
    """This process's rows of the batch that begins at row `first`; rows past the end are all zeros."""
    local = batch_size // share.count
    begin = first + share.index * local
    there = range(begin, max(min(begin + local, len(rows)), begin))
    made = rows.batch(there or range(1))
    if len(there) == local:
        return made
    rest = (local - len(there), rows.sequence_length)
    return Row(**{n: np.concatenate([a[: len(there)], np.zeros(rest, a.dtype)]) for n, a in made.items()})


class _ValidationBatches(Sequence[Row]):
    def __init__(self, rows: PackedRows | JoinedRows, batch_size: int, length: int, share: ProcessShare):
        self._rows, self._batch_size, self._length, self._share = rows, batch_size, length, share

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, k: int) -> Row:
        if not 0 <= k < self._length:
            raise IndexError(f"batch {k} of {self._length}")
        return _share_of_batch(self._rows, k * self._batch_size, self._batch_size, self._share)


class _Batches(grain.IterDataset[Row]):
    def __init__(self, rows: Rows, batch_sizes: Mapping[int, int], share: ProcessShare, with_sources: bool):
        super().__init__()
        self._arguments = (rows, batch_sizes, share, with_sources)

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(*self._arguments)


class _BatchIterator(grain.DatasetIterator[Row]):
    """Batches by position. Grain's own iterators count batches of one process; this one counts rows of the run."""

    def __init__(self, rows: Rows, batch_sizes: Mapping[int, int], share: ProcessShare, with_sources: bool):
        """`batch_sizes` by the row from which on they hold, in order, the first being row 0."""
        super().__init__()
        self._rows, self._share, self._with_sources = rows, share, with_sources
        self._marks, self._batch_sizes = list(batch_sizes), list(batch_sizes.values())
        self._next_row = 0

    def __next__(self) -> Row:
        batch_size = self._batch_sizes[bisect_right(self._marks, self._next_row) - 1]
        if self._next_row + batch_size > len(self._rows):
            raise StopIteration
        batch = _share_of_batch(self._rows, self._next_row, batch_size, self._share)
        if self._with_sources:
            batch |= {SOURCES: self._sources_of_batch(self._next_row, batch_size)}
        self._next_row += batch_size
        return batch

    def _sources_of_batch(self, first: int, batch_size: int) -> np.ndarray:
        """A one for the source of each row of this process's share, float32 [B / process_count, S]."""
        local = batch_size // self._share.count
        begin = first + self._share.index * local
        return np.eye(len(self._rows.names), dtype=np.float32)[self._rows.sources_of(range(begin, begin + local))]

    def get_state(self) -> dict[str, Any]:
        return {"next_row": self._next_row, "rows": self._rows.fingerprint_before(self._next_row)}

    def set_state(self, state: dict[str, Any]) -> None:
        if state["rows"] != self._rows.fingerprint_before(state["next_row"]):
            raise ValueError(
                "the checkpoint's position is in other data: files, tokenizer, or one of sequence_length, packing, "
                "packing_window, attend_across_documents, reset_positions, end_of_text_loss, validation_fraction, "
                "test_fraction, seed, shuffle, fim, chat and "
                f"(before row {state['next_row']}) the names or weights of sources have changed since"
            )
        self._next_row = state["next_row"]
