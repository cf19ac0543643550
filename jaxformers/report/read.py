"""What a run directory says of its run, also while the run goes on, and where a kill cut a line short."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jaxformers.train.monitor import ABOUT_FILE, METRICS_FILE, SAMPLES_FILE


@dataclass(frozen=True)
class Run:
    """One run: its metrics a line, its config and what it says of the model and the machine (both by name, values for
    people), and how it continues its sample prompts. All but the metrics may be empty."""

    path: Path
    lines: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]
    about: Mapping[str, Any]
    samples: Sequence[Mapping[str, str]]

    @property
    def step(self) -> int:
        """The last step that it wrote a line of; 0 of none."""
        return max((line["step"] for line in self.lines), default=0)


def read_run(path: Path) -> Run:
    """The run in a directory. ValueError where there is none."""
    metrics, config = path / METRICS_FILE, path / "config.yaml"
    if not path.is_dir():
        raise ValueError(f"{path}: no such run directory")
    if not metrics.is_file():
        raise ValueError(f"{path} holds no {METRICS_FILE}: it is no run, or one that has taken no step yet")
    lines = _lines(metrics)
    if not lines:
        raise ValueError(f"{metrics} has no whole line yet")
    return Run(path, lines, _yaml(config), _json(path / ABOUT_FILE, {}), _json(path / SAMPLES_FILE, []))


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole, in the order of their steps."""
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut short by a kill, or by our reading it while it is written
        if isinstance(line, dict) and type(line.get("step")) is int:
            found.append(line)
    return sorted(found, key=lambda line: line["step"])


def _yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    return values if isinstance(values, dict) else {}


def _json(path: Path, empty: Any) -> Any:
    """What a file holds; `empty` where there is none, or it is not whole."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return empty
    return value if isinstance(value, type(empty)) else empty
