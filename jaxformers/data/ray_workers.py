"""Tokenizing on a Ray cluster: the shards of a job as Ray tasks. Needs the extra `ray`.

This package travels to the nodes; what it imports (tokenizers, numpy, ...) must be installed there in the same
versions. The job and the tokenizer lie in the cache folder, which, as the sources, must be storage that every node sees
under the same path.
"""

import functools
import platform
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxformers.data import shards
from jaxformers.data.shards import Job
from jaxformers.data.tokenizer import Tokenizer, load_tokenizer
from jaxformers.data.workers import Step

_PACKAGE = Path(__file__).parent.parent  # travels to the nodes
_PATIENCE = 10  # seconds
_IN_FLIGHT = 4  # tasks submitted for each processor, so that none waits for the next one


@dataclass(frozen=True)
class RayPool:
    """The processors of a Ray cluster, `count` at most; None: as many as it has.

    `address` is HOST:PORT or ray://HOST:PORT, "auto" for the cluster this machine belongs to, "local" to start one.
    """

    address: str
    count: int | None = None

    def run(
        self, directory: Path, indices: Sequence[int], tokenizer: Tokenizer, stepped: Callable[[Step], None]
    ) -> None:
        """Writes the shards, as `workers.Pool` says.

        Raises:
            ValueError: besides those of any pool, no Ray here, no cluster at the address, a folder it does not share.
            RuntimeError: a task that died again and again.
        """
        if not indices:
            return
        ray = _connect(self.address, self.count)
        try:
            tokenizer.save(directory / "tokenizer")
            _run(ray, self.count, directory, indices, stepped)
        finally:
            ray.shutdown()


def _connect(address: str, count: int | None):
    try:
        import ray
    except ImportError:
        raise ValueError("--ray needs Ray: pip install 'jaxformers[ray]'") from None
    _knock(address)
    options = {"num_cpus": count} if address == "local" and count is not None else {}
    try:
        ray.init(
            address=address,
            runtime_env={"py_modules": [str(_PACKAGE)]},
            log_to_driver=False,
            logging_level="ERROR",
            include_dashboard=False if address == "local" else None,
            **options,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"no Ray cluster can be reached at {address!r} ({reason})") from error
    return ray


def _knock(address: str) -> None:
    """Refuses at once an address that nobody answers at, which Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        if address not in ("auto", "local"):
            raise ValueError(f"{address!r} is no address of a Ray cluster: HOST:PORT, ray://HOST:PORT, auto or local")
        return
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ValueError(f"no Ray cluster can be reached at {address!r} ({error})") from error


def _run(ray, count: int | None, directory: Path, indices: Sequence[int], stepped: Callable[[Step], None]) -> None:
    task = ray.remote(num_cpus=1)(_write_on_node)
    processors = count or max(int(ray.cluster_resources().get("CPU", 1)), 1)
    most = count or _IN_FLIGHT * processors
    waiting, running = list(reversed(indices)), {}
    while waiting or running:
        while waiting and len(running) < most:
            index = waiting.pop()
            running[task.remote(str(directory.absolute()), index)] = index
        (ready, *_), _ = ray.wait(list(running), num_returns=1)
        index = running.pop(ready)
        try:
            size, tokens, error = ray.get(ready)
        except ray.exceptions.RayError as failure:
            raise RuntimeError(f"Ray lost shard {index}: {' '.join(str(failure).split())}") from failure
        if error is not None:
            raise ValueError(error)
        if shards.read_shard(directory, index) is None:
            raise ValueError(
                f"a Ray node wrote shard {index} to {directory}, which is not there: all nodes must share it"
            )
        stepped(Step(index, size, tokens))
        stepped(Step(index, finished=True))


@functools.lru_cache(maxsize=1)
def _open(folder: Path, made: int) -> tuple[Job, Tokenizer]:
    """The job and the tokenizer in a folder, read once a process; `made` tells a job from an older one there."""
    return Job.load(folder), load_tokenizer(folder / "tokenizer")


def _write_on_node(directory: str, index: int) -> tuple[int, int, str | None]:
    """(bytes of text, tokens, what went wrong) of one shard, written by a node."""
    folder = Path(directory)
    if not folder.is_dir():
        return 0, 0, f"node {platform.node()} does not see {folder}: the cache folder must be storage all nodes share"
    done = [0, 0]

    def advanced(size: int, tokens: int) -> None:
        done[0] += size
        done[1] += tokens

    try:
        job, tokenizer = _open(folder, (folder / "job.json").stat().st_mtime_ns)
        shards.write_shard(job, index, tokenizer, folder, advanced)
    except ValueError as error:
        return 0, 0, str(error)
    except OSError as error:
        return 0, 0, f"node {platform.node()} cannot write to the cache folder {folder} ({error.strerror or error})"
    return done[0], done[1], None
