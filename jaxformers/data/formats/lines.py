"""Lines of JSON: every line of the file is a record. A file that is not compressed can be entered at any byte."""

import json
from collections.abc import Iterator
from dataclasses import replace

from jaxformers.data.files import COMPRESSED, DAMAGE, open_decompressed
from jaxformers.data.records import (
    BadRecord,
    Document,
    Entry,
    Fields,
    Piece,
    Record,
    SourceFile,
    is_unicode,
    tokens_record,
)


def cut(file: SourceFile, size: int) -> list[Piece]:
    """Ranges of bytes; a compressed file whole."""
    if file.path.lower().endswith(COMPRESSED) or file.size <= size:
        return [Piece(file.path, format=file.format)]
    starts = range(0, file.size, size)
    return [Piece(file.path, start, min(start + size, file.size), file.format) for start in starts]


def read(piece: Piece, fields: Fields) -> Iterator[Record]:
    """The records of the lines that begin in the piece. Blank lines are nothing at all."""
    with open_decompressed(piece.path) as file:
        offset = piece.start
        if offset:
            file.seek(offset - 1)
            offset += len(file.readline()) - 1  # a line that began before the piece belongs to the one before
        while piece.stop is None or offset < piece.stop:
            try:
                line = file.readline()
            except DAMAGE as error:
                yield BadRecord(piece.path, offset, f"damaged compressed data ({error})")
                return
            if not line:
                return
            if line.strip():
                yield _parse(piece.path, offset, line, fields)
            offset += len(line)


def _parse(path: str, offset: int, line: bytes, fields: Fields) -> Record:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return BadRecord(path, offset, "not UTF-8")
    except (ValueError, RecursionError):
        return BadRecord(path, offset, "not JSON")
    if fields.entries:
        return Entry(record, offset, "byte")
    if not isinstance(record, dict) or fields.wanted not in record:
        return BadRecord(path, offset, f"no field {fields.wanted!r}")
    value = record[fields.wanted]
    if fields.tokens is not None:
        return replace(tokens_record(value, path, offset, field=fields.tokens), unit="byte")
    if not isinstance(value, str):
        return BadRecord(path, offset, f"field {fields.text!r} is not a string")
    if not is_unicode(value):
        return BadRecord(path, offset, "half a surrogate pair, which is not Unicode text")
    return Document(value, offset)


def line_at(path: str, offset: int) -> int | None:
    """The number of the line that begins at a byte, from 1 on; None where the file can no longer be read so far."""
    line, left = 1, offset
    try:
        with open_decompressed(path) as file:
            while left and (block := file.read(min(left, 1 << 20))):
                line += block.count(b"\n")
                left -= len(block)
    except (OSError, ValueError, *DAMAGE):
        return None
    return line
