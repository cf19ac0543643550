"""Adafactor: the second moment of a matrix kept as its row and column means (arXiv:1804.04235).

optax's own takes the two largest dims of an array for rows and columns, and clips over whole arrays: of stacked layers
and of attention's weights, neither is a matrix's.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxformers.models.params import Params, ParamSpec
from jaxformers.train.matrices import column_dims, is_matrix, row_dims

EXPONENT = 0.8  # the second moment's decay at step t is 1 - t^-0.8
EPS = 1e-30  # added to squared gradients
CLIP = 1.0  # largest root mean square of a matrix's update


@flax.struct.dataclass
class Factors:
    """Means of squared gradients over a matrix's columns and over its rows: dims of a parameter that are averaged over
    have size 1."""

    rows: jax.Array
    columns: jax.Array


class ScaleByFactoredState(NamedTuple):
    """count int32: updates so far. nu: `Factors` of matrices, an array of everything else, float32."""

    count: jax.Array
    nu: Any


def scale_by_factored_moment(spec: Params) -> optax.GradientTransformation:
    """Gradients over the root of their factored second moment, clipped to a root mean square of 1; no first moment and
    no scaling by the parameters' size."""

    def init(params: Params) -> ScaleByFactoredState:
        return ScaleByFactoredState(jnp.zeros((), jnp.int32), jax.tree.map(_zeros, spec, params))

    def update(grads: Params, state: ScaleByFactoredState, params: Params | None = None) -> tuple[Params, Any]:
        del params
        count = state.count + 1
        decay = 1 - count.astype(jnp.float32) ** -EXPONENT

        def moment(s: ParamSpec, g: jax.Array, nu: Any) -> Any:
            return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, nu, _squares(s, g))

        nu = jax.tree.map(moment, spec, grads, state.nu)
        return jax.tree.map(_scaled, spec, grads, nu), ScaleByFactoredState(count, nu)

    return optax.GradientTransformation(init, update)


def _zeros(spec: ParamSpec, w: jax.Array) -> Factors | jax.Array:
    return jax.tree.map(jnp.zeros_like, _squares(spec, w))


def _squares(spec: ParamSpec, g: jax.Array) -> Factors | jax.Array:
    square = g**2 + EPS
    if not is_matrix(spec):
        return square
    return Factors(square.mean(axis=column_dims(spec), keepdims=True), square.mean(axis=row_dims(spec), keepdims=True))


def _scaled(spec: ParamSpec, g: jax.Array, nu: Factors | jax.Array) -> jax.Array:
    """The gradient over the root of nu, clipped matrix by matrix (of norms and biases: layer by layer)."""
    if isinstance(nu, Factors):
        # Two roots, as the product of two tiny means would be no number of float32.
        share = nu.rows / nu.rows.mean(axis=row_dims(spec), keepdims=True)
        update = g * jax.lax.rsqrt(share) * jax.lax.rsqrt(nu.columns)
    else:
        update = g * jax.lax.rsqrt(nu)
    dims = tuple(range(spec.num_batch, len(spec.shape)))
    size = math.prod(spec.shape[d] for d in dims)
    rms = jnp.sqrt((update**2).sum(axis=dims, keepdims=True) / size)
    return update / jnp.maximum(1.0, rms / CLIP)
