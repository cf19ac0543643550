"""Attention block by block: no matrix of queries by keys ever exists, so memory grows with the length, not its square.

An online softmax (arXiv:1805.02867) over blocks of keys, with a backward pass of its own that keeps only the output and
the logarithm of each softmax's sum (arXiv:2205.14135). Pairs of blocks in which no query can see a key are skipped;
which those are follows from positions and segments alone, so tokens may stand in any order.

Beside `blockwise_attention` stand its steps, for those who bring keys from elsewhere piece by piece. They work on
blocks: a leading dim counts them; queries are q [nq, B, K, G, b, N], keys k [nk, B, K, c, N] and v [nk, B, K, c, M].

B batch, T query time, S key time, H heads, K kv heads, G = H // K, N head dim, M value dim, b and c tokens of a block
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxformers.models.attention import MASKED, Scores, alibi_slopes, linear_biases
from jaxformers.models.layers import softcap
from jaxformers.models.masks import Visibility

BLOCK = 256
# Where what fills up a last block stands: such a query is before every key, such a key after every query.
NOWHERE, NEVER = -1, 2**30


class Softmax(NamedTuple):
    """An unfinished softmax of every query, float32: the largest logit `top` and the sum of weights `total`
    [nq, B, K, G, b], and the weighted values `mixed` [nq, B, K, G, b, M]."""

    top: jax.Array
    total: jax.Array
    mixed: jax.Array


class Attended(NamedTuple):
    """Attention's output [nq, B, K, G, b, M] in q's dtype, and the logarithm of each query's sum of exponentials
    [nq, B, K, G, b] in float32."""

    out: jax.Array
    lse: jax.Array


def blockwise_attention(
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
    """What `attention.dot_product` computes, up to rounding, without its [T, S] matrix.

    q [B, T, H, N], k [B, S, K, N], v [B, S, K, M] -> [B, T, H, M] in q's dtype; sums in float32. `sinks` [H] are logits
    that attend to nothing. `slopes` [H] are the linear biases' where these are not all heads of the model. `block` is
    how many queries, and keys, are looked at together.
    """
    kv_heads, slopes = k.shape[2], head_slopes(q, scores) if slopes is None else slopes
    parts = split_queries(q, kv_heads, block), split_keys(k, block), split_keys(v, block)
    attended = _attend(scores, *parts, per_head(slopes, kv_heads), split_places(visible, block))
    return join_queries(attended, q.shape[1], sinks)


def head_slopes(q: jax.Array, scores: Scores) -> jax.Array | None:
    """Slopes of the linear biases float32 [H] for all heads of q [B, T, H, N], None where the model has none."""
    return jnp.asarray(scores.alibi * alibi_slopes(q.shape[2])) if scores.alibi else None


def per_head(values: jax.Array | None, kv_heads: int) -> jax.Array | None:
    """[H] -> float32 [K, G, 1], to meet blocks of queries."""
    return None if values is None else values.astype(jnp.float32).reshape(kv_heads, -1, 1)


def split_queries(q: jax.Array, kv_heads: int, block: int = BLOCK) -> jax.Array:
    """[B, T, H, N] -> [nq, B, K, G, b, N]; zeros fill up the last block."""
    b, _, h, n = q.shape
    q = _split_time(q, block).reshape(-1, b, min(block, q.shape[1]), kv_heads, h // kv_heads, n)
    return q.transpose(0, 1, 3, 4, 2, 5)


def split_keys(k: jax.Array, block: int = BLOCK) -> jax.Array:
    """[B, S, K, N] -> [nk, B, K, c, N]; zeros fill up the last block."""
    return _split_time(k, block).transpose(0, 1, 3, 2, 4)


def split_places(visible: Visibility, block: int = BLOCK) -> Visibility:
    """The same with a leading dim of blocks: what is [B, T] becomes [nq, B, b]."""
    q_segments, k_segments = visible.q_segments, visible.k_segments
    return Visibility(
        _split_time(visible.q_positions, block, NOWHERE),
        _split_time(visible.k_positions, block, NEVER),
        None if q_segments is None else _split_time(q_segments, block),
        None if k_segments is None else _split_time(k_segments, block),
    )


def _split_time(x: jax.Array, block: int, fill: int = 0) -> jax.Array:
    """[B, T, ...] -> [n, B, b, ...]."""
    block = min(block, x.shape[1])
    missing = -x.shape[1] % block
    if missing:
        x = jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def join_queries(attended: Attended, length: int, sinks: jax.Array | None) -> jax.Array:
    """The output as [B, T, H, M] for T = `length`, after `sinks` [H] took their share of each softmax."""
    out, lse = attended
    if sinks is not None:
        share = jax.nn.sigmoid(lse - per_head(sinks, out.shape[2]))
        out = (out.astype(jnp.float32) * share[..., None]).astype(out.dtype)
    n, b, kv_heads, groups, block, m = out.shape
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(b, n * block, kv_heads * groups, m)[:, :length]


def unstarted(q: jax.Array, v: jax.Array) -> Softmax:
    """The softmax of queries [nq, B, K, G, b, N] that have seen no key yet."""
    # Made like q, they count as differing between those devices between which q does (inside `shard_map`).
    none, rows = jnp.zeros_like(q, jnp.float32, shape=q.shape[:-1]), (*q.shape[:-1], v.shape[-1])
    return Softmax(none + MASKED, none, jnp.zeros_like(q, jnp.float32, shape=rows))


def fold(
    softmax: Softmax,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slopes: jax.Array | None,
    places: Visibility,
    scores: Scores,
) -> Softmax:
    """The softmax of all queries after they have seen these keys too."""
    order, counts = _pairs(places, scores.window)

    def one(part: tuple[Softmax, jax.Array, Visibility, jax.Array, jax.Array]) -> Softmax:
        softmax, q, standing, order, count = part

        def step(n: jax.Array, so_far: Softmax) -> Softmax:
            j = order[n]
            visible = _pair(standing, places, j)
            logits = softmax_logits(_products(q, k[j]), visible, scores, slopes)
            mask = visible.mask(scores.window)[:, None, None]
            top = jnp.maximum(so_far.top, jnp.where(mask, logits, MASKED).max(-1))
            weights = jnp.where(mask, jnp.exp(logits - top[..., None]), 0.0)
            kept = jnp.exp(so_far.top - top)
            mixed = jnp.einsum("bkgts,bksm->bkgtm", weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
            return Softmax(top, so_far.total * kept + weights.sum(-1), so_far.mixed * kept[..., None] + mixed)

        return jax.lax.fori_loop(0, count, step, softmax)

    return jax.lax.map(one, (softmax, q, _queries_of(places), order, counts))


def finished(softmax: Softmax, dtype: jax.typing.DTypeLike) -> Attended:
    """The output of queries that have seen all their keys; marked, so that rematerialization may keep it."""
    total = jnp.where(softmax.total > 0, softmax.total, 1.0)  # of what fills up the last block
    out, lse = (softmax.mixed / total[..., None]).astype(dtype), softmax.top + jnp.log(total)
    return Attended(checkpoint_name(out, "mixed"), checkpoint_name(lse, "mixed"))


class OutputGradient(NamedTuple):
    """What the backward pass knows of each query: `lse` and `delta` float32 [nq, B, K, G, b], the gradient d_out
    [nq, B, K, G, b, M] of its output."""

    lse: jax.Array
    delta: jax.Array
    d_out: jax.Array


def output_gradient(attended: Attended, gradient: Attended) -> OutputGradient:
    """From what came out, and the gradient of it."""
    delta = (attended.out.astype(jnp.float32) * gradient.out.astype(jnp.float32)).sum(-1) - gradient.lse
    return OutputGradient(attended.lse, delta, gradient.out)


class Gradients(NamedTuple):
    """Of queries, keys and values, in their shapes and in float32."""

    q: jax.Array
    k: jax.Array
    v: jax.Array

    @classmethod
    def zeros(cls, q: jax.Array, k: jax.Array, v: jax.Array) -> Gradients:
        return cls(*(jnp.zeros_like(x, jnp.float32) for x in (q, k, v)))


def pull_back(
    gradients: Gradients,
    output: OutputGradient,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slopes: jax.Array | None,
    places: Visibility,
    scores: Scores,
) -> Gradients:
    """The gradients with the part that goes through these keys added."""
    order, counts = _pairs(places, scores.window)

    def one(carry: tuple[jax.Array, jax.Array], part: tuple) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        d_q, output, q, standing, order, count = part

        def step(n: jax.Array, so_far: Gradients) -> Gradients:
            j = order[n]
            visible = _pair(standing, places, j)
            shape = partial(softmax_logits, visible=visible, scores=scores, slopes=slopes)
            logits, pull = jax.vjp(shape, _products(q, k[j]))
            mask = visible.mask(scores.window)[:, None, None]
            weights = jnp.where(mask, jnp.exp(logits - output.lse[..., None]), 0.0)
            d_v = _summed("bkgts,bkgtm->bksm", weights, output.d_out)
            d_weights = jnp.einsum("bkgtm,bksm->bkgts", output.d_out, v[j], preferred_element_type=jnp.float32)
            (d_logits,) = pull(weights * (d_weights - output.delta[..., None]))
            d_q, d_k = _summed("bkgts,bksn->bkgtn", d_logits, k[j]), _summed("bkgts,bkgtn->bksn", d_logits, q)
            return Gradients(so_far.q + d_q, so_far.k.at[j].add(d_k), so_far.v.at[j].add(d_v))

        d_q, *carry = jax.lax.fori_loop(0, count, step, Gradients(d_q, *carry))
        return tuple(carry), d_q

    parts = (gradients.q, output, q, _queries_of(places), order, counts)
    (d_k, d_v), d_q = jax.lax.scan(one, (gradients.k, gradients.v), parts)
    return Gradients(d_q, d_k, d_v)


def _summed(terms: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum of float32 a, in b's dtype, summed in float32."""
    return jnp.einsum(terms, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _products(q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum("bkgtn,bksn->bkgts", q, k, preferred_element_type=jnp.float32)


def softmax_logits(products: jax.Array, visible: Visibility, scores: Scores, slopes: jax.Array | None) -> jax.Array:
    """Softmax logits float32 [B, K, G, b, c] of raw products of that shape, before the mask."""
    logits = softcap(products * scores.scale, scores.softcap)
    if slopes is None:
        return logits
    return logits + linear_biases(slopes[..., None], visible, scores)


def _queries_of(places: Visibility) -> tuple[jax.Array, jax.Array | None]:
    return places.q_positions, places.q_segments


def _pair(queries: tuple[jax.Array, jax.Array | None], places: Visibility, j: jax.Array) -> Visibility:
    """One block of queries before block j of the keys."""
    segments = None if places.k_segments is None else places.k_segments[j]
    return Visibility(queries[0], places.k_positions[j], queries[1], segments)


def _pairs(places: Visibility, window: int | None) -> tuple[jax.Array, jax.Array]:
    """For each block of queries the blocks of keys, int32 [nq, nk], those that one of its queries may see first, and
    how many these are, int32 [nq]. It may name a block too many, never one too few."""

    def ends(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x.min(-1), x.max(-1)

    (first_q, last_q), (first_k, last_k) = ends(places.q_positions[:, None]), ends(places.k_positions[None])
    near = last_q >= first_k  # [nq, nk, B]
    if window is not None:
        near &= first_q - last_k < window
    if places.q_segments is not None and places.k_segments is not None:
        (first_q, last_q), (first_k, last_k) = ends(places.q_segments[:, None]), ends(places.k_segments[None])
        near &= (first_q <= last_k) & (first_k <= last_q)
    near = near.any(-1)
    return jnp.argsort(~near, axis=1, stable=True), near.sum(1)


def _forward(
    scores: Scores, q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array | None, places: Visibility
) -> Attended:
    return finished(fold(unstarted(q, v), q, k, v, slopes, places, scores), q.dtype)


def _keeping(scores: Scores, *inputs: Any) -> tuple[Attended, Any]:
    attended = _forward(scores, *inputs)
    return attended, (attended, inputs)


def _backward(scores: Scores, kept: Any, gradient: Attended) -> tuple[jax.Array | None, ...]:
    attended, (q, k, v, slopes, places) = kept
    zeros, output = Gradients.zeros(q, k, v), output_gradient(attended, gradient)
    found = pull_back(zeros, output, q, k, v, slopes, places, scores)
    return *(d.astype(x.dtype) for d, x in zip(found, (q, k, v), strict=True)), None, None


_attend = jax.custom_vjp(_forward, nondiff_argnums=(0,))
_attend.defvjp(_keeping, _backward)
