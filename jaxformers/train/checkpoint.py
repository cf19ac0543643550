"""Checkpoints of a run: Orbax Composites of state, data position and metadata under one step number.

    RUN/checkpoints/STEP/{state, data, meta}

Written in the background, committed with checksums by a rename, restored onto any mesh. `meta` is JSON: the model's
config.json, the resolved run config and what else the caller wants checked at a resume.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import args as ocp_args
from orbax.checkpoint._src.futures import future as orbax_future  # threads that nothing public can end

from jaxformers.models.params import Params
from jaxformers.parallel.distributed import agree, is_first, wait_for_all
from jaxformers.train.config import CheckpointConfig
from jaxformers.train.folders import (
    UNFINISHED,
    check_room,
    clean,
    reason_of,
    remove,
    seal,
    some,
    steps_in,
    tidy,
)
from jaxformers.train.integrity import find_damage
from jaxformers.train.memory import give_back
from jaxformers.train.retention import VALIDATION, Metric, measured, numbers_of, to_remove
from jaxformers.train.state import TrainState
from jaxformers.train.stored import StoredArray, open_stored
from jaxformers.train.tiers import KEPT, Copier, leave_local, open_local

FOLDER = "checkpoints"
ITEMS = ("state", "data", "meta")
META_KEYS = ("model", "tokenizer", "config", "mesh")  # without which no run can tell whether a checkpoint is its own
SPARE_BYTES = 2**20  # beside a checkpoint's arrays: metadata, and what the run writes meanwhile
_BACK = "back to the one before"
_SAVE_SECONDS = 3600  # for the processes of a run to write one checkpoint
Place = Literal["store", "local"]  # the run's folder; or only the machine's own disk or memory
_NOTHING, _ALL_DAMAGED = -1, -2
_ORBAX_COROUTINES = "cancellable|_create_paths|_?async_serialize|_serialize|JsonCheckpoint|BasePyTreeCheckpoint"
_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written, in one line."""


class Checkpointer:
    """Saves and restores one run's checkpoints. As a context manager it waits for the last save on the way out.

    A checkpoint appears under its step number by a rename, complete and with checksums of its files, or not at all.
    Where the config names a local place, it appears there first, and then in the run's folder as a copy.
    Without a config it only reads the run's folder, and leaves alone what another process may be writing. `say` hears
    of saves that failed where the config goes on without them, and of old checkpoints that cannot be removed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: CheckpointConfig | None = None,
        *,
        say: Callable[[str], None] = _log.warning,
    ):
        _hush_orbax()
        self.folder = Path(run_dir).absolute() / FOLDER
        self.longest_save_seconds = 0.0
        self._config, self._say = config or CheckpointConfig(every_steps=None), say
        self._check_processes()
        self._metric = Metric.parse(self._config.best_metric)
        self._saved_at = time.monotonic()
        self._sealing: threading.Thread | None = None
        self._writing: int | None = None
        self._failure: Exception | None = None  # of the thread in the background
        self._lost: CheckpointError | None = None  # the last save, where it failed and the run goes on
        self._local: Path | None = None
        self._copier = Copier(self.folder)
        if config is not None and is_first():
            self._make_folders()
        self._orbax = _new_writer()

    def _check_processes(self) -> None:
        if jax.process_count() == 1:
            return
        if self._config.on_error == "continue":
            raise CheckpointError(
                "checkpoint.on_error=continue is for a single process: several lose each other where one of them "
                "cannot write; use stop, and `launch --restarts`"
            )
        if self._config.local_dir is not None:
            raise CheckpointError(
                f"checkpoint.local_dir={self._config.local_dir} is for a single process: of several, on machines of "
                "their own, each would hold a part; leave it out"
            )

    def _make_folders(self) -> None:
        """The folders, which can be written, without what saves left behind that did not live to their end."""
        folder, key = self.folder, "run_dir"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            clean(folder)
            if self._config.local_dir is None:
                leave_local(folder)
            else:
                folder, key = Path(self._config.local_dir), "checkpoint.local_dir"
                self._local = open_local(self._config.local_dir, self.folder)
        except OSError as error:
            raise CheckpointError(
                f"cannot write in {folder}: {error.strerror or error}; make it writable, or choose another {key}"
            ) from None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        with suppress(Exception):  # the failure that a save in the background may end in; another one is on its way
            if self._sealing is not None:
                self._sealing.join()
            self._copier.wait()
            self._orbax.close()

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        local = [] if self._local is None else steps_in(self._local)
        return sorted({*local, *steps_in(self.folder)})

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return max(self.steps, default=None)

    def is_due(self, step: int) -> Place | None:
        """Where the config asks for a checkpoint after this step; None where it asks for none. CheckpointError as
        `save` raises it, of a save in the background that has failed meanwhile."""
        if self._failure is not None:
            self.settle()
        if self._copier.failed:
            self._settle_copy()
        minutes = self._config.every_minutes
        # Clocks differ: processes agree on what one of them says.
        if _divides(self._config.every_steps, step) or (
            minutes is not None and agree(time.monotonic() - self._saved_at >= 60 * minutes)
        ):
            return "store"
        return "local" if _divides(self._config.local_every_steps, step) else None

    def check_measured(self, metrics: Mapping[str, Any]) -> None:
        """ValueError where the config keeps the best by something that steps, with these metrics, do not measure."""
        if self._config.keep_best is None or self._metric.evaluated or self._metric.name in numbers_of(metrics):
            return
        raise ValueError(
            f"checkpoint.best_metric: {self._metric.name} is no number that this run measures; there are "
            f"{VALIDATION}, {', '.join(numbers_of(metrics))}"
        )

    def save(
        self, state: TrainState, data: grain.DatasetIterator, meta: Mapping[str, Any], *, place: Place = "store"
    ) -> None:
        """Starts writing the state under its step number; returns once its arrays may be changed again.

        place: whether it is copied from the local place, if there is one, to the run's folder. A step that is saved
        already is left alone. Where this save fails, or an earlier one did in the background: CheckpointError, or, if
        the config says continue, a line, and the next save is another try.
        """
        self.settle()
        copies = self._local is not None and place == "store"
        if copies:
            self._settle_copy()  # a slow store holds the run up here, and not before
        self._lost, self._writing = None, int(state.step)
        try:
            if self._writing != self.latest_step:
                self._start(self._writing, state, data, meta, place)
            elif copies and self._writing not in steps_in(self.folder):
                self._copy(self._writing, time.monotonic())
        except Exception as error:
            self._fail(error)

    @property
    def _writes_in(self) -> Path:
        return self.folder if self._local is None else self._local

    def _start(
        self, step: int, state: TrainState, data: grain.DatasetIterator, meta: Mapping[str, Any], place: Place
    ) -> None:
        started = time.monotonic()
        if place == "store":
            self._saved_at = started  # also of one that fails: it is tried again when the next one is due
        if self._config.on_error == "continue":
            tidy(self._writes_in)  # threads of a save that failed may have written on after its end
        written = (s.data.nbytes for a in jax.tree.leaves(state) for s in a.addressable_shards if s.replica_id == 0)
        check_room(self._writes_in, sum(written) + SPARE_BYTES)
        items = ocp_args.Composite(
            state=ocp_args.StandardSave(state),
            # As JSON and not through Grain's own handler, whose file names depend on the number of processes.
            data=ocp_args.JsonSave(data.get_state()),
            meta=ocp_args.JsonSave(dict(meta)),
        )
        self._orbax.save(self._writes_in / f"{UNFINISHED}{step}", args=items, force=True)
        self._sealing = threading.Thread(target=self._seal, args=(step, place, started), name=f"checkpoint {step}")
        self._sealing.start()

    def _seal(self, step: int, place: Place, started: float) -> None:
        """Behind the writing, in a thread: checksums, the final name, and older checkpoints' end."""
        try:
            self._orbax.wait_until_finished()
            if not is_first():
                return
            seal(self._writes_in / f"{UNFINISHED}{step}", self._writes_in / str(step))
            if self._local is None:
                self._stored(started)
                return
            for old in steps_in(self._local)[:-KEPT]:
                if old != self._copier.copying:
                    self._remove(self._local / str(old))
            if place == "store":
                self._copy(step, started)
        except Exception as error:
            self._failure = error
        finally:
            give_back()

    def _copy(self, step: int, started: float) -> None:
        assert self._local is not None
        self._copier.start(self._local / str(step), then=lambda: self._stored(started))

    def _stored(self, started: float) -> None:
        """A checkpoint has come to the run's folder: older ones may go."""
        self.longest_save_seconds = max(self.longest_save_seconds, time.monotonic() - started)
        steps, keep, best = steps_in(self.folder), self._config, []
        if keep.keep_best is not None:
            try:
                values = {step: measured(self.folder / str(step)).get(self._metric.name) for step in steps}
            except OSError as error:
                self._say(f"cannot tell which checkpoints in {self.folder} are the best: {reason_of(error)}")
                return
            best = self._metric.best(values, keep.keep_best)
        for old in to_remove(steps, keep_last=keep.keep_last, keep_every=keep.keep_every, best=best):
            self._remove(self.folder / str(old))

    def _remove(self, old: Path) -> None:
        """One that stays costs room only."""
        try:
            remove(old)
        except OSError as error:
            self._say(f"cannot remove the old checkpoint {old}: {reason_of(error)}")

    def wait(self) -> None:
        """Returns once the last save is complete. CheckpointError if it failed, also where the config goes on."""
        self.settle()
        self._settle_copy()
        lost, self._lost = self._lost, None
        if lost is not None:
            raise lost

    def settle(self) -> None:
        """Returns when nothing is being written any more, but for a copy of what is. Of a background save that failed
        it tells as `save` does."""
        if self._sealing is None:
            return
        self._sealing.join()
        self._sealing, failure, self._failure = None, self._failure, None
        if failure is not None:
            self._fail(failure)
        else:
            wait_for_all("write a checkpoint")  # the first one names it, and then the others may look at the folder

    def _settle_copy(self) -> None:
        if failure := self._copier.wait():
            step = self._copier.step
            self._give_up(self._failed(f"copy step {step} to", self.folder, step, failure), failure)

    def _fail(self, reason: Exception) -> None:
        error = self._failed(f"save step {self._writing} in", self._writes_in, self._writing, reason)
        _release_threads()
        self._give_up(error, reason)
        with suppress(Exception):  # what it could not write it may not be able to close either
            self._orbax.close()
        self._orbax = _new_writer()
        tidy(self._writes_in)

    def _give_up(self, error: CheckpointError, reason: Exception) -> None:
        error.__cause__ = reason
        if self._config.on_error == "stop":
            raise error
        self._lost = error
        self._say(f"{error}; the run goes on and tries again when the next one is due")

    def _failed(self, what: str, folder: Path, step: int | None, reason: Exception) -> CheckpointError:
        others: list[int] = []
        with suppress(OSError):  # a disk that fails may not even list them
            others = [other for other in steps_in(folder) if other != step]
        kept = f"the newest complete one is step {others[-1]}" if others else "there is none yet"
        return CheckpointError(f"cannot {what} {folder} ({kept}): {reason_of(reason)}")

    def newest_good(self, say: Callable[[str], None]) -> int | None:
        """Step of the newest checkpoint whose files are as they were written, None where there is none at all.

        `say` hears of every damaged one that is passed over. A run that writes sets those aside, as STEP.damaged; a
        damaged local one is removed. CheckpointError where all are damaged.
        """
        found = self._newest_good(say) if is_first() else None
        if jax.process_count() > 1:
            wait_for_all("compare a checkpoint with its checksums")
            found = _from_first(found)
        if found == _ALL_DAMAGED:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be used: the files of all are damaged; bring them back from a "
                "copy, or choose another run_dir"
            )
        return found

    def _newest_good(self, say: Callable[[str], None]) -> int | None:
        steps = self.steps
        for step in reversed(steps):
            while (path := self._path(step)).is_dir():
                damage = find_damage(path) if self._config.verify else []
                if not damage:
                    return step
                copy = self.folder / str(step)
                there_is_another = path != copy and copy.is_dir()
                say(f"{_describe(path, damage)}; going {f'on with {copy}' if there_is_another else _BACK}")
                if path == copy:
                    break
                self._drop(path)
        return _ALL_DAMAGED if steps else None

    def _drop(self, path: Path) -> None:
        """Removes a damaged local checkpoint, which would else be taken for the step's."""
        try:
            remove(path)
        except OSError as error:
            raise CheckpointError(f"cannot remove the damaged checkpoint {path}: {reason_of(error)}") from None

    def _path(self, step: int) -> Path:
        """Where a step is read from: the local place, if it is there."""
        local = None if self._local is None else self._local / str(step)
        return local if local is not None and local.is_dir() else self.folder / str(step)

    def check(self, step: int) -> None:
        """CheckpointError naming what is wrong with the files of a step."""
        if damage := find_damage(self._path(step)):
            raise CheckpointError(f"{_describe(self._path(step), damage)}; {self._others(step)}")

    def _others(self, step: int) -> str:
        others = [str(other) for other in self.steps if other != step]
        return f"the others there are: {', '.join(others)}" if others else "there is no other one"

    def set_aside(self, newer_than: int) -> None:
        """Renames the checkpoints behind a step, which are damaged, so that their steps can be saved again."""
        for step in steps_in(self.folder) if is_first() else []:
            if step > newer_than:
                name = next(n for i in itertools.count() if not (n := self._damaged_name(step, i)).exists())
                os.replace(self.folder / str(step), name)
        wait_for_all("set damaged checkpoints aside")

    def _damaged_name(self, step: int, count: int) -> Path:
        return self.folder / (f"{step}.damaged" + (f".{count}" if count else ""))

    def meta(self, step: int) -> dict[str, Any]:
        """The metadata saved with a step."""
        meta = self._restore(step, ocp_args.Composite(meta=ocp_args.JsonRestore())).get("meta") or {}
        if lacks := [key for key in META_KEYS if key not in meta]:
            raise CheckpointError(
                f"{self.folder / str(step)} is no checkpoint of a run: it does not say its {lacks[0]}"
            )
        return meta

    def stored(self, step: int) -> dict[str, StoredArray]:
        """The arrays of a step's state by name, to be read one at a time."""
        return self._reading(step, lambda path: open_stored(path / "state"))

    def restore_arrays(self, step: int, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Some arrays of a step's state, in the shardings given; each device reads its own part."""
        found = self.stored(step)

        def read(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, found[name].read)

        return self._reading(step, lambda _: {name: read(name, leaf) for name, leaf in abstract.items()})

    def restore_data(self, step: int, data: grain.DatasetIterator) -> None:
        """Moves `data` to where it was then."""
        data.set_state(self._restore(step, ocp_args.Composite(data=ocp_args.JsonRestore())).data)

    def restore(self, step: int, abstract: TrainState, data: grain.DatasetIterator | None) -> TrainState:
        """The state of a step in the shardings of `abstract`; `data`, if given, is moved to where it was then."""
        items = ocp_args.Composite(state=ocp_args.StandardRestore(abstract), data=ocp_args.JsonRestore())
        restored = self._restore(step, items)
        if (found := int(restored.state.step)) != step:
            raise CheckpointError(
                f"{self.folder / str(step)} holds step {found}: it is a copy under another name; remove it"
            )
        if data is not None:
            data.set_state(restored.data)
        return restored.state

    def restore_params(self, step: int, abstract: Params, *, ema: bool = False) -> Params:
        """Only the parameters (or their moving average) of a step, in the shardings of `abstract`."""
        name = "ema" if ema else "params"
        restore_args = ocp.checkpoint_utils.construct_restore_args({name: abstract})
        item = ocp_args.PyTreeRestore(item={name: abstract}, restore_args=restore_args, partial_restore=True)
        return self._restore(step, ocp_args.Composite(state=item)).state[name]

    def _restore(self, step: int, items: ocp_args.Composite) -> Any:
        return self._reading(step, lambda path: self._orbax.restore(path, args=items))

    def _reading(self, step: int, read: Callable[[Path], Any]) -> Any:
        """What `read` gives of a step's folder, where anything that goes wrong is a CheckpointError."""
        path = self._path(step)
        if not path.is_dir():
            raise CheckpointError(f"{path} does not exist; there are {', '.join(map(str, self.steps)) or 'none'}")
        if lacks := [name for name in ITEMS if not (path / name).is_dir()]:
            raise CheckpointError(f"{path} is not whole: it has no {' and no '.join(lacks)}; use another checkpoint")
        try:
            return read(path)
        except Exception as error:
            raise CheckpointError(f"cannot read the checkpoint {path}: {reason_of(error)}") from error


def _describe(checkpoint: Path, damage: list[str]) -> str:
    return f"the checkpoint {checkpoint} is damaged: {some(damage)}"


def _divides(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


@functools.cache
def _hush_orbax() -> None:
    """What goes wrong in Orbax is raised as one line; its threads would print a stack of tracebacks as well."""
    logging.getLogger("absl").setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", message=f"coroutine '({_ORBAX_COROUTINES}).*' was never awaited")
    before = sys.unraisablehook

    def hook(found: sys.UnraisableHookArgs) -> None:
        # Of writes that were under way when another one failed; each would say so.
        if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
            before(found)

    sys.unraisablehook = hook


def _release_threads() -> None:
    """Ends what waits in Orbax for folders that a failed save will never make: after the failure it would wait, and
    the process with it, for many minutes."""
    for thread in threading.enumerate():
        if isinstance(thread, orbax_future._SignalingThread):
            with suppress(Exception):  # it has ended meanwhile, or whoever passes signals on has
                thread.cancel()
                orbax_future.set_signals(thread._receive_signals, operation_id=thread._operation_id)


def _new_writer() -> ocp.AsyncCheckpointer:
    options = ocp.AsyncOptions(timeout_secs=_SAVE_SECONDS)
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)


def _from_first(step: int | None) -> int | None:
    """What the first process says."""
    sent = int(multihost_utils.broadcast_one_to_all(np.int64(_NOTHING if step is None else step)))
    return None if sent == _NOTHING else sent
