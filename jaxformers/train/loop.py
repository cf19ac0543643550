"""A training run from its first step to its last: the only place with signals.

Given the pieces (state, compiled functions, data, checkpoints), it takes steps, speaks about them, evaluates, saves,
and stops cleanly when asked to.
"""

from __future__ import annotations

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
from jaxformers.train.reporting import Program, Reporter
from jaxformers.train.requests import Requests, catch_signals
from jaxformers.train.retention import MEASURED
from jaxformers.train.state import TrainState
from jaxformers.train.watch import Diverged, Watch
from jaxformers.train.watchdog import Watchdog


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
    reporter = Reporter(program, config.steps, place, trackers, display, supervision.goodput)
    run = _Run(program, state, batches, validation, config, place, checkpointer, meta, supervision, display, reporter)
    profiler = profile(partial(run.pause, "profile"))
    supervision.goodput.turn_to("compile")
    with catch_signals(supervision.requests), supervision.watchdog, profiler.running():
        if evaluate_first:
            run.evaluate()
        run.take_steps(profiler)
        result = run.end()
    trackers.log(result.step, supervision.goodput.measured())
    display.say(f"time: {supervision.goodput}")
    return result


class _Run:
    """A run while it goes on: where it is, and everybody who has to do with it."""

    def __init__(
        self,
        program: Program,
        state: TrainState,
        batches: Iterator[Any],
        validation: Mapping[str, Sequence[Any]],
        config: TrainConfig,
        place: Callable[[Any], Any],
        checkpointer: Checkpointer,
        meta: dict[str, Any],
        supervision: Supervision,
        display: Display,
        reporter: Reporter,
    ):
        self._program, self._config, self._place = program, config, place
        self._batches, self._validation = batches, validation
        self._checkpointer, self._meta, self._supervision = checkpointer, meta, supervision
        self._display, self._reporter = display, reporter
        self._watch = Watch(supervision.guard, state.guard, display.say)
        self._state, self._step, self._first_step = state, int(state.step), int(state.step)
        self._compiled: set[Step] = set()

    @contextmanager
    def pause(self, purpose: Purpose) -> Iterator[None]:
        """A block in which no step's time passes, and that may take as long as it needs."""
        supervision = self._supervision
        with self._reporter.paused(), supervision.watchdog.at_ease(), supervision.goodput.on(purpose):
            yield

    def take_steps(self, profiler: Profiler) -> None:
        """Step after step, with what is due between them."""
        while self._step < self._config.steps and self._settled().stop is None:
            try:
                with self._supervision.goodput.on("data"):
                    batch = self._place(next(self._batches))
            except StopIteration:
                self._display.say(f"the data ends at step {self._step}")
                return
            metrics = self._compute(batch, profiler)
            if metrics is not None:
                self._step += 1
                self._attend_to(metrics)

    def _settled(self) -> Requests:
        """What is asked of the run, agreed upon by all processes where they look."""
        asks = jax.process_count() == 1 or self._step % self._config.log_every == 0
        self._supervision.requests.settle(asks=asks, reserve=2 * self._checkpointer.longest_save_seconds)
        return self._supervision.requests

    def _compute(self, batch: Any, profiler: Profiler) -> dict[str, jax.Array] | None:
        """The next step's metrics; None where it was computed twice with two results, and the run went back."""
        step, every = self._step + 1, self._supervision.guard.recheck_every
        compute = self._program.step_at(step)
        profiler.before(step)
        # The first of all is part of the start, which counts as compiling anyway.
        compiles = nullcontext() if not self._compiled or compute in self._compiled else self._compiling()
        self._compiled.add(compute)
        if every is None or step % every:
            with compiles, profiler.named(step):
                self._state, metrics = compute(self._state, batch)
            profiler.after(step, metrics)
            return metrics
        with compiles:
            self._state, metrics, found = step_twice(compute, self._state, batch)
        if not agree(bool(found)):
            return metrics
        with self.pause("restart"):
            self._replay(step, found)
        self._reporter.go_on_from(self._step)
        return None

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        with self._supervision.watchdog.at_ease(), self._supervision.goodput.on("compile"):
            yield

    def _replay(self, step: int, found: Sequence[str]) -> None:
        """Goes back to the newest checkpoint, and to the data that came behind it. Diverged where there is none."""
        where = "; ".join(found) or "on other processes"
        before = self._supervision.replay()
        if before is None:
            raise Diverged(
                f"step {step}: computed twice with two results ({where}), and there is no checkpoint to go back to"
            )
        self._state, self._step = before, int(before.step)
        self._display.say(f"step {step}: computed twice with two results ({where}); going back to step {self._step}")
        self._watch.went_back(before.guard)

    def _attend_to(self, metrics: dict[str, jax.Array]) -> None:
        """What is due behind a step: its report, guards, an evaluation, a checkpoint."""
        step, config = self._step, self._config
        if step == self._first_step + 1:
            jax.block_until_ready(metrics)
            self._supervision.goodput.turn_to("productive")
        self._supervision.watchdog.beat()
        self._follow()  # the metrics of the step before have arrived by now, while this step is computed
        is_last = step == config.steps
        if step % config.log_every == 0 or is_last:
            self._reporter.pending = (step, metrics)
        evaluates = config.eval_every is not None and step % config.eval_every == 0 and not is_last
        due = "store" if self._supervision.requests.save else self._checkpointer.is_due(step)
        saves = due is not None and not is_last
        if evaluates or saves:
            self._follow()
        if evaluates:
            self.evaluate()
        if saves:
            with self.pause("checkpoint"):
                state = self._program.to_plain(self._state)
                self._checkpointer.save(state, self._batches, self._said(), place=due)

    def _follow(self) -> None:
        """Hands on the metrics that are pending, and does what guards ask for."""
        reported = self._reporter.report()
        if reported is None:
            return
        self._checkpointer.check_measured(self._reporter.metrics)
        if self._watch.look(reported, self._reporter.metrics):
            with self.pause("restart"):
                self._go_back()

    def _go_back(self) -> None:
        """To the newest checkpoint's state, if there is one; the data since then are left out."""
        before = self._supervision.go_back(self._state)
        if before is None:
            self._display.say("there is no checkpoint yet to go back to")
            return
        lost = int(before.guard.skipped) - int(self._state.guard.skipped)
        self._display.say(f"went back to the newest checkpoint; {lost} more updates are left out")
        self._watch.went_back(before.guard)
        self._state = before

    def evaluate(self) -> dict[str, float]:
        """The validation losses of the parameters as they are."""
        with self.pause("evaluate"):
            return self._reporter.validate(self._step, self._state.model, self._validation)

    def _said(self) -> dict[str, Any]:
        """What a checkpoint of this step says."""
        return {**self._meta, MEASURED: self._reporter.measured(self._step)}

    def end(self) -> Result:
        """The last report, evaluation and checkpoint."""
        self._follow()
        requests, validation = self._supervision.requests, {}
        requests.settle(asks=True, reserve=0.0)
        if requests.stop is None:
            validation = self.evaluate()
        with self.pause("checkpoint"):
            frozen, state = self._state.frozen, self._program.to_plain(self._state)
            self._state = state  # lets go of the form that it ran in
            self._checkpointer.save(state, self._batches, self._said())
            self._checkpointer.wait()
        return Result(state, self._step, self._reporter.metrics, validation, requests.stop, frozen)
