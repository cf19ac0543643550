"""Checkpoints on a fast disk of the machine, and copies of them in the run's folder: each is good by itself."""

import itertools
import os
import shutil
import threading
from pathlib import Path

import jax
import pytest
from faults import BAD_DISK, LEAVES_LOOPS, NO_SPACE, Faults
from saving import assert_right, restored, save
from tiny import assert_bit_equal, flip, run_config

import jaxformers as jf
from jaxformers.train import folders
from jaxformers.train.checkpoint import FOLDER, Checkpointer, CheckpointError
from jaxformers.train.config import CheckpointConfig
from jaxformers.train.integrity import find_damage

pytestmark = LEAVES_LOOPS


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def config(tmp_path):
    return CheckpointConfig(every_steps=10, local_every_steps=1, local_dir=str(tmp_path / "fast"))


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def local_of(config) -> Path:
    [folder] = Path(config.local_dir).iterdir()
    return folder


def saved(run, config, *steps, say=print):
    with Checkpointer(run, config, say=say) as checkpoints:
        for step in steps:
            save(checkpoints, step, place=checkpoints.is_due(step) or "store")


def test_every_save_stays_on_the_fast_disk_and_those_that_are_due_are_copied(run, config):
    saved(run, config, *range(1, 13))
    assert steps_of(local_of(config)) == [11, 12]
    assert steps_of(run / FOLDER) == [10]
    assert_right(run, 10)


def test_without_a_rhythm_of_its_own_the_fast_disk_gets_what_the_store_gets(run, config):
    config = config.model_copy(update={"local_every_steps": None})
    with Checkpointer(run, config) as checkpoints:
        assert [step for step in range(1, 31) if checkpoints.is_due(step)] == [10, 20, 30]
    saved(run, config, 10, 20, 30, 40)
    assert steps_of(local_of(config)) == [30, 40]
    assert steps_of(run / FOLDER) == [20, 30, 40]


def test_a_restart_goes_on_from_the_newest_of_both_and_a_dead_machine_from_the_store(run, config):
    saved(run, config, *range(1, 13))
    with Checkpointer(run, config) as checkpoints:
        assert checkpoints.newest_good(print) == 12
        assert int(restored(checkpoints, 12)[0].step) == 12
    shutil.rmtree(config.local_dir)
    with Checkpointer(run, config) as checkpoints:
        assert checkpoints.newest_good(print) == 10
        assert int(restored(checkpoints, 10)[0].step) == 10


def test_a_damaged_local_checkpoint_is_named_and_the_next_best_of_both_is_taken(run, config):
    saved(run, config, 9, 10)
    local, said = local_of(config), []
    for step in (10, 9):
        flip(local / str(step) / "meta" / "metadata", bit=9)
    with Checkpointer(run, config) as checkpoints:
        assert checkpoints.newest_good(said.append) == 10
        assert int(restored(checkpoints, 10)[0].step) == 10
    [line] = said
    assert line.startswith(f"the checkpoint {local / '10'} is damaged: meta/metadata ")
    assert line.endswith(f"; going on with {run / FOLDER / '10'}")
    assert steps_of(local) == [9], "a damaged one is not taken for its step again"


@pytest.mark.parametrize("life", ["on another machine", "without a local disk", "begun anew"])
def test_local_checkpoints_of_another_life_of_the_run_are_not_gone_back_to(run, config, tmp_path, life):
    saved(run, config, 10, 11)
    if life == "on another machine":
        saved(run, config.model_copy(update={"local_dir": str(tmp_path / "other")}), 20)
    elif life == "without a local disk":
        saved(run, CheckpointConfig(), 20)
    else:
        shutil.rmtree(run)
    with Checkpointer(run, config) as checkpoints:
        assert checkpoints.latest_step == (None if life == "begun anew" else 20)


def test_two_runs_share_a_disk(run, config, tmp_path):
    saved(run, config, 10)
    saved(tmp_path / "other" / "run", config, 20)
    for where, step in ((run, 10), (tmp_path / "other" / "run", 20)):
        with Checkpointer(where, config) as checkpoints:
            assert checkpoints.steps == [step]


def test_a_step_that_is_only_local_is_copied_when_the_run_ends_there(run, config):
    saved(run, config, 10, 11)
    with Checkpointer(run, config) as checkpoints:
        save(checkpoints, 11)
    assert steps_of(run / FOLDER) == [10, 11]
    assert_right(run, 11)


@pytest.fixture
def slow_copies(monkeypatch):
    """Copies wait for this."""
    go, copytree = threading.Event(), shutil.copytree

    def waiting(*args, **kwargs):
        assert go.wait(60)
        return copytree(*args, **kwargs)

    monkeypatch.setattr("jaxformers.train.folders.shutil.copytree", waiting)
    return go


def test_a_slow_store_does_not_hold_local_saves_up_nor_do_they_take_what_is_copied(run, config, slow_copies):
    with Checkpointer(run, config) as checkpoints:
        for step in range(10, 15):
            save(checkpoints, step, place=checkpoints.is_due(step))
        checkpoints.settle()
        assert steps_of(local_of(config)) == [10, 13, 14]
        assert steps_of(run / FOLDER) == []
        slow_copies.set()
    assert_right(run, 10)


DISK_SIZE = "4m"


@pytest.fixture
def full_disk(small_disk):
    """A disk with 64 KiB left, which is less than a checkpoint."""
    (small_disk / "something else").write_bytes(b"\1" * (2**22 - 2**16))
    return small_disk


@pytest.mark.parametrize("which", ["local", "store"])
@pytest.mark.parametrize("noticed_before", [True, False])
def test_either_disk_may_be_full(run, config, full_disk, tmp_path, monkeypatch, which, noticed_before):
    if not noticed_before:
        free = shutil.disk_usage(tmp_path)
        monkeypatch.setattr("jaxformers.train.folders.shutil.disk_usage", lambda _path: free)
    config = config.model_copy(update={"on_error": "continue", "every_steps": 1, "local_every_steps": None})
    if which == "local":
        config = config.model_copy(update={"local_dir": str(full_disk)})
    else:
        run = full_disk / "run"
    said = []
    with Checkpointer(run, config, say=said.append) as checkpoints:
        save(checkpoints, 1)
        with pytest.raises(CheckpointError):
            checkpoints.wait()
        (full_disk / "something else").unlink()
        save(checkpoints, 2)
    [line] = said
    doing = "save step 1 in" if which == "local" else "copy step 1 to"
    assert line.startswith(f"cannot {doing} {full_disk}/run")
    assert ("and the disk has" if noticed_before else "No space left on device") in line
    assert line.endswith("; the run goes on and tries again when the next one is due")
    assert steps_of(run / FOLDER)[-1:] == [2]
    assert_right(run, 2)


def test_a_copy_that_fails_stops_the_run_by_default_before_the_next_is_due(run, config, monkeypatch):
    faults = Faults(monkeypatch, run / FOLDER)
    checkpoints = Checkpointer(run, config)
    save(checkpoints, 10)
    checkpoints.wait()
    faults.arm("mkdir", 1, BAD_DISK, lasts=True)
    save(checkpoints, 20)
    checkpoints.settle()
    checkpoints._copier._thread.join()
    with pytest.raises(CheckpointError) as caught:
        checkpoints.is_due(21)
    where = f"{run / FOLDER} (the newest complete one is step 10)"
    assert str(caught.value) == f"cannot copy step 20 to {where}: Input/output error"
    faults.disarm()
    assert_right(run, 10)
    with Checkpointer(run, config) as again:
        assert again.newest_good(print) == 20


@pytest.mark.parametrize("call", ["open", "mkdir", "replace", "fsync"])
def test_a_copy_of_which_any_call_fails_leaves_nothing_half(run, config, monkeypatch, call):
    saved(run, config, 10)
    source, copied, faults = local_of(config) / "10", run / FOLDER / "10", Faults(monkeypatch, run)
    for turn in itertools.count(1):
        shutil.rmtree(copied, ignore_errors=True)
        faults.arm(call, turn, NO_SPACE)
        failure = None
        try:
            folders.copy(source, run / FOLDER)
        except OSError as error:
            failure = folders.reason_of(error)
        faults.disarm()
        if not faults.fired:
            break
        assert failure == "No space left on device"
        assert {path.name for path in (run / FOLDER).iterdir() if path.is_dir()} <= {"10"}
        assert not copied.is_dir() or find_damage(copied) == []
    assert turn > 1
    assert_right(run, 10)


def test_bytes_that_arrive_changed_are_not_taken_for_a_checkpoint(run, config, monkeypatch):
    copytree = shutil.copytree

    def changing(source, target, *args, **kwargs):
        copytree(source, target, *args, **kwargs)
        if Path(target).parent == run / FOLDER:
            flip(Path(target) / "meta" / "metadata", bit=9)

    monkeypatch.setattr("jaxformers.train.folders.shutil.copytree", changing)
    checkpoints = Checkpointer(run, config)
    save(checkpoints, 10)
    with pytest.raises(CheckpointError, match=r"its files arrive changed: meta/metadata .*$"):
        checkpoints.wait()
    assert os.listdir(run / FOLDER) == [".local"]


def test_a_local_disk_that_cannot_be_written_is_one_line(run, config, tmp_path):
    (tmp_path / "fast").write_text("a file")
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(run, config)
    expected = f"cannot write in {tmp_path / 'fast'}: Not a directory; make it writable, or choose another "
    assert str(caught.value) == expected + "checkpoint.local_dir"


def test_several_processes_are_refused(run, config, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(run, config)
    assert str(caught.value).startswith(f"checkpoint.local_dir={config.local_dir} is for a single process: ")


def test_a_run_that_dies_goes_on_from_its_local_checkpoint_bit_for_bit(tmp_path, monkeypatch, capsys):
    from whole_runs import Stopped, act_at

    whole = run_config(tmp_path)
    truth = jf.fit(whole)
    checkpoint = {"every_steps": 4, "local_every_steps": 1, "local_dir": str(tmp_path / "fast")}
    config = whole | {"run_dir": str(tmp_path / "again"), "checkpoint": checkpoint}

    def die():
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("jaxformers.train.monitor.Trackers.log", lambda self, *a: [t.log(*a) for t in self._trackers])
        act_at(patch, 6, die)
        with pytest.raises(Stopped):
            jf.fit(config)
    capsys.readouterr()
    result = jf.fit(config)
    assert "resuming from step 5" in capsys.readouterr().err
    assert_bit_equal(jax.device_get(result.model.params), jax.device_get(truth.model.params))
    assert steps_of(tmp_path / "again" / FOLDER) == [4, 8]
