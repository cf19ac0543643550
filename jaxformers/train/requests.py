"""What signals and the clock ask of a run: to save and go on, or to save and stop. The same for all processes of it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from jaxformers.parallel.distributed import highest

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAVE_SIGNAL = getattr(signal, "SIGUSR1", None)  # None on Windows
_NOTHING, _SAVE, _STOP = range(3)
TIME_LIMIT = "the time limit"


@dataclass
class Requests:
    """`stop` names what asks to stop, None while nothing does; `save` is whether a checkpoint is asked for.

    deadline: on the clock of `time.perf_counter`, when all must be over; None: never.
    """

    deadline: float | None = None
    stop: str | None = None
    save: bool = False
    _signal: str | None = field(default=None, repr=False)
    _save: bool = field(default=False, repr=False)

    def settle(self, *, asks: bool, reserve: float) -> None:
        """Brings `stop` and `save` up to date. reserve: seconds that saving takes, before the deadline.

        A signal may reach one process and not another, or later: several processes settle where they `ask` each other,
        which all must do at the same points of the program.
        """
        self.save = False
        if not asks:
            return
        if self._signal is None and self.deadline is not None and time.perf_counter() + reserve >= self.deadline:
            self._signal = TIME_LIMIT
        wish = highest(_STOP if self._signal else _SAVE if self._save else _NOTHING)
        if wish == _STOP:
            self.stop = self._signal or "a signal to another process"
        self.save, self._save = wish == _SAVE, False


@contextmanager
def catch_signals(requests: Requests) -> Iterator[None]:
    """Remembers SIGTERM, SIGINT and SIGUSR1 instead of dying of them. A second one to stop acts as it did before.

    Off the main thread, where Python allows no handlers, signals keep their effect.
    """
    numbers = [*STOP_SIGNALS, *([SAVE_SIGNAL] if SAVE_SIGNAL is not None else [])]
    before = {number: signal.getsignal(number) for number in numbers}

    def remember(number: int, _frame: object) -> None:
        if number == SAVE_SIGNAL:
            requests._save = True
            return
        requests._signal = signal.Signals(number).name
        signal.signal(number, before[number])

    try:
        for number in numbers:
            signal.signal(number, remember)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
