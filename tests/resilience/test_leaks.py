"""A long run needs no more memory than a short one."""

import os
import subprocess
import sys
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
    if step > 50 and step % 3 == 0 and "loss" in metrics:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        print(step, pages * os.sysconf("SC_PAGE_SIZE") / 1e6, flush=True)
MetricsFile.log = measuring
jf.fit(yaml.safe_load(Path(sys.argv[1]).read_text()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from /proc")
def test_memory_stays_flat_over_200_steps_with_50_saves_and_50_evaluations(tmp_path):
    config = run_config(
        tmp_path,
        model=LARGE,
        mesh={"dp": 1, "fsdp": 1},
        train={"steps": 200, "eval_every": 4, "ema_decay": 0.9},
        checkpoint={"every_steps": 4},
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "config.yaml")],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    resident = {int(step): float(mb) for step, mb in map(str.split, done.stdout.splitlines())}
    # A save in progress holds its state, and pools of free memory come and go: one figure says less than a mean.
    early, late = ([mb for step, mb in resident.items() if (step > 125) == is_late] for is_late in (False, True))
    state = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints" / "200").rglob("*")) / 1e6
    assert len(early) == len(late) == 25
    assert np.mean(late) - np.mean(early) < state, f"MB after so many steps, {state:.0f} a state: {resident}"
