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

import ml_dtypes
import numpy as np

ALIGNMENT = 64  # bytes; JAX on CPU adopts buffers that start at a multiple of it, and copies any others
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
WORD = np.dtype(np.complex128)  # the widest that NumPy moves as one; never computed with
BLOCK_ROW_BYTES, BLOCK_COLUMNS = 256, 2048  # of the target: 512 kB, about a second-level cache
CHUNK_BYTES = 4 << 20  # of one task for a thread
AT_ONCE_BYTES = 64 << 20  # of sources that are held while they are copied


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialized memory that `jax.Array`s on CPU can share."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def is_aligned(array: np.ndarray) -> bool:
    """Whether a `jax.Array` on CPU can share this memory, which is nobody else's."""
    return array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % ALIGNMENT == 0


def assign(target: np.ndarray, source: np.ndarray) -> None:
    """Sets `target[...] = source`, converting dtypes, in this thread."""
    for task in _tasks(target, source):
        task()


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
    matrices = _as_transposed(target, source)
    copy = _copy if matrices is None else _transpose
    target, source = matrices or (target, source)
    if source.nbytes <= CHUNK_BYTES:
        yield functools.partial(copy, target, source)
        return
    rows = max(1, CHUNK_BYTES * source.shape[0] // source.nbytes)
    rows += -rows % (WORD.itemsize // target.itemsize)
    for i in range(0, source.shape[0], rows):
        part = slice(i, i + rows)
        yield functools.partial(copy, target[:, part] if matrices else target[part], source[part])


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    out = target.view(_unsigned(target))
    if _widens(target, source):
        np.left_shift(source.view(np.uint16), np.uint32(16), out=out)
    else:
        np.copyto(out, _bits(source, target.dtype))


def _widens(target: np.ndarray, source: np.ndarray) -> bool:
    """Whether each number only gets zeros behind it: bfloat16 is the upper half of float32."""
    return source.dtype == BFLOAT16 and target.dtype == np.float32


def _unsigned(array: np.ndarray) -> np.dtype:
    """NumPy moves integers much faster than the dtypes that are no part of it."""
    return np.dtype(f"u{array.itemsize}")


def _bits(source: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`source.astype(dtype)` as unsigned integers; a view where the dtype is the same."""
    if source.dtype == dtype:
        return source.view(_unsigned(source))
    return source.astype(dtype).view(f"u{dtype.itemsize}")


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
    block_rows = BLOCK_ROW_BYTES // target.itemsize
    scratch = np.zeros((block_rows // lanes, min(BLOCK_COLUMNS, width)), WORD)
    dtype = source.dtype if _widens(target, source) else target.dtype
    parts = target.itemsize // dtype.itemsize  # of each number, the upper one last; a lower one stays zero
    out = target.view(WORD)
    for i in range(0, height, block_rows):
        for j in range(0, width, BLOCK_COLUMNS):
            block = _bits(source[i : i + block_rows, j : j + BLOCK_COLUMNS], dtype)
            rows, columns = block.shape
            packed = scratch[: rows // lanes, :columns]
            interleaved = packed.view(block.dtype).reshape(rows // lanes, columns, lanes, parts)[..., -1]
            for lane in range(lanes):
                interleaved[:, :, lane] = block[lane::lanes]
            out[j : j + columns, i // lanes : (i + rows) // lanes] = packed.T
