"""The same step twice: hardware that computes wrongly now and then gives two results, and they name the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxformers.train.state import TrainState

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


@jax.jit
def _copy(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)


@jax.jit
def _differs(a: jax.Array, b: jax.Array) -> jax.Array:
    """Whether any bit does; of two arrays on one device."""
    if jnp.issubdtype(a.dtype, jnp.floating):
        width = jnp.dtype(f"uint{8 * a.dtype.itemsize}")
        a, b = (jax.lax.bitcast_convert_type(x, width) for x in (a, b))
    return jnp.any(a != b)


def _differs_on(device: jax.Device, a: jax.Array, b: jax.Array) -> jax.Array:
    with jax.set_mesh(Mesh(np.array([device]), ("one",))):  # the run's own mesh has more devices
        return _differs(a, b)


def step_twice(step: Step, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array], list[str]]:
    """The step's result, and what two runs of it disagree about on this process's devices: "device: leaf, leaf, ...".

    state is used up, as by `step`; a second one is held meanwhile.
    """
    spare = _copy(state)
    first, metrics = step(state, batch)
    second, _ = step(spare, batch)
    return first, metrics, disagreements(first, second)


def disagreements(a: TrainState, b: TrainState) -> list[str]:
    """Each local device whose part of two states is not equal bit for bit, with the first leaves that differ."""
    flat, _ = jax.tree_util.tree_flatten_with_path(a)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in flat]
    found: dict[jax.Device, list[str]] = {}
    compared = [
        (name, mine.device, _differs_on(mine.device, mine.data, other.data))
        for name, (_, leaf), twin in zip(names, flat, jax.tree.leaves(b), strict=True)
        for mine, other in zip(leaf.addressable_shards, twin.addressable_shards, strict=True)
    ]
    for name, device, differs in compared:
        if np.asarray(differs):
            found.setdefault(device, []).append(name)
    return [f"process {d.process_index}, {d}: {', '.join(found[d][:3])}" for d in sorted(found, key=lambda d: d.id)]
