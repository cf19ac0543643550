"""Who tokenizes the shards of a job: this process, processes beside it, or (in `ray_workers`) those of a cluster.

A shard is the same bytes whoever writes it, so a pool decides how long the work takes and nothing else. Run as a
module, this file is one of the processes: shard numbers come in on stdin, what has been done goes out on stdout.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from jaxformers.data import shards
from jaxformers.data.shards import Job
from jaxformers.data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Step:
    """Some more of a shard is done: `size` bytes of text as UTF-8, `tokens` ids; `finished` comes once, at its end."""

    shard: int
    size: int = 0
    tokens: int = 0
    finished: bool = False


class Pool(Protocol):
    """Whatever can write the shards of a job."""

    def run(
        self, directory: Path, indices: Sequence[int], tokenizer: Tokenizer, stepped: Callable[[Step], None]
    ) -> None:
        """Writes these shards of the job in `directory`; calls `stepped` from the calling thread as they grow.

        Raises:
            ValueError: a source that cannot be read.
            OSError: a folder that cannot be written.
            RuntimeError: a tokenizing process that died.
        """
        ...


@dataclass(frozen=True)
class LocalPool:
    """Processes on this machine, `count` at most; where one would do, the calling process itself."""

    count: int

    def run(
        self, directory: Path, indices: Sequence[int], tokenizer: Tokenizer, stepped: Callable[[Step], None]
    ) -> None:
        if self.count == 1 or len(indices) < 2:
            job = Job.load(directory)
            for index in indices:
                _write(job, index, tokenizer, directory, stepped)
            return
        tokenizer.save(directory / "tokenizer")
        with _Workers(directory, min(self.count, len(indices))) as workers:
            for step in workers.run(indices):
                stepped(step)


def usable_cores() -> int:
    """How many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _write(job: Job, index: int, tokenizer: Tokenizer, directory: Path, stepped: Callable[[Step], None]) -> None:
    shards.write_shard(job, index, tokenizer, directory, lambda size, tokens: stepped(Step(index, size, tokens)))
    stepped(Step(index, finished=True))


class _Workers:
    """Processes that tokenize, each driven by a thread here.

    They are started as fresh interpreters rather than forked or spawned: a fork would copy the locks of jax's threads,
    and multiprocessing's spawn would run the user's script again where it has no `__main__` guard.
    """

    def __init__(self, directory: Path, count: int):
        # What this process can import, its workers can; one thread each, since the processes are the parallelism.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        command = [sys.executable, "-m", "jaxformers.data.workers", str(directory)]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            for _ in range(count)
        ]

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes:
            process.kill()  # a half-written shard has no name yet, so nothing is lost
        for process in self._processes:
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()

    def run(self, indices: Sequence[int]) -> Iterator[Step]:
        """Each step as it comes, of all processes; the last is the end of the last shard."""
        waiting = iter(indices)
        lock = threading.Lock()
        steps: queue.Queue[Step | Exception] = queue.Queue()

        def drive(process: subprocess.Popen) -> None:
            while True:
                with lock:
                    index = next(waiting, None)
                if index is None:
                    return
                for step in _ask(process, index):
                    steps.put(step)

        with ThreadPoolExecutor(len(self._processes)) as threads:
            try:
                for process in self._processes:
                    threads.submit(drive, process)
                left = len(indices)
                while left:
                    step = steps.get()
                    if isinstance(step, Exception):
                        raise step
                    left -= step.finished
                    yield step
            except BaseException:
                with lock:
                    waiting = iter(())
                for process in self._processes:
                    process.kill()
                raise


def _ask(process: subprocess.Popen, index: int) -> Iterator[Step | Exception]:
    """What the process says of a shard until it is finished, or why it never will be."""
    finished = False
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(f"{index}\n")
        process.stdin.flush()
    while not finished:
        answer = process.stdout.readline()
        if not answer:
            yield RuntimeError(f"a tokenizing process ended early, with exit status {process.wait()}")
            return
        reply = json.loads(answer)
        if "error" in reply:
            yield (OSError if reply.get("writing") else ValueError)(reply["error"])
            return
        step = Step(**reply)
        finished = step.finished
        yield step


def _serve(directory: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody is left to work for where the parent was killed
    job = Job.load(directory)
    tokenizer = load_tokenizer(directory / "tokenizer")
    for line in sys.stdin:
        try:
            _write(job, int(line), tokenizer, directory, lambda step: print(json.dumps(asdict(step)), flush=True))
        except ValueError as error:
            print(json.dumps({"error": str(error)}), flush=True)
        except OSError as error:  # of the cache folder: what is wrong with a source is a ValueError
            print(json.dumps({"error": error.strerror or str(error), "writing": True}), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
