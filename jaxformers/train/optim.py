"""The optimizer: optax transformations and what of the parameters they touch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
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
