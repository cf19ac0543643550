"""What a run says about itself: metrics.jsonl, all who listen to its lines, and the terminal."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"
ABOUT_FILE = "about.json"  # the model, its size, the mesh, what it all runs on
SAMPLES_FILE = "samples.json"  # how a finished run continues its sample prompts
Metrics = Mapping[str, Any]


class Tracker(Protocol):
    """Somewhere metrics go. `log` gets every line of metrics.jsonl."""

    def log(self, step: int, metrics: Metrics) -> None: ...
    def close(self) -> None: ...


class MetricsFile:
    """RUN/metrics.jsonl: one JSON object a step. On a resume from step k, and where a run goes back to it, lines after
    k are dropped, as those steps are made again; `lost_seconds` is what a resume's took."""

    def __init__(self, run_dir: Path, *, resume_step: int):
        self._path, self._last = run_dir / METRICS_FILE, resume_step
        lost = [line for line in _lines(self._path) if _step(line) > resume_step] if resume_step else []
        self.lost_seconds = sum(map(_step_seconds, lost))
        self._keep(resume_step)

    def _keep(self, last: int) -> None:
        """Drops what is behind a step."""
        kept = [line for line in _lines(self._path) if _step(line) <= last] if last else []
        temporary = self._path.with_suffix(".writing")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Metrics) -> None:
        if step < self._last:
            self._file.close()
            self._keep(step - 1)
        self._last = step
        values = {name: _plain(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def _step(line: str) -> float:
    """The step of a line; a line cut short by a kill belongs to no step that is kept."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def _step_seconds(line: str) -> float:
    try:
        seconds = json.loads(line)["step_seconds"]
    except (ValueError, KeyError, TypeError):
        return 0.0
    return seconds if isinstance(seconds, float) else 0.0


def _plain(value: Any) -> Any:
    """A number JSON has: it lacks NaN and infinities, which become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Trackers:
    """All trackers of a run. One that fails is named in the log and left out from then on; training goes on."""

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = list(trackers)

    def log(self, step: int, metrics: Metrics) -> None:
        for tracker in list(self._trackers):
            try:
                tracker.log(step, metrics)
            except Exception as error:
                log.warning("%s failed at step %d and is off from now on: %s", type(tracker).__name__, step, error)
                self._trackers.remove(tracker)
                _close(tracker)

    def close(self) -> None:
        for tracker in self._trackers:
            _close(tracker)


def _close(tracker: Tracker) -> None:
    try:
        tracker.close()
    except Exception as error:
        log.warning("%s failed to close: %s", type(tracker).__name__, error)


class Display:
    """The run on the terminal: a progress bar, or a line every few seconds where output is no terminal."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, *, first_step: int, steps: int, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self._steps = steps
        self._spoke_at = -math.inf
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=first_step, shown="")
        self._bar.start()

    def update(self, step: int, metrics: Metrics, *, seconds_left: float) -> None:
        shown = describe(metrics)
        self._bar.update(self._task, completed=step, shown=shown)
        due = time.monotonic() - self._spoke_at >= self.SECONDS_BETWEEN_LINES or step == self._steps
        if due and not self.console.is_terminal:
            self.say(f"step {step}/{self._steps}  {shown}  {seconds_left:.0f}s left")
            self._spoke_at = time.monotonic()

    def say(self, text: str) -> None:
        """A line of its own above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


def describe(metrics: Metrics) -> str:
    """The few metrics a person watches, in one line."""
    parts = [f"loss {metrics['loss']:.3f}", f"{metrics['tokens_per_second']:,.0f} tok/s"]
    if metrics.get("mfu") is not None:
        parts.append(f"MFU {100 * metrics['mfu']:.0f}%")
    return "  ".join(parts)
