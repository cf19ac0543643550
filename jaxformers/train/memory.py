"""Memory that is free, given back to the system.

glibc keeps what threads free in pools of their own, many per core, and hands it out again to the same threads only. A
save runs in new threads each time, so the pools fill one after the other, and a long run grows though nothing leaks.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


def give_back() -> None:
    """Returns free memory to the system where the C library has a call for that (glibc); it takes milliseconds."""
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], int]:
    if sys.platform == "linux":
        return getattr(ctypes.CDLL(None), "malloc_trim", lambda _left: 0)
    return lambda _left: 0
