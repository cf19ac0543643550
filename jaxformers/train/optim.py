"""The optimizer: optax transformations and what of the parameters they touch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxformers.models.params import Params
from jaxformers.train.config import OptimizerConfig


def decay_mask(spec: Params) -> Params:
    """True for matrices and embeddings; False for norms and biases, which weight decay spares."""
    return jax.tree.map(lambda s: s.init in ("normal", "residual"), spec)


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule, spec: Params) -> optax.GradientTransformation:
    """AdamW over already clipped gradients: u = -lr (m / (sqrt(v) + eps) + decay w), with bias-corrected m and v.

    spec is the tree of `ParamSpec`s that the parameters follow.
    """
    return optax.chain(
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(spec)),
        optax.scale_by_learning_rate(schedule),
    )


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
