"""Attention: the softmax over visible keys, and the two mixers built on it (grouped-query and latent).

B batch, T query time, S key time, D model, H heads, K kv heads, G = H // K, N head dim, M value dim, R latent rank
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.models.cache import LayerCache, write
from jaxformers.models.config import LayerKind, ModelConfig, QueryGrowth
from jaxformers.models.context import Context
from jaxformers.models.layers import norm, softcap
from jaxformers.models.masks import Visibility
from jaxformers.models.params import Params
from jaxformers.models.rope import rotate
from jaxformers.models.weights import linear, lookup

MASKED = float(jnp.finfo(jnp.float32).min)


@dataclass(frozen=True)
class Scores:
    """How raw query-key products become softmax logits: the static part."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    alibi: float = 0.0  # multiplies slopes of linear biases by distance (arXiv:2108.12409)
    alibi_rounded: bool = False  # biases are bfloat16 products of a slope and a key's position


def alibi_slopes(num_heads: int) -> np.ndarray:
    """One slope a head, float32 [H]: a geometric sequence, interleaved with the next one where H is no power of two."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return np.asarray(slopes, np.float32)


def linear_biases(slopes: jax.Array | np.ndarray, visible: Visibility, scores: Scores) -> jax.Array:
    """What linear position biases add to softmax logits: float32 [B or 1, K, G, T, S], for slopes float32 [K, G, 1, 1]
    that have been multiplied by `scores.alibi`."""
    if not scores.alibi_rounded:
        return -slopes * visible.distance()[:, None, None].astype(jnp.float32)
    places, queries = (p.astype(jnp.float32) for p in (visible.k_positions, visible.q_positions))
    keys = _to_bfloat16(_to_bfloat16(slopes / scores.alibi) * _to_bfloat16(places)[:, None, None, None])
    return scores.alibi * keys - slopes * queries[:, None, None, :, None]  # the latter keeps logits small, no more


def _to_bfloat16(x: jax.Array | np.ndarray) -> jax.Array:
    return jax.lax.reduce_precision(jnp.asarray(x), exponent_bits=8, mantissa_bits=7)


def dot_product(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility, scores: Scores, *, sinks: jax.Array | None = None
) -> jax.Array:
    """Softmax attention. q [B, T, H, N], k [B, S, K, N], v [B, S, K, M] -> [B, T, H, M] in q's dtype; softmax in
    float32.

    `sinks` [H] adds to each head's softmax one logit that attends to nothing (gpt-oss). Heads come first and all
    queries of a kv head are rows of one matmul; the output is divided by the softmax's sum, which is smaller than
    the weights are.
    """
    b, t, h, n = q.shape
    s, kv_heads, m = v.shape[1], k.shape[2], v.shape[3]
    groups = h // kv_heads
    q = q.reshape(b, t, kv_heads, groups, n).transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, groups * t, n)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    logits = jnp.einsum("bkqn,bksn->bkqs", q, k, preferred_element_type=jnp.float32)
    weights, total = _unnormalized(logits.reshape(b, kv_heads, groups, t, s), visible, scores, sinks)
    weights = weights.astype(v.dtype).reshape(b, kv_heads, groups * t, s)
    y = jnp.einsum("bkqs,bksm->bkqm", weights, v, preferred_element_type=jnp.float32)
    y = (y.reshape(b, kv_heads, groups, t, m) / total).astype(q.dtype)
    return y.transpose(0, 3, 1, 2, 4).reshape(b, t, h, m)


def single_query(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility, scores: Scores, *, sinks: jax.Array | None = None
) -> jax.Array:
    """`dot_product` with a step of one query a row written as multiply and sum: on CPU that is one fused loop, where a
    matmul with one row is several times slower."""
    b, t, h, n = q.shape
    if t > 1:
        return dot_product(q, k, v, visible, scores, sinks=sinks)
    kv_heads = k.shape[2]
    grouped = q.reshape(b, 1, kv_heads, h // kv_heads, n).astype(jnp.float32)
    logits = (grouped * k[:, :, :, None].astype(jnp.float32)).sum(-1)  # [B, S, K, G]
    weights, total = _unnormalized(jnp.moveaxis(logits, 1, -1)[:, :, :, None], visible, scores, sinks)
    weights = jnp.moveaxis(weights[:, :, :, 0], -1, 1)[..., None]  # [B, S, K, G, 1]
    y = (weights * v[:, :, :, None].astype(jnp.float32)).sum(1) / total[:, :, :, 0]
    return y.reshape(b, 1, h, v.shape[-1]).astype(q.dtype)


def _unnormalized(
    logits: jax.Array, visible: Visibility, scores: Scores, sinks: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Softmax weights float32 [B, K, G, T, S] of raw products of that shape before the division, and their sums
    [B, K, G, T, 1]."""
    _, kv_heads, groups, _, _ = logits.shape
    logits = softcap(logits * scores.scale, scores.softcap)
    if scores.alibi:
        slopes = scores.alibi * alibi_slopes(kv_heads * groups).reshape(kv_heads, groups, 1, 1)
        logits += linear_biases(slopes, visible, scores)
    logits = jnp.where(visible.mask(scores.window)[:, None, None], logits, MASKED)
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(kv_heads, groups, 1, 1)
        top = jnp.maximum(top, jax.lax.stop_gradient(sink))
    weights = jnp.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    return weights, total if sinks is None else total + jnp.exp(sink - top)


def gqa(
    p: Params, x: jax.Array, ctx: Context, cfg: ModelConfig, kind: LayerKind, cache: LayerCache | None
) -> tuple[jax.Array, LayerCache | None]:
    """Grouped-query attention (arXiv:2305.13245). x [B, T, D] -> [B, T, D], and the cache with this call's keys."""
    q, k, v = _project_qkv(p, x, ctx, cfg)
    if not cfg.qk_norm_after_rope:
        q, k = _qk_norm(p, q, k, cfg)
    if cfg.qkv_clip is not None:
        q, k, v = (jnp.clip(z, -cfg.qkv_clip, cfg.qkv_clip) for z in (q, k, v))
    if kind.rope is not None:
        q, k = rotate(q, kind.rope, ctx.rotations[kind.rope]), rotate(k, kind.rope, ctx.rotations[kind.rope])
    if cfg.qk_norm_after_rope:
        q, k = _qk_norm(p, q, k, cfg)
    if cfg.query_growth is not None:
        q = _grown(q, cfg.query_growth, ctx.positions)
    q = ctx.shard(q, "batch", "seq", "heads", None)
    k, v = ctx.shard(k, "batch", "seq", "kv_heads", None), ctx.shard(v, "batch", "seq", "kv_heads", None)
    visible = ctx.visible
    if cache is not None:
        cache = write(cache, ctx.positions, k=k, v=v)
        k, v, visible = ctx.read(cache["k"]), ctx.read(cache["v"]), ctx.visible_in_cache(cache["k"])
    scale = cfg.head_dim**-0.5 if cfg.attn_scale is None else cfg.attn_scale
    scores = Scores(scale, kind.window, cfg.attn_softcap, cfg.alibi_scale if cfg.alibi else 0.0, cfg.alibi_rounded)
    y = ctx.attend(q, k, v, visible, scores, sinks=p.get("sinks"))
    return linear(ctx.save(y, "mixed"), p["o"], p.get("o_b"), n_in=2), cache


def _grown(q: jax.Array, growth: QueryGrowth, positions: jax.Array) -> jax.Array:
    """q [B, T, H, N] multiplied as its positions [B, T] say."""
    factor = 1 + growth.beta * jnp.log1p((positions // growth.span).astype(jnp.float32))
    return q * factor[:, :, None, None].astype(q.dtype)


def _project_qkv(p: Params, x: jax.Array, ctx: Context, cfg: ModelConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [B, T, H, N], k and v [B, T, K, N]; from one fused weight [D, (H + 2K) N] where `layout.prepare` made one."""
    h, k = cfg.num_heads, cfg.num_kv_heads
    if "qkv" in p:
        fused = linear(x, p["qkv"], p.get("qkv_b")).reshape(*x.shape[:2], h + 2 * k, cfg.head_dim)
        parts = jnp.split(fused, [h, h + k], axis=2)
    else:
        asking = lookup(p["queries"], ctx.positions, dtype=x.dtype) if "queries" in p else x
        sources = zip((asking, x, x), "qkv", strict=True)
        parts = [linear(source, p[name], p.get(f"{name}_b")) for source, name in sources]
    query, key, value = (ctx.save(part, name) for part, name in zip(parts, "qkv", strict=True))
    return query, key, value


def _qk_norm(p: Params, q: jax.Array, k: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    if cfg.qk_norm == "none":
        return q, k
    dims = 2 if cfg.qk_norm == "full" else 1
    return norm(p["q_norm"], q, cfg, dims=dims), norm(p["k_norm"], k, cfg, dims=dims)


def mla(
    p: Params, x: jax.Array, ctx: Context, cfg: ModelConfig, kind: LayerKind, cache: LayerCache | None
) -> tuple[jax.Array, LayerCache | None]:
    """Multi-head latent attention (arXiv:2405.04434). x [B, T, D] -> [B, T, D], and the cache with this call's latents.

    Without a cache, keys and values are expanded from the latent. With one, only the latent is kept, and the
    expansion is absorbed into the query and the output: all heads then share one key of R + P dims.
    """
    m = cfg.mla
    assert m is not None
    assert kind.rope is not None
    turn = ctx.rotations[kind.rope]
    q = (
        linear(norm(p["q_norm"], linear(x, p["q_a"]), cfg, eps=m.norm_eps), p["q_b"])
        if "q_a" in p
        else linear(x, p["q"])
    )
    q_nope, q_rope = ctx.save(q[..., : m.nope_dim], "q"), rotate(q[..., m.nope_dim :], kind.rope, turn)
    latent = ctx.save(norm(p["kv_norm"], linear(x, p["kv_a"]), cfg, eps=m.norm_eps), "k")[:, :, None]
    k_rope = rotate(linear(x, p["k_rope"])[:, :, None], kind.rope, turn)
    scale = (m.nope_dim + m.rope_dim) ** -0.5 if cfg.attn_scale is None else cfg.attn_scale
    scores = Scores(scale, kind.window, cfg.attn_softcap)
    if cache is None:
        k_nope, v = linear(latent[:, :, 0], p["k_b"]), linear(latent[:, :, 0], p["v_b"])
        k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:3], m.rope_dim))
        q, k = jnp.concatenate([q_nope, q_rope], -1), jnp.concatenate([k_nope, k_rope], -1)
        q, k, v = (ctx.shard(z, "batch", "seq", "heads", None) for z in (q, k, v))
        y = ctx.attend(q, k, v, ctx.visible, scores)
    else:
        cache = write(cache, ctx.positions, latent=jnp.concatenate([latent, k_rope], -1))
        keys = ctx.read(cache["latent"])
        absorbed = jnp.einsum("bthn,rhn->bthr", q_nope, p["k_b"].astype(x.dtype))
        q = ctx.shard(jnp.concatenate([absorbed, q_rope], -1), "batch", "seq", "heads", None)
        # The values are the keys but for the rotated dims, which are left out behind: keys may be no array to cut.
        y = ctx.attend(q, keys, keys, ctx.visible_in_cache(keys), scores)[..., : m.kv_rank]
        y = jnp.einsum("bthr,rhm->bthm", y, p["v_b"].astype(x.dtype))
    return linear(ctx.save(y, "mixed"), p["o"], n_in=2), cache
