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
import re
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

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
from jaxformers.train.integrity import find_damage, write_checksums
from jaxformers.train.state import TrainState
from jaxformers.train.stored import StoredArray, open_stored

FOLDER = "checkpoints"
ITEMS = ("state", "data", "meta")
META_KEYS = ("model", "tokenizer", "config", "mesh")  # without which no run can tell whether a checkpoint is its own
SPARE_BYTES = 2**20  # beside a checkpoint's arrays: metadata, and what the run writes meanwhile
UNFINISHED = ".unfinished-"  # begins the names of checkpoints that are being written or removed
_SAVE_SECONDS = 3600  # for the processes of a run to write one checkpoint
_NAMED = 4  # damaged files in an error before it says how many more there are
_NOTHING, _ALL_DAMAGED = -1, -2
_ORBAX_COROUTINES = "cancellable|_create_paths|_async_serialize|_serialize|JsonCheckpoint|BasePyTreeCheckpoint"
_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written, in one line."""


class Checkpointer:
    """Saves and restores one run's checkpoints. As a context manager it waits for the last save on the way out.

    A checkpoint appears under its step number by a rename, complete and with checksums of its files, or not at all.
    Without a config it only reads, and leaves alone what another process may be writing. `say` hears of saves that
    failed where the config goes on without them, and of old checkpoints that cannot be removed.
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
        if self._config.on_error == "continue" and jax.process_count() > 1:
            raise CheckpointError(
                "checkpoint.on_error=continue is for a single process: several lose each other where one of them "
                "cannot write; use stop, and `launch --restarts`"
            )
        self._saved_at = time.monotonic()
        self._sealing: threading.Thread | None = None
        self._writing: int | None = None
        self._failure: Exception | None = None  # of the thread in the background
        self._lost: CheckpointError | None = None  # the last save, where it failed and the run goes on
        if config is not None and is_first():
            self._make_folder()
        self._orbax = _new_writer()

    def _make_folder(self) -> None:
        """The folder, which can be written, without what saves left behind that did not live to their end."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
            self._clean()
        except OSError as error:
            raise CheckpointError(
                f"cannot write in {self.folder}: {error.strerror or error}; make it writable, or choose another run_dir"
            ) from None

    def _clean(self) -> None:
        for path in self.folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(path)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        with suppress(Exception):  # the failure that a save in the background may end in; another one is on its way
            if self._sealing is not None:
                self._sealing.join()
            self._orbax.close()

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if is_step(path.name) and path.is_dir())

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return max(self.steps, default=None)

    def is_due(self, step: int) -> bool:
        """Whether the config asks for a checkpoint after this step. CheckpointError as `save` raises it, of a save in
        the background that has failed meanwhile."""
        if self._failure is not None:
            self.settle()
        by_step = self._config.every_steps is not None and step % self._config.every_steps == 0
        minutes = self._config.every_minutes
        # Clocks differ: processes agree on what one of them says.
        return by_step or (minutes is not None and agree(time.monotonic() - self._saved_at >= 60 * minutes))

    def save(self, state: TrainState, data: grain.DatasetIterator, meta: Mapping[str, Any]) -> None:
        """Starts writing the state under its step number; returns once its arrays may be changed again.

        A step that is saved already is left alone. Where this save fails, or an earlier one did in the background:
        CheckpointError, or, if the config says continue, a line, and the next save is another try.
        """
        self.settle()
        self._lost, self._writing = None, int(state.step)
        try:
            if self._writing != self.latest_step:
                self._start(self._writing, state, data, meta)
        except Exception as error:
            self._fail(error)

    def _start(self, step: int, state: TrainState, data: grain.DatasetIterator, meta: Mapping[str, Any]) -> None:
        self._saved_at = time.monotonic()  # also of one that fails: it is tried again when the next one is due
        if self._config.on_error == "continue":
            self._tidy()  # threads of a save that failed may have written on after its end
        self._check_room(state)
        items = ocp_args.Composite(
            state=ocp_args.StandardSave(state),
            # As JSON and not through Grain's own handler, whose file names depend on the number of processes.
            data=ocp_args.JsonSave(data.get_state()),
            meta=ocp_args.JsonSave(dict(meta)),
        )
        self._orbax.save(self.folder / f"{UNFINISHED}{step}", args=items, force=True)
        self._sealing = threading.Thread(target=self._seal, args=(step,), name=f"checkpoint {step}")
        self._sealing.start()

    def _seal(self, step: int) -> None:
        """Behind the writing, in a thread: checksums, the final name, and older checkpoints' end."""
        try:
            self._orbax.wait_until_finished()
            if is_first():
                seal(self.folder / f"{UNFINISHED}{step}", self.folder / str(step))
                self.longest_save_seconds = max(self.longest_save_seconds, time.monotonic() - self._saved_at)
                for old in to_remove(self.steps, keep_last=self._config.keep_last, keep_every=self._config.keep_every):
                    self._remove(old)
        except Exception as error:
            self._failure = error

    def _remove(self, step: int) -> None:
        """One that stays costs room only."""
        old = self.folder / str(step)
        try:
            remove(old)
        except OSError as error:
            self._say(f"cannot remove the old checkpoint {old}: {reason_of(error)}")

    def wait(self) -> None:
        """Returns once the last save is complete. CheckpointError if it failed, also where the config goes on."""
        self.settle()
        lost, self._lost = self._lost, None
        if lost is not None:
            raise lost

    def settle(self) -> None:
        """Returns when nothing is being written any more. Of a background save that failed it tells as `save` does."""
        if self._sealing is None:
            return
        self._sealing.join()
        self._sealing, failure, self._failure = None, self._failure, None
        if failure is not None:
            self._fail(failure)
        else:
            wait_for_all("write a checkpoint")  # the first one names it, and then the others may look at the folder

    def _fail(self, reason: Exception) -> None:
        error = self._cannot_save(reason_of(reason))
        error.__cause__ = reason
        _release_threads()
        if self._config.on_error == "stop":
            raise error
        self._lost = error
        self._say(f"{error}; the run goes on and tries again when the next one is due")
        with suppress(Exception):  # what it could not write it may not be able to close either
            self._orbax.close()
        self._orbax = _new_writer()
        self._tidy()

    def _tidy(self) -> None:
        """Gives back the room that saves which failed have taken, as far as the disk lets us."""
        with suppress(OSError):
            self._clean()

    def _check_room(self, state: TrainState) -> None:
        """Refuses a save that the disk has no room for, before half of it is written."""
        written = (s.data.nbytes for a in jax.tree.leaves(state) for s in a.addressable_shards if s.replica_id == 0)
        need = sum(written) + SPARE_BYTES
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise OSError(f"it needs {need / 1e6:,.1f} MB, and the disk has {free / 1e6:,.1f} MB left")

    def _cannot_save(self, reason: str) -> CheckpointError:
        others: list[int] = []
        with suppress(OSError):  # a disk that fails may not even list them
            others = [step for step in self.steps if step != self._writing]
        kept = f"the newest complete one is step {others[-1]}" if others else "there is none yet"
        return CheckpointError(f"cannot save step {self._writing} in {self.folder} ({kept}): {reason}")

    def newest_good(self, say: Callable[[str], None]) -> int | None:
        """Step of the newest checkpoint whose files are as they were written, None where there is none at all.

        `say` hears of every damaged one that is passed over. A run that writes sets those aside, as STEP.damaged.
        CheckpointError where all are damaged.
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
            damage = find_damage(self.folder / str(step)) if self._config.verify else []
            if not damage:
                return step
            say(f"{self._describe(step, damage)}; going back to the one before")
        return _ALL_DAMAGED if steps else None

    def check(self, step: int) -> None:
        """CheckpointError naming what is wrong with the files of a step."""
        if damage := find_damage(self.folder / str(step)):
            raise CheckpointError(f"{self._describe(step, damage)}; {self._others(step)}")

    def _others(self, step: int) -> str:
        others = [str(other) for other in self.steps if other != step]
        return f"the others there are: {', '.join(others)}" if others else "there is no other one"

    def set_aside(self, newer_than: int) -> None:
        """Renames the checkpoints behind a step, which are damaged, so that their steps can be saved again."""
        for step in self.steps if is_first() else []:
            if step > newer_than:
                name = next(n for i in itertools.count() if not (n := self._damaged_name(step, i)).exists())
                os.replace(self.folder / str(step), name)
        wait_for_all("set damaged checkpoints aside")

    def _damaged_name(self, step: int, count: int) -> Path:
        return self.folder / (f"{step}.damaged" + (f".{count}" if count else ""))

    def _describe(self, step: int, damage: Sequence[str]) -> str:
        more = f" and {len(damage) - _NAMED} more" if len(damage) > _NAMED else ""
        return f"the checkpoint {self.folder / str(step)} is damaged: {', '.join(damage[:_NAMED])}{more}"

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
        path = self.folder / str(step)
        if not path.is_dir():
            raise CheckpointError(f"{path} does not exist; there are {', '.join(map(str, self.steps)) or 'none'}")
        if lacks := [name for name in ITEMS if not (path / name).is_dir()]:
            raise CheckpointError(f"{path} is not whole: it has no {' and no '.join(lacks)}; use another checkpoint")
        try:
            return read(path)
        except Exception as error:
            raise CheckpointError(f"cannot read the checkpoint {path}: {reason_of(error)}") from error


def to_remove(steps: Sequence[int], *, keep_last: int, keep_every: int | None) -> list[int]:
    """The steps (oldest first) that retention does not keep: neither among the newest nor divisible by `keep_every`."""
    return [step for step in steps[:-keep_last] if keep_every is None or step % keep_every]


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint's folder. It loses its name first: half a checkpoint is never seen under it."""
    leaving = checkpoint.with_name(f"{UNFINISHED}removed-{checkpoint.name}")
    os.replace(checkpoint, leaving)
    shutil.rmtree(leaving)


def seal(unfinished: Path, checkpoint: Path) -> None:
    """Gives a written folder its checksums and then its final name."""
    write_checksums(unfinished)
    for path in unfinished.rglob("*"):
        _sync(path)
    os.replace(unfinished, checkpoint)
    _sync(checkpoint.parent)


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


def is_step(name: str) -> bool:
    """Whether a folder has the name that the checkpoint of a step gets: 12, and not 012 or 12.damaged."""
    return name.isdecimal() and name == str(int(name))


def _sync(path: Path) -> None:
    """Makes a file, or the names in a folder, survive a power cut, where the system lets folders be opened."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _from_first(step: int | None) -> int | None:
    """What the first process says."""
    sent = int(multihost_utils.broadcast_one_to_all(np.int64(_NOTHING if step is None else step)))
    return None if sent == _NOTHING else sent


def reason_of(error: Exception) -> str:
    """What went wrong, in one line; where it was the system's, in the system's words."""
    text = str(error).strip()
    if code := re.search(r"os_error_code='(\d+)'|\[Errno (\d+)\]", text):
        return os.strerror(int(code[1] or code[2]))
    return text.splitlines()[0] if text else type(error).__name__
