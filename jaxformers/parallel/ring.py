"""Ring attention (arXiv:2310.01889): each device keeps its queries, and keys travel around until every device met them.

Who sees whom follows from positions and segments, which travel along, so the tokens of a row may lie on the devices in
any order. Runs inside `shard_map`; knows nothing of meshes besides the name of its axis.

B batch, T tokens of this device, H heads, K kv heads, N head dim, M value dim
"""

from __future__ import annotations

from typing import Any

import jax

from jaxformers.models.attention import Scores
from jaxformers.models.blockwise import (
    BLOCK,
    Attended,
    Gradients,
    Softmax,
    finished,
    fold,
    join_queries,
    output_gradient,
    per_head,
    pull_back,
    split_keys,
    split_places,
    split_queries,
    unstarted,
)
from jaxformers.models.masks import Visibility

AXIS = "cp"


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: Visibility,
    scores: Scores,
    *,
    sinks: jax.Array | None = None,
    slopes: jax.Array | None = None,
    stride: int = 1,
    block: int = BLOCK,
) -> jax.Array:
    """Attention of this device's queries to the keys of all devices of its ring, [B, T, H, M] in q's dtype.

    q [B, T, H, N], k [B, T, K, N], v [B, T, K, M] and `visible` are this device's share; sinks and slopes are [H], as
    in `blockwise_attention`. The ring goes through every `stride`-th of the n x `stride` devices along the axis. Keys
    and values pass n - 1 times from each device to the next, in the backward pass together with their gradients, which
    then need one more pass to get home.
    """
    kv_heads = k.shape[2]
    parts = split_queries(q, kv_heads, block), split_keys(k, block), split_keys(v, block)
    attended = _attend(scores, stride, *parts, per_head(slopes, kv_heads), split_places(visible, block))
    return join_queries(attended, q.shape[1], sinks)


def _passed_on(tree: Any, stride: int) -> Any:
    """The tree of the device before this one in the ring, as this one's goes to the next."""
    size = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(tree, AXIS, [(i, (i + stride) % size) for i in range(size)])


def _travellers(k: jax.Array, v: jax.Array, places: Visibility) -> tuple[Any, ...]:
    return k, v, places.k_positions, places.k_segments


def _met(places: Visibility, travellers: tuple[Any, ...]) -> Visibility:
    """This device's queries before the keys that are here now."""
    return places.replace(k_positions=travellers[2], k_segments=travellers[3])


def _forward(
    scores: Scores,
    stride: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slopes: jax.Array | None,
    places: Visibility,
) -> Attended:
    def meet(softmax: Softmax, here: tuple[Any, ...]) -> Softmax:
        return fold(softmax, q, *here[:2], slopes, _met(places, here), scores)

    def step(carry: tuple[Softmax, tuple[Any, ...]], _: None) -> tuple[Any, None]:
        softmax, here = carry
        arriving = _passed_on(here, stride)  # while this device works on what is here
        return (meet(softmax, here), arriving), None

    start = unstarted(q, v), _travellers(k, v, places)
    (softmax, here), _ = jax.lax.scan(step, start, length=jax.lax.axis_size(AXIS) // stride - 1)
    return finished(meet(softmax, here), q.dtype)


def _keeping(scores: Scores, stride: int, *inputs: Any) -> tuple[Attended, Any]:
    attended = _forward(scores, stride, *inputs)
    return attended, (attended, inputs)


def _backward(scores: Scores, stride: int, kept: Any, gradient: Attended) -> tuple[jax.Array | None, ...]:
    attended, (q, k, v, slopes, places) = kept
    output = output_gradient(attended, gradient)

    def meet(gradients: Gradients, here: tuple[Any, ...]) -> Gradients:
        return pull_back(gradients, output, q, *here[:2], slopes, _met(places, here), scores)

    def step(carry: tuple[Gradients, tuple[Any, ...]], _: None) -> tuple[Any, None]:
        gradients, here = carry
        arriving = _passed_on(here, stride)
        gradients = meet(gradients, here)
        d_k, d_v = _passed_on((gradients.k, gradients.v), stride)
        return (Gradients(gradients.q, d_k, d_v), arriving), None

    start = Gradients.zeros(q, k, v), _travellers(k, v, places)
    (gradients, here), _ = jax.lax.scan(step, start, length=jax.lax.axis_size(AXIS) // stride - 1)
    d_q, d_k, d_v = meet(gradients, here)
    d_k, d_v = _passed_on((d_k, d_v), stride)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_attend = jax.custom_vjp(_forward, nondiff_argnums=(0, 1))
_attend.defvjp(_keeping, _backward)
