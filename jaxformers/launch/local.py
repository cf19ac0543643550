"""Many processes of one command on this machine, as long as all of them live.

They are told who they are by environment variables that `parallel.distributed` reads. What they do is not known here.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO

GRACE_SECONDS = 10.0  # between asking a process to end and ending it
POLL_SECONDS = 0.1
SETTLE_SECONDS = 0.5  # until all who fail of the same have been seen to
LINES_KEPT = 30
MISTAKE_STATUS = 2  # of a command that was told something wrong, and would be again


@dataclass
class Child:
    """A process, the threads that watch it and pass on what it says, the last of what it said as errors, and when it
    failed, if it did."""

    index: int
    process: subprocess.Popen[str]
    threads: list[threading.Thread] = field(default_factory=list)
    errors: deque[str] = field(default_factory=lambda: deque(maxlen=LINES_KEPT))
    failed_at: float | None = None


def launch(arguments: Sequence[str], *, processes: int, restarts: int = 0) -> int:
    """Runs `jaxformers ARGUMENTS` in so many processes and returns the exit status.

    What process 0 says is passed on as it is, the errors of others with their number in front. When one fails, all
    are ended, its own last lines come last on standard error, and its status is returned; or all are started again, up
    to `restarts` times, unless it was a user's mistake or a signal to us. SIGINT and SIGTERM go to every process, and
    their end is waited for.
    """
    if processes < 1:
        raise ValueError(f"--processes is {processes}; it must be at least 1")
    if restarts < 0:
        raise ValueError(f"--restarts is {restarts}; it must be at least 0")
    if not arguments:
        raise ValueError("launch needs a command after --, such as: jaxformers launch --processes 2 -- train CONFIG")
    for left in range(restarts, -1, -1):
        status, asked = _run(arguments, processes)
        if status in (0, MISTAKE_STATUS) or asked or not left:
            break
        print(f"jaxformers: starting again; {left - 1} more restarts are left", file=sys.stderr, flush=True)
    return status


def _run(arguments: Sequence[str], processes: int) -> tuple[int, bool]:
    """The exit status of one life of all processes, and whether a signal asked them to end."""
    coordinator = f"127.0.0.1:{_free_port()}"
    children = [_start(arguments, coordinator, i, processes) for i in range(processes)]
    asked: list[int] = []
    before = {number: signal.signal(number, _forward(children, asked)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        failed = _wait(children)
    finally:
        _end(children)
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed is None:
        return 0, bool(asked)
    print(_last_words(failed, children), file=sys.stderr, flush=True)
    return max(failed.process.returncode, 1), bool(asked)


def _last_words(failed: Child, children: Sequence[Child]) -> str:
    """Who failed and what it said last. Where the one that failed only noticed that others hang, they are named."""
    text, count, status = "".join(failed.errors), len(children), failed.process.returncode
    if silent := re.search(r"stopped sending heartbeats\):\s*((?:\d+\s)+)", text):
        numbers = [int(number) for number in silent[1].split()]
        said = "".join(line for number in numbers for line in children[number].errors)
        return f"{said}jaxformers: process {', '.join(map(str, numbers))} of {count} does not answer any more"
    how = f"exit status {status}" if status > 0 else signal.Signals(-status).name
    return f"jaxformers: process {failed.index} of {count} ended with {how}:\n{text}".rstrip("\n")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(arguments: Sequence[str], coordinator: str, index: int, count: int) -> Child:
    who = {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_PROCESS_ID": str(index), "JAX_NUM_PROCESSES": str(count)}
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxformers", *arguments],
        env=os.environ | who,
        stdout=None if index == 0 else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # the terminal's Ctrl-C comes once, through us
    )
    child = Child(index, process)
    assert process.stderr is not None
    child.threads.append(threading.Thread(target=_pass_on, args=(child, process.stderr), daemon=True))
    child.threads.append(threading.Thread(target=_watch, args=(child,), daemon=True))
    for thread in child.threads:
        thread.start()
    return child


def _pass_on(child: Child, stream: IO[str]) -> None:
    prefix = "" if child.index == 0 else f"[{child.index}] "
    for line in stream:
        child.errors.append(line)
        sys.stderr.write(prefix + line)
        sys.stderr.flush()


def _watch(child: Child) -> None:
    if child.process.wait():
        child.failed_at = time.monotonic()


def _forward(children: Sequence[Child], asked: list[int]) -> object:
    def forward(number: int, _frame: object) -> None:
        asked.append(number)
        for child in children:
            if child.process.poll() is None:
                child.process.send_signal(number)

    return forward


def _wait(children: Sequence[Child]) -> Child | None:
    """The first process that failed, as soon as it did; None once all have ended well."""
    while all(child.failed_at is None for child in children):
        if all(child.process.returncode == 0 for child in children):
            return None
        time.sleep(POLL_SECONDS)
    time.sleep(SETTLE_SECONDS)  # the others fail of its silence at once
    return min((child for child in children if child.failed_at is not None), key=lambda child: child.failed_at or 0.0)


def _end(children: Sequence[Child]) -> None:
    """Asks what still runs to end, and after a while makes it."""
    for child in children:
        if child.process.poll() is None:
            child.process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children:
        try:
            child.process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
        for thread in child.threads:
            thread.join(timeout=1.0)
