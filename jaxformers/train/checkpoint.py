"""Checkpoints of a run: Orbax Composites of state, data position and metadata under one step number.

    RUN/checkpoints/STEP/{state, data, meta}

Written in the background, committed by a rename, restored onto any mesh. `meta` is JSON: the model's config.json, the
resolved run config and what else the caller wants checked at a resume.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import orbax.checkpoint as ocp
from orbax.checkpoint import args as ocp_args

from jaxformers.models.params import Params
from jaxformers.train.config import CheckpointConfig
from jaxformers.train.state import TrainState

log = logging.getLogger(__name__)
FOLDER = "checkpoints"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written, in one line."""


class Checkpointer:
    """Saves and restores one run's checkpoints. As a context manager it waits for the last save on the way out.

    Without a config it only reads, and leaves alone what another process may be writing.
    """

    def __init__(self, run_dir: str | Path, config: CheckpointConfig | None = None):
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = Path(run_dir).absolute() / FOLDER
        self._config = config or CheckpointConfig(every_steps=None)
        options = (
            ocp.CheckpointManagerOptions(read_only=True)
            if config is None
            else ocp.CheckpointManagerOptions(
                max_to_keep=config.keep_last, keep_period=config.keep_every, cleanup_tmp_directories=True
            )
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise CheckpointError(f"cannot use {self.folder}: {error.strerror or error}") from None
        self._saved_at = time.monotonic()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest committed checkpoint."""
        return self._manager.latest_step()

    def is_due(self, step: int) -> bool:
        """Whether the config asks for a checkpoint after this step."""
        by_step = self._config.every_steps is not None and step % self._config.every_steps == 0
        minutes = self._config.every_minutes
        return by_step or (minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes)

    def save(self, state: TrainState, data: grain.DatasetIterator, meta: Mapping[str, Any]) -> None:
        """Starts writing the state under its step number; returns once its arrays may be changed again.

        A step that is saved already is left alone. CheckpointError if this or an earlier background save failed.
        """
        step = int(state.step)
        if step == self.latest_step:
            return
        items = ocp_args.Composite(
            state=ocp_args.StandardSave(state),
            # As JSON and not through Grain's own handler, whose file names depend on the number of processes.
            data=ocp_args.JsonSave(data.get_state()),
            meta=ocp_args.JsonSave(dict(meta)),
        )
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise self._cannot_save(step, error) from error
        self._saved_at = time.monotonic()

    def wait(self) -> None:
        """Returns when nothing is being written any more. CheckpointError if a background save failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._cannot_save(self.latest_step, error) from error

    def _cannot_save(self, step: int | None, error: Exception) -> CheckpointError:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        kept = (
            f"the newest complete one is step {self.latest_step}"
            if self.latest_step is not None
            else "there is none yet"
        )
        return CheckpointError(f"cannot save a checkpoint at step {step} in {self.folder} ({kept}): {reason}")

    def meta(self, step: int) -> dict[str, Any]:
        """The metadata saved with a step."""
        return self._restore(step, ocp_args.Composite(meta=ocp_args.JsonRestore())).meta

    def restore(self, step: int, abstract: TrainState, data: grain.DatasetIterator) -> TrainState:
        """The state of a step in the shardings of `abstract`; `data`, an iterator, is moved to where it was then."""
        items = ocp_args.Composite(state=ocp_args.StandardRestore(abstract), data=ocp_args.JsonRestore())
        restored = self._restore(step, items)
        data.set_state(restored.data)
        return restored.state

    def restore_params(self, step: int, abstract: Params, *, ema: bool = False) -> Params:
        """Only the parameters (or their moving average) of a step, in the shardings of `abstract`."""
        name = "ema" if ema else "params"
        restore_args = ocp.checkpoint_utils.construct_restore_args({name: abstract})
        item = ocp_args.PyTreeRestore(item={name: abstract}, restore_args=restore_args, partial_restore=True)
        return self._restore(step, ocp_args.Composite(state=item)).state[name]

    def _restore(self, step: int, items: ocp_args.Composite) -> Any:
        try:
            return self._manager.restore(step, args=items)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"cannot read the checkpoint {self.folder / str(step)}: {reason}") from error
