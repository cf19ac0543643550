"""The only code that looks inside a weight.

Everything else passes leaves of the parameter tree to `linear`, `grouped_linear` and `lookup`, so a leaf may change
what it is (an array today) without a change in any layer.

    B batch, T time, M rows, E experts
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def linear(
    x: jax.Array, w: jax.Array, bias: jax.Array | None = None, *, n_in: int = 1, out_dtype: Any = None
) -> jax.Array:
    """x [..., *in] times w [*in, *out] plus bias [*out] -> [..., *out] in x's dtype, or `out_dtype`; summed in float32.

    `n_in` counts the input dims. XLA:CPU multiplies bfloat16 twice as fast when the output is float32.
    """
    y = _matmul(n_in, x, w).astype(out_dtype or x.dtype)
    return y if bias is None else y + bias.astype(y.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(n_in: int, x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., *in] times w [*in, *out] -> float32 [..., *out]. Gradients of w are float32 sums in w's dtype."""
    contract = (tuple(range(x.ndim - n_in, x.ndim)), tuple(range(n_in)))
    return lax.dot_general(x, w.astype(x.dtype), (contract, ((), ())), preferred_element_type=jnp.float32)


def _matmul_forward(n_in: int, x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _matmul(n_in, x, w), (x, w)


def _matmul_backward(n_in: int, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    rows, outs = x.ndim - n_in, w.ndim - n_in
    dy = dy.astype(x.dtype)
    dx_contract = (tuple(range(rows, rows + outs)), tuple(range(n_in, w.ndim)))
    dx = lax.dot_general(dy, w.astype(x.dtype), (dx_contract, ((), ())), preferred_element_type=jnp.float32)
    x = x.transpose(*range(rows, x.ndim), *range(rows))
    if jax.default_backend() == "cpu":
        # XLA:CPU's fast matmul wants the contracted dims of its left operand last: transposing in memory first makes
        # this product twice as fast as leaving the transpose to the dot.
        x = lax.optimization_barrier(x)
    dw_contract = (tuple(range(n_in, x.ndim)), tuple(range(rows)))
    dw = lax.dot_general(x, dy, (dw_contract, ((), ())), preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def transposed_linear(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., in] times w [out, in] -> [..., out] in float32: the tied head over an embedding table."""
    contract = ((x.ndim - 1,), (1,))
    return lax.dot_general(x, w.astype(x.dtype), (contract, ((), ())), preferred_element_type=jnp.float32)


def grouped_linear(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Rows x [M, in], sorted by group, times their group's matrix in w [E, in, out] -> [M, out].

    Rows past `group_sizes.sum()` come out 0.
    """
    return lax.ragged_dot(x, w.astype(x.dtype), group_sizes, preferred_element_type=jnp.float32).astype(x.dtype)


def lookup(table: jax.Array, ids: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """Rows of table [V, D] at ids [...] -> [..., D]."""
    return table[ids].astype(dtype)


def concat_outputs(weights: list[jax.Array], *, n_in: int = 1) -> jax.Array:
    """Linear weights of one input as one matrix [*in, sum of flattened outputs]."""
    flat = [w.reshape(*w.shape[:n_in], math.prod(w.shape[n_in:])) for w in weights]
    return jnp.concatenate(flat, axis=-1)
