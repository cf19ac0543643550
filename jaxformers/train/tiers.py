"""A fast place for checkpoints on a run's own machine, in front of the store that outlives the machine.

    LOCAL_DIR/RUN-HASH/STEP    is copied to    RUN/checkpoints/STEP

What lies there counts while it is of the run's last start: both places hold the same word, which a start elsewhere, or
without a local place, changes. Otherwise a run that went on from the store on another machine, or was removed and begun
anew, would come back to the checkpoints of its other life.
"""

from __future__ import annotations

import secrets
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import xxhash

from jaxformers.train.folders import clean, copy

KEPT = 2  # local checkpoints: one to go on from, and one before it where that is damaged
_WORD = ".local"


def open_local(local_dir: str, store: Path) -> Path:
    """The folder of a run's local checkpoints, emptied of those that are not of its last start. OSError."""
    run = store.parent
    name = f"{run.name}-{xxhash.xxh3_64_hexdigest(str(run).encode())}"
    folder = Path(local_dir).expanduser().absolute() / name
    folder.mkdir(parents=True, exist_ok=True)
    word = _word(store)
    if word is None or word != _word(folder):
        shutil.rmtree(folder)
        folder.mkdir()
        word = secrets.token_hex(16)
        for place in (folder, store):
            (place / _WORD).write_text(word, encoding="utf-8")
    clean(folder)
    return folder


def leave_local(store: Path) -> None:
    """From now on no local checkpoint is of the run's last start. OSError."""
    (store / _WORD).unlink(missing_ok=True)


def _word(folder: Path) -> str | None:
    try:
        return (folder / _WORD).read_text(encoding="utf-8", errors="replace") or None
    except FileNotFoundError:
        return None


class Copier:
    """Copies checkpoints to a store in the background, one at a time.

    `step` is the one that is being copied, or was last; `failed` is whether that came to nothing, which `wait` tells.
    """

    def __init__(self, store: Path):
        self.step: int | None = None
        self._store = store
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    @property
    def copying(self) -> int | None:
        """The step that is being copied."""
        return self.step if self._thread is not None and self._thread.is_alive() else None

    @property
    def failed(self) -> bool:
        return self._failure is not None

    def start(self, checkpoint: Path, then: Callable[[], None]) -> None:
        """Begins with a checkpoint, once the one before is done. `then` follows its end in the thread."""
        assert self.copying is None
        self.step = int(checkpoint.name)
        self._thread = threading.Thread(target=self._copy, args=(checkpoint, then), name=f"copy {self.step}")
        self._thread.start()

    def wait(self) -> Exception | None:
        """Returns when nothing is being copied any more: why the last one failed, once."""
        if self._thread is not None:
            self._thread.join()
        self._thread, failure, self._failure = None, self._failure, None
        return failure

    def _copy(self, checkpoint: Path, then: Callable[[], None]) -> None:
        try:
            copy(checkpoint, self._store)
            then()
        except Exception as error:
            self._failure = error
