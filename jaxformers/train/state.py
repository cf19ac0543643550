"""The state of a training run as one pytree: made sharded, donated to each step, saved whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from jaxformers.models.adapters import combine
from jaxformers.models.params import Params
from jaxformers.parallel.mesh import RULES, SPLIT_REPLICAS, param_shardings, replicated
from jaxformers.train.config import GuardConfig
from jaxformers.train.guard import Guard, new_guard
from jaxformers.train.moments import map_moments, moment_sharding


@flax.struct.dataclass
class TrainState:
    """step int32 counts the batches seen; key is raw PRNG key data; ema is None unless the run keeps an average.

    params are those that are trained; frozen are the others, None where there are none. Each has None in place of what
    the other holds.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    key: jax.Array
    guard: Guard
    ema: Params | None = None
    frozen: Params | None = None

    @property
    def model(self) -> Params:
        """All parameters as one tree, from no copies."""
        return self.params if self.frozen is None else combine(self.params, self.frozen)

    def completed(self) -> TrainState:
        """The state with weights that are not trained among the others, and in their average."""
        if self.frozen is None:
            return self
        ema = None if self.ema is None else combine(self.ema, self.frozen)
        return self.replace(params=self.model, ema=ema, frozen=None)


def new_state(
    params: Params,
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    guard: GuardConfig,
    ema: bool,
    frozen: Params | None = None,
) -> TrainState:
    """The state before the first update."""
    average = jax.tree.map(jnp.copy, params) if ema else None
    step, key = jnp.zeros((), jnp.int32), jax.random.key_data(key)
    return TrainState(step, params, tx.init(params), key, new_guard(guard), average, frozen)


def abstract_state(
    spec: Params,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    guard: GuardConfig,
    ema: bool,
    split_moments: bool = False,
    moments_memory: str | None = None,
    frozen: Params | None = None,
) -> TrainState:
    """The state's shapes, dtypes and shardings, without allocating: what a checkpoint is restored into.

    spec is the tree of `ParamSpec`s that the trained parameters follow, frozen that of the others.
    split_moments: replicas of the parameters share one copy of the moments and the average. moments_memory: the kind of
    memory that these are in, None = the device's.
    """
    params, others = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), (spec, frozen))
    shapes = jax.eval_shape(
        lambda p, f: new_state(p, tx, jax.random.key(0), guard=guard, ema=ema, frozen=f), params, others
    )
    placed, whole = param_shardings(spec, mesh), replicated(mesh)
    rules = SPLIT_REPLICAS if split_moments else RULES

    def in_memory(place: NamedSharding) -> NamedSharding:
        return place if moments_memory is None else place.with_memory_kind(moments_memory)

    shared = jax.tree.map(in_memory, param_shardings(spec, mesh, rules))
    moments = map_moments(
        lambda a, s, _: whole if s is None else in_memory(moment_sharding(a.shape, s, mesh, rules)),
        shapes.opt_state,
        spec,
    )
    remembered = jax.tree.map(lambda _: whole, shapes.guard)
    still = None if frozen is None else param_shardings(frozen, mesh)
    places = TrainState(whole, placed, moments, whole, remembered, shared if ema else None, still)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, places)


def state_shardings(abstract: TrainState) -> TrainState:
    """Only the shardings of an abstract state."""
    return jax.tree.map(lambda a: a.sharding, abstract)


def map_params(function: Callable[[Params], Params], state: TrainState) -> TrainState:
    """`function` over every tree in the state that is shaped like the parameters: them, their average, their
    moments."""

    def is_params(node: Any) -> bool:
        return isinstance(node, dict) and "embed" in node

    return jax.tree.map(lambda node: function(node) if is_params(node) else node, state, is_leaf=is_params)
