"""Prints what the fault injection finds, as the table of the README.

python tests/resilience/figures.py [--kills 200] [--harms 1000] [--gigabytes 1]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "benchmarks")]

from kills import KEEP, kill_again_and_again, with_local  # noqa: E402  # the folders above are where the others are found


def killed(count: int, *, local: bool) -> str:
    with TemporaryDirectory() as folder:
        config = with_local(Path(folder)) if local else KEEP
        found = kill_again_and_again(Path(folder) / "run", kills=count, seed=0, config=config)
    return f"{found.kills} of {found.kills} survived, {found.in_a_save} of them in the middle of a save"


def harmed(count: int) -> str:
    import jax
    from harms import harmed_again_and_again
    from tiny import run_config

    import jaxformers as jf

    jax.config.update("jax_num_cpu_devices", 8)
    with TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        run = jf.fit(run_config(Path(folder))).run_dir
        return f"{harmed_again_and_again(run, count, seed=0)} of {count} found, named, and passed over"


def poisoned() -> str:
    """A run in which the losses of one step are not finite, beside one that is like it."""
    from unittest import mock

    import numpy as np
    from tiny import run_config

    import jaxformers as jf
    from jaxformers import training

    place, batches = training.to_global, iter(range(1, 10_000))

    def poison(batch, *args, **kwargs):
        if next(batches) == 4:
            batch = batch | {"weights": np.full_like(batch["weights"], np.nan)}
        return place(batch, *args, **kwargs)

    quiet, poisoning = contextlib.redirect_stderr(io.StringIO()), mock.patch.object(training, "to_global", poison)
    with TemporaryDirectory() as folder, quiet, poisoning:
        result = jf.fit(run_config(Path(folder)))
    return f"{result.metrics['skipped_total']} of {result.step} updates"


def overhead(gigabytes: float) -> str:
    import checkpoints

    found = checkpoints.measure(gigabytes, 3, None)
    return f"{100 * found.share:.1f}% of the seconds of a save ({gigabytes:g} GB)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--harms", type=int, default=1000)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    options = parser.parse_args()
    rows = {  # kills first: their processes are forked, and may be only before jax has begun to compute here
        "a process killed (SIGKILL) at random moments of its saves": killed(options.kills, local=False),
        "the same, with a local disk in front of the run's folder": killed(options.kills, local=True),
        "bits flipped, files cut, removed or swapped in a checkpoint": harmed(options.harms),
        "updates lost to a batch whose loss is NaN": poisoned(),
        "what checksums add to a save": overhead(options.gigabytes),
    }
    print("| what was done | what came of it |\n|---|---|")
    for done, found in rows.items():
        print(f"| {done} | {found} |")


if __name__ == "__main__":
    main()
