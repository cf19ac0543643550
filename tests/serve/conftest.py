"""Servers on loopback, each in a thread, with an engine that needs no model."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx
import pytest
from talker import Talker, served_by, talkative_tokenizer

from jaxformers.serve.served import Settings
from jaxformers.serving import Address, Options, Server, listen, url_of


@dataclass
class Live:
    """A server that listens."""

    url: str
    engine: Talker
    server: Server
    thread: threading.Thread
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=30, verify=False))

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def post(self, path: str, body, **options) -> httpx.Response:
        return self.client.post(f"{self.url}{path}", json=body, **options)

    def get(self, path: str, **options) -> httpx.Response:
        return self.client.get(f"{self.url}{path}", **options)

    def idle(self, seconds: float = 3.0) -> bool:
        """Whether the engine comes to rest: no slot taken, nothing waiting."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            stats = self.engine.stats()
            if not (stats.running or stats.waiting or self.engine.has_work()):
                return True
            time.sleep(0.01)
        return False


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return talkative_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def serve(tokenizer) -> Iterator[Callable[..., Live]]:
    """`serve(Talker(...), settings=...)`: a server that lives until the tests end."""
    alive: list[Live] = []

    def start(
        engine: Talker | None = None,
        *,
        settings: Settings | None = None,
        address: Address = Address(port=0),
        wait: bool = True,
        **fields,
    ) -> Live:
        engine = engine or Talker()
        listener = listen(address)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)  # a reader that stops is noticed soon
        server = Server(
            served_by(engine, **{"tokenizer": tokenizer} | fields),
            Options(address=address, settings=settings or Settings()),
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        live = Live(url_of(listener, tls=address.certificate is not None), engine, server, thread)
        alive.append(live)
        while wait and live.get("/ready").status_code != 200:
            time.sleep(0.02)
        return live

    yield start
    for live in alive:
        live.client.close()
        live.engine.gate.set()
        live.server.should_exit = True
    for live in alive:
        live.thread.join(timeout=10)


@pytest.fixture(scope="session")
def live(serve) -> Live:
    """One server for all tests that leave it as it was."""
    return serve()
