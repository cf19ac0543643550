"""Files wherever they lie: finding, describing and opening local paths, and URLs such as s3:// or hf:// through fsspec.

Knows no format but gzip and Zstandard, which any format may be wrapped in.
"""

import glob
import gzip
import io
import os
import sysconfig
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from jaxformers.data.records import SourceFile, stamp

COMPRESSED = (".gz", ".zst")


def is_remote(path: str) -> bool:
    """Whether a path is for fsspec, which is whatever has a protocol: s3://, gs://, hf://, memory:// and others."""
    return "://" in path


def glob_paths(pattern: str) -> list[str]:
    """Absolute paths or URLs that match, of files and folders (of a URL: files only), in no order.

    Raises:
        ValueError: a protocol that is unknown or needs a package; whatever its storage says.
    """
    if is_remote(pattern):
        with _remote(pattern) as (filesystem, path):
            matches = filesystem.glob(path, detail=True)
            return [filesystem.unstrip_protocol(name) for name, info in matches.items() if info["type"] == "file"]
    return [Path(path).absolute().as_posix() for path in glob.iglob(expand(pattern), recursive=True)]


def expand(pattern: str) -> str:
    """A local pattern with `~` and {stdlib} written out."""
    return os.path.expanduser(pattern.replace("{stdlib}", glob.escape(sysconfig.get_paths()["stdlib"])))


def describe(path: str, format: str) -> SourceFile:
    """A file as it is now; ValueError where it has gone or its storage does not answer."""
    if is_remote(path):
        with _remote(path) as (filesystem, name):
            info = filesystem.info(name)
            known = [info.get(key) for key in ("ETag", "Content-MD5", "Digest", "Last-Modified")]
            return SourceFile(path, info["size"] or 0, stamp(filesystem.ukey(name), known), format)
    try:
        status = os.stat(path)
    except OSError as error:
        raise cannot_be_read(path, error) from error
    return SourceFile(path, status.st_size, status.st_mtime_ns, format)


def open_binary(path: str) -> BinaryIO:
    """The bytes of a file as they are stored; seekable."""
    if not is_remote(path):
        return open(path, "rb", buffering=1 << 20)
    with _remote(path) as (filesystem, name):
        return filesystem.open(name, "rb")


def open_decompressed(path: str) -> BinaryIO:
    """The bytes of a file, those inside of it where its name ends in .gz or .zst; damage raises one of `DAMAGE`."""
    if path.lower().endswith(".gz"):
        return gzip.open(open_binary(path) if is_remote(path) else path, "rb")
    if path.lower().endswith(".zst"):
        return io.BufferedReader(_ZstdReader(path), 1 << 20)
    return open_binary(path)


def cannot_be_read(path: str, error: OSError) -> ValueError:
    """The one line for a file that the system does not give."""
    return ValueError(f"{path}: cannot be read: {error.strerror or one_line(error)}")


def one_line(error: BaseException) -> str:
    """What another library says, without its line breaks."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def needs_extra(path: str, library: str) -> ValueError:
    """The one line for an optional library that is not installed."""
    return ValueError(f"{path}: reading it needs {library}: pip install 'jaxformers[data]'")


@contextmanager
def _remote(path: str) -> Iterator[tuple]:
    """An fsspec filesystem and the path within it."""
    try:
        from fsspec.core import url_to_fs  # an optional extra
    except ImportError:
        raise needs_extra(path, "fsspec") from None
    try:
        yield url_to_fs(path)
    except Exception as error:  # each storage has a client, and each client exceptions, of its own
        raise ValueError(f"{path}: cannot be read: {one_line(error)}") from error


class _ZstdDamage(Exception):
    """The bytes are not Zstandard frames, or the last frame has no end."""


DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, _ZstdDamage)


class _ZstdReader(io.RawIOBase):
    """Every frame of a Zstandard file, one after the other.

    The library's own reader ends without a word where a file was cut short; this one says so.
    """

    def __init__(self, path: str):
        try:
            import zstandard  # an optional extra
        except ImportError:
            raise needs_extra(path, "zstandard") from None
        self._error = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = None
        self._source = open_binary(path)
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
