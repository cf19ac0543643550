"""GGUF files: one file that holds a model's settings, its tokenizer and its tensors, many of them quantized.

A file is a magic number, a version, two counts, typed key-value pairs, the description of each tensor, and the data,
aligned (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Files come from strangers, so every length is
checked against the file before it is used. Tensors are views of the memory-mapped file, or dequantized when asked for.

This module knows what a file says, and nothing about what a key or a tensor means; `gguf_models` does.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxformers.hub.gguf_blocks import BLOCKS, UNREAD, dequantized
from jaxformers.hub.safetensors import Deferred, release

VERSIONS = (2, 3)
MAX_DIMS = 4  # the format's own limit
MAX_STRING = 2**26  # bytes; chat templates and tokens are far below
MIN_ENTRY, MIN_PAIR = 24, 13  # bytes that describing a tensor and a key with its value take at least
STRING, ARRAY = 8, 9
LENGTH = struct.Struct("<Q")  # bytes of a text, before it
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
PLAIN = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: np.dtype(ml_dtypes.bfloat16)}
PLAIN_NAMES = {0: "F32", 1: "F16", 30: "BF16"}
TYPE_NAMES = PLAIN_NAMES | {type_id: block.name for type_id, block in BLOCKS.items()}

Tensor = np.ndarray | Deferred


@dataclass(frozen=True)
class GgufFile:
    """What a file says. Shapes of tensors are NumPy's, the dim that varies fastest last; quantized ones are `Deferred`
    and come as float32. `stored` counts the tensors of each type, `nbytes` is what their data takes."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    stored: Mapping[str, int]
    nbytes: int


def open_gguf(path: str | Path) -> GgufFile:
    """The settings and tensors of a `.gguf` file; of the tensors' data nothing is read yet.

    Raises `ValueError` for a file that is truncated, inconsistent or of another version or byte order, and for tensors
    of a type that cannot be dequantized.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise ValueError(f"{path} is empty, and no GGUF file") from None
    cursor = _Cursor(data, path)
    tensor_count, pair_count = _read_counts(cursor)
    metadata = _read_metadata(cursor, pair_count)
    entries = [_read_entry(cursor) for _ in range(tensor_count)]
    start = cursor.aligned(_alignment(metadata, path))
    _check_entries(entries, len(data) - start, path)
    names = [TYPE_NAMES[entry.type_id] for entry in entries]
    return GgufFile(
        path,
        metadata,
        {entry.name: _tensor(entry, data, start) for entry in entries},
        {name: names.count(name) for name in dict.fromkeys(names)},
        sum(entry.nbytes for entry in entries),
    )


class _Cursor:
    """Reads one value after another. Little-endian, and never past the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path):
        self._data, self._path, self._at = data, path, 0

    def scalar(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        start = self._advance(size)
        (value,) = struct.unpack_from(f"<{code}", self._data, start)
        # What a float32 was before it was rounded: 1e-05, not 9.99999974e-06.
        return float(str(np.float32(value))) if code == "f" else value

    def string(self) -> str:
        length = self.scalar("Q")
        if length > MAX_STRING:
            raise self.error(f"announces a text of {length} bytes (at most {MAX_STRING})")
        start = self._advance(length)
        try:
            return self._data[start : start + length].decode()
        except UnicodeDecodeError:
            raise self.error(f"holds a text at byte {start} that is not UTF-8") from None

    def _strings(self, count: int) -> list[str]:
        """As `string` so many times. Vocabularies have hundreds of thousands of texts, so nothing is called for each
        but where it is wrong."""
        self.require(LENGTH.size * count)
        data, size, found = self._data, len(self._data), []
        for _ in range(count):
            start = self._at + LENGTH.size
            end = start + LENGTH.unpack_from(data, self._at)[0] if start <= size else math.inf
            if end > size or end - start > MAX_STRING:
                self.string()  # says what is wrong
            try:
                found.append(data[start:end].decode())
            except UnicodeDecodeError:
                self.string()
            self._at = end
        return found

    def name(self) -> str:
        """The name of a key or a tensor, fit to be shown."""
        name = self.string()
        if not name.isprintable():
            raise self.error(f"has the name {name[:80]!r}, which is not printable")
        return name

    def value(self, type_id: int) -> Any:
        if type_id == STRING:
            return self.string()
        if type_id == ARRAY:
            return self._array(self.scalar("I"), self.scalar("Q"))
        if type_id not in SCALARS:
            raise self.error(f"has a value of the unknown type {type_id}")
        return self.scalar(SCALARS[type_id])

    def _array(self, type_id: int, count: int) -> list[Any]:
        if type_id == STRING:
            return self._strings(count)
        if type_id not in SCALARS:
            raise self.error(f"has an array of the unknown type {type_id}")
        dtype = np.dtype(f"<{SCALARS[type_id]}")
        start = self._advance(count * dtype.itemsize)
        return np.frombuffer(self._data, dtype, count, start).tolist()

    def aligned(self, alignment: int) -> int:
        """Where the data starts: the next multiple of `alignment`."""
        return -(-self._at // alignment) * alignment

    def _advance(self, size: int) -> int:
        self.require(size)
        start, self._at = self._at, self._at + size
        return start

    def require(self, size: int) -> None:
        """Refuses a file that has fewer bytes left."""
        if size > len(self._data) - self._at:
            raise self.error(f"is truncated: its header goes on past the {len(self._data)} bytes there are")

    def error(self, fault: str) -> ValueError:
        return ValueError(f"{self._path} {fault}")


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """Numbers of tensors and of key-value pairs, from the head of the file."""
    if cursor.scalar("I") != int.from_bytes(b"GGUF", "little"):
        raise cursor.error("is no GGUF file: it does not begin with 'GGUF'")
    version = cursor.scalar("I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        kind = f"big-endian version {swapped}" if swapped in VERSIONS else f"version {version}"
        raise cursor.error(f"is GGUF of {kind}; little-endian versions {' and '.join(map(str, VERSIONS))} are read")
    tensors, pairs = cursor.scalar("Q"), cursor.scalar("Q")
    cursor.require(tensors * MIN_ENTRY + pairs * MIN_PAIR)
    return tensors, pairs


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.name()
        if key in metadata:
            raise cursor.error(f"has the key {key!r} twice")
        metadata[key] = cursor.value(cursor.scalar("I"))
    return metadata


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    type_id: int
    begin: int  # bytes, from the start of the data
    nbytes: int


def _read_entry(cursor: _Cursor) -> _Entry:
    """One tensor's description; the format lists its dims fastest first."""
    name, dims = cursor.name(), cursor.scalar("I")
    if dims > MAX_DIMS:
        raise cursor.error(f"has the tensor {name!r} of {dims} dims (at most {MAX_DIMS})")
    shape = tuple(cursor.scalar("Q") for _ in range(dims))[::-1]
    type_id, begin = cursor.scalar("I"), cursor.scalar("Q")
    if type_id in PLAIN:
        return _Entry(name, shape, type_id, begin, math.prod(shape) * PLAIN[type_id].itemsize)
    if type_id not in BLOCKS:
        known = ", ".join(TYPE_NAMES.values())
        raise cursor.error(
            f"has the tensor {name!r} of type {UNREAD.get(type_id, type_id)}, which is not read; known: {known}"
        )
    block = BLOCKS[type_id]
    if not shape or shape[-1] % block.size:
        raise cursor.error(f"has the tensor {name!r} of {block.name} whose rows are no multiple of {block.size}")
    return _Entry(name, shape, type_id, begin, math.prod(shape) // block.size * block.nbytes)


def _alignment(metadata: Mapping[str, Any], path: Path) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"{path}: general.alignment is {alignment!r}; it must be a power of two")
    return alignment


def _check_entries(entries: list[_Entry], available: int, path: Path) -> None:
    """Every tensor lies in the file, on its own, under a name of its own."""
    covered, names = 0, set()
    for entry in sorted(entries, key=lambda entry: entry.begin):
        if entry.name in names:
            raise ValueError(f"{path} has the tensor {entry.name!r} twice")
        names.add(entry.name)
        if entry.begin < covered:
            raise ValueError(f"{path}: the tensor {entry.name!r} overlaps the one before it")
        covered = entry.begin + entry.nbytes
        if covered > available:
            raise ValueError(
                f"{path} is truncated: the tensor {entry.name!r} ends {covered - available} bytes past the file's end"
            )


def _tensor(entry: _Entry, data: mmap.mmap, start: int) -> Tensor:
    if entry.type_id in PLAIN:
        return np.ndarray(entry.shape, PLAIN[entry.type_id], buffer=data, offset=start + entry.begin)
    block = BLOCKS[entry.type_id]
    rows = (*entry.shape[:-1], entry.shape[-1] // block.size * block.nbytes)
    packed = np.ndarray(rows, np.uint8, buffer=data, offset=start + entry.begin)

    def read() -> np.ndarray:
        plain = dequantized(packed, block)
        release(packed)
        return plain

    return Deferred(entry.shape, np.dtype(np.float32), read)
