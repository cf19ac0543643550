"""Hugging Face datasets: what `save_to_disk` wrote, and names on the hub, both through the `datasets` library.

A folder that `save_to_disk` wrote is read row by row as `datasets` gives it. A name is downloaded and prepared by
`datasets`, whose Arrow files are then the sources: they stay as they are, while a name may come to mean something else.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from jaxformers.data.files import describe, needs_extra, one_line
from jaxformers.data.formats.columns import batch_records, damage_named, wanted_columns
from jaxformers.data.records import Fields, Piece, Record, SourceFile, even_pieces, stamp

_DATASET, _SPLITS = "state.json", "dataset_dict.json"  # by which a folder is known
_ROWS = 256  # read at a time


def is_saved(path: str) -> bool:
    """Whether `save_to_disk` wrote this folder, of a dataset or of a dictionary of its splits."""
    return any(os.path.isfile(os.path.join(path, name)) for name in (_DATASET, _SPLITS))


def describe_saved(path: str, split: str | None) -> SourceFile:
    """One split of a folder, which is a folder too; a change of any of its files shows.

    Raises:
        ValueError: several splits and none chosen, or one that is not there.
    """
    if os.path.isfile(os.path.join(path, _SPLITS)):
        path = os.path.join(path, _choose(path, split, _saved_splits(path)))
    elif split is not None and _saved_split(path) != split:
        raise ValueError(f"{path}: data.split is {split!r}, but this is the dataset of one split alone")
    files = _files(path)
    size = sum(size for name, size, _ in files if name.endswith(".arrow"))
    return SourceFile(path, size, stamp(*files), "huggingface")


def from_name(name: str, subset: str | None, split: str | None) -> list[SourceFile]:
    """The Arrow files that `datasets` makes of a dataset on the hub, or of a folder of data files; ValueError if none.

    `split` is a whole split; `subset` one of the dataset's configurations.
    """
    datasets = _import(name)
    if split is not None and not re.fullmatch(r"\w+(\.\w+)*", split):
        raise ValueError(f"{name}: data.split is {split!r}, which is not the name of a whole split")
    try:
        made = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library raises a dozen kinds, its clients' among them
        raise ValueError(f"{name}: `datasets` cannot load it: {one_line(error)}") from error
    if isinstance(made, dict):
        made = made[_choose(name, None, list(made))]
    return [describe(entry["filename"], "arrow") for entry in made.cache_files]


def cut(file: SourceFile, size: int) -> list[Piece]:
    """Ranges of rows."""
    if file.size <= size:
        return [Piece(file.path, format=file.format)]
    return even_pieces(file, len(_load(file.path)), size)


def read(piece: Piece, fields: Fields) -> Iterator[Record]:
    """A document a row, its place the row's number.

    Raises:
        ValueError: a folder that `datasets` cannot open; no such column, or one of another type.
    """
    dataset = _load(piece.path)
    rows = dataset.select_columns(wanted_columns(piece.path, dataset.features.arrow_schema, fields))
    rows = rows.with_format("arrow")
    stop = len(rows) if piece.stop is None else piece.stop
    for start in range(piece.start, stop, _ROWS):
        with damage_named(piece.path, "Hugging Face dataset"):
            (batch,) = rows[start : min(start + _ROWS, stop)].combine_chunks().to_batches()
        yield from batch_records(piece.path, batch, start, fields)


def _choose(path: str, split: str | None, splits: list[str]) -> str:
    if split in splits:
        return split
    if split is None and len(splits) == 1:
        return splits[0]
    said = "set data.split to one of its splits" if split is None else f"has no split {split!r}; its splits are"
    raise ValueError(f"{path}: {said}: {', '.join(splits)}")


def _saved_splits(path: str) -> list[str]:
    return _entry(path, _SPLITS, "splits", list)


def _saved_split(path: str) -> str | None:
    return _entry(path, _DATASET, "_split", str | None)


def _entry(path: str, name: str, key: str, kind: type):
    try:
        value = json.loads(Path(path, name).read_bytes())[key]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {name} is damaged") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path}: {name} is damaged")
    return value


def _files(path: str) -> list[tuple[str, int, int]]:
    try:
        entries = [(entry.name, entry.stat()) for entry in os.scandir(path) if entry.is_file()]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    return sorted((name, status.st_size, status.st_mtime_ns) for name, status in entries)


def _load(path: str):
    datasets = _import(path)
    try:
        return datasets.load_from_disk(path)
    except Exception as error:  # the library lets through whatever its own readers raise
        raise ValueError(f"{path}: `datasets` cannot open it: {one_line(error)}") from error


def _import(path: str):
    try:
        import datasets
    except ImportError:
        raise needs_extra(path, "datasets") from None
    return datasets
