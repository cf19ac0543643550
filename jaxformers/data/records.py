"""What sources are made of: files, the pieces they are cut into, and the documents a piece holds.

Knows no format: how a piece is found and read is the business of `formats`.
"""

import hashlib
import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Unit = Literal["byte", "row", "file"]


@dataclass(frozen=True)
class SourceFile:
    """Something to read as it was found, which is what a cache made from it is keyed by.

    Attributes:
        path: a local path, a URL, or a name where the format has names.
        size: in bytes, or near it where it is no file.
        modified: of a local file, nanoseconds since the epoch; else a number that changes if its content may have.
        format: a key of `formats.FORMATS`.
    """

    path: str
    size: int
    modified: int
    format: str = "text"


@dataclass(frozen=True)
class Piece:
    """What lies in [start, stop) of `path`; stop None: to the end.

    The unit is the format's: bytes for lines of JSON (a line belongs to the piece it begins in), row groups for
    Parquet, record batches for Arrow, documents for what is random access by document.
    """

    path: str
    start: int = 0
    stop: int | None = None
    format: str = "text"


@dataclass(frozen=True)
class Fields:
    """Where a record keeps its document: as text or, if `tokens` is given, as ids that are ready.

    `entries`, where there are any, are the fields that are wanted instead, side by side, as an `Entry`.
    """

    text: str = "text"
    tokens: str | None = None
    entries: tuple[str, ...] = ()

    @property
    def wanted(self) -> str:
        return self.text if self.tokens is None else self.tokens


@dataclass(frozen=True)
class Document:
    """One text and where it begins, as `BadRecord` says it."""

    text: str
    offset: int


@dataclass(frozen=True, eq=False)
class Tokens:
    """One document as ids: integers of any kind [length], not yet known to be in any vocabulary."""

    ids: np.ndarray
    offset: int
    unit: Unit = "row"


@dataclass(frozen=True, eq=False)
class Entry:
    """One whole record, which is not yet known to hold a conversation: its fields by name, or a list of messages."""

    value: Any
    offset: int
    unit: Unit = "row"


@dataclass(frozen=True)
class BadRecord:
    """Something that should have been a document: where it begins, and what is wrong with it.

    `offset` counts by `unit`: a byte of the (decompressed) file, which is named as its line; a row, document or record
    from 0 on, or a line from 1 on, which are named as they are; file: the record is all there is.
    """

    path: str
    offset: int
    reason: str
    unit: Unit = "byte"


Record = Document | Tokens | Entry | BadRecord


def stamp(*facts: object) -> int:
    """A number that changes with any of the facts, for what has no single time of modification."""
    return int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=7).digest(), "little")


def text_record(value: object, path: str, row: int, *, field: str) -> Document | BadRecord:
    """The value of a text field as a document: str, or bytes that must be UTF-8."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            return BadRecord(path, row, f"not UTF-8 (byte {error.start})", "row")
    if not isinstance(value, str):
        return BadRecord(path, row, f"{field!r} is {_kind(value)}, not text", "row")
    if not is_unicode(value):
        return BadRecord(path, row, "half a surrogate pair, which is not Unicode text", "row")
    return Document(value, row)


def tokens_record(value: object, path: str, row: int, *, field: str) -> Tokens | BadRecord:
    """The value of a field of ids as a document: any flat sequence of whole numbers."""
    try:
        ids = np.asarray(value)
    except ValueError:  # lists of unequal lengths
        ids = np.empty((0, 0))
    if ids.ndim == 1 and not ids.size:
        return Tokens(np.empty(0, np.int64), row)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        kind = _kind(value) if ids.ndim != 1 else "a list with something else in it"
        return BadRecord(path, row, f"{field!r} is {kind}, not a list of whole numbers", "row")
    return Tokens(ids, row)


def _kind(value: object) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: Python's strings may hold half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def even_pieces(file: SourceFile, count: int, size: int) -> list[Piece]:
    """[0, count) of the file's units in pieces of about `size` bytes, as if all units were of one size."""
    pieces = max(1, min(count, -(-file.size // size)))
    bounds = [count * number // pieces for number in range(pieces + 1)]
    return [Piece(file.path, start, stop, file.format) for start, stop in itertools.pairwise(bounds)]
