"""Waiting until all processes are there, and saying who is not: jax would end this one without a word on it."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress

RETRY_SECONDS = 0.1
HELLO_SECONDS = 5.0  # for one who has connected to say who it is, and for process 0 to say why it has given up
_GO = b"go"


def meet(coordinator: str, *, index: int, count: int, seconds: float) -> None:
    """Returns once `count` processes are there: number 0 listens at `coordinator`, a HOST:PORT, which is free again
    afterwards. ValueError, in all that are there, that names those who did not come in time or are not who they
    should be."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + seconds
    if index == 0:
        _gather(int(port), count, deadline, seconds)
    else:
        _report(host, int(port), f"{index} {count}", deadline + HELLO_SECONDS, seconds)


def _gather(port: int, count: int, deadline: float, seconds: float) -> None:
    with ExitStack() as stack:
        try:
            server = stack.enter_context(socket.create_server(("", port)))
        except OSError as error:
            raise ValueError(f"process 0 cannot listen at port {port}: {error.strerror}") from None
        here: dict[int, socket.socket] = {}
        while len(here) < count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            came: list[socket.socket] = []
            try:
                came.append(stack.enter_context(server.accept()[0]))
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, count) if i not in here)
                problem = f"process {missing} of {count} did not come to port {port} within {seconds:g} seconds"
            else:
                problem = _welcome(came[0], here, count)
            if problem:
                _tell([*here.values(), *came], problem)
                raise ValueError(problem)
        _tell(here.values(), _GO.decode())
        for connection in here.values():  # they close first, so that the port can be used again at once
            connection.recv(1)


def _welcome(connection: socket.socket, here: dict[int, socket.socket], count: int) -> str | None:
    """Adds who has connected, unless it is a stranger. What is wrong with it, in one line."""
    connection.settimeout(HELLO_SECONDS)
    try:
        hello = re.fullmatch(rb"(\d+) (\d+)", connection.recv(32))
    except OSError:
        return None
    if hello is None:
        return None
    index, expected = int(hello[1]), int(hello[2])
    if expected != count:
        return f"process {index} says that there are {expected} processes, process 0 says {count}"
    if index in here:
        return f"two processes say that they are process {index} of {count}"
    here[index] = connection
    return None


def _tell(connections: Iterable[socket.socket], message: str) -> None:
    for connection in connections:
        with suppress(OSError):
            connection.sendall(message.encode())


def _report(host: str, port: int, hello: str, deadline: float, seconds: float) -> None:
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.001)) as connection:
                connection.sendall(hello.encode())
                answer = connection.recv(1024)
        except OSError:
            answer = b""
        if answer == _GO:
            return
        if answer:
            raise ValueError(answer.decode())
        time.sleep(RETRY_SECONDS)
    raise ValueError(f"process 0 did not answer at {host}:{port} within {seconds:g} seconds")
