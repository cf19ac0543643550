"""Masks, softmax attention and its variants equal plain loops in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon_alibi

from jaxformers.models.attention import Scores, alibi_slopes, dot_product, linear_biases, single_query
from jaxformers.models.masks import Visibility

B, T, S, H, K, N, M = 2, 5, 7, 6, 3, 4, 3
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def sees(q_position, k_position, window, q_segment=0, k_segment=0) -> bool:
    """A query sees keys of its own document, at or before its position, among the last `window` positions."""
    return q_segment == k_segment and k_position <= q_position and (window is None or k_position > q_position - window)


# -- masks


@pytest.mark.parametrize("window", [None, 1, 2, 6, 7, 100])
@pytest.mark.parametrize("packed", [False, True])
def test_a_mask_is_the_written_out_rule(window, packed):
    positions = np.array([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]], np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]], np.int32) if packed else None
    found = np.asarray(Visibility(positions, positions, segments, segments).mask(window))
    ids = np.zeros_like(positions) if segments is None else segments
    for b, t, s in np.ndindex(found.shape):
        assert found[b, t, s] == sees(positions[b, t], positions[b, s], window, ids[b, t], ids[b, s]), (b, t, s)


def test_every_query_sees_itself_even_padding_under_the_narrowest_window():
    positions = jnp.zeros((1, 4), jnp.int32)
    segments = jnp.array([[1, 0, 0, 0]], jnp.int32)
    mask = np.asarray(Visibility(positions, positions, segments, segments).mask(1))
    assert np.diagonal(mask, axis1=1, axis2=2).all()
    assert not mask[0, 0, 1:].any()


def test_a_query_sees_the_slots_of_a_cache_up_to_its_own_position():
    mask = Visibility(jnp.array([[2], [4]]), jnp.arange(6)[None]).mask(3)
    np.testing.assert_array_equal(mask[:, 0], [[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0]])


# -- linear biases


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 20, 71])
def test_alibi_slopes_are_the_references(heads):
    mask = torch.ones(1, 5, dtype=torch.long)
    reference = build_alibi_tensor(mask, heads, torch.float32).numpy()[:, 0]
    np.testing.assert_allclose(alibi_slopes(heads)[:, None] * np.arange(5), reference, rtol=1e-6)


def test_alibi_slopes_of_eight_heads_are_the_papers():
    np.testing.assert_allclose(alibi_slopes(8), [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256])


def test_rounded_biases_are_falcons():
    heads, length = 20, 600
    reference = falcon_alibi(torch.ones(1, length, dtype=torch.long), heads, torch.float32).numpy()
    places = np.arange(length, dtype=np.int32)[None]
    visible, scores = Visibility(places, places), Scores(1.0, alibi=0.3, alibi_rounded=True)
    found = linear_biases(0.3 * alibi_slopes(heads)[:, None, None, None], visible, scores)
    relative = np.asarray(found)[0, :, 0] - np.asarray(found)[0, :, 0, :, :1]  # to the first key, whose bias is 0
    np.testing.assert_allclose(relative, 0.3 * np.broadcast_to(reference, relative.shape), atol=1e-4)


# -- softmax attention


def inputs(t=T):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((B, t, H, N), (B, S, K, N), (B, S, K, M)))
    q_positions = (
        np.array([[2, 3, 4, 5, 6], [0, 1, 2, 3, 4]], np.int32)[:, :t] if t > 1 else np.array([[6], [3]], np.int32)
    )
    k_positions = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    return q, k, v, Visibility(q_positions, k_positions)


def by_hand(q, k, v, visible, scores, sinks=None):
    """One query and one head at a time."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, h in np.ndindex(*q.shape[:3]):
        group = h // (q.shape[2] // k.shape[2])
        position = visible.q_positions[b, t]
        logits, values = [], []
        for s in range(k.shape[1]):
            if not sees(position, visible.k_positions[b, s], scores.window):
                continue
            logit = float(q[b, t, h] @ k[b, s, group]) * scores.scale
            if scores.softcap is not None:
                logit = scores.softcap * math.tanh(logit / scores.softcap)
            if scores.alibi:
                logit -= float(alibi_slopes(q.shape[2])[h]) * (position - visible.k_positions[b, s])
            logits.append(logit)
            values.append(v[b, s, group])
        exponents = [math.exp(logit) for logit in logits]
        total = sum(exponents) + (0.0 if sinks is None else math.exp(sinks[h]))
        out[b, t, h] = sum(e / total * value for e, value in zip(exponents, values, strict=True))
    return out


VARIANTS = {
    "plain": Scores(0.5),
    "window": Scores(0.5, window=3),
    "window of one": Scores(0.5, window=1),
    "soft cap": Scores(2.0, softcap=1.5),
    "linear biases": Scores(0.5, alibi=True),
    "everything": Scores(1.3, window=4, softcap=2.0, alibi=True),
}


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_is_the_written_out_softmax(variant, sinks):
    q, k, v, visible = inputs()
    logits = np.linspace(-2, 3, H, dtype=np.float32) if sinks else None
    expected = by_hand(q, k, v, visible, VARIANTS[variant], logits)
    with jax.default_matmul_precision("highest"):
        found = jit(dot_product, static_argnums=4)(q, k, v, visible, VARIANTS[variant], sinks=logits)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_single_query_gets_the_written_out_softmax_too(variant, sinks):
    q, k, v, visible = inputs(t=1)
    logits = np.linspace(-2, 3, H, dtype=np.float32) if sinks else None
    expected = by_hand(q, k, v, visible, VARIANTS[variant], logits)
    found = jit(single_query, static_argnums=4)(q, k, v, visible, VARIANTS[variant], sinks=logits)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_several_queries_of_single_query_are_dot_products():
    q, k, v, visible = inputs()
    found = jit(single_query, static_argnums=4)(q, k, v, visible, VARIANTS["everything"])
    np.testing.assert_array_equal(found, jit(dot_product, static_argnums=4)(q, k, v, visible, VARIANTS["everything"]))


@pytest.mark.parametrize("kernel", [dot_product, single_query])
def test_attention_in_bfloat16_is_near_and_stays_bfloat16(kernel):
    q, k, v, visible = inputs(t=1)
    expected = by_hand(q, k, v, visible, VARIANTS["plain"])
    half = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    found = jit(kernel, static_argnums=4)(*half, visible, VARIANTS["plain"])
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=0.03)


@pytest.mark.parametrize("kernel", [dot_product, single_query])
def test_a_cache_of_fewer_bits_than_the_queries_is_read(kernel):
    q, k, v, visible = inputs(t=1)
    expected = by_hand(q, k, v, visible, VARIANTS["plain"])
    found = jit(kernel, static_argnums=4)(
        q, jnp.asarray(k, jnp.bfloat16), jnp.asarray(v, jnp.bfloat16), visible, VARIANTS["plain"]
    )
    assert found.dtype == q.dtype
    np.testing.assert_allclose(found, expected, atol=0.03)


def test_linear_biases_are_as_exact_far_into_a_text_as_at_its_start():
    q, k, v, near = inputs()
    far = Visibility(near.q_positions + 200_000, near.k_positions + 200_000)
    attend = jit(dot_product, static_argnums=4)
    expected = attend(q, k, v, near, VARIANTS["linear biases"])
    np.testing.assert_allclose(attend(q, k, v, far, VARIANTS["linear biases"]), expected, atol=1e-5)


def test_huge_logits_do_not_overflow():
    q, k, v, visible = inputs()
    sinks = np.full(H, 1e4, np.float32)
    found = jit(dot_product, static_argnums=4)(q * 1e4, k * 1e4, v, visible, Scores(1.0))
    assert np.isfinite(found).all()
    away = jit(dot_product, static_argnums=4)(q, k, v, visible, Scores(1.0), sinks=sinks)
    np.testing.assert_allclose(away, np.zeros_like(away), atol=1e-6)  # all attention goes to the sink
