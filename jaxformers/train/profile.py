"""A window of steps that the profiler watches. Its trace opens in Perfetto (https://ui.perfetto.dev) and in XProf."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax

from jaxformers.train.config import ProfileConfig

log = logging.getLogger(__name__)
PROFILE_FOLDER = "profile"


class Profiler:
    """Traces steps of a run into RUN/profile: those that follow the first `start` ones that this process takes.

    A profiler that fails is named in the log, and training goes on.
    """

    def __init__(
        self,
        config: ProfileConfig,
        pause: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        run_dir: Path,
        say: Callable[[str], None],
    ):
        """`pause` is a block in which no step's time passes; beginning and writing a trace take a while."""
        self._config, self._pause, self._folder, self._say = config, pause, run_dir / PROFILE_FOLDER, say
        self._taken = 0
        self._first: int | None = None  # of the window, while it is open

    def before(self, step: int) -> None:
        """Opens the window where it is due."""
        if self._taken == self._config.start:
            with self._pause():
                self._first = step if _done(self._begin) else None
        self._taken += 1

    def _begin(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of a Python function would make steps slow and traces huge
        # Perfetto opens the one form that is written, XProf the other.
        jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True, profiler_options=options)

    def named(self, step: int) -> AbstractContextManager[Any]:
        """Around the step itself, so that the trace has its number."""
        return nullcontext() if self._first is None else jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, made: Any) -> None:
        """Closes the window behind its last step, once what that step `made` exists."""
        if self._first is not None and step - self._first + 1 == self._config.steps:
            jax.block_until_ready(made)
            self._close(step)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the run: a window that its end cuts short is written as well."""
        try:
            yield
        finally:
            if self._first is not None:
                self._close(None)

    def _close(self, last: int | None) -> None:
        first, self._first = self._first, None
        with self._pause():
            if _done(jax.profiler.stop_trace):
                self._say(f"profile of steps {first} to {last or 'the end'}: {self._folder}")


def _done(act: Callable[[], None]) -> bool:
    try:
        act()
    except Exception as error:
        log.warning("the profiler failed: %s", error)
        return False
    return True
