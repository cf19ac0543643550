"""Files in, documents out: which files a config names, and the documents in them, whatever their format.

A *piece* is a part of one file that can be read alone: all of it, or a range of its bytes, row groups or records.
Pieces are what processes share out among themselves. Knows no tokenizer and no cache.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch

from jaxformers.data.config import SourceConfig
from jaxformers.data.files import cannot_be_read, expand, glob_paths, is_remote
from jaxformers.data.formats import FORMATS, callables, format_of, huggingface
from jaxformers.data.formats.lines import line_at
from jaxformers.data.records import BadRecord, Document, Fields, Piece, Record, SourceFile, Tokens

__all__ = ["BadRecord", "Document", "Piece", "SourceFile", "Tokens", "cut", "files_of", "find_files", "name_of", "read"]


def files_of(config: SourceConfig) -> list[SourceFile]:
    """The files that a config names; see `find_files`."""
    return find_files(config.paths, config.exclude, format=config.format, subset=config.subset, split=config.split)


def find_files(
    paths: Sequence[str],
    exclude: Sequence[str] = (),
    *,
    format: str = "auto",
    subset: str | None = None,
    split: str | None = None,
) -> list[SourceFile]:
    """The files that the globs name, each once, sorted by path; or what the format has instead of files.

    Raises:
        ValueError: a glob that matches no file, or only excluded ones; a file of a kind that cannot be read; a name
            that the format does not find.
    """
    found: dict[str, SourceFile] = {}
    for pattern in paths:
        if format == "python":
            files = [callables.describe(pattern)]
        elif format == "huggingface":
            saved = _saved(_kept(glob_paths(pattern), exclude))
            files = [huggingface.describe_saved(path, split) for path in saved]
            files = files or huggingface.from_name(pattern, subset, split)
        else:
            files = _match(pattern, exclude, format, split)
        found.update((file.path, file) for file in files)
    return [found[path] for path in sorted(found)]


def _match(pattern: str, exclude: Sequence[str], format: str, split: str | None) -> list[SourceFile]:
    """The files of one glob, and in `auto` the folders that are Hugging Face datasets, in place of what is in them."""
    matches = glob_paths(pattern)
    if not matches and format != "auto" and FORMATS[format].implied:
        matches = glob_paths(pattern + FORMATS[format].implied)
    kept = _kept(matches, exclude)
    files = [path for path in kept if _is_file(path)]
    folders = _saved(set(kept) - set(files)) if format == "auto" else []
    files = [path for path in files if not _lies_in(path, folders)]
    if not files and not folders:
        raise ValueError(_why_nothing_matched(pattern, any(map(_is_file, matches))))
    named = [(path, format_of(path) if format == "auto" else format) for path in files]
    described = [FORMATS[name].describe(path, name) for path, name in named]
    return described + [huggingface.describe_saved(folder, split) for folder in folders]


def _kept(paths: Sequence[str], exclude: Sequence[str]) -> list[str]:
    return [path for path in paths if not any(fnmatch(path, excluded) for excluded in exclude)]


def _saved(paths: Iterable[str]) -> list[str]:
    """The outermost folders of Hugging Face datasets; the splits of a dictionary lie within its own."""
    folders = [path for path in paths if huggingface.is_saved(path)]
    return [path for path in folders if not _lies_in(path, folders)]


def _lies_in(path: str, folders: Sequence[str]) -> bool:
    return any(path.startswith(f"{folder}/") for folder in folders)


def _is_file(path: str) -> bool:
    return is_remote(path) or os.path.isfile(path)


def _why_nothing_matched(pattern: str, excluded: bool) -> str:
    if excluded:
        return f"every file that {pattern!r} matches is left out by data.exclude"
    if not is_remote(pattern) and os.path.isdir(expand(pattern)):
        return f"{pattern!r} is a directory: name its files by a glob such as {pattern.rstrip('/') + '/**/*.txt'!r}"
    return f"no file matches {pattern!r}"


def cut(file: SourceFile, size: int) -> list[Piece]:
    """The file in pieces of about `size` bytes where it can be entered in the middle, otherwise whole.

    Raises:
        ValueError: a file that cannot be opened, or is not of its format.
    """
    try:
        return FORMATS[file.format].cut(file, size)
    except OSError as error:
        raise cannot_be_read(file.path, error) from error


def read(
    piece: Piece, *, text_field: str = "text", tokens_field: str | None = None, entries: Sequence[str] = ()
) -> Iterator[Record]:
    """The documents of a piece in order, each a text or ready ids, and what could not be one; with `entries`, which
    names fields, whole records with at least those of the fields that there are.

    Raises:
        ValueError: the file cannot be opened, is not of its format or is damaged as a whole; a table without the field.
    """
    try:
        yield from FORMATS[piece.format].read(piece, Fields(text_field, tokens_field, tuple(entries)))
    except OSError as error:
        raise cannot_be_read(piece.path, error) from error


def name_of(record: BadRecord) -> str:
    """`path: reason`, or `path:line: reason`, `path:row: reason` where the file has several records."""
    if record.unit == "file":
        return f"{record.path}: {record.reason}"
    place = record.offset if record.unit == "row" else line_at(record.path, record.offset)
    if place is None:  # the file has changed since
        return f"{record.path}: {record.reason} at byte {record.offset}"
    return f"{record.path}:{place}: {record.reason}"
