"""ArrayRecord, the format of Grain: a file of numbered byte strings, entered at any of them.

A file does not say what its records are. They are read as UTF-8 text, or, where `tokens_field` names an integer type
(uint16, uint32, int32 or int64), as a document's ids of that type, little-endian, one after the other.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from jaxformers.data.files import is_remote, needs_extra, one_line
from jaxformers.data.records import (
    BadRecord,
    Entry,
    Fields,
    Piece,
    Record,
    SourceFile,
    Tokens,
    even_pieces,
    text_record,
)

ID_TYPES = ("uint16", "uint32", "int32", "int64")
_AT_ONCE = 256  # records


def cut(file: SourceFile, size: int) -> list[Piece]:
    """Ranges of records."""
    if file.size <= size:
        return [Piece(file.path, format=file.format)]
    with _open(file.path) as reader:
        return even_pieces(file, reader.num_records(), size)


def read(piece: Piece, fields: Fields) -> Iterator[Record]:
    """A document a record, its place the record's number in the file.

    Raises:
        ValueError: no ArrayRecord file, or a damaged one; a `tokens_field` that is no type of ids.
    """
    dtype = _dtype(piece.path, fields)
    with _open(piece.path) as reader:
        stop = reader.num_records() if piece.stop is None else piece.stop
        for start in range(piece.start, stop, _AT_ONCE):
            records = _read(piece.path, reader, start, min(start + _AT_ONCE, stop))
            for number, content in enumerate(records, start):
                if fields.entries:
                    yield _entry(piece.path, number, content)
                elif dtype is None:
                    yield text_record(content, piece.path, number, field="a record")
                else:
                    yield _ids(piece.path, number, content, dtype)


def _entry(path: str, number: int, content: bytes) -> Entry | BadRecord:
    try:
        return Entry(json.loads(content), number)
    except (ValueError, RecursionError):
        return BadRecord(path, number, "not JSON", "row")


def _dtype(path: str, fields: Fields) -> np.dtype | None:
    if fields.tokens is None:
        return None
    if fields.tokens not in ID_TYPES:
        said = f"its records have no field {fields.tokens!r}; to read them as ids, give the ids' type in tokens_field"
        raise ValueError(f"{path}: {said}: {', '.join(ID_TYPES)}")
    return np.dtype(fields.tokens).newbyteorder("<")


def _ids(path: str, number: int, content: bytes, dtype: np.dtype) -> Tokens | BadRecord:
    if len(content) % dtype.itemsize:
        said = f"{len(content)} bytes are no whole number of {dtype.itemsize}-byte ids"
        return BadRecord(path, number, said, "row")
    return Tokens(np.frombuffer(content, dtype), number)


@contextmanager
def _open(path: str):
    if is_remote(path):
        raise ValueError(f"{path}: ArrayRecord files are read from local disks only")
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError:
        raise needs_extra(path, "array-record") from None
    os.stat(path)  # the library does not tell a missing file from a damaged one
    reader = ArrayRecordReader(path)
    intact = reader.ok()
    try:
        if intact:
            yield reader
    finally:
        with _damage_named(path):
            reader.close()  # where what was wrong with the file is said
    if not intact:
        raise ValueError(f"{path}: damaged or no ArrayRecord file")


def _read(path: str, reader, start: int, stop: int) -> list[bytes]:
    with _damage_named(path):
        return reader.read(start, stop)


@contextmanager
def _damage_named(path: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"{path}: damaged or no ArrayRecord file ({one_line(error)})") from error
