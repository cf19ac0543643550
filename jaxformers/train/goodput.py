"""Where the time of a run goes: its goodput is the share of it in which the model learned."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Purpose = Literal["productive", "compile", "data", "evaluate", "checkpoint", "profile", "restart"]
PURPOSES: tuple[Purpose, ...] = ("productive", "compile", "data", "evaluate", "checkpoint", "profile", "restart")
_NAMES = {
    "productive": "taking steps",
    "compile": "compiling",
    "data": "waiting for data",
    "evaluate": "evaluating",
    "checkpoint": "waiting for checkpoints",
    "profile": "writing profiles",
    "restart": "starting, and repeating steps",
}


class Goodput:
    """Seconds by purpose. Every moment counts for one: what is not claimed by a block is productive.

    started: `time.perf_counter()` when the run began to exist; until the first step all is `restart`.
    """

    def __init__(self, *, started: float):
        self.seconds: dict[Purpose, float] = dict.fromkeys(PURPOSES, 0.0)
        self._purpose: Purpose = "restart"
        self._since = started

    def turn_to(self, purpose: Purpose) -> None:
        """From now on time goes to this."""
        now = time.perf_counter()
        self.seconds[self._purpose] += now - self._since
        self._purpose, self._since = purpose, now

    @contextmanager
    def on(self, purpose: Purpose) -> Iterator[None]:
        """Time inside goes to this, and behind it to what it went to before."""
        before = self._purpose
        self.turn_to(purpose)
        try:
            yield
        finally:
            self.turn_to(before)

    def repeat(self, seconds: float) -> None:
        """So many productive seconds are made again: those of steps behind the checkpoint that the run came back to."""
        self.seconds["restart"] += seconds

    def measured(self) -> dict[str, float]:
        """`goodput` (0 to 1) and `seconds/PURPOSE`, up to now."""
        self.turn_to(self._purpose)
        total = sum(self.seconds.values())
        shares = {f"seconds/{purpose}": seconds for purpose, seconds in self.seconds.items()}
        return {"goodput": self.seconds["productive"] / total if total else 0.0, **shares}

    def __str__(self) -> str:
        total = sum(self.seconds.values()) or 1.0
        spent = sorted(self.seconds.items(), key=lambda item: -item[1])
        return ", ".join(f"{100 * seconds / total:.1f}% {_NAMES[name]}" for name, seconds in spent if seconds > 0)
