"""Runs as the data of a page, and the page around them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jaxformers.report.read import Run, read_run

MOST_POINTS = 2000  # of a line; a longer one keeps the lowest and highest of each stretch
MOST_COLUMNS = 240  # of a heat map
_IN_LAYER = re.compile(r"(?P<measure>.+)/layers\.(?P<layer>\d+)(?:\.(?P<kind>.+))?")


def write_report(paths: Sequence[Path], output: Path) -> None:
    """Writes the page about the runs in these directories. ValueError where one holds none, or is given twice."""
    runs = [read_run(path) for path in paths]
    twice = [run.path for run in runs if [other.path.resolve() for other in runs].count(run.path.resolve()) > 1]
    if twice:
        raise ValueError(f"the run {twice[0]} is given twice")
    output.write_text(render(runs), encoding="utf-8")


def render(runs: Sequence[Run]) -> str:
    """The page as HTML."""
    names = _short_names([run.path for run in runs])
    data = {"runs": [_run_data(run, name) for run, name in zip(runs, names, strict=True)]}
    # A text of a run may hold anything, also what would end the script.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    here = files(__package__)
    parts = {name: (here / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")}
    page = parts["page.html"].replace("{{css}}", parts["page.css"]).replace("{{title}}", _escape(", ".join(names)))
    return page.replace("{{script}}", parts["page.js"]).replace("{{data}}", text)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _short_names(paths: Sequence[Path]) -> list[str]:
    """As many of each path's last parts as it takes to tell them apart."""
    parts = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(path[-count:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _run_data(run: Run, name: str) -> dict[str, Any]:
    wanted = (run.config.get("train") or {}).get("steps")
    return {
        "name": name,
        "path": str(run.path),
        "step": run.step,
        "steps": wanted if isinstance(wanted, int) else None,
        "axes": _axes(run.lines),
        "series": {name: _thinned(points) for name, points in _series(run.lines).items()},
        "layers": _layers(run.lines),
        "experts": _experts(run.lines),
        "time": _time(run.lines),
        "about": {key: value for key, value in run.about.items() if key != "versions"},
        "versions": run.about.get("versions") or {},
        "config": {key: json.dumps(value, ensure_ascii=False) for key, value in _flat(run.config)},
        "samples": list(run.samples),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short(value: float | None) -> float | None:
    """Six digits are more than a plot shows; what is not finite has no place in it."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def _axes(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Tokens read, and hours taken, by step: what a plot may have along its x axis."""
    steps, tokens, hours, spent, before = [], [], [], 0.0, 0
    for line in lines:
        if _is_number(line.get("tokens")) and _is_number(line.get("step_seconds")):
            spent += line["step_seconds"] * (line["step"] - before) / 3600
            before = line["step"]
            steps.append(line["step"])
            tokens.append(line["tokens"])
            hours.append(spent)
    keep = sorted({*range(0, len(steps), max(len(steps) // MOST_POINTS, 1)), *range(len(steps))[-1:]})
    return {
        "step": [steps[i] for i in keep],
        "tokens": [tokens[i] for i in keep],
        "hours": [_short(hours[i]) or 0.0 for i in keep],
    }


def _series(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float | None]]]:
    """The numbers of all lines by their name; null (not a number) is a gap. What layers say is elsewhere."""
    found: dict[str, list[tuple[int, float | None]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and not _IN_LAYER.fullmatch(name) and (value is None or _is_number(value)):
                found.setdefault(name, []).append((line["step"], value))
    return {
        name: points
        for name, points in found.items()
        if not name.startswith("seconds/") and any(value is not None for _, value in points)
    }


def _thinned(points: Sequence[tuple[int, float | None]]) -> dict[str, list[float | None]]:
    """A series as x and y; of a long one, the lowest and the highest point of each of many stretches."""
    if len(points) > MOST_POINTS:
        width = math.ceil(2 * len(points) / MOST_POINTS)
        kept: list[tuple[int, float | None]] = []
        for first in range(0, len(points), width):
            kept += _ends([*points[first : first + width]])
        points = kept
    return {"x": [step for step, _ in points], "y": [_short(value) for _, value in points]}


def _ends(stretch: list[tuple[int, float | None]]) -> list[tuple[int, float | None]]:
    there = [point for point in stretch if point[1] is not None]
    if not there:
        return stretch[:1]
    ends = {min(there, key=lambda point: point[1]), max(there, key=lambda point: point[1])}
    return sorted(ends, key=lambda point: point[0])


def _layers(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """measure -> {steps, kinds: {kind: {layers, values [layers][steps]}}}; of a list, such as one with a number for
    each head, its largest."""
    found: dict[str, dict[str, dict[int, dict[int, float | None]]]] = {}
    for line in lines:
        for name, value in line.items():
            match = _IN_LAYER.fullmatch(name)
            if match is None:
                continue
            numbers = [v for v in (value if isinstance(value, list) else [value]) if _is_number(v)]
            kinds = found.setdefault(match["measure"], {})
            rows = kinds.setdefault(match["kind"] or "", {})
            rows.setdefault(int(match["layer"]), {})[line["step"]] = max(numbers, default=None)
    return {measure: _heat(kinds) for measure, kinds in found.items()}


def _heat(kinds: Mapping[str, Mapping[int, Mapping[int, float | None]]]) -> dict[str, Any]:
    steps = sorted({step for rows in kinds.values() for by_step in rows.values() for step in by_step})
    if len(steps) > MOST_COLUMNS:
        steps = [steps[i * (len(steps) - 1) // (MOST_COLUMNS - 1)] for i in range(MOST_COLUMNS)]
    return {
        "steps": steps,
        "kinds": {
            kind: {
                "layers": sorted(rows),
                "values": [[_short(rows[layer].get(step)) for step in steps] for layer in sorted(rows)],
            }
            for kind, rows in kinds.items()
        },
    }


def _experts(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The last measured load of each expert, by layer; 1 is an even one."""
    for line in reversed(lines):
        loads = {
            int(match["layer"]): value
            for name, value in line.items()
            if (match := _IN_LAYER.fullmatch(name)) and match["measure"] == "expert_load" and isinstance(value, list)
        }
        if loads:
            layers = sorted(loads)
            return {
                "step": line["step"],
                "layers": layers,
                "load": [[_short(v) if _is_number(v) else None for v in loads[layer]] for layer in layers],
            }
    return None


def _time(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by purpose, from the account at the end of a run; empty where it has not come yet."""
    for line in reversed(lines):
        seconds = {name.removeprefix("seconds/"): v for name, v in line.items() if name.startswith("seconds/")}
        if seconds:
            return {name: _short(value) or 0.0 for name, value in seconds.items() if _is_number(value)}
    return {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
