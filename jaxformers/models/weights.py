"""The only code that looks inside a weight.

Everything else passes leaves of the parameter tree to `linear`, `grouped_linear` and `lookup`, so a leaf may change
what it is without a change in any layer: an array, one kept in the order that a device multiplies fastest from, one
kept in fewer bits, or one with a low-rank adapter beside it.

    B batch, T time, M rows, E experts, R rank of an adapter
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
from jax.custom_derivatives import SymbolicZero

from jaxformers.models.quantized import Quantized

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


@flax.struct.dataclass
class LoRA:
    """A weight [batch..., *in, *out] with a low-rank adapter (arXiv:2106.09685): base + scale a b, never added up.

    a [batch..., *in, R] and b [batch..., R, *out] are trained, base is not; batch dims are those of layers and experts,
    and scale float32 [batch...] is one number for each of them, 0 for one without an adapter. Of an embedding, `in` is
    the vocabulary. magnitude [batch..., *out] makes it a DoRA (arXiv:2402.09353): each output's weights are scaled to
    that length. key uint32 [batch..., 2] and places int32 [B, T], where a step sets them, drop that share of the
    adapter's inputs: which of a token's follows from its number in the whole batch, wherever it is computed.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    magnitude: jax.Array | None = None
    key: jax.Array | None = None
    places: jax.Array | None = None
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def n_in(self) -> int:
        """The number of input dims."""
        return self.a.ndim - self.scale.ndim - 1

    def delta(self) -> jax.Array:
        """What the adapter adds to the weight, float32, in its shape."""
        a, b, batch = self._flat()
        low = a * self.scale[..., None, None]
        return jnp.matmul(low, b, precision="highest").reshape(*batch, *self.a.shape[len(batch) : -1], *self._outs)

    def merged(self) -> jax.Array:
        """The weight as one array in the base's dtype."""
        base = dense(self.base)
        w = base.astype(jnp.float32) + self.delta()
        if self.magnitude is not None:
            batch, ins = self.scale.ndim, tuple(range(self.scale.ndim, self.scale.ndim + self.n_in))
            factor = self.magnitude / jnp.sqrt(jnp.square(w).sum(ins))
            w = w * jnp.expand_dims(factor, tuple(range(batch, batch + self.n_in)))
        return w.astype(base.dtype)

    def lengths(self) -> jax.Array:
        """The length float32 [batch..., *out] of each output's weights with the adapter, which are not added up."""
        a, b, batch = self._flat()
        w = dense(self.base).astype(jnp.float32).reshape(*batch, a.shape[-2], b.shape[-1])
        cross = jnp.matmul(a.mT, w, precision="highest")
        inner = jnp.matmul(jnp.matmul(a.mT, a, precision="highest"), b, precision="highest")
        scale = self.scale[..., None]
        squared = jnp.square(w).sum(-2) + (b * (2 * scale[..., None] * cross + scale[..., None] ** 2 * inner)).sum(-2)
        return jnp.sqrt(squared).reshape(*batch, *self._outs)

    @property
    def _outs(self) -> tuple[int, ...]:
        return self.b.shape[self.scale.ndim + 1 :]

    def _flat(self) -> tuple[jax.Array, jax.Array, tuple[int, ...]]:
        """a [batch..., in, R], b [batch..., R, out], and the batch dims."""
        batch, rank = self.scale.shape, self.a.shape[-1]
        return self.a.reshape(*batch, -1, rank), self.b.reshape(*batch, rank, -1), batch


@flax.struct.dataclass
class LoRABank:
    """A weight [*in, *out] with several adapters, of which each row of a batch has its own: base + a[rows] b[rows].

    a [n, in, R] and b [n, R, out], with all input and all output dims in one; rows int32 [B] is set for each call.
    Number 0 is all zeros, and a row with it comes out as from the base, bit by bit.
    """

    base: jax.Array | OutputMajor
    a: jax.Array
    b: jax.Array
    rows: jax.Array | None = None

    def added(self, x: jax.Array, n_in: int) -> jax.Array:
        """What the adapters add to x [B, T, *in] times the base: float32 [B, T, out]."""
        assert self.rows is not None
        flat = x.reshape(*x.shape[: x.ndim - n_in], -1)
        low = jnp.einsum("bti,bir->btr", flat, self.a[self.rows].astype(x.dtype), preferred_element_type=jnp.float32)
        b = self.b[self.rows].astype(x.dtype)
        return jnp.einsum("btr,bro->bto", low.astype(x.dtype), b, preferred_element_type=jnp.float32)


Weight = jax.Array | OutputMajor | Quantized | LoRA | LoRABank


def dense(w: Weight) -> jax.Array:
    """Any weight but an output-major one as one array: adapters added up, fewer bits unpacked."""
    if isinstance(w, LoRA):
        return w.merged()
    return w.dequantized() if isinstance(w, Quantized) else w


def linear(
    x: jax.Array,
    w: Weight,
    bias: jax.Array | None = None,
    *,
    n_in: int = 1,
    out_dtype: Any = None,
) -> jax.Array:
    """x [..., *in] times w [*in, *out] plus bias [*out] -> [..., *out] in x's dtype, or `out_dtype`; summed in float32.

    `n_in` counts the input dims. XLA:CPU multiplies bfloat16 twice as fast when the output is float32.
    """
    dtype = out_dtype or x.dtype
    y = _adapted(x, w, n_in, dtype) if isinstance(w, LoRA) else _kept(_product(x, w, n_in), dtype)
    return y if bias is None else y + bias.astype(y.dtype)


def _kept(y: jax.Array, dtype: Any) -> jax.Array:
    """y in that dtype, marked as a matmul's output for rematerialization policies."""
    return checkpoint_name(y.astype(dtype), "matmul")


def _adapted(x: jax.Array, w: LoRA, n_in: int, dtype: Any) -> jax.Array:
    """`linear` with an adapter beside the weight, each product in that dtype before they are added, as `peft` does.

    What a policy keeps is the base's product and the adapter's few numbers: XLA:CPU would keep both products in place
    of their sum, while the second one is made again in no time.
    """
    low = _kept(_matmul(n_in, _dropped(x, w), w.a) * w.scale, x.dtype)
    y = _kept(_product(x, w.base, n_in), dtype) + _matmul(1, low, w.b).astype(dtype)
    if w.magnitude is None:
        return y
    # The length counts as a constant in the gradient, which costs little quality and much less memory (section 4.3 of
    # the paper).
    factor = w.magnitude / lax.stop_gradient(w.lengths())
    return (y.astype(jnp.float32) * factor).astype(dtype)


def _product(x: jax.Array, w: jax.Array | OutputMajor | Quantized | LoRABank, n_in: int) -> jax.Array:
    """x [..., *in] times w [*in, *out] -> float32 [..., *out]."""
    if isinstance(w, OutputMajor):
        rows = x.shape[: x.ndim - n_in]
        return _weight_left(w.matrix, x.reshape(math.prod(rows), -1)).reshape(*rows, *w.out_shape)
    if isinstance(w, Quantized):
        return _matmul(n_in, x, w.dequantized(x.dtype))
    if isinstance(w, LoRABank):
        y = _product(x, w.base, n_in)
        return y + w.added(x, n_in).reshape(y.shape)
    return _matmul(n_in, x, w)


def _dropped(x: jax.Array, w: LoRA) -> jax.Array:
    """What the adapter sees of x: all of it, or in a training step with dropout, of x [B, T, *in] a random part, scaled
    up."""
    if w.key is None or not w.dropout:
        return x
    assert w.places is not None

    def of_token(place: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(w.key), place)
        return jax.random.bernoulli(key, 1 - w.dropout, x.shape[2:])

    kept = jax.vmap(jax.vmap(of_token))(w.places)
    return jnp.where(kept, x / jnp.asarray(1 - w.dropout, x.dtype), jnp.zeros((), x.dtype))


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


def _matmul_forward(n_in: int, x: Any, w: Any) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array, bool, jax.Array]]:
    # A weight that is not trained needs no gradient, and then of the input only its dtype is kept, by an empty array.
    like = jnp.zeros((0,), x.value.dtype)
    return _matmul(n_in, x.value, w.value), (x.value if w.perturbed else None, w.value, x.perturbed, like)


def _matmul_backward(
    n_in: int, saved: tuple[jax.Array | None, jax.Array, bool, jax.Array], dy: jax.Array | SymbolicZero
) -> tuple[jax.Array | None, jax.Array | None]:
    x, w, x_is_wanted, like = saved
    if isinstance(dy, SymbolicZero):
        return None, None
    rows = dy.ndim - (w.ndim - n_in)
    dy = dy.astype(like.dtype)
    dx = None
    if x_is_wanted:
        dx_contract = (tuple(range(rows, dy.ndim)), tuple(range(n_in, w.ndim)))
        dx = lax.dot_general(dy, w.astype(dy.dtype), (dx_contract, ((), ())), preferred_element_type=jnp.float32)
    return (None if dx is None else dx.astype(dy.dtype)), (None if x is None else _weight_gradient(n_in, x, w, dy))


def _weight_gradient(n_in: int, x: jax.Array, w: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient, in w's shape and dtype, of inputs x [..., *in] and outputs' gradients dy [..., *out]."""
    rows = x.ndim - n_in
    narrow = math.prod(w.shape[n_in:]) * 8 <= math.prod(w.shape[:n_in])  # as an adapter's first matrix is
    left, right, dims = (dy, x, dy.ndim - rows) if narrow else (x, dy, n_in)
    left = left.transpose(*range(rows, left.ndim), *range(rows))
    if jax.default_backend() == "cpu":
        # XLA:CPU's fast matmul wants the contracted dims of its left operand last: transposing in memory first makes
        # this product twice as fast as leaving the transpose to the dot.
        left = lax.optimization_barrier(left)
    contract = (tuple(range(dims, left.ndim)), tuple(range(rows)))
    dw = lax.dot_general(left, right, (contract, ((), ())), preferred_element_type=jnp.float32)
    dw = dw.transpose(*range(dims, dw.ndim), *range(dims)) if narrow else dw
    return dw.astype(w.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)


def transposed_linear(x: jax.Array, w: jax.Array | LoRA) -> jax.Array:
    """x [..., in] times w [out, in] -> [..., out] in float32: the tied head over an embedding table.

    An adapter of the embedding is one of looking tokens up, and no part of the head.
    """
    w, rows = w.base if isinstance(w, LoRA) else w, x.shape[:-1]
    if math.prod(rows) <= FEW_ROWS and jax.default_backend() == "cpu":
        return _weight_left(w, x.reshape(-1, x.shape[-1])).reshape(*rows, w.shape[0])
    contract = ((x.ndim - 1,), (1,))
    return lax.dot_general(x, w.astype(x.dtype), (contract, ((), ())), preferred_element_type=jnp.float32)


def output_lengths(w: Weight) -> jax.Array:
    """The length float32 [out] of each output's weights in a linear weight [in, out], at least 1e-12."""
    matrix, inputs = (w.matrix, 1) if isinstance(w, OutputMajor) else (dense(w), 0)
    return jnp.sqrt(jnp.maximum(jnp.square(matrix.astype(jnp.float32)).sum(inputs), 1e-24))


def grouped_linear(x: jax.Array, w: jax.Array | Quantized | LoRA, group_sizes: jax.Array) -> jax.Array:
    """Rows x [M, in], sorted by group, times their group's matrix in w [E, in, out] -> [M, out].

    Rows past `group_sizes.sum()` come out 0.
    """
    if not isinstance(w, LoRA):
        return _grouped_product(x, dense(w), group_sizes).astype(x.dtype)
    low = _grouped_product(x, w.a * w.scale[:, None, None], group_sizes).astype(x.dtype)
    y = _grouped_product(x, dense(w.base), group_sizes) + _grouped_product(low, w.b, group_sizes)
    return y.astype(x.dtype)


def _grouped_product(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot(x, w.astype(x.dtype), group_sizes, preferred_element_type=jnp.float32)


def lookup(table: jax.Array | LoRA, ids: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """Rows of table [V, D] at ids [...] -> [..., D]."""
    if isinstance(table, LoRA):
        low = table.a[ids].astype(dtype) * table.scale.astype(dtype)
        return lookup(table.base, ids, dtype=dtype) + linear(low, table.b)
    return table[ids].astype(dtype)


def concat_outputs(weights: list[jax.Array], *, n_in: int = 1) -> jax.Array:
    """Linear weights of one input as one matrix [*in, sum of flattened outputs]."""
    flat = [w.reshape(*w.shape[:n_in], math.prod(w.shape[n_in:])) for w in weights]
    return jnp.concatenate(flat, axis=-1)
