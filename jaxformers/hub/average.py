"""The average of several models of one architecture, a leaf at a time (model merging, arXiv:2505.12082)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxformers.hub.safetensors import Deferred
from jaxformers.models.params import Params


def average_weights(count: int, *, weights: Sequence[float] | None = None, ema: float | None = None) -> list[float]:
    """What each of `count` models counts, all together 1: alike, as `weights` say, or as an exponential moving average
    of decay `ema` from the first to the last, which begins with the first one.

    ValueError for weights that do not fit.
    """
    if count < 2:
        raise ValueError(f"an average needs at least two models; {count} given")
    if weights is not None and ema is not None:
        raise ValueError("weights and ema are two ways to average; give one of them")
    if ema is not None:
        if not 0 < ema < 1:
            raise ValueError(f"ema is {ema:g}; a decay lies between 0 and 1")
        return [ema ** (count - 1), *((1 - ema) * ema ** (count - 1 - i) for i in range(1, count))]
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} models; each needs one")
    if min(weights) < 0 or not sum(weights) or not np.isfinite(weights).all():
        raise ValueError(f"weights {', '.join(f'{w:g}' for w in weights)} are not all at least 0 with one above it")
    return [weight / sum(weights) for weight in weights]


def average_leaves(models: Sequence[Params], weights: Sequence[float]) -> Params:
    """The weighted sum of trees of `Deferred` float32 leaves, deferred too: two leaves exist at a time, however many
    models there are."""

    def averaged(*leaves: Any) -> Deferred:
        def load() -> np.ndarray:
            total = np.zeros(leaves[0].shape, np.float32)
            for leaf, weight in zip(leaves, weights, strict=True):
                read = np.array(leaf, np.float32)
                read *= np.float32(weight)
                total += read
                del read
            return total

        return Deferred(leaves[0].shape, np.dtype(np.float32), load)

    return jax.tree.map(averaged, *models)
