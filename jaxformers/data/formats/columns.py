"""Columns of Arrow arrays, which Parquet, Arrow and Hugging Face datasets all give, as documents."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jaxformers.data.files import needs_extra, one_line
from jaxformers.data.records import BadRecord, Entry, Fields, Record, text_record, tokens_record

if TYPE_CHECKING:
    import pyarrow


def import_pyarrow(path: str):
    """The library, or a ValueError that says how to get it."""
    try:
        import pyarrow
    except ImportError:
        raise needs_extra(path, "pyarrow") from None
    return pyarrow


@contextmanager
def damage_named(path: str, kind: str) -> Iterator[None]:
    """What the Arrow library says of a file that it cannot read, as one line."""
    pyarrow = import_pyarrow(path)
    try:
        yield
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        raise ValueError(f"{path}: damaged or no {kind} file ({one_line(error)})") from error


def wanted_columns(path: str, schema: "pyarrow.Schema", fields: Fields) -> list[str]:
    """The columns to read of a table: the one with the document, or those of whole records that are there.

    Raises:
        ValueError: no such column, or one with something else in it; says what is there.
    """
    if not fields.entries:
        check_column(path, schema, fields)
        return [fields.wanted]
    found = [name for name in dict.fromkeys(schema.names) if name in fields.entries]
    if not found or len(found) != sum(name in fields.entries for name in schema.names):
        count = "two columns of one name" if found else f"none of the columns {', '.join(fields.entries)}"
        raise ValueError(f"{path}: {count}; there are {', '.join(schema.names) or 'none at all'}")
    return found


def batch_records(path: str, batch: "pyarrow.RecordBatch", first: int, fields: Fields) -> Iterator[Record]:
    """A document, or a whole record, a row of a batch of `wanted_columns`; `first` is the row number of the first.

    Raises:
        ValueError: offsets that point outside of the data.
    """
    if not fields.entries:
        yield from column_records(path, batch.column(fields.wanted), first, fields)
        return
    batch.validate(full=True)
    for row in range(batch.num_rows):
        (values,) = batch.slice(row, 1).to_pylist()
        yield Entry({name: value for name, value in values.items() if value is not None}, first + row)


def check_column(path: str, schema: "pyarrow.Schema", fields: Fields) -> None:
    """Refuses a table that lacks the column, or has something else in it, with a ValueError that says what is there."""
    found = schema.get_all_field_indices(fields.wanted)
    if len(found) != 1:
        count = f"{len(found)} columns" if found else "no column"
        raise ValueError(f"{path}: {count} {fields.wanted!r}; there are {', '.join(schema.names) or 'none at all'}")
    kind = schema.field(found[0]).type
    good, meant = (_is_text(kind), "text") if fields.tokens is None else (_is_ids(kind), "lists of whole numbers")
    if not good:
        raise ValueError(f"{path}: column {fields.wanted!r} holds {kind}, not {meant}")


def _is_text(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    return any(test(kind) for test in tests)


def _is_ids(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return lists and types.is_integer(kind.value_type)


def column_records(path: str, column: "pyarrow.Array", first: int, fields: Fields) -> Iterator[Record]:
    """A document a row of a column that `check_column` has let through; `first` is the row number of the first.

    Raises:
        ValueError: offsets that point outside of the column's data.
    """
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(column.type):
        column.validate(full=True)
        column = column.dictionary_decode()
    if fields.tokens is not None:
        column.validate(full=True)
        yield from _ids(path, column, first, fields.tokens)
        return
    # Text that is not UTF-8 spoils its own row and no other, so it is decoded row by row.
    column = column.cast(pyarrow.large_binary())
    column.validate(full=True)
    for row, value in enumerate(column, first):
        yield text_record(value.as_py(), path, row, field=fields.text)


def _ids(path: str, column: "pyarrow.Array", first: int, field: str) -> Iterator[Record]:
    for row, value in enumerate(column, first):
        ids = value.values if value.is_valid else None
        if ids is not None and ids.null_count:
            yield BadRecord(path, row, f"{field!r} has a null among its ids", "row")
        else:
            yield tokens_record(None if ids is None else ids.to_numpy(), path, row, field=field)
