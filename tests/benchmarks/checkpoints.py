"""What checksums add to a save: seconds from the call to the committed checkpoint, with them and without, turn by turn.

    python tests/benchmarks/checkpoints.py [--gigabytes 1] [--rounds 3] [--directory DIR]

Each round saves the same state once in each way, into a new folder on the disk of DIR; all happens in the background of
a run, which goes on meanwhile. `of a save` is the time of the checksums alone over that of the whole save they are part
of, which a machine that slows down between two saves does not change. The target is 3%.

A core hashes 11 GB/s of a file that was just written: a copy out of the page cache, and XXH3, at 20 GB/s each. Mapped
files would spare the copy, but a bad disk would then end the process in place of an error.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

TARGET = 0.03
LEAVES = 16
WARM_UP = 0.01  # gigabytes, in a round that is not counted


@dataclass
class Seconds:
    """Medians over rounds, and the share of the checksums in the saves that had them."""

    with_checksums: float
    without: float
    checksums: float
    share: float

    def __str__(self) -> str:
        return (
            f"with checksums {self.with_checksums:.2f} s, without {self.without:.2f} s "
            f"(ratio {self.with_checksums / self.without:.3f}); checksums {self.checksums:.3f} s, "
            f"{100 * self.share:.1f}% of a save"
        )


class Nowhere:
    """A place in no data."""

    def get_state(self) -> dict[str, int]:
        return {"next_row": 0}


def state_of(gigabytes: float) -> Any:
    """Random float32 numbers, which no disk can make smaller."""
    import jax
    import jax.numpy as jnp

    from jaxformers.train.config import GuardConfig
    from jaxformers.train.guard import new_guard
    from jaxformers.train.state import TrainState

    keys = jax.random.split(jax.random.key(0), LEAVES)
    shape = (1024, max(int(gigabytes * 1e9 / 4 / LEAVES / 1024), 1))
    params = {f"leaf {i}": jax.random.normal(key, shape) for i, key in enumerate(keys)}
    step = jnp.asarray(1, jnp.int32)
    return TrainState(step, jax.block_until_ready(params), {}, jax.random.key_data(keys[0]), new_guard(GuardConfig()))


@contextmanager
def timed(name: str, *, off: bool):
    """Seconds that a function takes with which a checkpoint's folder is sealed, in a list; off: it is not called."""
    from jaxformers.train import folders

    spent: list[float] = []
    real = getattr(folders, name)

    def function(*args: Any) -> None:
        start = time.perf_counter()
        if not off:
            real(*args)
        spent.append(time.perf_counter() - start)

    with mock.patch.object(folders, name, function):
        yield spent


def save(state: Any, directory: Path, *, checksums: bool) -> tuple[float, float]:
    """Seconds of a save, and of its checksums."""
    from jaxformers.train.checkpoint import Checkpointer
    from jaxformers.train.config import CheckpointConfig

    with (
        TemporaryDirectory(dir=directory) as folder,
        timed("write_checksums", off=not checksums) as spent,
        Checkpointer(folder, CheckpointConfig()) as checkpoints,
    ):
        start = time.perf_counter()
        checkpoints.save(state, Nowhere(), {})
        checkpoints.wait()
        return time.perf_counter() - start, spent[0]


def measure(gigabytes: float, rounds: int, directory: Path) -> Seconds:
    save(state_of(WARM_UP), directory, checksums=True)
    state = state_of(gigabytes)
    pairs = []
    for number in range(rounds):
        order = (True, False) if number % 2 else (False, True)
        pairs.append({way: save(state, directory, checksums=way) for way in order})
    return Seconds(
        statistics.median(pair[True][0] for pair in pairs),
        statistics.median(pair[False][0] for pair in pairs),
        statistics.median(pair[True][1] for pair in pairs),
        statistics.median(pair[True][1] / pair[True][0] for pair in pairs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="on the disk to save to; none: that of temporary files")
    options = parser.parse_args()
    found = measure(options.gigabytes, options.rounds, options.directory)
    print(f"{options.gigabytes:g} GB, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}: {found}")
    print(f"the target is {100 * TARGET:g}% of a save: {'held' if found.share <= TARGET else 'NOT HELD'}")


if __name__ == "__main__":
    main()
