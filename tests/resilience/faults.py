"""A disk that fails on request: the n-th call of one kind below a folder gets an error of the system's."""

import errno
import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest

CALLS = ("open", "mkdir", "rename", "replace", "fsync")


class Faults:
    """Takes the place of what Python code, ours and Orbax's, in any thread, writes files with.

    `arm(call, n, code)`: the n-th such call from now on fails, once, or from then on all of them where it `lasts`;
    `fired` says whether it came to that.
    """

    def __init__(self, monkeypatch: Any, folder: Path):
        self._folder, self._lock = str(folder), threading.Lock()
        self._call: str | None = None
        self._left = 0
        self.fired = False
        for call in ("mkdir", "rename", "replace"):
            monkeypatch.setattr(os, call, self._guarded(call, getattr(os, call), lambda a: self._below(a[0])))
        monkeypatch.setattr(os, "fsync", self._guarded("fsync", os.fsync, lambda a: True))
        opening = self._guarded("open", io.open, lambda a: self._below(a[0]) and len(a) > 1 and "r" not in str(a[1]))
        monkeypatch.setattr("builtins.open", opening)
        monkeypatch.setattr(io, "open", opening)

    def arm(self, call: str, n: int, code: int, *, lasts: bool = False) -> None:
        self._call, self._left, self._code, self._lasts, self.fired = call, n, code, lasts, False

    def disarm(self) -> None:
        self._call = None

    def _below(self, path: Any) -> bool:
        return not isinstance(path, int) and os.fspath(path).startswith(self._folder)

    def _guarded(self, call: str, real: Any, concerns: Any) -> Any:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self._call == call and concerns(args):
                with self._lock:
                    self._left -= 1
                    fails = self._left == 0 or (self._lasts and self._left < 0)
                    self.fired |= fails
                if fails:
                    raise OSError(self._code, os.strerror(self._code), None if call == "fsync" else str(args[0]))
            return real(*args, **kwargs)

        return guarded


NO_SPACE, BAD_DISK = errno.ENOSPC, errno.EIO

# Orbax leaves event loops behind when a write fails, which complain when they are collected.
LEAVES_LOOPS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
