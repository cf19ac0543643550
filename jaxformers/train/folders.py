"""Checkpoints as folders: which there are, and how one appears, is copied and goes, so that half of one is never seen.

    CHECKPOINTS/STEP    CHECKPOINTS/.unfinished-*

Knows nothing of what a checkpoint holds.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from jaxformers.train.integrity import find_damage, write_checksums

UNFINISHED = ".unfinished-"  # begins the names of checkpoints that are being written or removed
NAMED = 4  # damaged files in a line before it says how many more there are


def is_step(name: str) -> bool:
    """Whether a folder has the name that the checkpoint of a step gets: 12, and not 012 or 12.damaged."""
    return name.isdecimal() and name == str(int(name))


def steps_in(folder: Path) -> list[int]:
    """Steps of the complete checkpoints below a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if is_step(path.name) and path.is_dir())


def seal(unfinished: Path, checkpoint: Path) -> None:
    """Gives a written folder its checksums and then its final name."""
    write_checksums(unfinished)
    _commit(unfinished, checkpoint)


def copy(checkpoint: Path, folder: Path) -> None:
    """Puts a copy of a checkpoint below another folder, once its files have been compared with their checksums there.

    OSError where that fails, which leaves nothing behind.
    """
    unfinished = folder / f"{UNFINISHED}{checkpoint.name}"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        check_room(folder, sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()))
        shutil.copytree(checkpoint, unfinished)
        if damage := find_damage(unfinished):
            raise OSError(f"its files arrive changed: {some(damage)}")
        _commit(unfinished, folder / checkpoint.name)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def check_room(folder: Path, need: int) -> None:
    """Refuses what the disk has no room for, before half of it is written. OSError saying how many bytes there are."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(f"it needs {need / 1e6:,.1f} MB, and the disk has {free / 1e6:,.1f} MB left")


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint's folder. It loses its name first: half a checkpoint is never seen under it."""
    leaving = checkpoint.with_name(f"{UNFINISHED}removed-{checkpoint.name}")
    os.replace(checkpoint, leaving)
    shutil.rmtree(leaving)


def clean(folder: Path) -> None:
    """Removes what saves, copies and removals that did not live to their end have left. OSError."""
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path)


def tidy(folder: Path) -> None:
    """`clean`, as far as the disk lets us."""
    with suppress(OSError):
        clean(folder)


def some(names: list[str]) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def reason_of(error: Exception) -> str:
    """What went wrong, in one line; where it was the system's, in the system's words."""
    text = str(error).strip()
    if code := re.search(r"os_error_code='(\d+)'|\[Errno (\d+)\]", text):
        return os.strerror(int(code[1] or code[2]))
    return text.splitlines()[0] if text else type(error).__name__


def _commit(unfinished: Path, checkpoint: Path) -> None:
    for path in unfinished.rglob("*"):
        _sync(path)
    os.replace(unfinished, checkpoint)
    _sync(checkpoint.parent)


def _sync(path: Path) -> None:
    """Makes a file, or the names in a folder, survive a power cut, where the system lets folders be opened."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
