"""What a step adds to its batch: the tokens' numbers, and what modules for multi-token prediction read and are to
predict, which are columns taken further on in the rows.

B batch, T time, M modules
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.models.runtime import no_shard
from jaxformers.train.losses import Batch


def number_tokens(
    batch: Batch, *, order: np.ndarray | None = None, shard: Callable[..., jax.Array] = no_shard
) -> dict[str, jax.Array]:
    """A whole batch [B, T] with `places` int32 [B, T], each token's number in it, row by row.

    order: where in its row the token of each column stands, int [T]; None = in its column.
    """
    rows, length = batch["tokens"].shape
    column = jnp.arange(length, dtype=jnp.int32) if order is None else jnp.asarray(order, jnp.int32)
    places = jnp.arange(rows, dtype=jnp.int32)[:, None] * length + column
    return {**batch, "places": shard(places, "batch", "seq")}


def look_ahead(
    batch: Batch, modules: int, *, order: np.ndarray | None = None, shard: Callable[..., jax.Array] = no_shard
) -> dict[str, jax.Array]:
    """A whole batch [B, T] with `mtp_tokens`, `mtp_targets`, `mtp_segment_ids` (int32) and `mtp_weights` (float32)
    [B, T, M].

    Module m takes the token, the target and its weight from m + 1 places further on in the same document; where the
    document or the row ends before that, all are 0. The weights of each module sum to 1 / M, so that the weighted
    negative log-likelihoods of all microbatches add up to the mean over modules of the mean over targets.
    order: where in its row the token of each column stands, int [T]; None = in its column.
    """
    length = batch["tokens"].shape[1]
    place = np.arange(length) if order is None else order
    column_of = np.argsort(place)
    found: dict[str, list[jax.Array]] = {}
    for m in range(modules):
        there = place + m + 1
        columns = column_of[np.minimum(there, length - 1)]
        # Whole rows of numbers, which are small: on a context axis each device then takes its own columns.
        further = {
            name: shard(shard(batch[name], "batch", None)[:, columns], "batch", "seq")
            for name in ("tokens", "targets", "weights", "segment_ids")
        }
        same = (there < length) & (further["segment_ids"] == batch["segment_ids"])
        further = {name: jnp.where(same, a, jnp.zeros_like(a)) for name, a in further.items()}
        further["weights"] /= modules * jnp.maximum(further["weights"].sum(), 1.0)
        for name, a in further.items():
            found.setdefault(f"mtp_{name}", []).append(a)
    return {**batch, **{name: jnp.stack(arrays, axis=-1) for name, arrays in found.items()}}
