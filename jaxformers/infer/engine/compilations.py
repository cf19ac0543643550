"""How often this thread made XLA compile something: what must not happen once an engine is ready."""

from __future__ import annotations

import functools
import threading
from typing import Any

import jax

_counts = threading.local()
_EVENT = "/jax/core/compile/backend_compile_duration"  # also where a program is found in the persistent cache


@functools.cache
def _listen() -> None:
    def count(event: str, _seconds: float, **_details: Any) -> None:
        if event == _EVENT:
            _counts.value = getattr(_counts, "value", 0) + 1

    jax.monitoring.register_event_duration_secs_listener(count)


def compilations() -> int:
    """Of this thread, since the first call by any."""
    _listen()
    return getattr(_counts, "value", 0)
