"""The checkpoints on a run's shelf: which there are, in which state, and which may go.

Looks only at folders, files and their checksums; reads no array.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from jaxformers.train.checkpoint import FOLDER, CheckpointError
from jaxformers.train.folders import UNFINISHED, remove, steps_in
from jaxformers.train.integrity import find_damage
from jaxformers.train.monitor import METRICS_FILE
from jaxformers.train.retention import VALIDATION, Metric, measured, metric_of, to_remove

Condition = Literal["whole", "damaged", "set aside", "unfinished"]


@dataclass(frozen=True)
class Entry:
    """A checkpoint's folder. nbytes: of its files; written: seconds since 1970; validation_loss in nats, where the run
    evaluated at that step; metric and value: what its run tells checkpoints apart by, and what was measured of it at
    that step; best: whether none of the others is better; damage: what is wrong with its files, each in a few words."""

    path: Path
    step: int | None
    condition: Condition
    nbytes: int
    written: float
    validation_loss: float | None = None
    metric: str = VALIDATION
    value: float | None = None
    best: bool = False
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
    return [folder / str(step) for step in steps_in(folder)]


def shelf_of(run: Path) -> Path:
    """The folder of a run's checkpoints. ValueError where it has none."""
    if not (run / FOLDER).is_dir():
        raise ValueError(f"{run} is no run directory: it has no {FOLDER} folder; name a run or one of its checkpoints")
    return run / FOLDER


def list_checkpoints(run: Path) -> list[Entry]:
    """Every folder on the shelf, by step. Files are compared with their checksums' list by name and size, not read,
    but for the metadata, which say what was measured."""
    shelf, losses = shelf_of(run), validation_losses(run)
    metric = _metric(shelf)
    entries = [_entry(path, losses, metric) for path in shelf.iterdir() if path.is_dir()]
    values = {e.step: e.value for e in entries if e.step is not None and e.condition == "whole"}
    best = metric.best(values, 1)
    entries = [replace(e, best=e.condition == "whole" and e.step in best) for e in entries]
    return sorted(entries, key=lambda entry: (-1 if entry.step is None else entry.step, entry.path.name))


def _entry(path: Path, losses: Mapping[int, float], metric: Metric) -> Entry:
    step, condition = _told_by_name(path)
    known: dict[str, float] = {}
    damage: list[str] = []
    if condition == "whole" and step is not None:
        damage = find_damage(path, contents=False)
        known = ({VALIDATION: losses[step]} if step in losses else {}) | _measured(path)
    files = [file.stat() for file in path.rglob("*") if file.is_file()]
    return Entry(
        path,
        step,
        "damaged" if damage else condition,
        nbytes=sum(file.st_size for file in files),
        written=path.stat().st_mtime,
        validation_loss=known.get(VALIDATION),
        metric=metric.name,
        value=known.get(metric.name),
        damage=tuple(damage),
    )


def _metric(shelf: Path) -> Metric:
    """What the run goes by that wrote the newest checkpoint."""
    steps = steps_in(shelf)
    with suppress(OSError):
        return metric_of(shelf / str(steps[-1])) if steps else Metric()
    return Metric()


def _measured(checkpoint: Path) -> dict[str, float]:
    with suppress(OSError):
        return measured(checkpoint)
    return {}


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


def best_of(run: Path, count: int) -> list[int]:
    """The steps of the best whole checkpoints, the best first. ValueError where none says how good it is."""
    metric = _metric(shelf_of(run))
    values = {e.step: e.value for e in list_checkpoints(run) if e.condition == "whole" and e.step is not None}
    if found := metric.best(values, count):
        return found
    raise ValueError(f"no whole checkpoint of {run} has a value of {metric.name}, which --keep-best goes by")


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
    keep_best: int | None = None,
    damaged: bool = False,
) -> Chosen:
    """Which checkpoints go: the steps named, those that retention does not keep, and the damaged ones (those that a run
    has set aside too). ValueError where nothing is asked for or a step is not there."""
    for option, value in (("--keep-every", keep_every), ("--keep-best", keep_best)):
        if value is not None and keep_last is None:
            raise ValueError(f"{option} says which of the older checkpoints stay beside --keep-last; give both")
    if not (steps or keep_last is not None or damaged):
        raise ValueError("say which checkpoints to remove: --step, --keep-last, or --damaged")
    folder = shelf_of(run)
    present = [int(path.name) for path in find_checkpoints(run)]
    if unknown := [step for step in steps if step not in present]:
        there = ", ".join(map(str, present)) or "none"
        raise ValueError(f"{folder} has no checkpoint of step {unknown[0]}; there are {there}")
    going = set(steps)
    if keep_last is not None:
        best = best_of(run, keep_best) if keep_best is not None else []
        going |= set(to_remove(present, keep_last=keep_last, keep_every=keep_every, best=best))
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
