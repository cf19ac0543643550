"""Several processes as one: who they are, and that they train what one process does, or stop together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from tiny import relative_error, run_config

from jaxformers.api import load
from jaxformers.parallel.distributed import Processes, find_processes
from jaxformers.parallel.rendezvous import meet


def test_a_process_without_arguments_or_variables_is_alone():
    assert find_processes(environment={}) is None
    assert find_processes(environment={"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None, "not started by srun"


def test_arguments_come_before_variables():
    variables = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "RANK": "3", "WORLD_SIZE": "4"}
    assert find_processes(environment=variables) == Processes(4, 3, "node0:29500")
    given = find_processes(coordinator="host:99", index=1, count=2, environment=variables)
    assert given == Processes(2, 1, "host:99")


@pytest.mark.parametrize(
    "variables, found",
    [
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "2"},
            Processes(2, 0, "a:1"),
        ),
        (
            {"COORDINATOR_ADDRESS": "job-0", "COORDINATOR_PORT": "80", "PROCESS_ID": "1", "NUM_PROCESSES": "2"},
            Processes(2, 1, "job-0:80"),
        ),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8"}, Processes(8, 5, None, "slurm")),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, Processes(2, 1, None, "ompi")),
    ],
)
def test_schedulers_say_who_a_process_is(variables, found):
    assert find_processes(environment=variables) == found


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"index": 0},
            "--coordinator and --num-processes must be given too: processes need all of --coordinator, --process-id, "
            "--num-processes",
        ),
        ({"coordinator": "host", "index": 0, "count": 2}, "coordinator 'host' is not of the form HOST:PORT"),
        ({"coordinator": "a:1", "index": 2, "count": 2}, "process 2 of 2 does not exist; the first is 0, the last 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError) as caught:
        find_processes(environment={}, **given)
    assert str(caught.value) == message


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_processes_meet_and_leave_the_port_free():
    port = free_port()
    with ThreadPoolExecutor() as pool:
        waits = [pool.submit(meet, f"127.0.0.1:{port}", index=i, count=3, seconds=10) for i in (2, 1, 0)]
        assert [wait.result() for wait in waits] == [None] * 3
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_those_who_do_not_come_in_time_are_named():
    port = free_port()
    with ThreadPoolExecutor() as pool:
        waits = [pool.submit(meet, f"127.0.0.1:{port}", index=i, count=4, seconds=0.5) for i in (0, 2)]
        with pytest.raises(ValueError, match=rf"process 1, 3 of 4 did not come to port {port} within 0\.5 seconds"):
            waits[0].result()
        with pytest.raises(ValueError, match="process 0 did not answer"):
            waits[1].result()


def command(folder: Path, *arguments: str, devices: int, **sections) -> subprocess.Popen:
    """`jaxformers ARGUMENTS train CONFIG`, in processes of so many CPU devices each."""
    values = run_config(folder, **{"mesh": {"dp": 2, "fsdp": 2}, "optimizer": {"eps": 1e-3}} | sections)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "jaxformers", *arguments, "train", str(config)],
        env=environment,
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
    )


def metrics_of(folder: Path) -> np.ndarray:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return np.array([(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"dp": 2, "fsdp": 2}, {"pp": 2, "fsdp": 2, "dp": 1}], ids=str)
def test_two_processes_train_as_one_does_and_leave_one_log_and_one_checkpoint(tmp_path, mesh):
    folders = {"one": tmp_path / "one", "two": tmp_path / "two"}
    for name, arguments, devices in (("one", (), 4), ("two", ("launch", "--processes", "2", "--"), 2)):
        folders[name].mkdir()
        process = command(folders[name], *arguments, devices=devices, mesh=mesh, train={"steps": 4})
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        assert errors.count("done: ") == 1
    one, two = metrics_of(folders["one"]), metrics_of(folders["two"])
    assert two[:, 0].tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(two, one, rtol=1e-5)
    params = [jax.device_get(load(folder / "run").params) for folder in folders.values()]
    assert relative_error(params[1], params[0]) < 1e-5


@pytest.mark.slow
def test_when_one_process_dies_all_stop_within_a_minute_and_it_is_named_last(tmp_path):
    launcher = command(tmp_path, "launch", "--processes", "2", "--", devices=2, train={"steps": 100_000})
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    pids = [int(pid) for pid in children.read_text().split()]
    second = next(pid for pid in pids if b"JAX_PROCESS_ID=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(second, signal.SIGKILL)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    assert "jaxformers: process 1 of 2 ended with SIGKILL" in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
def test_a_mistake_is_one_line_at_the_end(tmp_path):
    process = command(tmp_path, "launch", "--processes", "2", "--", devices=1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    refusal = "mesh: dp=2, fsdp=2 needs 4 devices, but there are 2; nearest legal: 2"
    assert errors.splitlines()[-1] == f"jaxformers: {refusal}"
