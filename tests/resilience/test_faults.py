"""A disk that fails under a save costs that save, one line, and, by config, the run; never the checkpoint before."""

import gc
import itertools
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from faults import BAD_DISK, CALLS, LEAVES_LOOPS, NO_SPACE, Faults
from saving import Position, assert_right, said_at, save, state_of

import jaxformers as jf
from jaxformers.train.checkpoint import FOLDER, Checkpointer, CheckpointError
from jaxformers.train.config import CheckpointConfig
from jaxformers.train.folders import remove

pytestmark = LEAVES_LOOPS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STOP = CheckpointConfig(every_steps=1, keep_last=2)
CONTINUE = STOP.model_copy(update={"on_error": "continue"})
SAMPLED = {"open": range(1, 99, 3), "fsync": range(1, 99, 9)}  # of calls that are many, in the fast tests


@pytest.fixture(autouse=True)
def _collected():
    yield
    gc.collect()


def names(run):
    return sorted(path.name for path in (run / FOLDER).iterdir())


def fail_in_turn(faults: Faults, run, call: str, code: int, turns) -> int:
    """Fails one call after the other, each in a save of its own, until there are no more; how many there were."""
    said, failed = [], 0
    with Checkpointer(run, CONTINUE, say=said.append) as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        for step, turn in enumerate(turns, start=2):
            before = checkpoints.latest_step
            faults.arm(call, turn, code)
            save(checkpoints, step)
            checkpoints.settle()
            faults.disarm()
            if not faults.fired:
                break
            failed += 1
            [line] = said
            said.clear()
            where = f"{run / FOLDER} (the newest complete one is step {before})"
            if line.startswith("cannot remove"):
                removed = rf"cannot remove the old checkpoint {run / FOLDER}/\d+: {os.strerror(code)}"
                assert re.fullmatch(removed, line)
                assert checkpoints.latest_step == step
            else:
                after = "; the run goes on and tries again when the next one is due"
                assert line == f"cannot save step {step} in {where}: {os.strerror(code)}{after}"
            assert_right(run, before if before in checkpoints.steps else step)
        save(checkpoints, 1000)
        checkpoints.wait()
    Checkpointer(run, STOP)
    assert all(name.isdecimal() for name in names(run)), "a new start removes what failed saves left"
    assert_right(run, 1000)
    return failed


@pytest.mark.parametrize("call", CALLS)
def test_a_save_of_which_any_call_fails_is_one_line_and_the_run_goes_on(tmp_path, monkeypatch, call):
    code = NO_SPACE if call == "open" else BAD_DISK
    assert fail_in_turn(Faults(monkeypatch, tmp_path), tmp_path, call, code, SAMPLED.get(call, itertools.count(1))) > 1


@pytest.mark.slow
@pytest.mark.parametrize("code", [NO_SPACE, BAD_DISK])
@pytest.mark.parametrize("call", CALLS)
def test_every_call_of_a_save_may_fail(tmp_path, monkeypatch, call, code):
    assert fail_in_turn(Faults(monkeypatch, tmp_path), tmp_path, call, code, itertools.count(1)) > 1


@pytest.mark.parametrize("call", CALLS)
def test_a_disk_that_stays_broken_stops_the_run_by_default(tmp_path, monkeypatch, call):
    faults = Faults(monkeypatch, tmp_path)
    checkpoints = Checkpointer(tmp_path, STOP)
    save(checkpoints, 1)
    checkpoints.wait()
    faults.arm(call, 1, BAD_DISK, lasts=True)
    before = set(threading.enumerate())
    with pytest.raises(CheckpointError) as caught:  # noqa: PT012
        save(checkpoints, 2)
        checkpoints.wait()
    faults.disarm()
    deadline = time.monotonic() + 10
    while waiting := set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, f"{waiting} would keep the process from its end"
        time.sleep(0.01)
    where = f"{tmp_path / FOLDER} (the newest complete one is step 1)"
    assert str(caught.value) == f"cannot save step 2 in {where}: Input/output error"
    assert_right(tmp_path, 1)


def test_a_background_save_that_failed_is_told_before_the_next_one_is_due(tmp_path, monkeypatch):
    faults = Faults(monkeypatch, tmp_path)
    checkpoints = Checkpointer(tmp_path, STOP.model_copy(update={"every_steps": 100}))
    faults.arm("replace", 1, BAD_DISK)
    save(checkpoints, 100)
    deadline = time.monotonic() + 30
    with pytest.raises(  # noqa: PT012
        CheckpointError, match=r"cannot save step 100 in .* \(there is none yet\): Input/output error$"
    ):
        while time.monotonic() < deadline:
            assert not checkpoints.is_due(101)
            time.sleep(0.01)


def test_a_run_that_goes_on_still_ends_in_an_error_where_its_last_save_fails(tmp_path, monkeypatch):
    faults, said = Faults(monkeypatch, tmp_path), []
    checkpoints = Checkpointer(tmp_path, CONTINUE, say=said.append)
    faults.arm("open", 1, BAD_DISK, lasts=True)
    save(checkpoints, 1)
    checkpoints.settle()
    with pytest.raises(CheckpointError, match="cannot save step 1 in"):
        checkpoints.wait()
    assert len(said) == 1


def test_a_write_that_the_system_cuts_short_is_one_line(tmp_path):
    """Here it is the arrays' own writing that fails, and not what Python code does around it."""
    said = []
    with Checkpointer(tmp_path, CONTINUE, say=said.append) as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, most))
        try:
            save(checkpoints, 2)
            checkpoints.settle()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        assert [line.rpartition(": ")[2] for line in said] == [
            "File too large; the run goes on and tries again when the next one is due"
        ]
        assert_right(tmp_path, 1)
        save(checkpoints, 3)
    assert_right(tmp_path, 3)


@pytest.fixture(scope="module")
def failing_disk(tmp_path_factory):
    """A library that comes between tensorstore and the C library's write and fsync."""
    library = tmp_path_factory.mktemp("disk") / "failing_disk.so"
    command = ["gcc", "-shared", "-fPIC", "-o", str(library), str(HERE / "failing_disk.c"), "-ldl"]
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("the library is for Linux, and gcc makes it")
    subprocess.run(command, check=True)
    return library


@pytest.mark.parametrize("code", [BAD_DISK, pytest.param(NO_SPACE, marks=pytest.mark.slow)])
def test_any_write_of_the_arrays_themselves_may_fail_or_take_long(tmp_path, failing_disk, code):
    environment = os.environ | {"LD_PRELOAD": str(failing_disk), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, str(HERE / "failing_disk.py"), str(tmp_path), str(code)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 4, "data and the database's manifest are written and synced"


def test_training_goes_on_while_a_slow_disk_writes(tmp_path, monkeypatch):
    """The save of step 2 is not done before step 3 is."""
    from tiny import run_config
    from whole_runs import act_at

    step_done, replace, waited = threading.Event(), os.replace, []

    def replaced(source, target):
        if Path(target).name == "2":
            waited.append(step_done.wait(120))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replaced)
    act_at(monkeypatch, 3, step_done.set)
    result = jf.fit(run_config(tmp_path, checkpoint={"every_steps": 2}))
    assert (result.step, waited) == (8, [True])
    assert names(tmp_path / "run") == ["4", "6", "8"]


DISK_SIZE = "1m"  # which a dozen checkpoints fill


@pytest.mark.parametrize("noticed_before", [True, False])
def test_a_full_disk_costs_saves_until_there_is_room_again(small_disk, monkeypatch, noticed_before):
    monkeypatch.setattr("jaxformers.train.checkpoint.SPARE_BYTES", 10**5 if noticed_before else -(10**9))
    said = []
    keep_all = CONTINUE.model_copy(update={"keep_last": 100})
    with Checkpointer(small_disk, keep_all, say=said.append) as checkpoints:
        for step in range(1, 31):
            save(checkpoints, step)
            checkpoints.settle()
            if step - checkpoints.latest_step == 3:
                break
        assert ("and the disk has" if noticed_before else "No space left on device") in said[0]
        newest = checkpoints.latest_step
        assert step == newest + 3, "the disk was never full"
        assert len(said) >= 3
        assert_right(small_disk, newest)
        for old in checkpoints.steps[:-1]:
            remove(small_disk / FOLDER / str(old))
        save(checkpoints, step + 1)
    assert_right(small_disk, step + 1)


def test_a_slow_disk_delays_neither_the_run_nor_changes_what_is_saved(tmp_path, monkeypatch):
    """What is saved is the state of that moment, though its memory is used again long before it is written."""
    slow = threading.Event()
    replace = os.replace

    def replaced(*paths):
        slow.wait()
        replace(*paths)

    monkeypatch.setattr(os, "replace", replaced)
    with Checkpointer(tmp_path, STOP) as checkpoints:
        state = state_of(1)
        checkpoints.save(state, Position(1), said_at(1))
        for array in state.params.values():
            array.delete()
        assert checkpoints.steps == []
        assert not checkpoints._sealing.join(timeout=0.3)
        assert checkpoints._sealing.is_alive()
        slow.set()
    assert_right(tmp_path, 1)


def test_an_old_checkpoint_that_cannot_be_removed_is_a_line_also_where_errors_stop_the_run(tmp_path, monkeypatch):
    faults, said = Faults(monkeypatch, tmp_path), []
    with Checkpointer(tmp_path, STOP, say=said.append) as checkpoints:
        for step in (1, 2):
            save(checkpoints, step)
        checkpoints.wait()
        faults.arm("replace", 3, BAD_DISK)  # after the list of checksums and the final name
        save(checkpoints, 3)
        checkpoints.wait()
        assert said == [f"cannot remove the old checkpoint {tmp_path / FOLDER / '1'}: Input/output error"]
        assert checkpoints.steps == [1, 2, 3]
        faults.disarm()
        save(checkpoints, 4)
        checkpoints.wait()
        assert checkpoints.steps == [3, 4]


def test_a_whole_run_goes_on_over_saves_that_fail_and_says_so(tmp_path, monkeypatch, capsys):
    from tiny import run_config

    faults = Faults(monkeypatch, tmp_path / "run" / FOLDER)
    config = run_config(tmp_path, checkpoint={"every_steps": 2, "on_error": "continue"})
    faults.arm("replace", 1, NO_SPACE)
    result = jf.fit(config)
    said = capsys.readouterr().err
    assert result.step == 8
    assert names(tmp_path / "run") == ["4", "6", "8"]
    assert said.count("cannot save step 2 in ") == 1
    assert "No space left on device; the run goes on" in said
