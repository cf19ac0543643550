"""Which of a run's checkpoints stay: the newest, those of every so many steps, and the best by a metric.

What was measured at its step lies in a checkpoint's own metadata, so that which is best outlives the process and a cut
log. Reads nothing else of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VALIDATION = "validation_loss"  # begins the names of what evaluations measure
MEASURED = "metrics"  # the key of the metadata that holds the numbers of the step
META_FILE = Path("meta", "metadata")
_DIRECTIONS = ("min", "max")


@dataclass(frozen=True)
class Metric:
    """A number that tells checkpoints apart, and whether the largest of it is the best."""

    name: str = VALIDATION
    largest: bool = False

    @classmethod
    def parse(cls, text: str) -> Metric:
        """What `validation_loss`, `min loss` or `max accuracy` means; without a word before it, the least is the best.

        ValueError for anything else.
        """
        *direction, name = text.split() or [""]
        if not name or name in _DIRECTIONS or direction not in ([], ["min"], ["max"]):
            raise ValueError(f"{text!r} is no metric to go by; write its name, or `min NAME`, or `max NAME`")
        return cls(name, direction == ["max"])

    @property
    def evaluated(self) -> bool:
        """Whether an evaluation measures it, and not every step."""
        return self.name.partition("/")[0] == VALIDATION

    def best(self, values: Mapping[int, float | None], count: int) -> list[int]:
        """The steps of the best values, the best first and the newer of equal ones before the older; a step without a
        value is never among them."""
        sign = -1.0 if self.largest else 1.0
        ranked = sorted((sign * value, -step) for step, value in values.items() if value is not None)
        return [-step for _, step in ranked[:count]]


def to_remove(steps: Sequence[int], *, keep_last: int, keep_every: int | None, best: Collection[int] = ()) -> list[int]:
    """The steps (oldest first) that nothing keeps: neither among the newest nor divisible by `keep_every` nor best."""
    return [s for s in steps[:-keep_last] if (keep_every is None or s % keep_every) and s not in best]


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among metrics: what checkpoints remember and are compared by."""
    return {n: v for n, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}


def measured(checkpoint: Path) -> dict[str, float]:
    """The numbers that were measured at a checkpoint's step; empty where it does not say.

    OSError where it cannot be read, which says nothing about how good it is.
    """
    found = _meta(checkpoint).get(MEASURED)
    return numbers_of(found) if isinstance(found, dict) else {}


def metric_of(checkpoint: Path) -> Metric:
    """What the run that wrote a checkpoint goes by; the usual one where it does not say. OSError as `measured`."""
    try:
        return Metric.parse(_meta(checkpoint)["config"]["checkpoint"]["best_metric"])
    except (KeyError, TypeError, AttributeError, ValueError):
        return Metric()


def _meta(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's metadata; empty where it is not there or damaged."""
    try:
        found = json.loads((checkpoint / META_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
