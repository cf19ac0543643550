"""Files in, documents out: which files a config names, and the text in them.

A *piece* is a range of bytes of one file: all of it, or some whole lines of a large .jsonl. Pieces are what processes
share out among themselves, so reading one needs nothing from any other. Knows no tokenizer and no cache.
"""

import glob
import gzip
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".lzma", ".lz4", ".zip", ".7z", ".br", ".z")
_NOT_TEXT = (".parquet", ".arrow", ".feather", ".arrayrecord", ".bin", ".npy", ".npz", ".tar", ".safetensors")


@dataclass(frozen=True)
class SourceFile:
    """A file as it was found: `size` in bytes, `modified` in nanoseconds since the epoch."""

    path: str
    size: int
    modified: int


@dataclass(frozen=True)
class Piece:
    """The lines of `path` that begin in bytes [start, stop); stop None: to the end of the file."""

    path: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Document:
    """One text and the byte of the (decompressed) file it begins at."""

    text: str
    offset: int


@dataclass(frozen=True)
class BadRecord:
    """Something that should have been a document: where it begins, and what is wrong with it."""

    path: str
    offset: int
    reason: str


def find_files(paths: Sequence[str], exclude: Sequence[str] = ()) -> list[SourceFile]:
    """The files that the globs name, each once, sorted by path.

    Raises:
        ValueError: a glob that matches no file, or only excluded ones; a file of a kind that cannot be read as text.
    """
    found: dict[str, SourceFile] = {}
    for pattern in paths:
        matches = [path for path in glob.iglob(_expand(pattern), recursive=True) if os.path.isfile(path)]
        kept = [path for path in matches if not any(fnmatch(_whole(path), excluded) for excluded in exclude)]
        if not kept:
            raise ValueError(_why_nothing_matched(pattern, bool(matches)))
        found.update((path, _source_file(path)) for path in map(_whole, kept))
    return [found[path] for path in sorted(found)]


def _expand(pattern: str) -> str:
    return os.path.expanduser(pattern.replace("{stdlib}", glob.escape(sysconfig.get_paths()["stdlib"])))


def _whole(path: str) -> str:
    return Path(path).absolute().as_posix()


def _why_nothing_matched(pattern: str, excluded: bool) -> str:
    if excluded:
        return f"every file that {pattern!r} matches is left out by data.exclude"
    if os.path.isdir(_expand(pattern)):
        return f"{pattern!r} is a directory: name its files by a glob such as {pattern.rstrip('/') + '/**/*.txt'!r}"
    return f"no file matches {pattern!r}"


def _source_file(path: str) -> SourceFile:
    suffix = Path(path).suffix.lower()
    if suffix in _COMPRESSED and not is_jsonl(path):
        raise ValueError(f"{path}: unknown compression {suffix!r}; known are .jsonl.gz and .jsonl.zst")
    if suffix in _NOT_TEXT:
        raise ValueError(f"{path}: {suffix!r} files are not text; known are {', '.join(_JSONL)} and plain text files")
    status = os.stat(path)
    return SourceFile(path, status.st_size, status.st_mtime_ns)


def is_jsonl(path: str) -> bool:
    """Whether every line of the file is a document (otherwise the file is one document)."""
    return path.lower().endswith(_JSONL)


def cut(file: SourceFile, size: int) -> list[Piece]:
    """The file in pieces of about `size` bytes where it can be entered in the middle, otherwise whole."""
    if not file.path.lower().endswith(".jsonl") or file.size <= size:
        return [Piece(file.path)]
    return [Piece(file.path, start, min(start + size, file.size)) for start in range(0, file.size, size)]


def read(piece: Piece, *, text_field: str) -> Iterator[Document | BadRecord]:
    """The documents of a piece in order, and what could not be one. Blank lines of a .jsonl are nothing at all.

    Raises:
        ValueError: the file cannot be opened.
    """
    try:
        if is_jsonl(piece.path):
            yield from _read_lines(piece, text_field)
        else:
            yield _decode(piece.path, 0, Path(piece.path).read_bytes())
    except OSError as error:
        raise ValueError(f"{piece.path}: cannot be read: {error.strerror or error}") from error


def name_of(record: BadRecord) -> str:
    """`path: reason`, or `path:line: reason` for a line of a .jsonl."""
    if not is_jsonl(record.path):
        return f"{record.path}: {record.reason}"
    line, left = 1, record.offset
    try:
        with open_lines(record.path) as file:
            while left and (block := file.read(min(left, 1 << 20))):
                line += block.count(b"\n")
                left -= len(block)
    except (OSError, *_DAMAGE):  # the file has changed since
        return f"{record.path}: {record.reason} at byte {record.offset}"
    return f"{record.path}:{line}: {record.reason}"


def open_lines(path: str) -> BinaryIO:
    """A binary file over the decompressed bytes of a .jsonl, .jsonl.gz or .jsonl.zst."""
    if path.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.lower().endswith(".zst"):
        return io.BufferedReader(_ZstdReader(path), 1 << 20)
    return open(path, "rb", buffering=1 << 20)


def _read_lines(piece: Piece, text_field: str) -> Iterator[Document | BadRecord]:
    with open_lines(piece.path) as file:
        offset = piece.start
        if offset:
            file.seek(offset - 1)
            offset += len(file.readline()) - 1  # a line that began before the piece belongs to the one before
        while piece.stop is None or offset < piece.stop:
            try:
                line = file.readline()
            except _DAMAGE as error:
                yield BadRecord(piece.path, offset, f"damaged compressed data ({error})")
                return
            if not line:
                return
            if line.strip():
                yield _parse(piece.path, offset, line, text_field)
            offset += len(line)


def _parse(path: str, offset: int, line: bytes, text_field: str) -> Document | BadRecord:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return BadRecord(path, offset, "not UTF-8")
    except (ValueError, RecursionError):
        return BadRecord(path, offset, "not JSON")
    if not isinstance(record, dict) or text_field not in record:
        return BadRecord(path, offset, f"no field {text_field!r}")
    text = record[text_field]
    if not isinstance(text, str):
        return BadRecord(path, offset, f"field {text_field!r} is not a string")
    if not _is_unicode(text):
        return BadRecord(path, offset, "half a surrogate pair, which is not Unicode text")
    return Document(text, offset)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decode(path: str, offset: int, content: bytes) -> Document | BadRecord:
    try:
        return Document(content.decode("utf-8-sig"), offset)
    except UnicodeDecodeError as error:
        return BadRecord(path, offset, f"not UTF-8 (byte {error.start})")


class _ZstdDamage(Exception):
    """The bytes are not Zstandard frames, or the last frame has no end."""


_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, _ZstdDamage)


class _ZstdReader(io.RawIOBase):
    """Every frame of a Zstandard file, one after the other.

    The library's own reader ends without a word where a file was cut short; this one says so.
    """

    def __init__(self, path: str):
        try:
            import zstandard  # an optional extra
        except ImportError:
            raise ValueError(f"{path}: reading .zst needs zstandard: pip install 'jaxformers[data]'") from None
        self._error = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = None
        self._source = open(path, "rb")  # noqa: SIM115
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._ready and self._fill():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _fill(self) -> bool:
        """Decompresses one more block; False at the end of the file."""
        ended = self._frame is None or self._frame.eof
        block = (self._frame.unused_data if self._frame is not None and ended else b"") or self._source.read(1 << 16)
        if not block:
            if not ended:
                raise _ZstdDamage("the file ends inside a frame")
            return False
        if ended:
            self._frame = self._new_frame()
        try:
            self._ready = self._frame.decompress(block)
        except self._error as error:
            raise _ZstdDamage(str(error)) from error
        return True

    def close(self) -> None:
        self._source.close()
        super().close()
