"""Which adapters an engine has, by name, and where their factors are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import Sharding

from jaxformers.infer.engine import programs
from jaxformers.infer.generate import Prepared
from jaxformers.infer.request import EngineConfig
from jaxformers.models.bank import Bank, adapter_factors, empty_bank, with_bank
from jaxformers.models.params import Params


@dataclass(frozen=True)
class Adapter:
    """number: where its factors are, from 1 on. serial: what no other adapter of this engine ever had."""

    number: int
    serial: int


@dataclass
class Adapters:
    """Room for adapters beside the weights of a model. What is put in is on the device after the next `settle`."""

    model: Prepared
    config: EngineConfig
    place: Sharding
    _names: dict[str, Adapter] = field(default_factory=dict)
    _coming: list[tuple[int, Bank]] = field(default_factory=list)
    _serials: int = 0
    _bank: Bank = field(init=False)

    def __post_init__(self) -> None:
        sizes = {"count": self.config.adapters, "rank": self.config.adapter_rank, "dtype": self.model.runtime.dtype}
        bank = empty_bank(self.model.params, self.model.config, **sizes) if self.config.adapters else {}
        self._bank = jax.device_put(bank, self.place)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    @property
    def params(self) -> Params:
        """The model's, with the room for adapters if there is some."""
        return with_bank(self.model.params, self.model.config, self._bank) if self._bank else self.model.params

    def find(self, name: str | None) -> Adapter | None:
        """ValueError for a name that none has."""
        if name is None:
            return None
        if name not in self._names:
            there = f"loaded are {', '.join(self._names)}" if self._names else "none is loaded"
            raise ValueError(f"there is no adapter {name!r}; {there}")
        return self._names[name]

    def factors(self, tree: Params) -> Bank:
        """What an adapter's `LoRA` leaves put into the room. ValueError for one that does not fit."""
        rank, dtype = self.config.adapter_rank, self.model.runtime.dtype
        return adapter_factors(tree, self.model.params, self.model.config, rank=rank, dtype=dtype)

    def add(self, name: str, factors: Bank, *, used: Iterable[Adapter]) -> None:
        """Takes in an adapter, where no other is and none of those that are still `used` was. ValueError where there
        is no room, or the name has another."""
        if name in self._names:
            raise ValueError(f"there is an adapter {name!r} already; remove it first")
        taken = {adapter.number for adapter in (*self._names.values(), *used)}
        free = next((n for n in range(1, self.config.adapters + 1) if n not in taken), None)
        if free is None:
            told = f"adapter {name!r} finds no room: there is room for {self.config.adapters}"
            raise ValueError(told + (", and requests still use one that was removed" if self._names_are_few else ""))
        self._coming.append((free, factors))
        self._names[name] = Adapter(free, self._serials)
        self._serials += 1

    def remove(self, name: str) -> None:
        """Gives up an adapter. ValueError for a name that none has."""
        self.find(name)
        del self._names[name]

    def settle(self) -> bool:
        """Puts what has come on the device; whether anything had."""
        coming, self._coming = self._coming, []
        for number, factors in coming:
            self._bank = programs.put_adapter(self._bank, np.int32(number), factors)
        return bool(coming)

    def rehearse(self) -> None:
        """Runs what `settle` runs."""
        if self._bank:
            nothing = jax.tree.map(lambda a: np.zeros(a.shape[1:], a.dtype), self._bank)
            self._bank = programs.put_adapter(self._bank, np.int32(0), nothing)

    @property
    def _names_are_few(self) -> bool:
        return len(self._names) < self.config.adapters


def salt_of(adapter: Adapter | None) -> bytes:
    """What keeps apart what the same tokens mean with different adapters."""
    return b"" if adapter is None else f"adapter {adapter.serial} ".encode()
