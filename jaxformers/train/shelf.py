"""The checkpoints on a run's shelf: which there are, in which state, and which may go.

Looks only at folders, files and their checksums; reads no array.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxformers.train.checkpoint import FOLDER, UNFINISHED, CheckpointError, is_step, remove, to_remove
from jaxformers.train.integrity import find_damage
from jaxformers.train.monitor import METRICS_FILE

Condition = Literal["whole", "damaged", "set aside", "unfinished"]


@dataclass(frozen=True)
class Entry:
    """A checkpoint's folder. nbytes: of its files; written: seconds since 1970; validation_loss in nats, where the run
    evaluated at that step; damage: what is wrong with its files, each in a few words."""

    path: Path
    step: int | None
    condition: Condition
    nbytes: int
    written: float
    validation_loss: float | None = None
    damage: tuple[str, ...] = ()


def find_checkpoints(ref: str | Path) -> list[Path]:
    """The complete checkpoints that a run directory (or one checkpoint's folder) means, oldest first.

    A run without config.yaml is one too: what is left of it may be looked at. ValueError for anything else.
    """
    path = Path(ref).expanduser().absolute()
    if not path.exists():
        raise ValueError(f"{ref}: no such file or directory")
    if path.parent.name == FOLDER and path.is_dir() and path.name.partition(".")[0].isdecimal():
        return [path]
    folder = shelf_of(path)
    return sorted((p for p in folder.iterdir() if p.is_dir() and is_step(p.name)), key=lambda p: int(p.name))


def shelf_of(run: Path) -> Path:
    """The folder of a run's checkpoints. ValueError where it has none."""
    if not (run / FOLDER).is_dir():
        raise ValueError(f"{run} is no run directory: it has no {FOLDER} folder; name a run or one of its checkpoints")
    return run / FOLDER


def list_checkpoints(run: Path) -> list[Entry]:
    """Every folder on the shelf, by step. Files are compared with their checksums' list by name and size, not read."""
    losses = validation_losses(run)
    entries = []
    for path in shelf_of(run).iterdir():
        if not path.is_dir():
            continue
        step, condition = _told_by_name(path)
        damage = find_damage(path, contents=False) if condition == "whole" else []
        loss = losses.get(step) if step is not None and condition == "whole" else None
        files = [file.stat() for file in path.rglob("*") if file.is_file()]
        written = path.stat().st_mtime
        condition = "damaged" if damage else condition
        size = sum(file.st_size for file in files)
        entries.append(Entry(path, step, condition, size, written, loss, tuple(damage)))
    return sorted(entries, key=lambda entry: (-1 if entry.step is None else entry.step, entry.path.name))


def _told_by_name(path: Path) -> tuple[int | None, Condition]:
    if path.name.startswith(UNFINISHED):
        number = path.name.removeprefix(UNFINISHED).removeprefix("removed-").partition(".")[0]
        return (int(number) if number.isdecimal() else None), "unfinished"
    number, dot, _ = path.name.partition(".")
    if not number.isdecimal():
        return None, "unfinished"
    return int(number), "set aside" if dot else "whole"


def validation_losses(run: Path) -> dict[int, float]:
    """The validation loss of each step that metrics.jsonl has one of."""
    path = run / METRICS_FILE
    losses = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            values = json.loads(line)
        except ValueError:
            continue  # a line cut short by a kill
        if isinstance(values, dict) and values.get("validation_loss") is not None and "step" in values:
            losses[values["step"]] = values["validation_loss"]
    return losses


@dataclass(frozen=True)
class Chosen:
    """Checkpoints to remove, and the steps that stay."""

    going: tuple[Path, ...]
    staying: tuple[int, ...]


def choose(
    run: Path,
    *,
    steps: Sequence[int] = (),
    keep_last: int | None = None,
    keep_every: int | None = None,
    damaged: bool = False,
) -> Chosen:
    """Which checkpoints go: the steps named, those that retention does not keep, and the damaged ones (those that a run
    has set aside too). ValueError where nothing is asked for or a step is not there."""
    if keep_every is not None and keep_last is None:
        raise ValueError("--keep-every says which of the older checkpoints stay beside --keep-last; give both")
    if not (steps or keep_last is not None or damaged):
        raise ValueError("say which checkpoints to remove: --step, --keep-last, or --damaged")
    folder = shelf_of(run)
    present = [int(path.name) for path in find_checkpoints(run)]
    if unknown := [step for step in steps if step not in present]:
        there = ", ".join(map(str, present)) or "none"
        raise ValueError(f"{folder} has no checkpoint of step {unknown[0]}; there are {there}")
    going = set(steps)
    if keep_last is not None:
        going |= set(to_remove(present, keep_last=keep_last, keep_every=keep_every))
    aside: list[Path] = []
    if damaged:
        going |= {step for step in present if step not in going and find_damage(folder / str(step))}
        aside = sorted(p for p in folder.iterdir() if p.is_dir() and _told_by_name(p)[1] == "set aside")
    paths = [folder / str(step) for step in sorted(going)] + aside
    return Chosen(tuple(paths), tuple(step for step in present if step not in going))


def check_leaves_a_good_one(run: Path, chosen: Chosen) -> None:
    """CheckpointError where the last checkpoint whose files are as they were written would go."""
    folder = shelf_of(run)
    if any(not find_damage(folder / str(step)) for step in reversed(chosen.staying)):
        return
    good = [path for path in chosen.going if path.name.isdecimal() and not find_damage(path)]
    if good:
        newest = max(good, key=lambda path: int(path.name))
        raise CheckpointError(f"{newest} is the last good checkpoint of {run}; --force removes it too")


def remove_chosen(chosen: Chosen) -> None:
    """Removes them. CheckpointError naming the first that cannot be."""
    for path in chosen.going:
        try:
            remove(path)
        except OSError as error:
            raise CheckpointError(f"cannot remove {path}: {error.strerror or error}") from None
