"""Which experts a token visits and with what weight, and the sums that keep experts evenly loaded.

B batch, T time, M = B T tokens, E experts, k experts a token
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from jaxformers.models.config import MoE
from jaxformers.models.params import Params


class Routing(NamedTuple):
    """weights float32 [..., k] and experts int32 [..., k] of each token; router logits and scores float32 [..., E]."""

    weights: jax.Array
    experts: jax.Array
    logits: jax.Array
    scores: jax.Array


@flax.struct.dataclass
class MoEStats:
    """Sums over the valid tokens of a batch, of one sparse layer or, with a leading dim, of each.

    balance: each row's load-balance loss E sum_e f_e P_e times its tokens, where f_e is the number of visits to
    expert e per token and P_e its mean score (arXiv:2101.03961, taken a row at a time as in arXiv:2412.19437, so
    that the sum does not depend on how rows are batched). router_z: sum of logsumexp(logits)^2 (arXiv:2202.08906).
    load: visits [E]. scores: router scores [E], each token's summing to one. dropped: visits that found no room.
    """

    balance: jax.Array
    router_z: jax.Array
    load: jax.Array
    scores: jax.Array
    dropped: jax.Array

    def batch_balance(self, tokens: jax.Array) -> jax.Array:
        """The load-balance loss of all `tokens` of the batch at once, times their number (arXiv:2501.11873)."""
        return self.load.shape[-1] * (self.load * self.scores).sum(axis=-1) / tokens


def join_layers(layers: list[Any]) -> Any:
    """The statistics of each layer as one, leaves [layers, ...]; None of no layers."""
    return jax.tree.map(lambda *a: jnp.stack(a), *layers) if layers else None


def each_layer(repeats: Any) -> Any:
    """Statistics [repeats, layers of a pattern, ...] as [layers, ...], in the model's order."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), repeats)


def concat_layers(parts: Sequence[Any]) -> Any:
    """Statistics [layers, ...] of successive layers as one; None of no layers, which None stands for."""
    found = [part for part in parts if part is not None]
    return jax.tree.map(lambda *a: jnp.concatenate(a), *found) if found else None


def largest(x: jax.Array, k: int) -> jax.Array:
    """Indices int32 [..., k] of the k largest of x [..., E], the largest first, the first among equals.

    For each of the few one pass over all: XLA would gather the operand of its own top-k from all devices.
    """
    x = jnp.maximum(jax.lax.stop_gradient(x), jnp.finfo(x.dtype).min)  # ruled out still comes before taken
    places, found = jnp.arange(x.shape[-1]), []
    for _ in range(k):
        found.append(x.argmax(axis=-1, keepdims=True).astype(jnp.int32))
        x = jnp.where(places == found[-1], -jnp.inf, x)
    return jnp.concatenate(found, axis=-1)


def _two_largest(x: jax.Array) -> jax.Array:
    """Their sum [...] of x [..., E]."""
    return jnp.take_along_axis(x, largest(x, 2), axis=-1).sum(axis=-1)


def route(p: Params, x: jax.Array, m: MoE) -> Routing:
    """The experts of each token. x [..., D]; router logits and scores are float32 whatever x is."""
    # At full precision on every device: a rounded logit would send tokens to other experts.
    weight = p["router"].astype(jnp.float32)
    logits = jnp.matmul(x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
    if m.router_bias:
        logits += p["router_b"].astype(jnp.float32)
    if m.score == "sparse_mixer":
        weights, experts = _sparse_mixer(logits, m)
        return Routing(weights, experts, logits, jax.nn.softmax(logits, axis=-1))
    if m.score == "softmax_topk":
        experts = largest(logits, m.top_k)
        top = jnp.take_along_axis(logits, experts, axis=-1)
        return Routing(jax.nn.softmax(top, axis=-1) * m.scale, experts, logits, jax.nn.softmax(logits, axis=-1))
    scores = jax.nn.softmax(logits, axis=-1) if m.score == "softmax" else jax.nn.sigmoid(logits)
    preference = scores + p["select_b"].astype(jnp.float32) if m.select_bias else scores
    experts = largest(_limit_groups(preference, m), m.top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if m.normalize:
        weights /= weights.sum(axis=-1, keepdims=True) + 1e-20
    return Routing(weights * m.scale, experts, logits, scores)


def _sparse_mixer(logits: jax.Array, m: MoE) -> tuple[jax.Array, jax.Array]:
    """Weights and experts [..., 2]: each expert is weighed by a softmax over the logits near its own, the second one
    with the first left out.

    This is the reference implementation's inference; its training draws experts at random instead.
    """
    candidates, weights, experts = logits, [], []
    for _ in range(2):
        best = candidates.argmax(axis=-1, keepdims=True)
        top = jax.lax.stop_gradient(candidates.max(axis=-1, keepdims=True))
        distance = (top - logits) / jnp.maximum(jnp.abs(logits), top)
        gates = jax.nn.softmax(jnp.where(distance > 2 * m.jitter, -jnp.inf, candidates), axis=-1)
        weights.append(jnp.take_along_axis(gates, best, axis=-1))
        experts.append(best.astype(jnp.int32))
        chosen = jax.nn.one_hot(best[..., 0], m.num_experts, dtype=bool)
        candidates = jnp.where(chosen, -jnp.inf, logits)
    return jnp.concatenate(weights, axis=-1), jnp.concatenate(experts, axis=-1)


def _limit_groups(preference: jax.Array, m: MoE) -> jax.Array:
    """Preferences [..., E] with those outside each token's best groups ruled out (device-limited routing,
    arXiv:2405.04434)."""
    if m.groups == 1:
        return preference
    grouped = preference.reshape(*preference.shape[:-1], m.groups, m.num_experts // m.groups)
    best = grouped.max(axis=-1) if m.group_score == "max" else _two_largest(grouped)
    kept = jax.nn.one_hot(largest(best, m.top_groups), m.groups).sum(axis=-2)
    return jnp.where(kept[..., None] > 0, grouped, -jnp.inf).reshape(preference.shape)


def only_valid(routing: Routing, valid: jax.Array | None, m: MoE) -> tuple[jax.Array, jax.Array]:
    """weights and experts of a routing in which padding visits no expert (index E), and so takes no one's room.

    valid bool [...] marks the tokens that count, None = all.
    """
    if valid is None:
        return routing.weights, routing.experts
    chosen = valid[..., None]
    return jnp.where(chosen, routing.weights, 0.0), jnp.where(chosen, routing.experts, m.num_experts)


def routing_stats(routing: Routing, valid: jax.Array | None, m: MoE) -> MoEStats:
    """The sums of one layer over a routing [B, T]; valid bool [B, T] marks the tokens that count, None = all."""
    mask = jnp.ones(routing.logits.shape[:2], jnp.float32) if valid is None else valid.astype(jnp.float32)
    visits = jax.nn.one_hot(routing.experts, m.num_experts).sum(axis=-2) * mask[..., None]
    scores = routing.scores / routing.scores.sum(axis=-1, keepdims=True) * mask[..., None]
    visits, scores = visits.sum(axis=1), scores.sum(axis=1)  # [B, E]
    tokens = jnp.maximum(mask.sum(axis=1), 1.0)  # [B]
    balance = m.num_experts * (visits * scores).sum(axis=-1) / tokens
    router_z = jnp.square(jax.nn.logsumexp(routing.logits, axis=-1)) * mask
    return MoEStats(balance.sum(), router_z.sum(), visits.sum(axis=0), scores.sum(axis=0), jnp.zeros((), jnp.float32))
