"""A Python function as a source: `package.module:function`, called without arguments in every process that reads.

It returns a sequence (it has `__len__` and `__getitem__`), whose items are read in ranges by several processes, or any
other iterable, which one process reads from its beginning. An item is a text, a dictionary with a text or ids under the
configured field, or a sequence of ids.

What decides whether a cache is still good is the source file that the function stands in, the length of a sequence, and
the function's attribute `version`, if it has one. What the function reads beyond that is not seen: change `version`.
"""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxformers.data.files import one_line
from jaxformers.data.records import (
    BadRecord,
    Entry,
    Fields,
    Piece,
    Record,
    SourceFile,
    even_pieces,
    stamp,
    text_record,
    tokens_record,
)

_NOMINAL_BYTES = 1024  # what a document counts for where work is shared out, since nobody knows its size


def describe(name: str) -> SourceFile:
    """The function as a source.

    Raises:
        ValueError: a name that leads to no function; a function that fails or returns nothing to iterate over.
    """
    function = _function(name)
    try:
        with open(inspect.getsourcefile(function) or "", "rb") as file:
            written = file.read()
    except (OSError, TypeError) as error:
        raise ValueError(f"{name}: its source file cannot be read, so that a change of it would not be seen") from error
    items = _items(name)
    count = len(items) if _is_sequence(items) else 1
    modified = stamp(written, count, repr(getattr(function, "version", None)))
    return SourceFile(name, count * _NOMINAL_BYTES, modified, "python")


def cut(file: SourceFile, size: int) -> list[Piece]:
    """Ranges of a sequence; another iterable whole."""
    items = _items(file.path)
    if not _is_sequence(items):
        return [Piece(file.path, format=file.format)]
    return even_pieces(file, len(items), size)


def read(piece: Piece, fields: Fields) -> Iterator[Record]:
    """A document an item, its place the item's number.

    Raises:
        ValueError: an iterable that fails.
    """
    for number, item in _numbered(piece):
        yield _record(piece.path, number, item, fields)


def _numbered(piece: Piece) -> Iterator[tuple[int, Any]]:
    items = _items(piece.path)
    try:
        if _is_sequence(items):
            for number in range(piece.start, len(items) if piece.stop is None else piece.stop):
                yield number, items[number]
        else:
            yield from enumerate(items)
    except Exception as error:  # it is the user's code, and one line says where
        raise ValueError(f"{piece.path}: fails with {type(error).__name__}: {one_line(error)}") from error


def _record(path: str, number: int, item: Any, fields: Fields) -> Record:
    if fields.entries:
        return Entry(item, number)
    if isinstance(item, Mapping):
        if fields.wanted not in item:
            return BadRecord(path, number, f"no field {fields.wanted!r}", "row")
        item = item[fields.wanted]
        if fields.tokens is not None:
            return tokens_record(item, path, number, field=fields.wanted)
    elif isinstance(item, list | tuple | np.ndarray):
        return tokens_record(item, path, number, field="the item")
    return text_record(item, path, number, field=fields.text)


def _is_sequence(items: Any) -> bool:
    return hasattr(items, "__len__") and hasattr(items, "__getitem__") and not isinstance(items, Mapping)


def _items(name: str) -> Iterable[Any]:
    """What the function returns: a sequence once a process, a fresh iterable each time."""
    sequence = _sequence(name)
    return sequence if sequence is not None else _call(name)


@functools.lru_cache(maxsize=8)
def _sequence(name: str) -> Iterable[Any] | None:
    items = _call(name)
    return items if _is_sequence(items) else None


def _call(name: str) -> Iterable[Any]:
    function = _function(name)
    try:
        items = function()
    except Exception as error:  # it is the user's code, and one line says where
        raise ValueError(f"{name}: fails with {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(items, Iterable) and not _is_sequence(items):
        raise ValueError(f"{name} returns a value of type {type(items).__name__}, which gives no documents")
    return items


def _function(name: str) -> Callable[[], Iterable[Any]]:
    module_name, separator, attribute = name.partition(":")
    if not (separator and module_name and attribute):
        raise ValueError(f"{name!r} names no function: write it as package.module:function")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` has it; a console script does not
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code
        raise ValueError(f"{name}: cannot import {module_name} ({type(error).__name__}: {one_line(error)})") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"{name}: {module_name} has no function {attribute!r}")
    return function
