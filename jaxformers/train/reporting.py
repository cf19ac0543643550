"""What a run says of its steps and evaluations: numbers from the devices become lines of metrics.

Clocks stand here and in the loop alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from jaxformers.train.goodput import Goodput
from jaxformers.train.monitor import Display, Trackers
from jaxformers.train.recheck import Step
from jaxformers.train.retention import numbers_of
from jaxformers.train.state import TrainState


@dataclass(frozen=True)
class Program:
    """What a run computes.

    `step(state, batch)` -> (state, metrics); every `measure_every` steps `measured_step`, if given, takes its place and
    measures more; `name(metrics)` gives them as a line of metrics has them. `evaluate(params, batch)` -> (nll sum,
    weight sum); `to_plain(state)` -> the form that checkpoints hold; `tokens_after(step)` counts the positions that the
    first `step` steps read. flops_per_token and peak_flops (of all devices) give MFU; None = unknown.
    """

    step: Step
    evaluate: Callable[[Any, Any], tuple[jax.Array, jax.Array]]
    to_plain: Callable[[TrainState], TrainState]
    tokens_after: Callable[[int], int]
    flops_per_token: float
    peak_flops: float | None
    name: Callable[[dict[str, Any]], dict[str, Any]]
    measured_step: Step | None = None
    measure_every: int = 1

    def step_at(self, step: int) -> Step:
        """What computes this step, counted from 1."""
        measures = self.measured_step is not None and step % self.measure_every == 0
        return self.measured_step if measures else self.step


def evaluate(
    program: Program, params: Any, sources: Mapping[str, Sequence[Any]], place: Callable[[Any], Any]
) -> dict[str, float]:
    """Mean cross-entropy in nats per target over the validation batches of all sources, and where there are several
    also of each; empty where there are none."""
    sums = {name: _sums(program, params, batches, place) for name, batches in sources.items()}
    sums = {name: (nll, weight) for name, (nll, weight) in sums.items() if weight}
    if not sums:
        return {}
    nll, weight = map(sum, zip(*sums.values(), strict=True))
    by_source = {f"validation_loss/{name}": nll / weight for name, (nll, weight) in sums.items()}
    return {"validation_loss": nll / weight, **(by_source if len(sources) > 1 else {})}


def _sums(program: Program, params: Any, batches: Sequence[Any], place: Callable[[Any], Any]) -> tuple[float, float]:
    """Cross-entropy in nats and the weight of its targets, summed."""
    nll = weight = 0.0
    for batch in batches:
        sums = jax.device_get(program.evaluate(params, place(batch)))
        nll, weight = nll + float(sums[0]), weight + float(sums[1])
    return nll, weight


class Reporter:
    """Turns what steps return into lines of metrics. A step's time spans from the line before, with pauses (evaluation,
    saving) left out; the first one includes compilation."""

    def __init__(
        self,
        program: Program,
        steps: int,
        place: Callable[[Any], Any],
        trackers: Trackers,
        display: Display,
        goodput: Goodput,
    ):
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.metrics: dict[str, Any] = {}
        self._program, self._steps, self._place = program, steps, place
        self._trackers, self._display, self._goodput = trackers, display, goodput
        self._last, self._last_step = time.perf_counter(), None
        self._measured: tuple[int, dict[str, float]] = (-1, {})

    def measured(self, step: int) -> dict[str, float]:
        """The finite numbers that this step, and an evaluation after it, have been found to have."""
        return self._measured[1] if self._measured[0] == step else {}

    def _remember(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._measured = (step, self.measured(step) | numbers_of(metrics))

    def report(self) -> int | None:
        """Waits for the pending step's metrics and hands them on. The step, None where none is pending."""
        if self.pending is None:
            return None
        step, values = self.pending
        self.pending, self.metrics = None, self._measure(step, jax.device_get(values))
        self._remember(step, self.metrics)
        self._trackers.log(step, self.metrics)
        seconds_left = (self._steps - step) * self.metrics["step_seconds"]
        self._display.update(step, self.metrics, seconds_left=seconds_left)
        return step

    def go_on_from(self, step: int) -> None:
        """The next step to be measured is the one behind this; what is pending is not reported any more."""
        self.pending, self._last, self._last_step = None, time.perf_counter(), step

    def _measure(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
        now = time.perf_counter()
        before = step - 1 if self._last_step is None else self._last_step
        seconds, tokens = (now - self._last) / (step - before), self._program.tokens_after(step)
        rate = (tokens - self._program.tokens_after(before)) / (now - self._last)
        self._last, self._last_step = now, step
        peak = self._program.peak_flops
        return {
            **self._program.name(values),
            "tokens": tokens,
            "tokens_per_second": rate,
            "step_seconds": seconds,
            "mfu": None if peak is None else rate * self._program.flops_per_token / peak,
            "goodput": self._goodput.measured()["goodput"],
        }

    def validate(self, step: int, params: Any, sources: Mapping[str, Sequence[Any]]) -> dict[str, float]:
        """Evaluates and says so; empty where there is nothing to evaluate on."""
        validation = evaluate(self._program, params, sources, self._place)
        if validation:
            self._remember(step, validation)
            self._trackers.log(step, validation)
            parts = [f"{name.partition('/')[2]} {loss:.4f}" for name, loss in validation.items() if "/" in name]
            said = f" ({', '.join(parts)})" if parts else ""
            self._display.say(f"step {step}: validation loss {validation['validation_loss']:.4f} nats{said}")
        return validation

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count as a step's."""
        start = time.perf_counter()
        yield
        self._last += time.perf_counter() - start
