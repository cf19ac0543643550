"""Arrow's IPC format, as a stream or a file (Feather version 2): pieces are record batches, mapped and not copied."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jaxformers.data.documents import Fields, Piece, Record, SourceFile, even_pieces
from jaxformers.data.files import is_remote, open_binary
from jaxformers.data.formats.columns import check_column, column_records, damage_named, import_pyarrow

if TYPE_CHECKING:
    import pyarrow

_MAGIC = b"ARROW1"  # of the file format; a stream has none


def cut(file: SourceFile, size: int) -> list[Piece]:
    """Ranges of record batches; a remote file whole, since to pass over its batches is to fetch them."""
    if file.size <= size or is_remote(file.path):
        return [Piece(file.path, format=file.format)]
    with damage_named(file.path, "Arrow"), _open(file.path) as source:
        count = sum(1 for _ in _batches(source, _schema(source)))
    return even_pieces(file, count, size)


def read(piece: Piece, fields: Fields) -> Iterator[Record]:
    """A document a row, its place the row's number in the file.

    Raises:
        ValueError: no Arrow file, or a damaged one; no such column, or one of another type.
    """
    with damage_named(piece.path, "Arrow"), _open(piece.path) as source:
        schema = _schema(source)
        check_column(piece.path, schema, fields)
        row = 0
        for number, batch in enumerate(_batches(source, schema, fields.wanted)):
            if piece.stop is not None and number >= piece.stop:
                return
            if number >= piece.start:
                yield from column_records(piece.path, batch.column(fields.wanted), row, fields)
            row += batch.num_rows


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
    source: "pyarrow.NativeFile", schema: "pyarrow.Schema", column: str | None = None
) -> "Iterator[pyarrow.RecordBatch]":
    """Every record batch in order, with no other column than the given one."""
    from pyarrow import ipc

    options = ipc.IpcReadOptions(included_fields=None if column is None else [schema.get_field_index(column)])
    with _reader(source, options) as reader:
        if isinstance(reader, ipc.RecordBatchFileReader):
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)
        else:
            yield from reader


def _reader(source: "pyarrow.NativeFile", options: "pyarrow.ipc.IpcReadOptions | None"):
    from pyarrow import ipc

    source.seek(0)
    is_file = source.read(len(_MAGIC)) == _MAGIC
    source.seek(0)
    return (ipc.open_file if is_file else ipc.open_stream)(source, options=options)
