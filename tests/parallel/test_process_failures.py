"""When one of several processes fails, all stop within a minute, and what went wrong with that one comes last."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import yaml
from several import ROOT, curve_of, end, start
from tiny import LLAMA, run_config

MINUTE = 60
SMALL = LLAMA | {"num_hidden_layers": 1}

# What a `sitecustomize` does to process 1 when it starts.
UNREADABLE = """
from jaxformers.data import rows
read = rows.PackedRows.batch
def batch(self, numbers):
    if max(numbers) >= 40:
        raise ValueError("row 40 cannot be read on this machine")
    return read(self, numbers)
rows.PackedRows.batch = batch
"""
OTHER_DATA = """
from jaxformers.data import rows
rows.PackedRows.fingerprint = property(lambda self: "of other files")
"""
KILLED_WHILE_SAVING = """
import os, signal
import orbax.checkpoint as ocp
save = ocp.AsyncCheckpointer.save
def save_and_die(self, directory, **settings):
    save(self, directory, **settings)
    if directory.name.endswith("-4"):
        os.kill(os.getpid(), signal.SIGKILL)
ocp.AsyncCheckpointer.save = save_and_die
"""


def launch(
    folder: Path, *, steps: int = 100_000, sabotage: str | None = None, restarts: int = 0, **sections
) -> subprocess.Popen:
    """`jaxformers launch --processes 2 -- train CONFIG`, where process 1 may be sabotaged."""
    values = run_config(
        folder,
        model=SMALL,
        mesh={"dp": 1, "fsdp": 2},
        train={"steps": steps, "eval_batches": 0},
        schedule={"name": "constant", "warmup_steps": 0},
        **sections,
    )
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    path = [str(ROOT)]
    if sabotage is not None:
        body = "".join(f"    {line}\n" for line in sabotage.splitlines())
        text = f"import os\nif os.environ.get('JAX_PROCESS_ID') == '1':\n{body}"
        (folder / "sitecustomize.py").write_text(text, encoding="utf-8")
        path.insert(0, str(folder))
    options = ["--processes", "2", "--restarts", str(restarts)]
    command = ["-m", "jaxformers", "launch", *options, "--", "train", str(config)]
    return start(command, PYTHONPATH=os.pathsep.join(path))


def wait_until_it_trains(launcher: subprocess.Popen, run: Path) -> None:
    deadline = time.monotonic() + 4 * MINUTE
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 2:
        assert launcher.poll() is None, launcher.communicate()[1]
        assert time.monotonic() < deadline, "it does not begin"
        time.sleep(0.1)


def children_of(launcher: subprocess.Popen) -> dict[int, int]:
    """Number of each process -> its pid."""
    pids = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    told = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in pids}
    return {int(v.split(b"=")[1]): int(pid) for pid, vs in told.items() for v in vs if v.startswith(b"JAX_PROCESS_ID=")}


def last_words(launcher: subprocess.Popen, *, seconds: float = 5 * MINUTE) -> list[str]:
    """The lines it said as errors, once it has ended."""
    children = children_of(launcher)
    try:
        return launcher.communicate(timeout=seconds)[1].splitlines()
    finally:
        end([launcher])
        for pid in children.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_and_comes_last(tmp_path):
    launcher = launch(tmp_path, sabotage=UNREADABLE)
    wait_until_it_trains(launcher, tmp_path / "run")
    children = children_of(launcher)
    lines = last_words(launcher, seconds=MINUTE)
    assert launcher.returncode == 2
    assert lines[-1] == "jaxformers: row 40 cannot be read on this machine"
    assert "jaxformers: process 1 of 2 ended with exit status 2:" in lines
    assert not any(Path(f"/proc/{pid}").exists() for pid in children.values())


@pytest.mark.slow
def test_processes_with_other_data_than_the_first_are_named_before_anything_is_trained(tmp_path):
    launcher = launch(tmp_path, sabotage=OTHER_DATA)
    lines = last_words(launcher)
    assert launcher.returncode == 2
    assert lines[-1] == "jaxformers: process 1 has another data than process 0; all need the same"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_a_run_that_goes_on_from_the_save_before(tmp_path):
    launcher = launch(tmp_path, steps=6, sabotage=KILLED_WHILE_SAVING, checkpoint={"every_steps": 2})
    lines = last_words(launcher)
    assert launcher.returncode == 1
    assert any("process 1 of 2 ended with SIGKILL" in line for line in lines)
    (tmp_path / "sitecustomize.py").unlink()
    launcher = launch(tmp_path, steps=6, checkpoint={"every_steps": 2})
    lines = last_words(launcher)
    assert launcher.returncode == 0, lines
    assert any(line.startswith("resuming from step 2: restored") for line in lines)
    assert curve_of(tmp_path / "run")[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert np.isfinite(curve_of(tmp_path / "run")).all()


@pytest.mark.slow
def test_a_process_that_hangs_is_named_and_all_stop_within_a_minute(tmp_path):
    launcher = launch(tmp_path)
    wait_until_it_trains(launcher, tmp_path / "run")
    children = children_of(launcher)
    os.kill(children[1], signal.SIGSTOP)
    lines = last_words(launcher, seconds=MINUTE)
    assert launcher.returncode == 1
    assert lines[-1] == "jaxformers: process 1 of 2 does not answer any more"
    assert not any(Path(f"/proc/{pid}").exists() for pid in children.values())


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_one_checkpoint_of_all_and_ends_well(tmp_path):
    launcher = launch(tmp_path, checkpoint={"every_steps": None})
    wait_until_it_trains(launcher, tmp_path / "run")
    launcher.terminate()
    lines = last_words(launcher, seconds=MINUTE)
    assert launcher.returncode == 0, lines
    steps = curve_of(tmp_path / "run")[:, 0].astype(int).tolist()
    assert steps == list(range(1, steps[-1] + 1))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(steps[-1])]
    assert any(line.startswith("stopped by ") and f"at step {steps[-1]};" in line for line in lines)


KILLED_ONCE = """
from pathlib import Path
died = Path(__file__).with_name("died")
if not died.exists():
    import os, signal
    import orbax.checkpoint as ocp
    save = ocp.AsyncCheckpointer.save
    def save_and_die(self, directory, **settings):
        save(self, directory, **settings)
        if directory.name.endswith("-4"):
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    ocp.AsyncCheckpointer.save = save_and_die
"""


@pytest.mark.slow
def test_a_group_that_failed_is_started_again_from_the_newest_good_checkpoint(tmp_path):
    launcher = launch(tmp_path, steps=6, sabotage=KILLED_ONCE, restarts=2, checkpoint={"every_steps": 2})
    lines = last_words(launcher)
    assert launcher.returncode == 0, lines
    assert "jaxformers: starting again; 1 more restarts are left" in lines
    assert any(line.startswith("resuming from step 2: restored") for line in lines)
    assert curve_of(tmp_path / "run")[:, 0].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_mistake_is_not_started_again(tmp_path):
    command = ["-m", "jaxformers", "launch", "--processes", "1", "--restarts", "3", "--", "train", "no.yaml"]
    launcher = start(command, PYTHONPATH=str(ROOT))
    lines = last_words(launcher)
    assert launcher.returncode == 2
    assert lines[-1] == "jaxformers: no.yaml: no such config file"
    assert not any("starting again" in line for line in lines)
