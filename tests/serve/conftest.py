"""Servers on loopback, each in a thread: with an engine that needs no model, or with a real one."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx
import pytest
from real_model import NAME, tiny_model
from talker import Talker, served_by, talkative_tokenizer

from jaxformers.infer.request import Driven, EngineConfig
from jaxformers.serve.served import Served, Settings
from jaxformers.serving import Address, Options, Server, listen, served_model, url_of


@dataclass
class Live:
    """A server that listens."""

    url: str
    engine: Driven
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

    def idle(self, seconds: float = 10.0) -> bool:
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


def launch(served: Served, *, settings: Settings | None = None, address: Address = Address(port=0)) -> Live:
    """A server that runs in a thread, ready or not yet."""
    listener = listen(address)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)  # a reader that stops is noticed soon
    server = Server(served, Options(address=address, settings=settings or Settings()))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    return Live(url_of(listener, tls=address.certificate is not None), served.engine, server, thread)


def wait_until_ready(live: Live) -> None:
    while live.get("/ready").status_code != 200:
        time.sleep(0.02)


@pytest.fixture(scope="session")
def serve(tokenizer) -> Iterator[Callable[..., Live]]:
    """`serve(Talker(...), settings=...)`: a server that lives until the tests end."""
    alive: list[Live] = []

    def start(engine: Talker | None = None, *, wait: bool = True, **options) -> Live:
        of_server = {name: options.pop(name) for name in ("settings", "address") if name in options}
        live = launch(served_by(engine or Talker(), **{"tokenizer": tokenizer} | options), **of_server)
        alive.append(live)
        if wait:
            wait_until_ready(live)
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


@pytest.fixture(scope="session")
def model():
    """A tiny model that can chat."""
    return tiny_model()


@pytest.fixture(scope="session")
def launched() -> Iterator[Callable[[Served], Live]]:
    """`launched(served)`: a server of it, ready, that lives until the tests end."""
    alive: list[Live] = []

    def start(served: Served) -> Live:
        alive.append(launch(served))
        wait_until_ready(alive[-1])
        return alive[-1]

    yield start
    for live in alive:
        live.client.close()
        live.server.should_exit = True
    for live in alive:
        live.thread.join(timeout=10)


@pytest.fixture(scope="session")
def real(model, launched) -> Live:
    """One server for all tests of the engine behind HTTP."""
    config = EngineConfig(slots=4, max_length=512, prefill_piece=32, queue_requests=64)
    return launched(served_model(model, config, name=NAME))
