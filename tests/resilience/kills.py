"""Kills a process at random moments of its saves, again and again, and looks at what each death leaves behind.

    python tests/resilience/kills.py [--kills 200] [--seed 0] [--local]

A life of the process: it restores the newest checkpoint that the last one committed and compares it bit for bit with
what that step should hold, begins to write again, which has to remove what the last one left half-written, and then
saves without a pause, asynchronously, until it is killed (SIGKILL) at a random moment. Before its next life the files
of the newest checkpoint are compared with their checksums. With --local it saves to a local place first, and each
third step is copied to the run's folder: then all that is committed in either is compared. Ends with status 1 at the
first thing that is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from saving import assert_right, save  # jax is imported once, for all lives; each starts its own backend

from jaxformers.train.checkpoint import FOLDER, Checkpointer
from jaxformers.train.config import CheckpointConfig
from jaxformers.train.folders import steps_in
from jaxformers.train.integrity import find_damage

LONGEST_LIFE = 0.5  # seconds from the start of the first save to the kill, a few saves
KEEP = CheckpointConfig(every_steps=1, keep_last=2)


def with_local(folder: Path) -> CheckpointConfig:
    """The same with a local place below a folder, of which each third step is copied."""
    return KEEP.model_copy(update={"every_steps": 3, "local_every_steps": 1, "local_dir": str(folder / "fast")})


def live(run: Path, config: CheckpointConfig, ready: int) -> None:
    """A life: what the last one left is checked, checkpoints are written until the end, and `ready` is told of each."""
    writing = Checkpointer(run, config)
    left = [name for folder in _places(run, config) for name in _unfinished(folder)]
    assert not left, f"a new start leaves {left}"
    newest = writing.newest_good(_complain)
    if newest is not None:
        assert_right(run, newest, config)
    for step in itertools.count((newest or 0) + 1):
        save(writing, step, place=writing.is_due(step) or "store")
        os.write(ready, b".")


def _complain(line: str) -> None:
    raise AssertionError(line)


def _places(run: Path, config: CheckpointConfig) -> list[Path]:
    """The folders that hold checkpoints."""
    local = Path(config.local_dir) if config.local_dir is not None else None
    return [run / FOLDER, *(local.iterdir() if local is not None and local.is_dir() else ())]


def _unfinished(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_dir() and not path.name.isdecimal()]


@dataclass
class Figures:
    """What happened: kills, those that hit a checkpoint half-written or half-removed, and checkpoints committed."""

    kills: int = 0
    in_a_save: int = 0
    committed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.kills} kills survived, {self.in_a_save} of them in the middle of a save; "
            f"{self.committed} checkpoints committed, after every kill the newest one whole and right"
        )


def kill_again_and_again(run: Path, *, kills: int, seed: int, config: CheckpointConfig = KEEP) -> Figures:
    """AssertionError or SystemExit at the first thing that is wrong."""
    draw, figures, before = random.Random(seed), Figures(), 0
    for _ in range(kills):
        _live_and_die(run, config, draw.uniform(0, LONGEST_LIFE))
        places = _places(run, config)
        figures.kills += 1
        figures.in_a_save += any(_unfinished(folder) for folder in places)
        newest = max((step for folder in places for step in steps_in(folder)), default=0)
        assert newest >= before, f"step {before} was committed and is gone"
        figures.committed += newest - before
        before = newest
        for folder in places:
            for step in steps_in(folder)[-1:]:
                damage = find_damage(folder / str(step))
                assert not damage, f"kill {figures.kills}: step {step} in {folder}: {damage}"
    _live_and_die(run, config, 0)  # what the last kill left is checked as well
    return figures


def _live_and_die(run: Path, config: CheckpointConfig, seconds: float) -> None:
    """A process that is killed so many seconds after it began to save."""
    told, ready = os.pipe()
    pid = os.fork()
    if pid:
        os.close(ready)
        saves = os.read(told, 1)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(told)
        if not saves:
            raise SystemExit("a process ended before it was killed")
        return
    try:
        live(run, config, ready)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--local", action="store_true")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        config = with_local(Path(folder)) if options.local else KEEP
        print(kill_again_and_again(Path(folder) / "run", kills=options.kills, seed=options.seed, config=config))


if __name__ == "__main__":
    main()
