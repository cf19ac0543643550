"""A thread that notices when a run stands still, writes down where every thread is, and may end the process.

Knows no step and no device: whoever works says that it does, and how long it may take until it says so again.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxformers.train.config import WatchdogConfig

STALLS_FILE = "stalls.log"
STALLED_STATUS = 1  # of a process that is ended: a failure, which a launcher may start again
_REMEMBERED_STEPS = 64
_LOOKS_A_SECOND = 10


class Watchdog:
    """Watches from `with` to the end of its block. `beat()` after every step; `at_ease()` around what takes longer.

    A step may take `factor` times the median of the last ones, and `least_seconds` in any case; there is no limit
    before the first one, which compiles.
    """

    def __init__(self, config: WatchdogConfig, run_dir: Path):
        self._config, self._path = config, run_dir / STALLS_FILE
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._beat: float | None = None  # None: at ease
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._config.factor is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self) -> None:
        """A step has been taken."""
        now = time.monotonic()
        if self._beat is not None:
            self._seconds.append(now - self._beat)
        self._beat = now

    @contextmanager
    def at_ease(self) -> Iterator[None]:
        """What happens inside is no step, and may take its time."""
        before, self._beat = self._beat, None
        yield
        self._beat = None if before is None else time.monotonic()

    @property
    def limit(self) -> float | None:
        """Seconds that a step may take now, None while nothing is known."""
        if not self._seconds or self._config.factor is None:
            return None
        return max(self._config.factor * statistics.median(self._seconds), self._config.least_seconds)

    def _watch(self) -> None:
        told: float | None = None  # the beat behind which a stall has been written down
        while not self._ended.wait(1 / _LOOKS_A_SECOND):
            beat, limit = self._beat, self.limit
            if beat is None or limit is None or beat == told or time.monotonic() - beat <= limit:
                continue
            told = beat
            self._write_down(time.monotonic() - beat, limit)
            if self._config.action == "end":
                os._exit(STALLED_STATUS)

    def _write_down(self, seconds: float, limit: float) -> None:
        line = f"a step has taken {seconds:.0f} seconds, of {limit:.0f} it may take; every thread is at:"
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:  # a full disk may be the very reason
            print(time.strftime("%Y-%m-%d %H:%M:%S"), line, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        ends = "; the process ends" if self._config.action == "end" else ""
        print(
            f"jaxformers: a step has taken {seconds:.0f} seconds (see {self._path}){ends}", file=sys.stderr, flush=True
        )
