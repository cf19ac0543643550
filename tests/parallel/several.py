"""Several processes as one, for tests: starts them, waits for them, reads what they left."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
SECONDS = 900  # for a dozen small models on a busy machine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command: Sequence[str], *, devices: int = 1, stdin: int | None = None, **variables: str) -> subprocess.Popen:
    """`python COMMAND` with so many CPU devices; what it says as errors can be read from it."""
    ours = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | ours | variables,
        stdin=stdin,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(processes: Sequence[subprocess.Popen], *, seconds: float = SECONDS) -> list[str]:
    """What each said as errors, once all have ended; they are ended if they take too long."""
    try:
        return [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        end(processes)


def end(processes: Sequence[subprocess.Popen]) -> None:
    """Ends what still runs of them."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.communicate()


def train_all(configs: Sequence[Mapping[str, Any]], *, processes: int, devices: int) -> None:
    """Trains the configs one after the other, in processes of so many devices that are started once."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(configs, file)
        file.flush()
        coordinator = f"127.0.0.1:{free_port()}"
        who = [
            {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_PROCESS_ID": str(i), "JAX_NUM_PROCESSES": str(processes)}
            for i in range(processes)
        ]
        started = [start([str(WORKER), file.name], devices=devices, **variables) for variables in who]
        errors = wait_for(started)
    failed = [text for text, process in zip(errors, started, strict=True) if process.returncode]
    assert not failed, "\n".join(failed)


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def curve_of(run: Path, *, names: Sequence[str] = ("loss", "grad_norm", "accuracy")) -> np.ndarray:
    """Step and named metrics [steps, 1 + names] of a run."""
    return np.array([[line["step"], *(line[n] for n in names)] for line in metrics_of(run) if "loss" in line])


def validation_of(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["validation_loss"]) for line in metrics_of(run) if "validation_loss" in line]


def tokens_fed(run: Path, *, step: int, processes: int) -> np.ndarray:
    """The global batches [batches, B, T] that the processes put together on their way to a step, in order."""
    files = [np.load(run / f"fed_at_{step}_by_{i}_of_{processes}.npz") for i in range(processes)]
    shares = {int(file["shares"][0]): file["tokens"] for file in files}
    return np.concatenate([shares[i] for i in sorted(shares)], axis=1)
