"""The state of a training run as one pytree: made sharded, donated to each step, saved whole."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxformers.models.config import ModelConfig
from jaxformers.models.params import Params, init_params, model_spec
from jaxformers.parallel.mesh import param_shardings, replicated
from jaxformers.train.optim import opt_state_shardings


@flax.struct.dataclass
class TrainState:
    """step int32 counts the updates made; key is raw PRNG key data; ema is None unless the run keeps an average."""

    step: jax.Array
    params: Params
    opt_state: Any
    key: jax.Array
    ema: Params | None = None


def new_state(params: Params, tx: optax.GradientTransformation, key: jax.Array, *, ema: bool) -> TrainState:
    """The state before the first update."""
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jax.random.key_data(key), average)


def abstract_state(cfg: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, *, ema: bool) -> TrainState:
    """The state's shapes, dtypes and shardings, without allocating: what a checkpoint is restored into."""
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: new_state(init_params(cfg, key), tx, key, ema=ema))
    params, whole = param_shardings(model_spec(cfg), mesh), replicated(mesh)
    places = TrainState(
        whole, params, opt_state_shardings(tx, shapes.opt_state, params, whole), whole, params if ema else None
    )
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, places)


def state_shardings(abstract: TrainState) -> TrainState:
    """Only the shardings of an abstract state."""
    return jax.tree.map(lambda a: a.sharding, abstract)


def init_state(cfg: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, *, seed: int, ema: bool) -> TrainState:
    """A fresh state with random parameters; every device makes only its own part."""
    places = state_shardings(abstract_state(cfg, tx, mesh, ema=ema))

    def make(key: jax.Array) -> TrainState:
        init_key, run_key = jax.random.split(key)
        return new_state(init_params(cfg, init_key), tx, run_key, ema=ema)

    return jax.jit(make, out_shardings=places)(jax.random.key(seed))


def state_from_params(
    params: Params, cfg: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, *, seed: int, ema: bool
) -> TrainState:
    """A fresh state around given float32 parameters, already in their shardings."""
    places = state_shardings(abstract_state(cfg, tx, mesh, ema=ema))
    make = jax.jit(lambda p, key: new_state(p, tx, key, ema=ema), out_shardings=places, donate_argnums=0)
    return make(params, jax.random.key(seed))
