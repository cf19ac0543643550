"""Who this process is among several that work as one: from arguments, or what a launcher or scheduler has set.

Reads an environment and knows nothing else: no device, no network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Processes:
    """One process among `count`; `coordinator` is the HOST:PORT where process 0 listens. `local_index`: its number
    among those on its machine, where a scheduler says that there are others, which drive the other accelerators."""

    count: int
    index: int
    coordinator: str
    local_index: int | None = None


@dataclass(frozen=True)
class _Told:
    """What one source says, as texts; None where it is silent. `names` are where it says it, in the same order."""

    coordinator: str | None
    index: str | None
    count: str | None
    names: tuple[str, str, str]
    local_index: int | None = None


_FIELDS = ("coordinator", "index", "count")
_ARGUMENTS = ("--coordinator", "--process-id", "--num-processes")
_OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID", "JAX_NUM_PROCESSES")
# Coordinator's host, its port, index and count, as operators of Kubernetes set them.
_OPERATORS = (
    ("COORDINATOR_ADDRESS", "COORDINATOR_PORT", "PROCESS_ID", "NUM_PROCESSES"),  # Kubeflow's JAXJob
    ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"),  # training operators made for PyTorch, and torchrun
)
_JOB_INDEX = "JOB_COMPLETION_INDEX"  # of a Kubernetes Job whose completionMode is Indexed


def find_processes(
    *,
    coordinator: str | None = None,
    index: int | None = None,
    count: int | None = None,
    environment: Environment = os.environ,
) -> Processes | None:
    """Who this process is, None where it is alone.

    Arguments come first, then what launchers have set, then what schedulers have; what one leaves open another may say.
    ValueError in one line for what is incomplete or contradicts itself.
    """
    arguments = _Told(coordinator, *(None if n is None else str(n) for n in (index, count)), _ARGUMENTS)
    found: dict[str, tuple[str, str]] = {}
    local_index = None
    for told in (arguments, *_of_launchers(environment), *_of_schedulers(environment)):
        if len(found) < len(_FIELDS):
            _add(found, told)
            local_index = told.local_index if local_index is None else local_index
    # Pods of an indexed Job may also be many that have nothing to do with each other.
    if not found or list(found.values()) == [(environment.get(_JOB_INDEX), _JOB_INDEX)]:
        return None
    return _checked(found, local_index)


def _add(found: dict[str, tuple[str, str]], told: _Told) -> None:
    """Keeps what is new as (value, where it was said). ValueError for an index or a count unlike the one before."""
    for field, name in zip(_FIELDS, told.names, strict=True):
        if (value := getattr(told, field)) is None:
            continue
        known, where = found.setdefault(field, (value, name))
        if field != "coordinator" and known != value:
            raise ValueError(f"{where} says {known} and {name} says {value}: which process of how many is this?")


def _checked(found: dict[str, tuple[str, str]], local_index: int | None) -> Processes:
    missing = [i for i, field in enumerate(_FIELDS) if field not in found]
    if missing:
        said = ", ".join(f"{name}={value}" for value, name in found.values())
        names = " and ".join(f"{_ARGUMENTS[i]} (or {_OURS[i]})" for i in missing)
        raise ValueError(f"{said} says that there are several processes; {names} must be given too")
    (coordinator, _), (index, index_name), (count, count_name) = (found[field] for field in _FIELDS)
    for value, name in ((index, index_name), (count, count_name)):
        if not re.fullmatch(r"-?\d+", value):
            raise ValueError(f"{name} is {value!r}; it must be a whole number")
    processes = Processes(int(count), int(index), coordinator, local_index)
    if not 0 <= processes.index < processes.count:
        raise ValueError(
            f"process {index} of {count} ({index_name}, {count_name}) does not exist; the first is 0, "
            f"the last {processes.count - 1}"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator {coordinator!r} is not of the form HOST:PORT")
    return processes


def _of_launchers(environment: Environment) -> list[_Told]:
    """What variables of `jaxformers launch`, of a person and of operators say."""
    told = [_Told(*(environment.get(name) for name in _OURS), _OURS)]
    for host, port, rank, size in _OPERATORS:
        if rank in environment and size in environment:  # otherwise such names may be about something else
            address = f"{environment[host]}:{environment[port]}" if {host, port} <= set(environment) else None
            told.append(_Told(address, environment[rank], environment[size], (host, rank, size)))
    return told


def _of_schedulers(environment: Environment) -> list[_Told]:
    """What schedulers say. The inner comes first: mpirun starts its own daemons by srun."""
    told = []
    if environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        told.append(_open_mpi(environment))
    elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":  # of this step; an allocation alone starts nothing
        told.append(_slurm(environment))
    if _JOB_INDEX in environment:
        told.append(_Told(None, environment[_JOB_INDEX], None, ("", _JOB_INDEX, "")))
    return told


def _slurm(environment: Environment) -> _Told:
    """A step of srun. Process 0 is on the step's first node, where it listens at a port that follows from the job."""
    host = first_host(environment.get("SLURM_STEP_NODELIST", ""))
    job, step = (environment.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    here = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return _Told(
        f"{host}:{_port(int(job) + int(step))}" if host else None,
        environment.get("SLURM_PROCID"),
        environment["SLURM_STEP_NUM_TASKS"],
        ("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        _own_accelerator("SLURM_LOCALID", environment) if here and here[0] != "1" else None,
    )


def first_host(node_list: str) -> str | None:
    """The first of Slurm's list of nodes: a7 of `a[7,9-12]-ib,b1` is a7-ib."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", node_list)
    return "".join(part or "" for part in match.groups()) if match else None


def _open_mpi(environment: Environment) -> _Told:
    """A process of mpirun. Process 0 is where mpirun is, and listens at a port that follows from the job."""
    size, local_size = environment["OMPI_COMM_WORLD_SIZE"], environment.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    host, job = None, "0"
    # Version 5 names its jobs `prterun-HOST-PID@1`; before, the address of mpirun is `JOB.0;tcp://IP,IP:PORT`.
    if match := re.fullmatch(r"[^-]+-(.+)-(\d+)@\d+", environment.get("PMIX_NAMESPACE", "")):
        host, job = match.groups()
    elif match := re.match(r"(\d+)\.\d+;tcp://([^,:]+)", environment.get("OMPI_MCA_orte_hnp_uri", "")):
        job, host = str(int(match[1]) >> 12), match[2]  # its lowest 12 bits are zeros
    if local_size == size:
        host = "127.0.0.1"
    return _Told(
        f"{host}:{_port(int(job))}" if host else None,
        environment.get("OMPI_COMM_WORLD_RANK"),
        size,
        ("PMIX_NAMESPACE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        _own_accelerator("OMPI_COMM_WORLD_LOCAL_RANK", environment) if local_size not in (None, "1") else None,
    )


def _own_accelerator(name: str, environment: Environment) -> int | None:
    """The number that a process has on its machine, unless the scheduler shows it one accelerator only."""
    shown = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES", "several,"))
    return int(environment.get(name, "0")) if "," in shown else None


def _port(job: int) -> int:
    """A port for a job, of the last 4096, which systems give out for a while and mostly last."""
    return 61440 + job % 4096
