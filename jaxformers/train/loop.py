"""A training run from its first step to its last: the only place with clocks and signals.

Given the pieces (state, compiled functions, data, checkpoints), it takes steps, speaks about them, evaluates, saves,
and stops cleanly when asked to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax

from jaxformers.parallel.distributed import agree
from jaxformers.train.checkpoint import Checkpointer
from jaxformers.train.config import GuardConfig, TrainConfig
from jaxformers.train.goodput import Goodput, Purpose
from jaxformers.train.monitor import Display, Trackers
from jaxformers.train.profile import Profiler
from jaxformers.train.recheck import Step, step_twice
from jaxformers.train.requests import Requests, catch_signals
from jaxformers.train.retention import MEASURED, numbers_of
from jaxformers.train.state import TrainState
from jaxformers.train.watch import Diverged, Watch
from jaxformers.train.watchdog import Watchdog


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


@dataclass
class Result:
    """How a run ended. `state` is in the form that checkpoints hold; `stopped` names what ended it early: a signal, or
    the time limit; `frozen` is what the run held beside what it trained."""

    state: TrainState
    step: int
    metrics: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    stopped: str | None = None
    frozen: Any = None


@dataclass(frozen=True)
class Supervision:
    """What looks after a run.

    `go_back(state)` gives the newest checkpoint's state at the step of the given one, whose data are left out;
    `replay()` the newest checkpoint's state with the data moved to where they were then; both None where there is no
    checkpoint.
    """

    guard: GuardConfig
    watchdog: Watchdog
    goodput: Goodput
    requests: Requests
    go_back: Callable[[TrainState], TrainState | None]
    replay: Callable[[], TrainState | None]


def train(
    program: Program,
    state: TrainState,
    batches: Iterator[Any],
    validation: Mapping[str, Sequence[Any]],
    config: TrainConfig,
    *,
    place: Callable[[Any], Any],
    checkpointer: Checkpointer,
    meta: dict[str, Any],
    supervision: Supervision,
    trackers: Trackers,
    display: Display,
    profile: Callable[[Callable[[], AbstractContextManager[None]]], Profiler],
    evaluate_first: bool = False,
) -> Result:
    """Takes steps until `config.steps`, a request to stop, or the end of the data; saves the last state either way.

    `validation` are batches by the name of their source; evaluate_first: they are read before the first step too.
    `profile` makes what traces steps, given a block in which no step's time passes. `place` puts a host batch on the
    mesh. On SIGTERM or SIGINT, and before a time limit, the step in progress is finished and saved; on SIGUSR1 the run
    saves and goes on.
    CheckpointError if a save fails; Diverged where guards end the run.
    """
    step, first_step = int(state.step), int(state.step)
    validation_metrics: dict[str, float] = {}
    goodput, requests = supervision.goodput, supervision.requests
    reporter = Reporter(program, config.steps, place, trackers, display, goodput)
    watch = Watch(supervision.guard, state.guard, display.say)

    @contextmanager
    def compiling() -> Iterator[None]:
        with supervision.watchdog.at_ease(), goodput.on("compile"):
            yield

    @contextmanager
    def pause(purpose: Purpose) -> Iterator[None]:
        with reporter.paused(), supervision.watchdog.at_ease(), goodput.on(purpose):
            yield

    def follow(state: TrainState) -> TrainState:
        """Hands on the metrics that are pending, and does what guards ask for."""
        reported = reporter.report()
        if reported is None:
            return state
        checkpointer.check_measured(reporter.metrics)
        if not watch.look(reported, reporter.metrics):
            return state
        with pause("restart"):
            return _gone_back(state, supervision.go_back, watch, display)

    def said() -> dict[str, Any]:
        """What a checkpoint of this step says."""
        return {**meta, MEASURED: reporter.measured(step)}

    def asked() -> Requests:
        asks = jax.process_count() == 1 or step % config.log_every == 0
        requests.settle(asks=asks, reserve=2 * checkpointer.longest_save_seconds)
        return requests

    profiler = profile(partial(pause, "profile"))
    goodput.turn_to("compile")
    known: set[Step] = set()  # those compiled
    with catch_signals(requests), supervision.watchdog, profiler.running():
        if evaluate_first:
            with pause("evaluate"):
                reporter.validate(step, state.model, validation)
        while step < config.steps and asked().stop is None:
            try:
                with goodput.on("data"):
                    batch = place(next(batches))
            except StopIteration:
                display.say(f"the data ends at step {step}")
                break
            every, compute = supervision.guard.recheck_every, program.step_at(step + 1)
            profiler.before(step + 1)
            compiles = nullcontext() if not known or compute in known else compiling()
            known.add(compute)
            if every is not None and (step + 1) % every == 0:
                with compiles:
                    state, metrics, found = step_twice(compute, state, batch)
                if agree(bool(found)):
                    with pause("restart"):
                        state = _replayed(step + 1, found, supervision.replay, watch, display)
                    step = int(state.step)
                    reporter.go_on_from(step)
                    continue
            else:
                with compiles, profiler.named(step + 1):
                    state, metrics = compute(state, batch)
                profiler.after(step + 1, metrics)
            step += 1
            if step == first_step + 1:
                jax.block_until_ready(metrics)
                goodput.turn_to("productive")
            supervision.watchdog.beat()
            # The metrics of the step before have arrived by now, while this step is computed.
            state = follow(state)
            if step % config.log_every == 0 or step == config.steps:
                reporter.pending = (step, metrics)
            evaluates = config.eval_every is not None and step % config.eval_every == 0 and step < config.steps
            due = "store" if requests.save else checkpointer.is_due(step)
            saves = due is not None and step < config.steps
            if evaluates or saves:
                state = follow(state)
            if evaluates:
                with pause("evaluate"):
                    reporter.validate(step, state.model, validation)
            if saves:
                with pause("checkpoint"):
                    checkpointer.save(program.to_plain(state), batches, said(), place=due)
        state = follow(state)
        with pause("evaluate"):
            requests.settle(asks=True, reserve=0.0)
            if requests.stop is None:
                validation_metrics = reporter.validate(step, state.model, validation)
        with pause("checkpoint"):
            frozen, state = state.frozen, program.to_plain(state)
            checkpointer.save(state, batches, said())
            checkpointer.wait()
    trackers.log(step, goodput.measured())
    display.say(f"time: {goodput}")
    return Result(state, step, reporter.metrics, validation_metrics, requests.stop, frozen)


def _gone_back(
    state: TrainState, go_back: Callable[[TrainState], TrainState | None], watch: Watch, display: Display
) -> TrainState:
    before = go_back(state)
    if before is None:
        display.say("there is no checkpoint yet to go back to")
        return state
    lost = int(before.guard.skipped) - int(state.guard.skipped)
    display.say(f"went back to the newest checkpoint; {lost} more updates are left out")
    watch.went_back(before.guard)
    return before


def _replayed(
    step: int, found: Sequence[str], replay: Callable[[], TrainState | None], watch: Watch, display: Display
) -> TrainState:
    where = "; ".join(found) or "on other processes"
    before = replay()
    if before is None:
        raise Diverged(
            f"step {step}: computed twice with two results ({where}), and there is no checkpoint to go back to"
        )
    display.say(f"step {step}: computed twice with two results ({where}); going back to step {int(before.step)}")
    watch.went_back(before.guard)
    return before


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
