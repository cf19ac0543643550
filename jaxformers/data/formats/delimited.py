"""CSV and TSV with a header row. A quoted field may hold line breaks, so a file can only be read from its beginning."""

import csv
import io
import json
from collections.abc import Iterator

from jaxformers.data.files import DAMAGE, open_decompressed
from jaxformers.data.records import BadRecord, Entry, Fields, Piece, Record, is_unicode, text_record, tokens_record

_TABS = (".tsv", ".tsv.gz", ".tsv.zst")
_LONGEST = 2**31 - 1  # characters in a field; the library's own 131,072 is less than a long document


def read(piece: Piece, fields: Fields) -> Iterator[Record]:
    """A document a row, its place the line the row begins in. Ids stand in a field as a list of JSON.

    Raises:
        ValueError: no header row, or one without the field.
    """
    csv.field_size_limit(_LONGEST)
    dialect = "excel-tab" if piece.path.lower().endswith(_TABS) else "excel"
    # Bytes that are not UTF-8 become half surrogate pairs, so that they spoil their own row and no other.
    with io.TextIOWrapper(
        open_decompressed(piece.path), encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as text:
        rows = csv.reader(text, dialect, strict=True)
        header = _header(piece.path, rows)
        if header is None:
            return
        if not fields.entries and header.count(fields.wanted) != 1:
            found = f"{header.count(fields.wanted)} columns" if fields.wanted in header else "no column"
            raise ValueError(f"{piece.path}: {found} {fields.wanted!r}; the header has {', '.join(header)}")
        yield from _records(piece.path, rows, header, fields)


def _header(path: str, rows) -> list[str] | None:
    """The first row that is not blank; None for an empty file."""
    try:
        return next((row for row in rows if row), None)
    except (csv.Error, *DAMAGE) as error:
        raise ValueError(f"{path}: its header row cannot be read ({error})") from error


def _records(path: str, rows, header: list[str], fields: Fields) -> Iterator[Record]:
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRecord(path, line, f"not CSV ({error})", "row")
            continue
        except DAMAGE as error:
            yield BadRecord(path, line, f"damaged compressed data ({error})", "row")
            return
        if not row:
            continue
        if len(row) != len(header):
            yield BadRecord(path, line, f"fields: {len(row)}, but the header has {len(header)}", "row")
            continue
        if fields.entries:
            yield _entry(path, line, dict(zip(header, row, strict=True)))
        else:
            yield _record(path, line, row[header.index(fields.wanted)], fields)


def _entry(path: str, line: int, values: dict[str, str]) -> Record:
    """A row by its header; what is empty is not there."""
    if not all(map(is_unicode, values.values())):
        return BadRecord(path, line, "not UTF-8", "row")
    return Entry({name: value for name, value in values.items() if value}, line)


def _record(path: str, line: int, value: str, fields: Fields) -> Record:
    if not is_unicode(value):
        return BadRecord(path, line, "not UTF-8", "row")
    if fields.tokens is None:
        return text_record(value, path, line, field=fields.text)
    try:
        ids = json.loads(value)
    except (ValueError, RecursionError):
        return BadRecord(path, line, f"{fields.tokens!r} is not a list of JSON", "row")
    return tokens_record(ids, path, line, field=fields.tokens)
