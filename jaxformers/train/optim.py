"""The optimizer: optax transformations and what of the parameters they touch.

An optimizer is here as what turns a gradient into a direction. So there is none that sets its own rate (Prodigy), whose
trained parameters are not those to evaluate (schedule-free), or that wants more than a gradient (Sophia, the loss to
differentiate twice): rates and decay of groups, clipping and averages would not mean what they say.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import scale_by_adopt

from jaxformers.models.config import ModelConfig
from jaxformers.models.params import Params
from jaxformers.train.adafactor import scale_by_factored_moment
from jaxformers.train.ademamix import warmed_up_ademamix
from jaxformers.train.eight_bit import in_eight_bits
from jaxformers.train.groups import Share, leaf_settings
from jaxformers.train.matrices import is_hidden_matrix
from jaxformers.train.muon import scale_by_muon
from jaxformers.train.optimizer_config import OptimizerConfig
from jaxformers.train.soap import scale_by_soap


def decay_mask(spec: Params) -> Params:
    """True for matrices and embeddings; False for norms and biases, which weight decay spares."""
    return jax.tree.map(lambda s: s.init in ("normal", "residual"), spec)


def make_optimizer(
    config: OptimizerConfig,
    schedule: optax.Schedule,
    spec: Params,
    *,
    cfg: ModelConfig | None = None,
    steps: int | None = None,
    slots: np.ndarray | None = None,
) -> optax.GradientTransformation:
    """The named optimizer over already clipped gradients: u = -lr (direction + decay w). AdamW's direction is
    m / (sqrt(v) + eps), with bias-corrected m and v.

    spec is the tree of `ParamSpec`s that the parameters follow. cfg, the run's steps and, of a pipeline, its slots
    (see `groups.leaf_settings`) are for groups and layer-wise rates; steps for ademamix, too. ValueError for a group
    that fits no parameter.
    """
    core = _direction(config, spec, steps)
    settings = leaf_settings(config, schedule, decay_mask(spec), cfg=cfg, steps=steps, slots=slots)
    return optax.chain(
        in_eight_bits(core, spec) if config.state == "int8" else core,
        _add_decay(jax.tree.map(lambda setting: setting.decay, settings)),
        _descend(jax.tree.map(lambda setting: setting.rates, settings)),
    )


def _direction(config: OptimizerConfig, spec: Params, steps: int | None) -> optax.GradientTransformation:
    betas = {"b1": config.b1, "b2": config.b2}
    adam = optax.scale_by_adam(**betas, eps=config.eps)
    match config.name:
        case "adamw":
            return adam
        case "adafactor":
            return scale_by_factored_moment(spec)
        case "ademamix":
            assert steps is not None
            return warmed_up_ademamix(**betas, eps=config.eps, steps=steps)
        case "adopt":
            return scale_by_adopt(**betas, eps=config.eps)
        case "lion":
            return optax.scale_by_lion(**betas)
        case "sgd":
            momentum = config.decay_of_momentum
            return optax.trace(momentum, nesterov=config.is_nesterov) if momentum else optax.identity()
        case "muon":
            muon = scale_by_muon(spec, momentum=config.decay_of_momentum, nesterov=config.is_nesterov)
            return _for_hidden_matrices("muon", muon, spec, others=adam)
        case "soap":
            return _for_hidden_matrices("soap", scale_by_soap(spec, **betas, eps=config.eps), spec, others=adam)


def _for_hidden_matrices(
    name: str, tx: optax.GradientTransformation, spec: Params, *, others: optax.GradientTransformation
) -> optax.GradientTransformation:
    """`tx` for hidden matrices, `others`, called adam in checkpoints, for everything else."""
    labels: Any = jax.tree.map(lambda s: name if is_hidden_matrix(s) else "adam", spec)
    return optax.partition({name: tx, "adam": others}, labels)


def _add_decay(decays: Params) -> optax.GradientTransformation:
    """u + decay w; decays holds a `Share` for every parameter. Masked, as optax's own: checkpoints know its state."""

    def add(share: Share, u: jax.Array, w: jax.Array) -> jax.Array:
        return u if isinstance(u, optax.MaskedNode) else u + share.of(w)

    decayed = jax.tree.map(lambda share: not share.is_zero, decays)
    return optax.masked(optax.stateless(lambda updates, params: jax.tree.map(add, decays, updates, params)), decayed)


def _descend(rates: Params) -> optax.GradientTransformation:
    """-lr u; rates holds the schedules of every parameter, each with the share of its rows that follow it. All count
    the same updates."""

    def init(params: Params) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(
        updates: Params, state: optax.ScaleByScheduleState, params: Params | None = None
    ) -> tuple[Params, optax.ScaleByScheduleState]:
        del params
        # Not a set, whose order would make each process another program.
        schedules = dict.fromkeys(schedule for own in jax.tree.leaves(rates) for schedule in own.schedules)
        now = {schedule: jnp.asarray(-schedule(state.count), jnp.float32) for schedule in schedules}
        updates = jax.tree.map(lambda own, u: own.times(u, now), rates, updates)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def clip_scale(norm: jax.Array, limit: float | None) -> jax.Array | float:
    """The factor that brings a gradient of this global norm to at most `limit`."""
    return 1.0 if limit is None else jnp.minimum(1.0, limit / (norm + 1e-12))


def scale_updates(factors: Params) -> optax.GradientTransformation:
    """Multiplies updates by a tree of factors like them, each for a leaf's leading dims or all of it."""

    def update(updates: Params, state: optax.EmptyState, _params: Params | None = None) -> tuple[Params, Any]:
        return jax.tree.map(scaled, updates, factors), state

    return optax.GradientTransformation(lambda _params: optax.EmptyState(), update)


def scaled(leaf: jax.Array, factor: np.ndarray) -> jax.Array:
    """A leaf times factors for its leading dims."""
    return leaf * factor.reshape(*factor.shape, *(1,) * (leaf.ndim - factor.ndim))
