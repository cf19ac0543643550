"""An average of the parameters over a run: exponential (EMA), or plain from some update on (SMA, stochastic weight
averaging, arXiv:1803.05407)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxformers.models.params import Params
from jaxformers.train.config import TrainConfig


def averaged(average: Params, params: Params, updates: jax.Array, config: TrainConfig) -> Params:
    """The average after an update gave these parameters; updates int32 counts those made, that one included.

    Until update `average_from` it is the parameters themselves; from there each enters. The n-th after the first
    counts 1 / (n + 1) in a plain mean, and 1 - ema_decay in an exponential one.
    """
    since = updates - config.average_from
    if config.averages == "sma":
        weight = 1.0 / (since + 1).astype(jnp.float32)
    else:
        assert config.ema_decay is not None
        weight = jnp.float32(1 - config.ema_decay)
    weight = jnp.where(since <= 0, 1.0, weight)
    return jax.tree.map(lambda e, p: (1 - weight) * e + weight * p, average, params)
