"""Ulysses attention (arXiv:2309.14509): devices trade their share of the tokens for a share of the heads, and back.

Runs inside `shard_map`; knows nothing of meshes besides the name of its axis.

B batch, T tokens of this device, H heads, K kv heads, N head dim, M value dim, n devices along the axis
"""

from __future__ import annotations

import jax

from jaxformers.models.attention import Scores
from jaxformers.models.blockwise import BLOCK, blockwise_attention
from jaxformers.models.masks import Visibility

AXIS = "cp"


def ulysses_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: Visibility,
    scores: Scores,
    *,
    sinks: jax.Array | None = None,
    slopes: jax.Array | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """Attention of this device's queries to the keys of all devices along the axis, [B, T, H, M] in q's dtype.

    q [B, T, H, N], k [B, T, K, N], v [B, T, K, M] and `visible` are this device's share of the tokens; H and K are
    multiples of n. sinks and slopes [H / n] are those of the heads that this device computes: its share, counted along
    the axis.
    """
    q, k, v = (jax.lax.all_to_all(x, AXIS, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
    visible = jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, axis=1, tiled=True), visible)
    y = blockwise_attention(q, k, v, visible, scores, sinks=sinks, slopes=slopes, block=block)
    return jax.lax.all_to_all(y, AXIS, split_axis=1, concat_axis=2, tiled=True)
