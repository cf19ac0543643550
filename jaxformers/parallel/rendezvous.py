"""Waiting until all processes are there, and saying who is not: jax would end this one without a word on it."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack

RETRY_SECONDS = 0.1


def meet(coordinator: str, *, index: int, count: int, seconds: float) -> None:
    """Returns once `count` processes are there: number 0 listens at `coordinator`, a HOST:PORT, which is free again
    afterwards. ValueError that names those who did not come in time."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + seconds
    if index == 0:
        _gather(int(port), count, deadline, seconds)
    else:
        _report(host, int(port), index, deadline, seconds)


def _gather(port: int, count: int, deadline: float, seconds: float) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("", port)))
        here: dict[int, socket.socket] = {}
        while len(here) < count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
                number = connection.recv(16)
            except TimeoutError:
                missing = [str(i) for i in range(1, count) if i not in here]
                raise ValueError(
                    f"process {', '.join(missing)} of {count} did not come to port {port} within {seconds:g} seconds"
                ) from None
            if number.isdigit():
                here[int(number)] = connection
        for connection in here.values():
            connection.sendall(b"go")
        for connection in here.values():  # they close first, so that the port can be used again at once
            connection.recv(1)


def _report(host: str, port: int, index: int, deadline: float, seconds: float) -> None:
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.001)) as connection:
                connection.sendall(str(index).encode())
                if connection.recv(2) == b"go":
                    return
        except OSError:
            pass
        time.sleep(RETRY_SECONDS)
    raise ValueError(f"process 0 did not answer at {host}:{port} within {seconds:g} seconds, or waits for others still")
