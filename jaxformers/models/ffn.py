"""Feed-forward networks: the dense one, and the mixture of experts.

B batch, T time, D model, F ffn, M = B T tokens, E experts, k experts a token
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxformers.models.config import ModelConfig
from jaxformers.models.context import Context
from jaxformers.models.layers import ACTIVATIONS, activate
from jaxformers.models.params import Params
from jaxformers.models.routing import MoEStats, route, routing_stats
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
    return linear(hidden, p["down"], p.get("down_b"))


def moe(p: Params, x: jax.Array, ctx: Context, cfg: ModelConfig) -> tuple[jax.Array, MoEStats]:
    """x [B, T, D] -> [B, T, D]: the weighted sum of each token's chosen experts, plus the shared expert."""
    m = cfg.moe
    assert m is not None
    tokens = x.reshape(-1, x.shape[-1])
    routing = route(p, tokens, m)
    y = ctx.experts(p, tokens, routing.weights, routing.experts, cfg)
    if m.shared_d_ff:
        shared = mlp(p["shared"], tokens, ctx, cfg)
        if m.shared_gate:
            shared *= jax.nn.sigmoid(linear(tokens, p["shared_gate"]))
        y += shared
    valid = None if ctx.segment_ids is None else ctx.segment_ids > 0
    return y.reshape(x.shape), routing_stats(routing, x.shape[:2], valid, m)


def local_experts(p: Params, x: jax.Array, weights: jax.Array, experts: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Every chosen expert of every token, dropless, on one device.

    Token copies are sorted by expert, multiplied group by group (`ragged_dot`), put back and summed by weight. x [M,
    D], weights float32 [M, k], experts int32 [M, k] -> [M, D]. An expert that got no token is an empty group.
    """
    m = cfg.moe
    assert m is not None
    order = jnp.argsort(experts.reshape(-1), stable=True)
    expert_of = experts.reshape(-1)[order]
    sizes = jnp.bincount(expert_of, length=m.num_experts).astype(jnp.int32)

    def project(rows: jax.Array, name: str) -> jax.Array:
        y = grouped_linear(rows, p[name], sizes)
        return y + p[f"{name}_b"][expert_of].astype(y.dtype) if m.expert_bias else y

    copies = x[order // m.top_k]
    hidden = _expert_activation(project(copies, "gate"), project(copies, "up"), cfg)
    y = project(hidden, "down")[jnp.argsort(order)].reshape(-1, m.top_k, x.shape[-1])
    return jnp.einsum("mkd,mk->md", y.astype(jnp.float32), weights).astype(x.dtype)


def _expert_activation(gate: jax.Array, up: jax.Array, cfg: ModelConfig) -> jax.Array:
    if cfg.swiglu_limit is None:
        return ACTIVATIONS[cfg.activation](gate) * up
    gate, up = jnp.minimum(gate, cfg.swiglu_limit), jnp.clip(up, -cfg.swiglu_limit, cfg.swiglu_limit)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
