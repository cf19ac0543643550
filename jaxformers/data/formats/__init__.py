"""The formats of sources, by name. Each says how a file is cut into pieces and what documents a piece holds.

Whatever the format, documents end in the one token cache, so packing, mixing and resuming know none of them. A format
that cannot be entered in the middle has one piece, the whole file. Libraries that only a format needs are imported
where it reads.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from jaxformers.data.files import COMPRESSED, describe
from jaxformers.data.formats import (
    arrayrecord,
    arrow,
    callables,
    delimited,
    huggingface,
    lines,
    megatron,
    parquet,
    text,
)
from jaxformers.data.records import Fields, Piece, Record, SourceFile


def _whole(file: SourceFile, size: int) -> list[Piece]:
    return [Piece(file.path, format=file.format)]


@dataclass(frozen=True)
class Format:
    """One way in which documents lie in files.

    Attributes:
        read: the records of a piece, in order.
        cut: a file in independent pieces of about so many bytes.
        suffixes: of file names that have this format where a config does not say which.
        describe: a path as a source, given the path and the format's name.
        implied: what may be left out at the end of a path.
    """

    read: Callable[[Piece, Fields], Iterator[Record]]
    cut: Callable[[SourceFile, int], list[Piece]] = _whole
    suffixes: tuple[str, ...] = ()
    describe: Callable[[str, str], SourceFile] = describe
    implied: str = ""


FORMATS = {
    "text": Format(text.read),
    "jsonl": Format(lines.read, lines.cut, (".jsonl", ".jsonl.gz", ".jsonl.zst")),
    "csv": Format(delimited.read, suffixes=(".csv", ".csv.gz", ".csv.zst", ".tsv", ".tsv.gz", ".tsv.zst")),
    "parquet": Format(parquet.read, parquet.cut, (".parquet",)),
    "arrow": Format(arrow.read, arrow.cut, (".arrow", ".feather")),
    "arrayrecord": Format(arrayrecord.read, arrayrecord.cut, (".arrayrecord", ".array_record")),
    "megatron": Format(megatron.read, megatron.cut, (".bin", ".idx"), megatron.describe_pair, ".bin"),
    "huggingface": Format(huggingface.read, huggingface.cut),
    "python": Format(callables.read, callables.cut),
}

_OTHER_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".lzma", ".lz4", ".zip", ".7z", ".br", ".z")
_NOT_TEXT = (".npy", ".npz", ".tar", ".safetensors")


def format_of(path: str) -> str:
    """The format that a file's name stands for.

    Raises:
        ValueError: a compression that is not known for this kind of file, or a kind that holds no documents.
    """
    for name, format in FORMATS.items():
        if path.lower().endswith(format.suffixes):
            return name
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in _OTHER_COMPRESSED:
        compressed = ", ".join(end for end in _known_suffixes() if end.endswith(COMPRESSED))
        raise ValueError(f"{path}: unknown compression {suffix!r}; known are {compressed}")
    if suffix in _NOT_TEXT:
        known = ", ".join(_known_suffixes())
        raise ValueError(f"{path}: {suffix!r} files are not text; known are {known} and plain text files")
    return "text"


def _known_suffixes() -> Iterator[str]:
    return (end for format in FORMATS.values() for end in format.suffixes)
