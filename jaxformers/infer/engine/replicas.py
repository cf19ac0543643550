"""Several engines with one model, each on devices of its own, driven as if they were one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxformers.infer.engine.engine import Engine, Loaded
from jaxformers.infer.generate import prepare_model
from jaxformers.infer.request import EngineConfig, EngineStats, Event, QueueFull, Request
from jaxformers.models.params import Params


class Replicas:
    """`Driven` by all of these engines, which step side by side: a request goes to the one with the fewest requests.

    A request's tokens are the same in any of them. Of n engines, number i calls its own request j what is called
    j n + i here.
    """

    def __init__(self, engines: Sequence[Engine]):
        if not engines:
            raise ValueError("there is no engine; replicas need at least one")
        self.engines = tuple(engines)
        self._threads = ThreadPoolExecutor(len(engines), thread_name_prefix="replica")

    @classmethod
    def of(cls, model: Loaded, config: EngineConfig = EngineConfig()) -> Replicas:
        """One engine for each part of the model's mesh along dp, each with `config` to itself."""
        return cls([Engine(_part(model, mesh), config) for mesh in split_replicas(model.mesh)])

    @property
    def adapters(self) -> Sequence[str]:
        """As `Engine.adapters`, which are the same in all."""
        return self.engines[0].adapters

    @property
    def vocab_size(self) -> int:
        """As `Engine.vocab_size`."""
        return self.engines[0].vocab_size

    def submit(self, request: Request) -> int:
        """As `Engine.submit`; QueueFull where too much waits in all of them."""
        full: QueueFull | None = None
        for i in sorted(range(len(self.engines)), key=self._load):
            try:
                return self.engines[i].submit(request) * len(self.engines) + i
            except QueueFull as error:
                full = full or error
        assert full is not None
        raise full

    def cancel(self, request: int) -> None:
        """As `Engine.cancel`."""
        number, i = divmod(request, len(self.engines))
        self.engines[i].cancel(number)

    def add_adapter(self, name: str, params: Params) -> None:
        """As `Engine.add_adapter`, to all or to none."""
        for i, engine in enumerate(self.engines):
            try:
                engine.add_adapter(name, params)
            except ValueError:
                for other in self.engines[:i]:
                    other.remove_adapter(name)
                raise

    def remove_adapter(self, name: str) -> None:
        """As `Engine.remove_adapter`, from all."""
        for engine in self.engines:
            engine.remove_adapter(name)

    def has_work(self) -> bool:
        """Whether a request waits or runs in any."""
        return any(engine.has_work() for engine in self.engines)

    def step(self) -> list[Event]:
        """A step of all that have work, at the same time."""
        found = self._at_once(lambda engine: engine.step() if engine.has_work() else [])
        count = len(self.engines)
        return [replace(e, request=e.request * count + i) for i, events in enumerate(found) for e in events]

    def warm_up(self) -> None:
        """As `Engine.warm_up`, of all."""
        for engine in self.engines:
            engine.warm_up()

    def stats(self) -> EngineStats:
        """Those of all engines, added up."""
        each = [asdict(engine.stats()) for engine in self.engines]
        return EngineStats(**{name: sum(stats[name] for stats in each) for name in each[0]})

    def _load(self, i: int) -> int:
        stats = self.engines[i].stats()
        return stats.running + stats.waiting

    def _at_once(self, call: Callable[[Engine], Any]) -> list[Any]:
        return list(self._threads.map(call, self.engines))


def split_replicas(mesh: Mesh) -> list[Mesh]:
    """The parts of a mesh along dp, each a mesh with dp of size 1."""
    parts = np.split(mesh.devices, mesh.shape["dp"], axis=mesh.axis_names.index("dp"))
    return [Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types) for devices in parts]


def _part(model: Loaded, mesh: Mesh) -> Any:
    """The model on a part of its mesh, ready to generate."""
    params = jax.tree.map(lambda w: jax.device_put(w, NamedSharding(mesh, w.sharding.spec)), model.params)
    return prepare_model(params, model.config, mesh, dtype=model.dtype)
