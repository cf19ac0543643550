"""Recomputation that waits for the gradient: rematerialization on a backend that orders operations as early as it can.

Knows nothing of layers; what is kept and what is recomputed is what `jax.checkpoint` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from jaxformers.models.adapters import combine, partition


def recomputed_late(body: Callable[[Any, jax.Array, Any], Any]) -> Callable[[Any, jax.Array, Any], Any]:
    """`body(params, x, rest)`, a function under `jax.checkpoint`, whose recomputation waits for its output's gradient.

    XLA:CPU drops the barriers of `jax.checkpoint` before it orders operations. It then recomputes a layer as soon as it
    can, and what that makes of all layers waits side by side for the backward pass. Here whatever is recomputed reads
    a number of the gradient, which no compiler can know earlier.

    rest is not differentiated. All calls of one such function must differentiate the same leaves of params.
    """
    late = jax.custom_vjp(body)

    def forward(params: Any, x: Any, rest: Any) -> tuple[Any, tuple[Any, Any]]:
        assert not any(leaf.perturbed for leaf in jax.tree.leaves(rest))
        wanted = jax.tree.map(lambda leaf: leaf.perturbed, params)
        params, x, rest = jax.tree.map(lambda leaf: leaf.value, (params, x, rest))
        moved, still = partition(params, wanted)
        # x is differentiated also where nobody asks for it, as before a first layer over a frozen embedding: equal
        # layers are traced once, and all have to keep the same.
        out, pull = jax.vjp(lambda moved, x: body(combine(moved, still), x, rest), moved, x)
        return out, partition(pull, _activations(pull, params))

    def backward(kept: tuple[Any, Any], gradient: Any) -> tuple[Any, jax.Array, None]:
        gradient = jax.tree.map(_instantiated, gradient, is_leaf=_is_zero)
        arrived = jax.tree.leaves(gradient)[0].ravel()[0]
        # A gradient that is not a number has only such ones behind it anyway.
        activations = jax.tree.map(lambda a: jnp.where(arrived == arrived, a, jnp.nan), kept[0])
        return *combine(activations, kept[1])(gradient), None

    late.defvjp(forward, backward, symbolic_zeros=True)
    return late


def _activations(pull: Any, params: Any) -> Any:
    """Which leaves of what a backward pass keeps are floats that are no parameters, as a tree of bools."""
    own = {id(leaf) for leaf in jax.tree.leaves(params)}
    return jax.tree.map(lambda a: id(a) not in own and jnp.issubdtype(a.dtype, jnp.floating), pull)


def _is_zero(leaf: Any) -> bool:
    return isinstance(leaf, SymbolicZero)


def _instantiated(leaf: Any) -> Any:
    return np.zeros(leaf.shape, leaf.dtype) if _is_zero(leaf) else leaf
