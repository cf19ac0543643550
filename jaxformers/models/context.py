"""What every layer of one forward pass shares: where its tokens stand, and how the pass is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxformers.models.config import Rope
from jaxformers.models.masks import Visibility
from jaxformers.models.rope import Rotation


@dataclass(frozen=True)
class Context:
    """B batch, T time, S cache slots.

    `places`, where adapters have dropout, numbers the tokens of the whole batch.
    `observe` names what layers show of their inside (see `models.observe`).
    `read_slots` (static) bounds how much of a cache is looked at: no position of this call may lie past it.
    """

    positions: jax.Array  # int32 [B, T]
    segment_ids: jax.Array | None  # int32 [B, T]; 0 = padding
    rotations: dict[Rope, Rotation]
    shard: Callable[..., jax.Array]
    attend: Callable[..., jax.Array]
    experts: Callable[..., jax.Array]
    read_slots: int | None = None
    observe: frozenset[str] = frozenset()
    places: jax.Array | None = None  # int32 [B, T]

    @property
    def visible(self) -> Visibility:
        """This call's tokens among themselves."""
        return Visibility(self.positions, self.positions, self.segment_ids, self.segment_ids)

    def visible_in_cache(self, buffer: jax.Array) -> Visibility:
        """This call's tokens before a cache buffer [B, S, ...], whose slot s holds position s."""
        slots = min(buffer.shape[1], self.read_slots or buffer.shape[1])
        return Visibility(self.positions, jnp.arange(slots)[None])

    def read(self, buffer: jax.Array) -> jax.Array:
        """The part of a cache buffer [B, S, ...] that this call may look at."""
        return buffer if self.read_slots is None else buffer[:, : self.read_slots]

    @property
    def arrays(self) -> Any:
        """All arrays it holds, as a pytree."""
        return self.positions, self.segment_ids, self.places, list(self.rotations.values())

    def with_arrays(self, arrays: Any) -> Context:
        """The same over other arrays, in a pytree of that form."""
        positions, segment_ids, places, turns = arrays
        rotations = dict(zip(self.rotations, turns, strict=True))
        return replace(self, positions=positions, segment_ids=segment_ids, places=places, rotations=rotations)

    def save(self, x: jax.Array, name: str) -> jax.Array:
        """x, marked so that a rematerialization policy may keep it by name."""
        return checkpoint_name(x, name)
