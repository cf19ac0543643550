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
from several import end, free_port, start
from tiny import relative_error, run_config

from jaxformers.api import load
from jaxformers.parallel.rendezvous import meet


def test_processes_meet_and_leave_the_port_free():
    port = free_port()
    with ThreadPoolExecutor() as pool:
        waits = [pool.submit(meet, f"127.0.0.1:{port}", index=i, count=3, seconds=10) for i in (2, 1, 0)]
        assert [wait.result() for wait in waits] == [None] * 3
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.parametrize(
    "who, message",
    [
        ([(0, 4), (2, 4)], r"process 1, 3 of 4 did not come to port \d+ within 1 seconds"),
        ([(0, 3), (1, 3), (1, 3)], "two processes say that they are process 1 of 3"),
        ([(0, 2), (1, 3)], "process 1 says that there are 3 processes, process 0 says 2"),
    ],
)
def test_all_who_are_there_hear_who_does_not_come_or_is_not_who_it_should_be(who, message):
    address = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor() as pool:
        waits = [pool.submit(meet, address, index=index, count=count, seconds=1) for index, count in who]
    for wait in waits:
        with pytest.raises(ValueError, match=message):
            wait.result()


def test_who_says_nothing_or_nonsense_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("jaxformers.parallel.rendezvous.HELLO_SECONDS", 0.1)
    port = free_port()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(meet, f"127.0.0.1:{port}", index=0, count=2, seconds=10)
        while True:
            try:
                silent = socket.create_connection(("127.0.0.1", port))
                break
            except OSError:
                time.sleep(0.05)
        with silent, socket.create_connection(("127.0.0.1", port)) as talker:
            talker.sendall(b"GET / HTTP/1.1")
            meet(f"127.0.0.1:{port}", index=1, count=2, seconds=10)
            assert first.result() is None


def test_without_process_0_the_others_say_so(monkeypatch):
    monkeypatch.setattr("jaxformers.parallel.rendezvous.HELLO_SECONDS", 0.1)
    port = free_port()
    with pytest.raises(ValueError, match=f"process 0 did not answer at 127.0.0.1:{port} within 0.2 seconds"):
        meet(f"127.0.0.1:{port}", index=1, count=2, seconds=0.2)


WAITER = """
import sys
import jax
from jaxformers.parallel import distributed
from jaxformers.parallel.processes import find_processes

distributed.start(find_processes())
if jax.process_index() == 1:
    sys.stdin.read()  # alive, and late
    distributed.leave(0)
try:
    distributed.wait_for_all("open its data", seconds=1)
except ValueError as error:
    print(error, file=sys.stderr)
    distributed.leave(2)
"""


def test_a_barrier_gives_up_and_says_who_is_missing():
    coordinator = f"127.0.0.1:{free_port()}"
    told = {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_NUM_PROCESSES": "2"}
    late = start(["-c", WAITER], stdin=subprocess.PIPE, JAX_PROCESS_ID="1", **told)
    first = start(["-c", WAITER], JAX_PROCESS_ID="0", **told)
    try:
        _, errors = first.communicate(timeout=60)
    finally:
        end([first, late])
    assert first.returncode == 2
    assert errors.splitlines()[-1] == "process 1 of 2 did not open its data within 1 seconds after the first"


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
