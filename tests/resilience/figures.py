"""Prints what the fault injection finds, as the table of the README.

python tests/resilience/figures.py [--kills 200] [--harms 1000] [--flips 10] [--gigabytes 1]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "benchmarks")]

from kills import KEEP, kill_again_and_again, with_local  # noqa: E402  # the folders above are where the others are found


def killed(count: int, *, local: bool) -> str:
    with TemporaryDirectory() as folder:
        config = with_local(Path(folder)) if local else KEEP
        found = kill_again_and_again(Path(folder) / "run", kills=count, seed=0, config=config)
    return f"{found.kills} of {found.kills} survived, {found.in_a_save} of them in the middle of a save"


def trained(folder: str, *overrides: str, run: str = "run") -> tuple[Any, str]:
    """A small run's result, and what it said. SystemExit where a signal stopped it: figures are of whole runs."""
    import jax
    from tiny import run_config

    import jaxformers as jf

    jax.config.update("jax_num_cpu_devices", 8)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        result = jf.fit(run_config(Path(folder)) | {"run_dir": str(Path(folder) / run)}, overrides)
    if result.stopped is not None:
        raise SystemExit(f"a run was stopped by {result.stopped}")
    return result, said.getvalue()


def harmed(count: int) -> str:
    from harms import harmed_again_and_again

    with TemporaryDirectory() as folder:
        run = trained(folder)[0].run_dir
        return f"{harmed_again_and_again(run, count, seed=0)} of {count} found, named, and passed over"


def flipped(count: int) -> str:
    """Runs in which a bit of one device's parameters turns over in step 5, which is computed twice."""
    import jax
    from harms import flipping_once
    from tiny import assert_bit_equal

    from jaxformers.train import recheck

    copy, draw, caught = recheck._copy, random.Random(0), 0
    with TemporaryDirectory() as folder:
        truth, _ = trained(folder)
        for number in range(count):
            with mock.patch.object(recheck, "_copy", flipping_once(copy, draw)):
                result, said = trained(folder, "guard.recheck_every=5", run=f"flipped {number}")
            caught += "step 5: computed twice with two results (process 0, cpu:" in said
            assert_bit_equal(*(jax.device_get(run.model.params) for run in (result, truth)))
    return f"{caught} of {count} caught, the device named; parameters at the end bit for bit those of a clean run"


def poisoned() -> str:
    """A run in which the losses of one step are not finite, beside one that is like it."""
    import numpy as np

    from jaxformers import training

    place, batches = training.to_global, iter(range(1, 10_000))

    def poison(batch, *args, **kwargs):
        if next(batches) == 4:
            batch = batch | {"weights": np.full_like(batch["weights"], np.nan)}
        return place(batch, *args, **kwargs)

    with TemporaryDirectory() as folder, mock.patch.object(training, "to_global", poison):
        result, _ = trained(folder)
    return f"{result.metrics['skipped_total']} of {result.step} updates"


def overhead(gigabytes: float) -> str:
    import checkpoints

    found = checkpoints.measure(gigabytes, 3, None)
    return f"{100 * found.share:.1f}% of the seconds of a save ({gigabytes:g} GB)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--harms", type=int, default=1000)
    parser.add_argument("--flips", type=int, default=10)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    options = parser.parse_args()
    rows = {  # kills first: their processes are forked, and may be only before jax has begun to compute here
        "a process killed (SIGKILL) at random moments of its saves": partial(killed, options.kills, local=False),
        "the same, with a local disk in front of the run's folder": partial(killed, options.kills, local=True),
        "bits flipped, files cut, removed or swapped in a checkpoint": partial(harmed, options.harms),
        "a parameter's bit flipped on one device (`guard.recheck_every`)": partial(flipped, options.flips),
        "updates lost to a batch whose loss is NaN": poisoned,
        "what checksums add to a save": partial(overhead, options.gigabytes),
    }
    print("| what was done | what came of it |\n|---|---|")
    for done, find in rows.items():
        print(f"| {done} | {find()} |", flush=True)


if __name__ == "__main__":
    main()
