"""Muon: momentum made orthogonal, matrix by matrix (Keller Jordan, 2024; arXiv:2502.16982).

A matrix is what a checkpoint has for one: each layer's and each expert's own, attention's heads together.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jaxformers.models.params import Params, ParamSpec
from jaxformers.train.matrices import as_matrices

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # a quintic that is steepest at zero
ITERATIONS = 5
ADAM_RMS = 0.2  # root mean square of a usual AdamW update


def orthogonalized(x: jax.Array) -> jax.Array:
    """Matrices [..., m, n] with all singular values brought to about 1 (0.7 to 1.2), by Newton-Schulz iterations."""
    m, n = x.shape[-2:]
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    if m > n:
        x = x.mT
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if m > n else x


def scale_by_muon(spec: Params, *, momentum: float, nesterov: bool) -> optax.GradientTransformation:
    """The orthogonalized momentum times 0.2 sqrt(max(m, n)), which gives an update the size of AdamW's, so that one
    learning rate and decay suit both (arXiv:2502.16982, equation 4)."""

    def direction(s: ParamSpec, u: jax.Array) -> jax.Array:
        matrices = as_matrices(u, s)
        scale = ADAM_RMS * max(matrices.shape[-2:]) ** 0.5
        return (scale * orthogonalized(matrices)).reshape(u.shape)

    def shape(updates: Params, params: Params | None) -> Params:
        del params
        # Of what is not Muon's, there is an empty node in the place of an array.
        return jax.tree.map(lambda s, u: u if isinstance(u, optax.MaskedNode) else direction(s, u), spec, updates)

    return optax.chain(optax.trace(momentum, nesterov=nesterov), optax.stateless(shape))
