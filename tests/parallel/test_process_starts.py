"""Who a process is, from arguments and from what each scheduler sets, and that processes told so train together."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from several import curve_of, free_port, start, wait_for
from tiny import run_config

from jaxformers.parallel.processes import Processes, find_processes, first_host

SRUN = {  # of two tasks on one node, as srun sets them
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_TASKS_PER_NODE": "2",
}
MPIRUN_4 = {  # of Open MPI 4
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1,10.148.0.1:34911",
}
MPIRUN_5 = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-login-node-17189@1",
    "PMIX_SERVER_URI41": "prterun-login-node-17189@0.0;tcp4://127.0.0.1:53697",
}


def srun(index: int) -> dict[str, str]:
    return SRUN | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}


def mpirun(index: int, variables: dict[str, str] = MPIRUN_5) -> dict[str, str]:
    return variables | {"OMPI_COMM_WORLD_RANK": str(index), "OMPI_COMM_WORLD_LOCAL_RANK": str(index)}


def indexed_job(index: int, *, address: str = "job-0.pods:1234") -> dict[str, str]:
    """A pod of an indexed Job, whose manifest sets the first two for all of its pods."""
    return {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "JOB_COMPLETION_INDEX": str(index),
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "KUBERNETES_SERVICE_PORT": "443",
        "HOSTNAME": f"job-{index}",
    }


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"},  # a batch script, not started by srun
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "a"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"JOB_COMPLETION_INDEX": "3"},
        {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"},
    ],
    ids=str,
)
def test_a_process_that_nothing_says_is_one_of_several_is_alone(variables):
    assert find_processes(environment=variables) is None


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
        (
            {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "RANK": "3", "WORLD_SIZE": "4"},
            Processes(4, 3, "node0:29500"),
        ),
        (srun(1), Processes(2, 1, "localhost:62055", 1)),
        (srun(0) | {"SLURM_STEP_ID": "2"}, Processes(2, 0, "localhost:62057", 0)),
        # A task a node drives all of its accelerators.
        (
            srun(1) | {"SLURM_STEP_NODELIST": "gpu[007-008]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
            Processes(2, 1, "gpu007:62055"),
        ),
        # Who sees one accelerator only has been given its own.
        (srun(1) | {"CUDA_VISIBLE_DEVICES": "5"}, Processes(2, 1, "localhost:62055")),
        (mpirun(1, MPIRUN_4), Processes(2, 1, "127.0.0.1:62624", 1)),
        (mpirun(1), Processes(2, 1, "127.0.0.1:62245", 1)),
        (mpirun(1) | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, Processes(2, 1, "login-node:62245")),
        # mpirun starts its daemons by srun, and what they inherit is no task's.
        (srun(0) | mpirun(1), Processes(2, 1, "127.0.0.1:62245", 1)),
        (indexed_job(1), Processes(2, 1, "job-0.pods:1234")),
        # A launcher inside of a scheduler's step.
        (
            srun(0) | {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "3", "JAX_NUM_PROCESSES": "4"},
            Processes(4, 3, "a:1"),
        ),
    ],
    ids=str,
)
def test_launchers_and_schedulers_say_who_a_process_is(variables, found):
    assert find_processes(environment=variables) == found


def test_arguments_come_first_and_what_they_leave_open_variables_say():
    variables = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "RANK": "3", "WORLD_SIZE": "4"}
    given = find_processes(coordinator="host:99", index=1, count=2, environment=variables)
    assert given == Processes(2, 1, "host:99")
    assert find_processes(coordinator="host:99", environment=srun(1)) == Processes(2, 1, "host:99", 1)
    pod = {"JOB_COMPLETION_INDEX": "1"}
    assert find_processes(coordinator="job-0:9", count=3, environment=pod) == Processes(3, 1, "job-0:9")


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-0015],host2", "node001"),
        ("node[001,007-015],host2", "node001"),
        ("a[7,9-12]-ib,b1", "a7-ib"),
        ("", None),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    "given, variables, message",
    [
        (
            {"index": 0},
            {},
            "--process-id=0 says that there are several processes; --coordinator (or JAX_COORDINATOR_ADDRESS) and "
            "--num-processes (or JAX_NUM_PROCESSES) must be given too",
        ),
        (
            {},
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"},
            "JAX_COORDINATOR_ADDRESS=a:1, JAX_NUM_PROCESSES=2 says that there are several processes; --process-id (or "
            "JAX_PROCESS_ID) must be given too",
        ),
        (
            {},
            {"RANK": "0", "WORLD_SIZE": "2"},
            "RANK=0, WORLD_SIZE=2 says that there are several processes; --coordinator (or JAX_COORDINATOR_ADDRESS) "
            "must be given too",
        ),
        (
            {},
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
            "OMPI_COMM_WORLD_RANK=0, OMPI_COMM_WORLD_SIZE=2 says that there are several processes; --coordinator (or "
            "JAX_COORDINATOR_ADDRESS) must be given too",
        ),
        (
            {"coordinator": "a:1", "count": 4},
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
            "--num-processes says 4 and OMPI_COMM_WORLD_SIZE says 2: which process of how many is this?",
        ),
        ({"coordinator": "host", "index": 0, "count": 2}, {}, "coordinator 'host' is not of the form HOST:PORT"),
        (
            {"coordinator": "a:1", "index": 2, "count": 2},
            {},
            "process 2 of 2 (--process-id, --num-processes) does not exist; the first is 0, the last 1",
        ),
        ({}, srun(0) | {"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'; it must be a whole number"),
        (
            {},
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "two"},
            "JAX_NUM_PROCESSES is 'two'; it must be a whole number",
        ),
    ],
)
def test_what_is_missing_or_contradicts_itself_is_refused(given, variables, message):
    with pytest.raises(ValueError) as caught:
        find_processes(environment=variables, **given)
    assert str(caught.value) == message


def write_config(folder: Path) -> Path:
    values = run_config(
        folder,
        mesh={"dp": 1, "fsdp": 2},
        train={"steps": 2, "eval_batches": 0},
        schedule={"warmup_steps": 0},
        checkpoint={"every_steps": None},
    )
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def assert_trained(folder: Path, errors: list[str]) -> None:
    assert "".join(errors).count("done: ") == 1, errors
    assert [row[0] for row in curve_of(folder / "run")] == [1, 2]


def start_all(folder: Path, variables: list[dict[str, str]], arguments: list[list[str]] | None = None) -> None:
    """Trains two steps in one process for each dict of variables, as a scheduler would start them."""
    command = ["-m", "jaxformers", "train", str(write_config(folder))]
    arguments = arguments or [[] for _ in variables]
    processes = [start([*command, *more], **told) for told, more in zip(variables, arguments, strict=True)]
    errors = wait_for(processes, seconds=120)
    assert [process.returncode for process in processes] == [0, 0], errors
    assert_trained(folder, errors)


def test_srun_starts_processes_that_train_together(tmp_path):
    job = {"SLURM_JOB_ID": str(free_port())}
    start_all(tmp_path, [srun(i) | job for i in range(2)])


@pytest.mark.slow
@pytest.mark.parametrize("version", [4, 5])
def test_mpirun_starts_processes_that_train_together(tmp_path, version):
    job = free_port()
    told = {
        4: {"OMPI_MCA_orte_hnp_uri": f"{job << 12}.0;tcp://127.0.0.1:1"},
        5: {"PMIX_NAMESPACE": f"prterun-x-{job}@1"},
    }
    start_all(tmp_path, [mpirun(i, {4: MPIRUN_4, 5: MPIRUN_5}[version] | told[version]) for i in range(2)])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs Open MPI's mpirun")
def test_mpirun_itself_starts_processes_that_train_together(tmp_path):
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", "python", "-m", "jaxformers", "train"]
    command = [*mpirun, str(write_config(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert_trained(tmp_path, [done.stderr])


@pytest.mark.slow
def test_pods_of_an_indexed_job_train_together(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    start_all(tmp_path, [indexed_job(i, address=address) for i in range(2)])


@pytest.mark.slow
def test_processes_started_by_hand_train_together(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    given = [["--coordinator", address, "--process-id", str(i), "--num-processes", "2"] for i in range(2)]
    start_all(tmp_path, [{}, {}], given)
