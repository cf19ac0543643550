"""Several processes as one system: how they start, wait for each other, agree, and end.

Each process drives its own devices; together they run one program over one mesh.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its barriers, unlike the public ones, give up and say who is missing
from jax.experimental import multihost_utils

from jaxformers.parallel.processes import Processes
from jaxformers.parallel.rendezvous import meet

START_SECONDS = 120  # to wait for processes that have not come yet
HEARTBEAT_SECONDS = 30  # of silence until a process counts as dead, and all others stop
WAIT_SECONDS = 3600  # for processes that live, but open their data or compile for longer than others


def start(processes: Processes | None) -> None:
    """Joins the other processes; to be called before jax looks at any device. ValueError where they do not come."""
    if processes is None or processes.count == 1:
        return
    meet(processes.coordinator, index=processes.index, count=processes.count, seconds=START_SECONDS)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            processes.coordinator,
            num_processes=processes.count,
            process_id=processes.index,
            local_device_ids=_local_devices(processes),
            cluster_detection_method="deactivate",  # who we are is known; jax would ask Kubernetes
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"process {processes.index} of {processes.count} cannot join the others at {processes.coordinator}: "
            f"{reason}"
        ) from error


def _local_devices(processes: Processes) -> list[int] | None:
    """Which accelerators of this machine are this process's; None = all that it sees."""
    return None if processes.local_index is None else [processes.local_index]


def is_first() -> bool:
    """Whether this process writes what only one may write."""
    return jax.process_index() == 0


def agree(flag: bool) -> bool:
    """Whether any process says so. All must ask at the same point of the program; waits for their devices."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def wait_for_all(what: str, *, seconds: float = WAIT_SECONDS) -> None:
    """Returns once all processes have come to this point of the program. ValueError that names who has not.

    Devices that first speak to each other wait half a minute at most, and then only say that they cannot.
    """
    if jax.process_count() == 1:
        return
    try:
        distributed.global_state.client.wait_at_barrier(what, int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        named = re.search(r"task names:\s*((?:\d+\s)+)", str(error))
        missing = ", ".join(named[1].split()) if named else "another"
        raise ValueError(
            f"process {missing} of {jax.process_count()} did not {what} within {seconds:g} seconds after the first"
        ) from error


def differing(value: str) -> list[int]:
    """The processes that say something else than process 0; empty where all agree. All must ask at the same point."""
    if jax.process_count() == 1:
        return []
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint32)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    return np.flatnonzero((digests != digests[0]).any(axis=1)).tolist()


def together(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """A jitted function that no process begins to run before all have compiled it for arguments of these shapes, as
    some may find it in a cache that others lack. `what` completes: a process did not ..."""
    if jax.process_count() == 1:
        return function
    compiled: dict[tuple[tuple[int, ...], ...], Callable[..., Any]] = {}

    def call(*arguments: Any) -> Any:
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments))
        if shapes not in compiled:
            compiled[shapes] = function.lower(*arguments).compile()
            wait_for_all(what)
        return compiled[shapes](*arguments)

    return call


def leave(status: int) -> None:
    """Ends this process after a failure. Among several without the usual goodbye, which would wait for the others, who
    wait for this one: they learn of it by its silence, and whoever started it by its status."""
    if not jax.distributed.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
