"""What `jaxformers models` shows: every model type, what the tests prove of it, and the published sizes it has."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources

from jaxformers.families import FAMILIES, read_config
from jaxformers.families.catalog import Published, published

# What a task has to have been compared with: gradients; greedy and cached tokens; import and export, bit for bit.
TASKS = ("train", "generate", "convert")


@dataclass(frozen=True)
class Size:
    """One published size. context in tokens, None for a type that cannot be read."""

    name: str
    parameters: str
    context: int | None
    hub_id: str | None


@dataclass(frozen=True)
class TypeRow:
    """One model type. status says of each task: proved (the tests compare it with its reference), loads (checkpoints
    are read and written by its tables, untried) or untested."""

    model_type: str
    status: dict[str, str]
    sizes: tuple[Size, ...]


@functools.cache
def proved() -> dict[str, frozenset[str]]:
    """The model types that the tests compare with their reference, by task. A test keeps this equal to their matrix."""
    text = resources.files("jaxformers.families").joinpath("proved.json").read_text(encoding="utf-8")
    return {task: frozenset(types) for task, types in json.loads(text).items()}


def list_types(only: str | None = None) -> list[TypeRow]:
    """Every model type with its sizes, or those whose type, lineage or size contains `only`, in any case.

    ValueError with the nearest name if nothing does.
    """
    entries = published().values()
    types = sorted(set(FAMILIES) | {entry.model_type for entry in entries})
    rows = [_row(name, [entry for entry in entries if entry.model_type == name], only or "") for name in types]
    found = [row for row in rows if row is not None]
    if not found:
        near = get_close_matches(str(only).lower(), [*types, *published()], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "without an argument all are listed"
        raise ValueError(f"no model type, lineage or size contains {only!r}; {hint}")
    return found


def _row(model_type: str, entries: Iterable[Published], only: str) -> TypeRow | None:
    """The row of a type that matches, with all its sizes, or with those that match; None if nothing does."""
    wanted = only.lower()
    if wanted not in model_type.lower():
        entries = [entry for entry in entries if wanted in entry.name or wanted in entry.lineage.lower()]
        if not entries:
            return None
    status = {task: _status(model_type, task) for task in TASKS}
    return TypeRow(model_type, status, tuple(map(_size, entries)))


def _status(model_type: str, task: str) -> str:
    if model_type in proved()[task]:
        return "proved"
    return "loads" if task == "convert" and model_type in FAMILIES else "untested"


def _size(entry: Published) -> Size:
    count = entry.parameters
    shown = f"{count:,}" if isinstance(count, int) else count or "unpublished"
    context = read_config(entry.config).context_length if entry.model_type in FAMILIES else None
    return Size(entry.name, shown, context, entry.hub_id)


def describe_types(rows: Iterable[TypeRow]) -> str:
    """The rows for people: a line a type, and below it a line a size."""
    lines = []
    for row in rows:
        lines.append(f"{row.model_type:18}" + "  ".join(f"{task}: {row.status[task]}" for task in TASKS))
        lines += [
            f"  {size.name:30}{size.parameters:>16}{_tokens(size.context):>11}  {size.hub_id or ''}".rstrip()
            for size in row.sizes
        ]
    return "\n".join(lines)


def _tokens(context: int | None) -> str:
    return "" if context is None else f"{context:,}"
