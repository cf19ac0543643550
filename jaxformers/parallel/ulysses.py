"""Ulysses attention (arXiv:2309.14509): devices trade their share of the tokens for a share of the heads, and back.

The trade is among groups of neighbours. With one group, each of its devices then sees whole rows; with several, a ring
of the devices with the same heads carries keys from group to group, which is the hybrid of both (arXiv:2405.07719).
Runs inside `shard_map`; knows nothing of meshes besides the name of its axis.

B batch, T tokens of this device, H heads, K kv heads, N head dim, M value dim, u devices of a group
"""

from __future__ import annotations

from functools import partial

import jax

from jaxformers.models.attention import Scores
from jaxformers.models.blockwise import BLOCK, blockwise_attention
from jaxformers.models.masks import Visibility
from jaxformers.parallel.ring import AXIS, ring_attention


def ulysses_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: Visibility,
    scores: Scores,
    *,
    group: int,
    sinks: jax.Array | None = None,
    slopes: jax.Array | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """Attention of this device's queries to the keys of all devices along the axis, [B, T, H, M] in q's dtype.

    q [B, T, H, N], k [B, T, K, N], v [B, T, K, M] and `visible` are this device's share of the tokens; sinks and slopes
    are [H]. `group` is u, which divides H, K and the number of devices.
    """
    size = jax.lax.axis_size(AXIS)
    groups = [list(range(first, first + group)) for first in range(0, size, group)]
    trade = partial(jax.lax.all_to_all, axis_name=AXIS, axis_index_groups=groups, tiled=True)
    q, k, v = (trade(x, split_axis=2, concat_axis=1) for x in (q, k, v))
    visible = jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, axis=1, axis_index_groups=groups, tiled=True), visible)
    attend = blockwise_attention if group == size else partial(ring_attention, stride=group)
    sinks, slopes = _own(sinks, group), _own(slopes, group)
    y = attend(q, k, v, visible, scores, sinks=sinks, slopes=slopes, block=block)
    return trade(y, split_axis=1, concat_axis=2)


def _own(values: jax.Array | None, group: int) -> jax.Array | None:
    """Of one value a head, those of the heads that this device computes."""
    if values is None:
        return None
    count = values.shape[0] // group
    return jax.lax.dynamic_slice_in_dim(values, jax.lax.axis_index(AXIS) % group * count, count)
