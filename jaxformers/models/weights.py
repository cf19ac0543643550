"""The only code that looks inside a weight.

Everything else passes leaves of the parameter tree to `linear`, `grouped_linear` and `lookup`, so a leaf may change
what it is without a change in any layer: an array, or one kept in the order that a device multiplies fastest from.

    B batch, T time, M rows, E experts
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

FEW_ROWS = 64  # up to so many rows, a CPU's matmul is bound by reading weights


@flax.struct.dataclass
class OutputMajor:
    """A linear weight kept as [out, in], the order that a few rows are multiplied from fastest on CPU.

    XLA:CPU streams the left operand of a matmul: with the weight there, 8 rows take half the time they take with the
    weight on the right, and 1 row takes no longer.
    """

    matrix: jax.Array
    out_shape: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, w: jax.Array, *, n_in: int) -> OutputMajor:
        """The weight [*in, *out] in this order."""
        return cls(w.reshape(math.prod(w.shape[:n_in]), -1).T, w.shape[n_in:])


def linear(
    x: jax.Array,
    w: jax.Array | OutputMajor,
    bias: jax.Array | None = None,
    *,
    n_in: int = 1,
    out_dtype: Any = None,
) -> jax.Array:
    """x [..., *in] times w [*in, *out] plus bias [*out] -> [..., *out] in x's dtype, or `out_dtype`; summed in float32.

    `n_in` counts the input dims. XLA:CPU multiplies bfloat16 twice as fast when the output is float32.
    """
    if isinstance(w, OutputMajor):
        rows = x.shape[: x.ndim - n_in]
        y = _weight_left(w.matrix, x.reshape(math.prod(rows), -1)).reshape(*rows, *w.out_shape)
    else:
        y = _matmul(n_in, x, w)
    y = checkpoint_name(y.astype(out_dtype or x.dtype), "matmul")
    return y if bias is None else y + bias.astype(y.dtype)


def _weight_left(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """matrix [out, in] times rows x [M, in] -> float32 [M, out]; few rows with the matrix as the left operand."""
    contract = ((1,), (1,))
    if x.shape[0] > FEW_ROWS:
        return lax.dot_general(x, matrix.astype(x.dtype), (contract, ((), ())), preferred_element_type=jnp.float32)
    y = lax.dot_general(matrix.astype(x.dtype), x, (contract, ((), ())), preferred_element_type=jnp.float32)
    return lax.optimization_barrier(y).T  # without the barrier, XLA swaps the operands back to save the transpose


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
    rows = x.shape[:-1]
    if math.prod(rows) <= FEW_ROWS and jax.default_backend() == "cpu":
        return _weight_left(w, x.reshape(-1, x.shape[-1])).reshape(*rows, w.shape[0])
    contract = ((x.ndim - 1,), (1,))
    return lax.dot_general(x, w.astype(x.dtype), (contract, ((), ())), preferred_element_type=jnp.float32)


def output_lengths(w: jax.Array | OutputMajor) -> jax.Array:
    """The length float32 [out] of each output's weights in a linear weight [in, out], at least 1e-12."""
    matrix, inputs = (w.matrix, 1) if isinstance(w, OutputMajor) else (w, 0)
    return jnp.sqrt(jnp.maximum(jnp.square(matrix.astype(jnp.float32)).sum(inputs), 1e-24))


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
