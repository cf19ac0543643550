"""Feed-forward networks: the dense one, and the mixture of experts.

B batch, T time, D model, F ffn, M = B T tokens, E experts, k experts a token
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxformers.models.config import ModelConfig
from jaxformers.models.context import Context
from jaxformers.models.layers import ACTIVATIONS, activate
from jaxformers.models.params import Params
from jaxformers.models.routing import MoEStats, only_valid, route, routing_stats
from jaxformers.models.weights import grouped_linear, linear


def mlp(p: Params, x: jax.Array, ctx: Context, cfg: ModelConfig) -> jax.Array:
    """x [..., D] -> [..., D]: down(act(gate x) * up x), or down(act(up x)) without a gate."""
    if "gate_up" in p:
        gate, up = jnp.split(linear(x, p["gate_up"], p.get("gate_up_b")), 2, axis=-1)
    else:
        up = linear(x, p["up"], p.get("up_b"))
        gate = linear(x, p["gate"], p.get("gate_b")) if cfg.gated else None
    up = ctx.save(up, "up")
    hidden = activate(p, up if gate is None else ctx.save(gate, "gate"), cfg)
    if gate is not None:
        hidden *= up
    hidden = ctx.shard(hidden, "batch", "seq", "mlp")
    return linear(hidden, p["down"], p.get("down_b"))


def moe(p: Params, x: jax.Array, ctx: Context, cfg: ModelConfig) -> tuple[jax.Array, MoEStats]:
    """x [B, T, D] -> [B, T, D]: the weighted sum of each token's chosen experts, plus the shared expert."""
    m = cfg.moe
    assert m is not None
    routing = route(p, x, m)
    valid = None if ctx.segment_ids is None else ctx.segment_ids > 0
    weights, experts = only_valid(routing, valid, m)
    y, dropped = ctx.experts(p, x, weights, experts, cfg)
    if m.shared_d_ff:
        shared = mlp(p["shared"], x, ctx, cfg)
        if m.shared_gate:
            shared *= jax.nn.sigmoid(linear(x, p["shared_gate"]))
        y += shared
    return y, routing_stats(routing, valid, m).replace(dropped=dropped)


class Mixed(NamedTuple):
    """What experts made of tokens, [..., D], and how many visits they had no room for (float32 scalar)."""

    x: jax.Array
    dropped: jax.Array


def local_experts(p: Params, x: jax.Array, weights: jax.Array, experts: jax.Array, cfg: ModelConfig) -> Mixed:
    """Every chosen expert of every token, dropless, on one device.

    x [..., D], weights float32 [..., k], experts int32 [..., k]; an index of E visits none.
    """
    k, d = experts.shape[-1], x.shape[-1]
    y = run_experts(p, x.reshape(-1, d), experts.reshape(-1, k), cfg)
    y = weigh(y, weights.reshape(-1, k))
    return Mixed(y.astype(x.dtype).reshape(x.shape), jnp.zeros((), jnp.float32))


def run_experts(p: Params, x: jax.Array, experts: jax.Array, cfg: ModelConfig) -> jax.Array:
    """What each of the experts held in p makes of each token that visits it: x [M, D], experts int32 [M, k] ->
    [M, k, D], zeros where the index is past those held.

    Token copies are sorted by expert, multiplied group by group (`ragged_dot`) and put back. An expert that got no
    token is an empty group.
    """
    k, held = experts.shape[-1], p["up"].shape[0]
    order = jnp.argsort(experts.reshape(-1), stable=True)
    expert_of = experts.reshape(-1)[order]
    sizes = jnp.bincount(expert_of, length=held).astype(jnp.int32)

    def project(rows: jax.Array, name: str) -> jax.Array:
        y = grouped_linear(rows, p[name], sizes)
        return y + p[f"{name}_b"][expert_of].astype(y.dtype) if f"{name}_b" in p else y

    copies = x[order // k]
    hidden = _expert_activation(project(copies, "gate"), project(copies, "up"), cfg)
    y = jnp.where(expert_of[:, None] < held, project(hidden, "down"), 0)
    return y[jnp.argsort(order)].reshape(-1, k, x.shape[-1])


def weigh(y: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted sum float32 [M, D] of each token's experts y [M, k, D]."""
    return jnp.einsum("mkd,mk->md", y.astype(jnp.float32), weights)


def _expert_activation(gate: jax.Array, up: jax.Array, cfg: ModelConfig) -> jax.Array:
    if cfg.swiglu_limit is None:
        return ACTIVATIONS[cfg.activation](gate) * up
    gate, up = jnp.minimum(gate, cfg.swiglu_limit), jnp.clip(up, -cfg.swiglu_limit, cfg.swiglu_limit)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
