"""Blockwise attention computes what the plain one does, in value and in every gradient, and never a T x S matrix."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.models.attention import Scores, dot_product
from jaxformers.models.blockwise import blockwise_attention
from jaxformers.models.masks import Visibility

QUICK = {"xla_backend_optimization_level": 0}  # compiles fast, computes the same
ROWS, LENGTH, HEADS, HEAD_DIM = 2, 48, 4, 8


def places(length: int = LENGTH, *, documents: tuple[int, ...] = (), order: np.ndarray | None = None) -> Visibility:
    """Rows of documents of these lengths (the last row of one alone), in order or reordered."""
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (ROWS, length)).copy()
    segments = np.ones_like(positions)
    if documents:
        assert sum(documents) == length
        positions[0] = np.concatenate([np.arange(n) for n in documents])
        segments[0] = np.repeat(np.arange(len(documents)), documents)
    order = np.arange(length) if order is None else order
    positions, segments = jnp.asarray(positions[:, order]), jnp.asarray(segments[:, order])
    return Visibility(positions, positions, *((segments, segments) if documents else ()))


def inputs(length: int = LENGTH, *, kv_heads: int = 2, value_dim: int = HEAD_DIM, dtype: Any = jnp.float32) -> tuple:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (ROWS, length, HEADS, HEAD_DIM), (ROWS, length, kv_heads, HEAD_DIM), (ROWS, length, kv_heads, value_dim)
    return *(jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=False)), jax.random.normal(keys[3], 4)


def values_and_gradients(attend: Any, visible: Visibility, scores: Scores, arrays: tuple, *, sinks: bool) -> tuple:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array, sink: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = attend(q, k, v, visible, scores, sinks=sink if sinks else None)
        wave = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return (y.astype(jnp.float32) * wave).sum(), y

    with jax.default_matmul_precision("highest"):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True), compiler_options=QUICK)
        (_, y), gradients = step(*arrays)
    return y, *gradients


def small_blocks(*args: Any, **settings: Any) -> jax.Array:
    return blockwise_attention(*args, block=16, **settings)


SCALE = HEAD_DIM**-0.5
BACKWARDS = np.arange(LENGTH)[::-1]
SHUFFLED = np.random.default_rng(0).permutation(LENGTH)
CASES = {
    "causal": (places(), Scores(SCALE), {}),
    "one document a row, positions shared": (Visibility(*[jnp.arange(LENGTH)[None]] * 2), Scores(SCALE), {}),
    "window": (places(), Scores(SCALE, window=5), {}),
    "window of one": (places(), Scores(SCALE, window=1), {}),
    "window beyond the row": (places(), Scores(SCALE, window=100), {}),
    "documents": (places(documents=(20, 1, 27)), Scores(SCALE), {}),
    "documents and window": (places(documents=(20, 1, 27)), Scores(SCALE, window=7), {}),
    "soft cap": (places(), Scores(1.0, softcap=2.0), {}),
    "linear biases": (places(documents=(31, 17)), Scores(SCALE, alibi=1.0), {}),
    "one kv head": (places(), Scores(SCALE), {"kv_heads": 1}),
    "a kv head a query head": (places(), Scores(SCALE), {"kv_heads": 4}),
    "wider values": (places(), Scores(SCALE), {"value_dim": 12}),
    "backwards": (places(documents=(20, 1, 27), order=BACKWARDS), Scores(SCALE, window=9), {}),
    "shuffled": (places(documents=(20, 28), order=SHUFFLED), Scores(SCALE, window=9, softcap=3.0, alibi=1.0), {}),
    "length that blocks do not divide": (places(41), Scores(SCALE, window=20), {"length": 41}),
    "length of one": (places(1), Scores(SCALE), {"length": 1}),
}


WITH_SINKS = {
    "causal",
    "documents and window",
    "soft cap",
    "one kv head",
    "shuffled",
    "length that blocks do not divide",
}


@pytest.mark.parametrize("case", CASES)
def test_it_equals_the_plain_attention(case):
    (visible, scores, shape), sinks = CASES[case], case in WITH_SINKS
    arrays = inputs(**shape)
    ours = values_and_gradients(small_blocks, visible, scores, arrays, sinks=sinks)
    truth = values_and_gradients(dot_product, visible, scores, arrays, sinks=sinks)
    for found, expected in zip(ours, truth, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(expected).max()))


def test_in_bfloat16_it_is_as_near_to_float32_as_the_plain_attention():
    visible, scores = places(documents=(20, 28)), Scores(SCALE)
    exact = values_and_gradients(dot_product, visible, scores, inputs(), sinks=True)
    arrays = inputs(dtype=jnp.bfloat16)
    rounded = [x.astype(jnp.float32) for x in arrays]
    exact = values_and_gradients(dot_product, visible, scores, rounded, sinks=True)
    ours = values_and_gradients(small_blocks, visible, scores, arrays, sinks=True)
    plain = values_and_gradients(dot_product, visible, scores, arrays, sinks=True)

    def error(found: tuple) -> list[float]:
        return [float(jnp.abs(f.astype(jnp.float32) - e).max()) for f, e in zip(found, exact, strict=True)]

    assert ours[0].dtype == jnp.bfloat16
    for our, theirs in zip(error(ours), error(plain), strict=True):
        assert our < 1.5 * theirs + 1e-3
