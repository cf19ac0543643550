"""Text: a file is one document."""

from collections.abc import Iterator

from jaxformers.data.files import open_binary
from jaxformers.data.records import BadRecord, Document, Fields, Piece, Record


def read(piece: Piece, fields: Fields) -> Iterator[Record]:
    """The whole file, without its byte order mark."""
    if fields.tokens is not None:
        raise ValueError(f"{piece.path}: a text file has no field {fields.tokens!r}: leave data.tokens_field out")
    if fields.entries:
        raise ValueError(f"{piece.path}: a text file holds no conversations: give it a source of its own, without chat")
    with open_binary(piece.path) as file:
        content = file.read()
    try:
        yield Document(content.decode("utf-8-sig"), 0)
    except UnicodeDecodeError as error:
        yield BadRecord(piece.path, 0, f"not UTF-8 (byte {error.start})", "file")
