"""The only code that looks inside a weight.

Everything else passes leaves of the parameter tree to `linear`, `grouped_linear` and `lookup`, so a leaf may change
what it is (an array today) without a change in any layer.

    B batch, T time, M rows, E experts
"""

from __future__ import annotations

import math
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
    contract = (tuple(range(x.ndim - n_in, x.ndim)), tuple(range(n_in)))
    y = lax.dot_general(x, w.astype(x.dtype), (contract, ((), ())), preferred_element_type=jnp.float32)
    y = y.astype(out_dtype or x.dtype)
    return y if bias is None else y + bias.astype(y.dtype)


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
