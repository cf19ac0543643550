"""The optimizer: optax transformations and what of the parameters they touch."""

from __future__ import annotations

from typing import Any

import jax
import optax

from jaxformers.models.config import ModelConfig
from jaxformers.models.params import Params, model_spec
from jaxformers.train.config import OptimizerConfig


def decay_mask(cfg: ModelConfig) -> Params:
    """True for matrices and embeddings; False for norms and biases, which weight decay spares."""
    return jax.tree.map(lambda spec: spec.init in ("normal", "residual"), model_spec(cfg))


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule, cfg: ModelConfig) -> optax.GradientTransformation:
    """AdamW over already clipped gradients: u = -lr (m / (sqrt(v) + eps) + decay w), with bias-corrected m and v."""
    return optax.chain(
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(cfg)),
        optax.scale_by_learning_rate(schedule),
    )


def clip_scale(norm: jax.Array, limit: float | None) -> jax.Array | float:
    """The factor that brings a gradient of this global norm to at most `limit`."""
    return 1.0 if limit is None else jax.numpy.minimum(1.0, limit / (norm + 1e-12))


def opt_state_shardings(tx: optax.GradientTransformation, opt_state: Any, params: Params, other: Any) -> Any:
    """Moments take the sharding of the parameter they mirror, everything else takes `other`."""
    return optax.tree.map_params(tx, lambda _, s: s, opt_state, params, transform_non_params=lambda _: other)
