"""Megatron's indexed datasets: ids in a `.bin`, and in the `.idx` beside it where each sequence and document lies.

The index is, little-endian: the magic, a version (uint64), a code for the ids' type (uint8), the number of sequences
and of document boundaries (uint64 each); then lengths in ids (int32) and places in bytes (int64) of the sequences, and
the number of the first sequence of each document (int64), ended by the number of sequences.

Nothing is believed before it is compared with the size of the files, so that a damaged index costs no memory.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from jaxformers.data.files import describe, open_binary
from jaxformers.data.records import Fields, Piece, Record, SourceFile, Tokens, even_pieces, stamp

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_AT_ONCE = 4096  # documents whose places are read together


@dataclass(frozen=True)
class Index:
    """The header of an `.idx`: the ids' type, and how many sequences and documents there are."""

    path: str
    dtype: np.dtype
    sequences: int
    documents: int

    def lengths(self, file: BinaryIO, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]: sequences' lengths in ids."""
        return _array(file, HEADER.size, "<i4", start, stop)

    def pointers(self, file: BinaryIO, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: the bytes of the `.bin` at which sequences begin."""
        return _array(file, HEADER.size + 4 * self.sequences, "<i8", start, stop)

    def firsts(self, file: BinaryIO, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: the numbers of the first sequences of documents."""
        return _array(file, HEADER.size + 12 * self.sequences, "<i8", start, stop)


def describe_pair(path: str, format: str) -> SourceFile:
    """The `.bin` of a pair, named by either of its files; a change of either shows.

    Raises:
        ValueError: one without the other.
    """
    ids, index = f"{path[:-4]}.bin", f"{path[:-4]}.idx"
    try:
        of_ids, of_index = describe(ids, format), describe(index, format)
    except ValueError as error:
        lone, missing = (index, ids) if path.lower().endswith(".idx") else (ids, index)
        raise ValueError(f"{lone}: a Megatron dataset is a .bin and an .idx, but {missing} cannot be read") from error
    return SourceFile(ids, of_ids.size, stamp(of_ids.modified, of_index.size, of_index.modified), format)


def cut(file: SourceFile, size: int) -> list[Piece]:
    """Ranges of documents."""
    if file.size <= size:
        return [Piece(file.path, format=file.format)]
    return even_pieces(file, read_index(_index_of(file.path)).documents, size)


def read(piece: Piece, fields: Fields) -> Iterator[Record]:
    """A document's sequences joined, its place the document's number in the file.

    Raises:
        ValueError: an index that is damaged or does not fit the ids, or ids that are no whole numbers.
    """
    if fields.entries:
        raise ValueError(f"{piece.path}: ready ids hold no conversations: they need a source without chat")
    index = read_index(_index_of(piece.path))
    size = describe(piece.path, piece.format).size
    stop = index.documents if piece.stop is None else piece.stop
    with open_binary(index.path) as places, open_binary(piece.path) as ids:
        for start in range(piece.start, stop, _AT_ONCE):
            yield from _documents(index, places, ids, size, start, min(start + _AT_ONCE, stop))


def read_index(path: str) -> Index:
    """What an `.idx` says of itself.

    Raises:
        ValueError: another kind of file, another version, a size that does not fit the counts, or ids of floats.
    """
    size = describe(path, "megatron").size
    with open_binary(path) as file:
        header = file.read(HEADER.size)
        if header[: len(MAGIC)] != MAGIC[: len(header)] or not header:
            raise ValueError(f"{path}: not a Megatron index: it begins with {header[:9]!r}, not {MAGIC!r}")
        if len(header) < HEADER.size:
            raise ValueError(f"{path}: a Megatron index of {size} bytes, fewer than the {HEADER.size} of its header")
        _, version, code, sequences, boundaries = HEADER.unpack(header)
        if version != 1:
            raise ValueError(f"{path}: version {version} of Megatron's index; only version 1 is known")
        dtype = np.dtype(_integers(path, code)).newbyteorder("<")
        needed = HEADER.size + 12 * sequences + 8 * boundaries
        if size != needed:
            said = f"{sequences} sequences and {boundaries} document boundaries take {needed} bytes"
            modes = " (an index of several modalities is not read)" if size == needed + sequences else ""
            raise ValueError(f"{path}: {said}, but the file has {size}{modes}")
        index = Index(path, dtype, sequences, boundaries - 1)
        ends = (*index.firsts(file, 0, 1), *index.firsts(file, max(boundaries - 1, 0), boundaries))
        if ends != (0, sequences):
            raise ValueError(f"{path}: its document boundaries do not go from 0 to its {sequences} sequences")
    return index


def _integers(path: str, code: int) -> str:
    if code not in DTYPES:
        known = ", ".join(f"{number} {name}" for number, name in DTYPES.items())
        raise ValueError(f"{path}: unknown code {code} for the type of its ids; known are {known}")
    if DTYPES[code].startswith("float"):
        raise ValueError(f"{path}: holds {DTYPES[code]}, not ids of tokens")
    return DTYPES[code]


def _index_of(path: str) -> str:
    return f"{path[:-4]}.idx"


def _array(file: BinaryIO, base: int, dtype: str, start: int, stop: int) -> np.ndarray:
    width = np.dtype(dtype).itemsize
    file.seek(base + start * width)
    return np.frombuffer(file.read((stop - start) * width), dtype)


def _documents(index: Index, places: BinaryIO, ids: BinaryIO, size: int, start: int, stop: int) -> Iterator[Tokens]:
    """Documents [start, stop), each joined of its sequences, wherever those lie in the `size` bytes of ids."""
    firsts = index.firsts(places, start, stop + 1)
    if (firsts[1:] < firsts[:-1]).any() or firsts[0] < 0 or firsts[-1] > index.sequences:
        raise ValueError(f"{index.path}: document boundaries {start} to {stop} do not rise within its sequences")
    first, last = int(firsts[0]), int(firsts[-1])
    lengths, pointers = index.lengths(places, first, last), index.pointers(places, first, last)
    bytes_of = lengths.astype(np.int64) * index.dtype.itemsize
    outside = (lengths < 0) | (pointers < 0) | (pointers > size - bytes_of)
    if outside.any():
        at = int(np.argmax(outside))
        said = f"sequence {first + at} has {lengths[at]} ids from byte {pointers[at]} on, in a file of {size} bytes"
        raise ValueError(f"{index.path}: {said}")
    for number, (begin, end) in enumerate(zip(firsts[:-1] - first, firsts[1:] - first, strict=True), start):
        parts = [_sequence(ids, *place) for place in zip(pointers[begin:end], bytes_of[begin:end], strict=True)]
        yield Tokens(np.frombuffer(b"".join(parts), index.dtype), number)


def _sequence(ids: BinaryIO, pointer: int, count: int) -> bytes:
    ids.seek(int(pointer))
    return ids.read(int(count))
