"""Experts are chosen and weighed as a loop over tokens says, and the balancing sums are the published formulas."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny import one_sparse_layer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from jaxformers.models.config import MoE
from jaxformers.models.context import Context
from jaxformers.models.ffn import local_experts, moe
from jaxformers.models.params import moe_spec
from jaxformers.models.routing import route, routing_stats
from jaxformers.models.runtime import Runtime, no_shard

B, T, D, F, E = 2, 6, 8, 5, 8
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
PLAIN = MoE(num_experts=E, top_k=3, d_ff=F)
ROUTINGS = {
    "softmax": PLAIN,
    "softmax, not normalised": replace(PLAIN, normalize=False, scale=2.0),
    "sigmoid": replace(PLAIN, score="sigmoid"),
    "softmax of the chosen": replace(PLAIN, score="softmax_topk", router_bias=True),
    "selection bias": replace(PLAIN, score="sigmoid", select_bias=True),
    "groups by their best": replace(PLAIN, groups=4, top_groups=2),
    "groups by their two best": replace(
        PLAIN, score="sigmoid", select_bias=True, groups=4, top_groups=2, group_score="top2", scale=2.5
    ),
    "one group of all": replace(PLAIN, groups=2, top_groups=2),
    "all experts": replace(PLAIN, top_k=E),
    "one of many": replace(PLAIN, top_k=1),
    "only one": replace(PLAIN, num_experts=1, top_k=1),
    "biased experts": replace(PLAIN, expert_bias=True),
    "shared expert": replace(PLAIN, shared_d_ff=7),
    "gated shared expert": replace(PLAIN, shared_d_ff=7, shared_gate=True),
}


config = functools.partial(one_sparse_layer, d_model=D, d_ff=F)


def weights(m: MoE, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda spec: rng.standard_normal(spec.shape).astype(np.float32), moe_spec(config(m)))


def inputs(seed=1):
    return np.random.default_rng(seed).standard_normal((B, T, D)).astype(np.float32)


def route_by_hand(p, x, m: MoE):
    """Weights by expert of one token x [D]."""
    logits = [
        float(x @ p["router"][:, e]) + (float(p["router_b"][e]) if m.router_bias else 0.0) for e in range(m.num_experts)
    ]
    if m.score == "softmax":
        scores = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
    elif m.score == "sigmoid":
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    else:
        scores = logits
    preference = [s + (float(p["select_b"][e]) if m.select_bias else 0.0) for e, s in enumerate(scores)]
    size = m.num_experts // m.groups
    groups = [range(g * size, (g + 1) * size) for g in range(m.groups)]
    counted = 1 if m.group_score == "max" else 2
    groups.sort(key=lambda group: -sum(sorted((preference[e] for e in group), reverse=True)[:counted]))
    allowed = [e for group in groups[: m.top_groups] for e in group]
    chosen = sorted(allowed, key=lambda e: -preference[e])[: m.top_k]
    weight = {e: math.exp(scores[e]) if m.score == "softmax_topk" else scores[e] for e in chosen}
    total = sum(weight.values()) if m.normalize else 1.0
    return {e: m.scale * w / total for e, w in weight.items()}


def silu(x):
    return x / (1 + np.exp(-x))


def expert_by_hand(p, x, e, m: MoE):
    def project(x, name):
        return x @ p[name][e] + (p[f"{name}_b"][e] if m.expert_bias else 0.0)

    return project(silu(project(x, "gate")) * project(x, "up"), "down")


def layer_by_hand(p, x, m: MoE):
    p, x = jax.tree.map(lambda a: a.astype(np.float64), (p, x))
    out = np.zeros_like(x)
    for b, t in np.ndindex(B, T):
        out[b, t] = sum(w * expert_by_hand(p, x[b, t], e, m) for e, w in route_by_hand(p, x[b, t], m).items())
        if m.shared_d_ff:
            s = p["shared"]
            shared = (silu(x[b, t] @ s["gate"]) * (x[b, t] @ s["up"])) @ s["down"]
            out[b, t] += shared / (1 + np.exp(-(x[b, t] @ p["shared_gate"]))) if m.shared_gate else shared
    return out


def apply(p, x, segment_ids, m: MoE):
    ctx = Context(jnp.zeros((B, T), jnp.int32), segment_ids, {}, no_shard, Runtime().attend, local_experts)
    return moe(p, x, ctx, config(m))


layer = jit(apply, static_argnums=3)


@pytest.fixture(autouse=True)
def exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("name", ROUTINGS)
def test_a_layer_is_the_loop_over_its_tokens(name):
    m = ROUTINGS[name]
    p, x = weights(m), inputs()
    expected = layer_by_hand(p, x, m)
    np.testing.assert_allclose(layer(p, x, None, m)[0], expected, atol=1e-5 * np.abs(expected).max())


def test_experts_outside_the_best_groups_are_never_chosen_even_where_all_are_disliked():
    m = ROUTINGS["groups by their two best"]
    p = weights(m)
    p["select_b"] = np.linspace(-3, -2, E, dtype=np.float32)
    found = jit(route, static_argnums=2)(p, inputs().reshape(-1, D), m)
    for token, x in enumerate(inputs().reshape(-1, D)):
        assert set(map(int, found.experts[token])) == set(route_by_hand(p, x, m)), token


def test_all_tokens_may_go_to_one_expert_and_others_stay_empty():
    m = ROUTINGS["one of many"]
    p, x = weights(m), np.abs(inputs())
    p["router"] = np.zeros((D, E), np.float32)
    p["router"][:, 5] = 1.0
    y, stats = layer(p, x, None, m)
    expected = layer_by_hand(p, x, m)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(stats.load, np.eye(E)[5] * B * T)


def test_gradients_reach_every_visited_expert_and_the_router():
    m = replace(PLAIN, top_k=E)
    p, x = weights(m), jnp.asarray(inputs())
    grads = jit(jax.grad(lambda p: apply(p, x, None, m)[0].sum()))(p)
    assert all(np.abs(g).reshape(g.shape[0], -1).max(axis=1).min() > 0 for g in jax.tree.leaves(grads))


def test_routing_is_float32_whatever_the_activations_are():
    p, x = weights(PLAIN), jnp.asarray(inputs().reshape(-1, D), jnp.bfloat16)
    found = route(p, x, PLAIN)
    assert {found.weights.dtype, found.logits.dtype, found.scores.dtype} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(found.logits, np.asarray(x, np.float64) @ p["router"], atol=1e-5)


# -- balancing sums


def stats_of(p, x, m, segment_ids=None):
    routing = route(p, x, m)
    return routing, routing_stats(routing, None if segment_ids is None else segment_ids > 0, m)


def test_the_balance_of_one_row_is_the_references_load_balancing_loss():
    p, x = weights(PLAIN), inputs()[:1]
    routing, stats = stats_of(p, x, PLAIN)
    logits = torch.from_numpy(np.array(routing.logits).reshape(-1, E))
    truth = load_balancing_loss_func((logits,), E, PLAIN.top_k)
    np.testing.assert_allclose(stats.balance / T, truth, rtol=1e-6)


def test_the_balance_of_one_row_leaves_padding_out_as_the_reference_does():
    p, x = weights(PLAIN), inputs()[:1]
    segments = np.array([[1, 1, 2, 2, 0, 0]])
    routing, stats = stats_of(p, x, PLAIN, segments)
    logits = torch.from_numpy(np.array(routing.logits).reshape(-1, E))
    truth = load_balancing_loss_func((logits,), E, PLAIN.top_k, torch.from_numpy(segments > 0).long())
    np.testing.assert_allclose(stats.balance / 4, truth, rtol=1e-6)
    alone = stats_of(p, x[:, :4], PLAIN)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), stats, alone)


def test_router_z_is_the_sum_of_squared_logsumexps():
    p, x = weights(PLAIN), inputs()
    routing, stats = stats_of(p, x, PLAIN)
    expected = sum(
        math.log(sum(math.exp(v) for v in row)) ** 2 for row in np.asarray(routing.logits, np.float64).reshape(-1, E)
    )
    np.testing.assert_allclose(stats.router_z, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "softmax of the chosen"])
def test_sums_of_rows_add_up_to_those_of_the_batch(name):
    m = ROUTINGS[name]
    p, x = weights(m), inputs()
    rows = [stats_of(p, x[b : b + 1], m)[1] for b in range(B)]
    total = jax.tree.map(lambda *values: sum(values), *rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stats_of(p, x, m)[1], total)


def test_an_even_load_has_the_lowest_balance():
    # With uniform scores, f_e P_e sums to top_k / E whatever is chosen: balance is top_k a token.
    p, x = weights(PLAIN) | {"router": np.zeros((D, E), np.float32)}, inputs()
    np.testing.assert_allclose(stats_of(p, x, PLAIN)[1].balance, PLAIN.top_k * B * T, rtol=1e-6)


def test_a_row_of_padding_adds_nothing():
    p, x = weights(PLAIN), inputs()
    padded = stats_of(p, x, PLAIN, np.array([[1] * T, [0] * T]))[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), padded, stats_of(p, x[:1], PLAIN)[1])
