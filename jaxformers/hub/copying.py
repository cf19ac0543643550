"""Copying tensors: into memory that JAX takes over as it is, transposed at near the speed of memory, in threads.

NumPy copies a transposed matrix element by element, at a tenth of what memory can do. Here rows are first interleaved
into words of 16 bytes, within the processor's cache, so that what is scattered is whole words. Nothing here knows about
models or files.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

ALIGNMENT = 64  # bytes; JAX on CPU adopts buffers that start at a multiple of it, and copies any others
WORD = np.dtype(np.complex128)  # the widest that NumPy moves as one; never computed with
BLOCK_ROWS, BLOCK_COLUMNS = 64, 1024  # 128 kB of 16-bit numbers, which fits the second-level cache
CHUNK_BYTES = 4 << 20  # of one task for a thread
AT_ONCE_BYTES = 64 << 20  # of sources that are held while they are copied


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialized memory that `jax.Array`s on CPU can share."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="copying")


class Copying:
    """Copies in threads, a bounded number of bytes at a time. All are done when the `with` block ends.

    `done` is called with each source that is no longer needed.
    """

    def __init__(self, done: Callable[[np.ndarray], None] = lambda _source: None):
        self._done = done
        self._sources: list[np.ndarray] = []
        self._futures: list[Future[None]] = []

    def __enter__(self) -> Copying:
        return self

    def add(self, target: np.ndarray, source: np.ndarray) -> None:
        """Sets `target[...] = source`, converting dtypes, now or by the end of the block."""
        self._sources.append(source)
        self._futures += [_threads().submit(task) for task in _tasks(target, source)]
        if sum(array.nbytes for array in self._sources) > AT_ONCE_BYTES:
            self._finish()

    def __exit__(self, *_error: object) -> None:
        self._finish()

    def _finish(self) -> None:
        for future in self._futures:
            future.result()
        for source in self._sources:
            self._done(source)
        self._futures, self._sources = [], []


def _tasks(target: np.ndarray, source: np.ndarray) -> Iterator[Callable[[], None]]:
    """What together sets `target[...] = source`, in chunks of some megabytes."""
    if target.dtype == source.dtype:
        # NumPy moves integers much faster than the dtypes that are no part of it.
        target, source = (np.atleast_1d(array).view(f"u{array.dtype.itemsize}") for array in (target, source))
    matrix = _as_transposed(target, source)
    copy: Callable[[np.ndarray, np.ndarray], None] = np.copyto if matrix is None else _transpose
    target, source = matrix or (target, source)
    rows = max(1, CHUNK_BYTES * source.shape[0] // source.nbytes) if source.ndim and source.nbytes else 1
    if source.nbytes <= CHUNK_BYTES:
        yield functools.partial(copy, target, source)
        return
    rows += -rows % (WORD.itemsize // target.itemsize)
    for i in range(0, source.shape[0], rows):
        part = slice(i, i + rows)
        yield functools.partial(copy, target[:, part] if matrix else target[part], source[part])


def _as_transposed(target: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Both as matrices of contiguous rows, `target` [I, O] with rows of whole words and `source` [O, I]; None where
    they are not each other's transpose in memory."""
    for split in range(1, target.ndim):
        shape = (math.prod(target.shape[:split]), math.prod(target.shape[split:]))
        try:
            matrices = target.reshape(shape, copy=False), source.reshape(shape, copy=False)
        except ValueError:
            continue  # no strides express it
        if not _has_rows(matrices[0]):
            matrices = matrices[0].T, matrices[1].T
        rows, columns = matrices[0], matrices[1].T
        if _has_rows(rows) and _has_rows(columns) and rows.shape[1] * rows.itemsize % WORD.itemsize == 0:
            return rows, columns
    return None


def _has_rows(matrix: np.ndarray) -> bool:
    return matrix.strides[1] == matrix.itemsize and 1 not in matrix.shape


def _transpose(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source.T` for a source [O, I] of contiguous rows, O of them filling whole words."""
    lanes = WORD.itemsize // target.itemsize
    height, width = source.shape
    scratch = np.empty((BLOCK_ROWS // lanes, min(BLOCK_COLUMNS, width)), WORD)
    out = target.view(WORD)
    for i in range(0, height, BLOCK_ROWS):
        for j in range(0, width, BLOCK_COLUMNS):
            block = source[i : i + BLOCK_ROWS, j : j + BLOCK_COLUMNS]
            rows, columns = block.shape
            packed = scratch[: rows // lanes, :columns]
            interleaved = packed.view(target.dtype).reshape(rows // lanes, columns, lanes)
            for lane in range(lanes):
                interleaved[:, :, lane] = block[lane::lanes]
            out[j : j + columns, i // lanes : (i + rows) // lanes] = packed.T
