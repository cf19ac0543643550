"""Trackers of other makers: each gets every line of metrics.jsonl, as numbers by name. Each needs an extra."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxformers.train.config import TrackerName
from jaxformers.train.monitor import Metrics, Tracker

log = logging.getLogger(__name__)
# tracker -> the module it needs, and the extra that brings it
NEEDS: dict[TrackerName, tuple[str, str]] = {
    "tensorboard": ("tensorboardX", "monitor"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
}


def check_trackers(names: Sequence[TrackerName]) -> None:
    """ValueError for a tracker that is not installed."""
    for name in names:
        module, extra = NEEDS[name]
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"monitor.trackers has {name}, which needs {module}: pip install 'jaxformers[{extra}]'")


def open_trackers(
    names: Sequence[TrackerName], run_dir: Path, *, config: Mapping[str, Any], resumes: bool
) -> list[Tracker]:
    """The trackers of these names; one that cannot begin is named in the log and left out.

    config is what the run was told, for them to show. resumes: whether the run goes on, as theirs then does.
    """
    makers: dict[TrackerName, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(run_dir),
        "wandb": lambda: Wandb(run_dir, config=config, resumes=resumes),
        "mlflow": lambda: MLflow(run_dir, config=config, resumes=resumes),
    }
    opened: list[Tracker] = []
    check_trackers(names)
    for name in dict.fromkeys(names):
        try:
            opened.append(makers[name]())
        except Exception as error:
            log.warning("monitor.trackers: %s did not begin and is off: %s", name, error)
    return opened


def scalars(metrics: Metrics) -> dict[str, float]:
    """The numbers of a line of metrics; of a list, such as one with a number for each head, its largest."""
    values = {name: max(value) if isinstance(value, list) and value else value for name, value in metrics.items()}
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


class TensorBoard:
    """Scalars for TensorBoard under RUN/tensorboard."""

    def __init__(self, run_dir: Path):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in scalars(metrics).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, in the project that WANDB_PROJECT names, or `jaxformers`; a resumed run goes on in it.
    WANDB_MODE=offline keeps it under RUN/wandb."""

    def __init__(self, run_dir: Path, *, config: Mapping[str, Any], resumes: bool):
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "jaxformers"),
            name=run_dir.name,
            id=_remembered(run_dir / "wandb.id", lambda: secrets.token_hex(4), resumes=resumes),
            resume="allow",
            dir=str(run_dir),
            config=dict(config),
        )
        # Its own counter never goes back, as a run does that repeats steps.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log({**scalars(metrics), "step": step})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or else under RUN/mlflow, in the experiment that MLFLOW_EXPERIMENT_NAME
    names, or `jaxformers`; a resumed run goes on in it."""

    def __init__(self, run_dir: Path, *, config: Mapping[str, Any], resumes: bool):
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (run_dir / "mlflow").absolute().as_uri()
        if uri.startswith("file:"):  # which MLflow wants to be asked for by name
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._entities = importlib.import_module("mlflow.entities")
        self._client = importlib.import_module("mlflow").MlflowClient(tracking_uri=uri)

        def begin() -> str:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "jaxformers")
            found = self._client.get_experiment_by_name(name)
            experiment = self._client.create_experiment(name) if found is None else found.experiment_id
            run = self._client.create_run(experiment, run_name=run_dir.name).info.run_id
            for key, value in _flat(config).items():
                self._client.log_param(run, key, str(value)[:500])
            return run

        self._run = _remembered(run_dir / "mlflow.id", begin, resumes=resumes)

    def log(self, step: int, metrics: Metrics) -> None:
        now = int(time.time() * 1000)
        # Its files cannot have both `loss` and `loss/web`.
        named = {re.sub(r"[^\w\-. ]", "_", name.replace("/", ".")): value for name, value in scalars(metrics).items()}
        values = [self._entities.Metric(name, value, now, step) for name, value in named.items()]
        for first in range(0, len(values), 1000):  # the most that one request may hold
            self._client.log_batch(self._run, metrics=values[first : first + 1000])

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _remembered(path: Path, make: Callable[[], str], *, resumes: bool) -> str:
    """What another service knows the run by, kept in a file of the run."""
    if not (resumes and path.exists()):
        path.write_text(make(), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found
