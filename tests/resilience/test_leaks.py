"""A long run needs no more memory than a short one, and one that does is seen."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import run_config

ROOT = Path(__file__).parents[2]
STATM = Path("/proc/self/statm")
LARGE = {"vocab_size": 4096, "hidden_size": 128}  # a state that shows where one of them is kept
RUN = """
import gc, os, sys, yaml
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 1)
import jaxformers as jf
from jaxformers.train.monitor import MetricsFile
log = MetricsFile.log
def measuring(self, step, metrics):
    log(self, step, metrics)
    if step > 100 and step % 3 == 0 and "loss" in metrics:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        arrays = sum(array.nbytes for array in jax.live_arrays())
        print(step, pages * os.sysconf("SC_PAGE_SIZE") / 1e6, arrays / 1e6, flush=True)
MetricsFile.log = measuring
jf.fit(yaml.safe_load(Path(sys.argv[1]).read_text()))
"""


LEAK = """
import jax, jax.numpy as jnp, numpy as np
from jaxformers.train.checkpoint import Checkpointer
save, held = Checkpointer.save, []
def holding(self, state, *args, **kwargs):
    held.append(jnp.zeros((), jnp.int32))
    if int(state.step) % 40 == 0:
        held.append(jax.tree.map(np.array, state))
    save(self, state, *args, **kwargs)
Checkpointer.save = holding
"""  # a number in every save, the state in every tenth


@dataclass(frozen=True)
class Growth:
    """Megabytes by which steps 176 to 250 hold more than 101 to 175, of all memory and of JAX's arrays, beside those of
    a state."""

    resident: float
    arrays: float
    state: float


def growth_of(folder: Path, run: str) -> Growth:
    """What a run of 250 steps, with a save and an evaluation at every fourth, holds more in the end. Its first hundred
    steps find out how much memory it needs."""
    config = run_config(
        folder,
        model=LARGE,
        mesh={"dp": 1, "fsdp": 1},
        train={"steps": 250, "eval_every": 4, "ema_decay": 0.9},
        checkpoint={"every_steps": 4},
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-c", run, str(folder / "config.yaml")],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    measured = np.array([line.split() for line in done.stdout.splitlines()], float)
    assert len(measured) == 50
    print(measured.tolist())
    early, late = measured[:25], measured[25:]
    return Growth(
        # A save in progress holds its state, and pools of free memory come and go: one figure says less than a mean.
        resident=late[:, 1].mean() - early[:, 1].mean(),
        # Of arrays the least is what stays when no batch and no copy is under way.
        arrays=late[:, 2].min() - early[:, 2].min(),
        state=sum(path.stat().st_size for path in (folder / "run" / "checkpoints" / "248").rglob("*")) / 1e6,
    )


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from /proc")
def test_memory_stays_flat_over_250_steps_with_62_saves_and_62_evaluations(tmp_path):
    found = growth_of(tmp_path, RUN)
    assert found.arrays <= 0, found
    assert found.resident < found.state, found


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from /proc")
def test_a_number_that_every_save_holds_and_a_state_that_every_tenth_does_are_seen(tmp_path):
    found = growth_of(tmp_path, LEAK + RUN)
    assert found.arrays > 0, found
    assert found.resident > found.state, found
