"""Several processes as one system: who they are, how they find each other, and how they agree.

Each process drives its own devices; together they run one program over one mesh.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxformers.parallel.rendezvous import meet

START_SECONDS = 120  # to wait for processes that have not come yet
HEARTBEAT_SECONDS = 30  # of silence until a process counts as dead, and all others stop


@dataclass(frozen=True)
class Processes:
    """One process among `count`. `coordinator` is the HOST:PORT where process 0 listens; None = as the `scheduler`
    (a name that `jax.distributed` knows) says."""

    count: int
    index: int
    coordinator: str | None
    scheduler: str | None = None


# Names of coordinator, port (None: part of the coordinator), index and count, as launchers set them.
_VARIABLES = (
    ("JAX_COORDINATOR_ADDRESS", None, "JAX_PROCESS_ID", "JAX_NUM_PROCESSES"),
    ("COORDINATOR_ADDRESS", "COORDINATOR_PORT", "PROCESS_ID", "NUM_PROCESSES"),  # Kubeflow's JAXJob
    ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"),  # Kubernetes training operators
)
# Names of index and count under schedulers that tell each process its own, and what jax calls them.
_SCHEDULERS = (
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "slurm"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "ompi"),
)


def find_processes(
    *,
    coordinator: str | None = None,
    index: int | None = None,
    count: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Processes | None:
    """Who this process is, from arguments or else from what a launcher or scheduler has set; None where it is alone.

    ValueError for arguments or variables that are incomplete or do not fit each other.
    """
    given = {"--coordinator": coordinator, "--process-id": index, "--num-processes": count}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) < len(given):
        if missing:
            raise ValueError(f"{' and '.join(missing)} must be given too: processes need all of {', '.join(given)}")
        return _checked(str(coordinator), given["--process-id"], given["--num-processes"])
    for host, port, rank, size in _VARIABLES:
        names = [name for name in (host, port, rank, size) if name]
        if all(name in environment for name in names):
            address = f"{environment[host]}:{environment[port]}" if port else environment[host]
            return _checked(address, environment[rank], environment[size])
    for rank, size, scheduler in _SCHEDULERS:
        if rank in environment and int(environment.get(size, "1")) > 1:
            return Processes(int(environment[size]), int(environment[rank]), None, scheduler)
    return None


def _checked(coordinator: str, index: object, count: object) -> Processes:
    try:
        processes = Processes(int(str(count)), int(str(index)), coordinator)
    except ValueError:
        raise ValueError(f"process {index} of {count}: both must be whole numbers") from None
    if not 0 <= processes.index < processes.count:
        raise ValueError(f"process {index} of {count} does not exist; the first is 0, the last {processes.count - 1}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator {coordinator!r} is not of the form HOST:PORT")
    return processes


def start(processes: Processes | None) -> None:
    """Joins the other processes; to be called before jax looks at any device. ValueError where they do not come."""
    if processes is None or processes.count == 1:
        return
    if processes.coordinator is not None:
        meet(processes.coordinator, index=processes.index, count=processes.count, seconds=START_SECONDS)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    known = {"num_processes": processes.count, "process_id": processes.index}
    where = {"cluster_detection_method": processes.scheduler} if processes.scheduler else known
    try:
        jax.distributed.initialize(
            processes.coordinator,
            **where,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"process {processes.index} of {processes.count} cannot join the others at "
            f"{processes.coordinator or processes.scheduler}: {reason}"
        ) from error


def is_first() -> bool:
    """Whether this process writes what only one may write."""
    return jax.process_index() == 0


def agree(flag: bool) -> bool:
    """Whether any process says so. All must ask at the same point of the program; waits for their devices."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
