"""A model behind HTTP: what the `serve` verb composes, from a reference to a process that ends well."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn

from jaxformers import __version__
from jaxformers.api import Model, find_to_load, load_to_generate
from jaxformers.generation import prepared
from jaxformers.infer.request import Driven, EngineConfig, Pooling
from jaxformers.parallel.mesh import single_device_mesh
from jaxformers.serve import security
from jaxformers.serve.app import build_app
from jaxformers.serve.connections import bounded_protocol
from jaxformers.serve.driver import Driver
from jaxformers.serve.served import Served, Settings

KEY_VARIABLE = "JAXFORMERS_API_KEY"
LAST_WORDS_SECONDS = 5  # for answers to leave once the time for requests under way is over


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where to listen. port 0 takes a free one. certificate and private_key: files, for TLS."""

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: Path | None = None
    private_key: Path | None = None

    def __post_init__(self) -> None:
        if self.private_key is not None and self.certificate is None:
            raise ValueError("a private key for TLS needs its certificate; give --tls-certificate too")
        for path in (self.certificate, self.private_key):
            if path is not None and not path.is_file():
                raise ValueError(f"{path} is no file; TLS needs a certificate and its key in PEM format")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `serve` may be told beside the reference. name: what clients call the model; None: the reference's own.
    draft: the reference of the model that guesses, where the engine's settings ask for one. adapters: directories in
    peft's format, by the names that clients choose them by in place of the model's."""

    address: Address = field(default_factory=Address)
    engine: EngineConfig = field(default_factory=EngineConfig)
    settings: Settings = field(default_factory=Settings)
    draft: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    name: str | None = None
    pooling: Pooling = "mean"
    dtype: str | None = None
    ema: bool = False
    access_log: bool = True


def make_engine(model: Model, config: EngineConfig, draft: Model | None = None) -> Driven:
    """The engine that serves a model."""
    from jaxformers.infer.engine import Engine

    return Engine(prepared(model), config, draft=None if draft is None else prepared(draft))


def served_model(
    model: Model, config: EngineConfig, *, name: str, pooling: Pooling = "mean", draft: Model | None = None
) -> Served:
    """A loaded model as a server sees it. ValueError for one without a tokenizer."""
    if model.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, so it cannot be served")
    return Served(
        name=name,
        tokenizer=model.tokenizer,
        engine=make_engine(model, config, draft),
        max_length=config.max_length or model.config.context_length,
        vocab_size=model.config.vocab_size,
        family=model.config.family,
        generation=model.generation,
        pooling=pooling,
        version=__version__,
    )


def serve(ref: str, options: Options) -> None:
    """Serves what `ref` means until the process is told to end; says where it listens, and `ready` once warm.

    SIGTERM lets requests under way finish, for as long as the settings say, and ends with status 0. ValueError or
    OSError for whatever keeps it from serving; RuntimeError once the engine has failed.
    """
    signal.signal(signal.SIGTERM, _leave_quietly)
    listener = listen(options.address)
    model = load_while_compiling(ref, options)
    draft = None if options.draft is None else load_to_generate(options.draft, dtype=options.dtype)
    name = options.name or _own_name(ref)
    served = served_model(model, options.engine, name=name, pooling=options.pooling, draft=draft)
    add_adapters(served, model, options.adapters)
    run(served, options, listener)


def load_while_compiling(ref: str, options: Options) -> Model:
    """The model of a reference; what its engine compiles is compiled meanwhile, as far as that can be told."""
    from jaxformers.infer.engine.ahead import compile_ahead

    found = find_to_load(ref, dtype=options.dtype, mtp=options.engine.speculate == "mtp")
    foreseen = found.foreseen(single_device_mesh(), dtype=options.dtype)
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        compiling = thread.submit(compile_ahead, foreseen, options.engine) if foreseen is not None else None
        model = found.load_to_generate(dtype=options.dtype, ema=options.ema)
    if compiling is not None:
        compiling.result()
    return model


def add_adapters(served: Served, model: Model, refs: Mapping[str, str]) -> None:
    """Lets clients choose adapters of the model by name. ValueError for one that is not its, or has its name."""
    from jaxformers.adapters import adapter_params  # with what training needs, which takes its time

    for name, ref in refs.items():
        if name == served.name:
            raise ValueError(f"adapter {name!r} has the model's own name; choose another, or --name")
        served.engine.add_adapter(name, adapter_params(ref, model.config))


def run(served: Served, options: Options, listener: socket.socket) -> None:
    """Serves until told to end, on a socket that listens already."""
    if options.access_log:
        _log_requests()
    server = Server(served, options, at_ready=lambda: print("ready", flush=True))
    tls = options.address.certificate is not None
    print(f"{served.name} listens at {url_of(listener, tls=tls)}", flush=True)
    server.run(sockets=[listener])
    if server.driver.failure is not None:
        raise RuntimeError("the engine has failed") from server.driver.failure


class Server(uvicorn.Server):
    """uvicorn's server, which calls `at_ready` once the engine is warm, ends with it, and drains when told to end."""

    def __init__(self, served: Served, options: Options, *, at_ready: Callable[[], None] | None = None):
        app = build_app(served, options.settings)
        self.driver: Driver = app.state.server.driver
        self._at_ready = at_ready
        self._drain_seconds = options.settings.limits.drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        config = uvicorn.Config(
            app,
            http=bounded_protocol(options.settings.limits),
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(self._drain_seconds) + LAST_WORDS_SECONDS,
            ssl_certfile=options.address.certificate,
            ssl_keyfile=options.address.private_key,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._following = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        ready, broken = (asyncio.create_task(event.wait()) for event in (self.driver.ready, self.driver.broken))
        await asyncio.wait((ready, broken), return_when=asyncio.FIRST_COMPLETED)
        if ready.done() and self._at_ready is not None:
            self._at_ready()
        await broken
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.driver.drain, self._drain_seconds)


def listen(address: Address) -> socket.socket:
    """A socket that listens, so that an address in use is told before a model is loaded."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen at {address.host}, port {address.port}: {why}") from None


def url_of(listener: socket.socket, *, tls: bool = False) -> str:
    """Where clients find the server."""
    host, port = listener.getsockname()[:2]
    return f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"


def hosts_to_answer(address: Address, *, has_key: bool, insecure: bool) -> tuple[str, ...]:
    """The names that clients may call the server by. Without a key, on loopback, a page of another site must not reach
    it by a name of its own that leads here; elsewhere any name will do. Refuses to serve everyone by accident."""
    security.check_exposure(address.host, has_key=has_key, insecure=insecure)
    return () if has_key or insecure else (*security.LOOPBACK_HOSTS, address.host)


def _own_name(ref: str) -> str:
    return Path(ref).resolve().name if Path(ref).exists() else ref


def _log_requests() -> None:
    """The access log, on standard error."""
    access = logging.getLogger("jaxformers.access")
    if not access.handlers:
        access.addHandler(logging.StreamHandler())
    access.setLevel(logging.INFO)
    access.propagate = False


def _leave_quietly(sig: int, frame: FrameType | None) -> None:
    sys.exit(0)
