"""Whole runs that are stopped, killed and looked into, for the tests of what that changes: nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import yaml

from jaxformers import training
from jaxformers.config import load_config
from jaxformers.train.checkpoint import Checkpointer
from jaxformers.train.monitor import MetricsFile

STEPS = 8  # of a run of `run_config`


class Stopped(Exception):
    """What a test raises in the place of a power cut."""


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_of(run: Path) -> list[tuple]:
    """(step, loss, gradient norm, rate) of every step that the run says it took."""
    lines = [line for line in metrics_of(run) if "loss" in line]
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]


def checkpoints_of(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())


def saved_state(config: dict, step: int = STEPS):
    """Everything a checkpoint holds of the state, as numpy."""
    resolved = load_config(config)
    abstract = training.prepare_run(resolved).trainer.plain_state
    with Checkpointer(resolved.run_dir) as checkpoints:

        class Position:
            def set_state(self, state):
                self.state = state

        position = Position()
        state = checkpoints.restore(step, abstract, position)
    return jax.device_get(state), position.state["next_row"]


def act_at(monkeypatch, step: int, action) -> None:
    """Calls `action` when the metrics of a step are written, which is while the next step is computed."""
    log = MetricsFile.log

    def acting(self, logged, metrics):
        log(self, logged, metrics)
        if logged == step and "loss" in metrics:
            action()

    monkeypatch.setattr(MetricsFile, "log", acting)


def raise_signal(number):
    return lambda: os.kill(os.getpid(), number)


def again(config: dict, folder: Path, **changes) -> dict:
    """The same run over the same files, in another run directory."""
    return config | {"run_dir": str(folder / "run")} | changes


KILLED_AT = """
import os, signal, sys
from jaxformers.train.monitor import MetricsFile
log, step, number = MetricsFile.log, int(sys.argv.pop()), signal.Signals[sys.argv.pop()]
def dying(self, logged, metrics):
    log(self, logged, metrics)
    if logged == step and "loss" in metrics:
        os.kill(os.getpid(), number)
MetricsFile.log = dying
from jaxformers.cli import main
main()
"""


def process(config: dict, folder: Path, *, code: str | None = None, extra: tuple[str, ...] = (), processes: int = 1):
    """The command line on a config, with as many devices as here, which several processes share."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    start = ["-m", "jaxformers"] if code is None else ["-c", code]
    if processes > 1:
        start += ["launch", "--processes", str(processes), "--"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(8 // processes),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    command = [sys.executable, *start, "train", str(path), *extra]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
