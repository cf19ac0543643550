"""Parquet: pieces are row groups, and only the needed columns are read."""

from collections.abc import Iterator
from contextlib import contextmanager

from jaxformers.data.files import open_binary
from jaxformers.data.formats.columns import batch_records, damage_named, wanted_columns
from jaxformers.data.records import Fields, Piece, Record, SourceFile, even_pieces

_ROWS = 256  # read at a time: few enough that long documents fit in memory


def cut(file: SourceFile, size: int) -> list[Piece]:
    """Ranges of row groups."""
    if file.size <= size:
        return [Piece(file.path, format=file.format)]
    with damage_named(file.path, "Parquet"), _open(file.path) as parquet:
        return even_pieces(file, parquet.num_row_groups, size)


def read(piece: Piece, fields: Fields) -> Iterator[Record]:
    """A document a row, its place the row's number in the file.

    Raises:
        ValueError: no Parquet file, or a damaged one; no such column, or one of another type.
    """
    with damage_named(piece.path, "Parquet"), _open(piece.path) as parquet:
        columns = wanted_columns(piece.path, parquet.schema_arrow, fields)
        stop = parquet.num_row_groups if piece.stop is None else piece.stop
        row = sum(parquet.metadata.row_group(number).num_rows for number in range(piece.start))
        groups = list(range(piece.start, stop))
        for batch in parquet.iter_batches(_ROWS, row_groups=groups, columns=columns, use_threads=False):
            yield from batch_records(piece.path, batch, row, fields)
            row += batch.num_rows


@contextmanager
def _open(path: str):
    from pyarrow.parquet import ParquetFile

    with open_binary(path) as file, ParquetFile(file) as parquet:
        yield parquet
