"""Arrow's IPC format, as a stream or a file (Feather version 2): pieces are record batches, mapped and not copied."""

import functools
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jaxformers.data.files import is_remote, open_binary
from jaxformers.data.formats.columns import batch_records, damage_named, import_pyarrow, wanted_columns
from jaxformers.data.records import Fields, Piece, Record, SourceFile, even_pieces

if TYPE_CHECKING:
    import pyarrow

_MAGIC = b"ARROW1"  # of the file format; a stream has none


def cut(file: SourceFile, size: int) -> list[Piece]:
    """Ranges of record batches; a remote file whole, since to pass over its batches is to fetch them."""
    if file.size <= size or is_remote(file.path):
        return [Piece(file.path, format=file.format)]
    return even_pieces(file, len(_first_rows(file.path, os.stat(file.path).st_mtime_ns)), size)


def read(piece: Piece, fields: Fields) -> Iterator[Record]:
    """A document a row, its place the row's number in the file.

    Raises:
        ValueError: no Arrow file, or a damaged one; no such column, or one of another type.
    """
    row = _first_rows(piece.path, os.stat(piece.path).st_mtime_ns)[piece.start] if piece.start else 0
    with damage_named(piece.path, "Arrow"), _open(piece.path) as source:
        schema = _schema(source)
        columns = [schema.get_field_index(name) for name in wanted_columns(piece.path, schema, fields)]
        for batch in _batches(source, columns, piece.start, piece.stop):
            yield from batch_records(piece.path, batch, row, fields)
            row += batch.num_rows


@functools.lru_cache(maxsize=16)
def _first_rows(path: str, modified: int) -> tuple[int, ...]:
    """The number of the first row of each batch. Counted once a process: compressed batches open slowly."""
    with damage_named(path, "Arrow"), _open(path) as source:
        rows = [batch.num_rows for batch in _batches(source, [0])]
    return tuple(itertools.accumulate(rows, initial=0))[:-1]


@contextmanager
def _open(path: str) -> "Iterator[pyarrow.NativeFile]":
    pyarrow = import_pyarrow(path)
    if is_remote(path):
        with open_binary(path) as file, pyarrow.PythonFile(file, "r") as source:
            yield source
    else:
        with pyarrow.memory_map(path) as source:
            yield source


def _schema(source: "pyarrow.NativeFile") -> "pyarrow.Schema":
    with _reader(source, None) as reader:
        return reader.schema


def _batches(
    source: "pyarrow.NativeFile", columns: list[int], start: int = 0, stop: int | None = None
) -> "Iterator[pyarrow.RecordBatch]":
    """Record batches [start, stop) in order, with some columns alone."""
    from pyarrow import ipc

    with _reader(source, ipc.IpcReadOptions(included_fields=columns)) as reader:
        if isinstance(reader, ipc.RecordBatchFileReader):
            for number in range(start, reader.num_record_batches if stop is None else stop):
                yield reader.get_batch(number)
        else:
            yield from itertools.islice(reader, start, stop)


def _reader(source: "pyarrow.NativeFile", options: "pyarrow.ipc.IpcReadOptions | None"):
    from pyarrow import ipc

    source.seek(0)
    is_file = source.read(len(_MAGIC)) == _MAGIC
    source.seek(0)
    return (ipc.open_file if is_file else ipc.open_stream)(source, options=options)
