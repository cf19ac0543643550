"""Checkpoints of a run: Orbax Composites of state, data position and metadata under one step number.

    RUN/checkpoints/STEP/{state, data, meta}

Written in the background, committed by a rename, restored onto any mesh. `meta` is JSON: the model's config.json, the
resolved run config and what else the caller wants checked at a resume.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import args as ocp_args

from jaxformers.models.params import Params
from jaxformers.parallel.distributed import agree
from jaxformers.train.config import CheckpointConfig
from jaxformers.train.state import TrainState

FOLDER = "checkpoints"
SPARE_BYTES = 2**20  # beside a checkpoint's arrays: metadata, and what the run writes meanwhile


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written, in one line."""


class Checkpointer:
    """Saves and restores one run's checkpoints. As a context manager it waits for the last save on the way out.

    Without a config it only reads, and leaves alone what another process may be writing.
    """

    def __init__(self, run_dir: str | Path, config: CheckpointConfig | None = None):
        # What goes wrong in Orbax is raised here as one line; its threads would log a stack of tracebacks as well.
        logging.getLogger("absl").setLevel(logging.CRITICAL + 1)
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
        self._writing: int | None = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        with suppress(Exception):  # the failure that a save in the background may end in; another one is on its way
            self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest committed checkpoint."""
        return self._manager.latest_step()

    def is_due(self, step: int) -> bool:
        """Whether the config asks for a checkpoint after this step."""
        by_step = self._config.every_steps is not None and step % self._config.every_steps == 0
        minutes = self._config.every_minutes
        # Clocks differ: processes agree on what one of them says.
        return by_step or (minutes is not None and agree(time.monotonic() - self._saved_at >= 60 * minutes))

    def save(self, state: TrainState, data: grain.DatasetIterator, meta: Mapping[str, Any]) -> None:
        """Starts writing the state under its step number; returns once its arrays may be changed again.

        A step that is saved already is left alone. CheckpointError if this or an earlier background save failed.
        """
        step = int(state.step)
        if step == self.latest_step:
            return
        self.wait()
        self._check_room(step, state)
        items = ocp_args.Composite(
            state=ocp_args.StandardSave(state),
            # As JSON and not through Grain's own handler, whose file names depend on the number of processes.
            data=ocp_args.JsonSave(data.get_state()),
            meta=ocp_args.JsonSave(dict(meta)),
        )
        self._writing = step
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise self._cannot_save(_reason(error)) from error
        self._saved_at = time.monotonic()

    def wait(self) -> None:
        """Returns when nothing is being written any more. CheckpointError if a background save failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._cannot_save(_reason(error)) from error

    def _check_room(self, step: int, state: TrainState) -> None:
        """Refuses a save that the disk has no room for, before half of it is written."""
        written = (s.data.nbytes for a in jax.tree.leaves(state) for s in a.addressable_shards if s.replica_id == 0)
        need = sum(written) + SPARE_BYTES
        free = shutil.disk_usage(self.folder).free
        if free < need:
            self._writing = step
            raise self._cannot_save(f"it needs {need / 1e6:,.1f} MB, and the disk has {free / 1e6:,.1f} MB left")

    def _cannot_save(self, reason: str) -> CheckpointError:
        latest = self.latest_step
        kept = "there is none yet" if latest is None else f"the newest complete one is step {latest}"
        return CheckpointError(f"cannot save step {self._writing} in {self.folder} ({kept}): {reason}")

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
            raise CheckpointError(f"cannot read the checkpoint {self.folder / str(step)}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What went wrong, in one line; where it was the system's, in the system's words."""
    text = str(error).strip()
    if code := re.search(r"os_error_code='(\d+)'|\[Errno (\d+)\]", text):
        return os.strerror(int(code[1] or code[2]))
    return text.splitlines()[0] if text else type(error).__name__
