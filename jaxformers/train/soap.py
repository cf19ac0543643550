"""SOAP: Adam in the eigenbasis of Shampoo's factors, matrix by matrix (arXiv:2409.11321).

Of a matrix's gradients G [m, n], the factors are running means of G G' [m, m] and G' G [n, n]; the second moment is
that of G in the basis of their eigenvectors. These are found once, from the first gradient, which moves nothing, and
then follow the factors by a power iteration and a QR decomposition every ten updates. The order of it all is that of
the authors' implementation.

Where a factor leaves eigenvectors open (the first gradient of a tall matrix says nothing of most of its rows'),
rounding chooses them: two meshes may choose differently, and both are right. Knows nothing of what is no matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxformers.models.params import Params, ParamSpec
from jaxformers.train.matrices import as_matrices

EVERY = 10  # updates from one basis to the next
LARGEST = 10_000  # a longer side of a matrix stays as it is: its factor would be larger than any matrix


@flax.struct.dataclass
class Side:
    """Of one side of matrices, [*layers and experts, k, k] float32: the mean of G G' (rows) or G' G (columns), and the
    columns of an orthogonal matrix that are about its eigenvectors; zero before the first gradient."""

    factor: jax.Array
    basis: jax.Array

    def take(self, outer: jax.Array, decay: float) -> Side:
        return self.replace(factor=decay * self.factor + (1 - decay) * outer)

    def begun(self) -> Side:
        return self.replace(basis=_decomposed(lambda a: jnp.linalg.eigh(a).eigenvectors, self.factor))

    def followed(self) -> tuple[Side, jax.Array]:
        """The basis after one power iteration, and the order [..., k] of the old one's columns that it is in: largest
        eigenvalue first, as each column of a QR decomposition yields to those before it."""
        image = self.factor @ self.basis
        order = jnp.argsort(-(self.basis * image).sum(axis=-2), axis=-1)
        ordered = jnp.take_along_axis(image, order[..., None, :], axis=-1)
        return self.replace(basis=_decomposed(lambda a: jnp.linalg.qr(a).Q, ordered)), order


def _decomposed(decompose: Callable[[jax.Array], jax.Array], a: jax.Array) -> jax.Array:
    """A decomposition's matrices [..., k, k] of a."""

    def one_by_one(a: jax.Array) -> jax.Array:
        return jax.lax.map(decompose, a.reshape(-1, *a.shape[-2:])).reshape(a.shape)

    # On CPU, a call with a batch waits for threads to take a share each. Where all of them are in such calls, of other
    # parameters or of other devices, none is left to.
    return jax.lax.platform_dependent(a, cpu=one_by_one, default=decompose)


@flax.struct.dataclass
class Moments:
    """What is remembered of the matrices of one parameter: mu and nu in the eigenbasis, shaped as the parameter. A side
    longer than `LARGEST` is None."""

    mu: jax.Array
    nu: jax.Array
    rows: Side | None
    columns: Side | None


class ScaleBySoapState(NamedTuple):
    """count int32: updates so far, the first included. moments: `Moments` of every parameter."""

    count: jax.Array
    moments: Any


def scale_by_soap(spec: Params, *, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's direction m / (sqrt(v) + eps) in the eigenbasis, turned back, for parameters that hold matrices; b2 is the
    decay of the factors too. The first direction is zero."""

    def init(params: Params) -> ScaleBySoapState:
        return ScaleBySoapState(jnp.zeros((), jnp.int32), _map(_zeros, spec, params))

    def update(grads: Params, state: ScaleBySoapState, params: Params | None = None) -> tuple[Params, ScaleBySoapState]:
        del params
        count = state.count

        def remembered(s: ParamSpec, g: jax.Array, old: Moments) -> Moments:
            return _remembered(s, g, old, b1=b1, b2=b2)

        def direction(s: ParamSpec, new: Moments) -> jax.Array:
            seen = jnp.maximum(count, 1).astype(jnp.float32)
            step = new.mu / (1 - b1**seen) / (jnp.sqrt(new.nu / (1 - b2**seen)) + eps)
            return _turned_back(as_matrices(step, s), new).reshape(step.shape)

        # Rounded as the products of a forward pass may be, these would be no rotations.
        with jax.default_matmul_precision("highest"):
            moments = _map(remembered, spec, grads, state.moments)
            directions = _map(direction, spec, moments)
            # Bases move behind the update, so that none is made of the gradient that it turns.
            which = jnp.where(count % EVERY != 0, 0, jnp.where(count == 0, 1, 2))
            branches = lambda tree: tree, partial(_map, _begun, spec), partial(_map, _followed, spec)
            moments = jax.lax.switch(which, branches, moments)
        return directions, ScaleBySoapState(optax.safe_increment(count), moments)

    return optax.GradientTransformation(init, update)


def _map(function: Callable[..., Any], spec: Params, *trees: Params) -> Params:
    """`function` over parameters; of what is not SOAP's, there is an empty node in the place of an array."""

    def mapped(s: ParamSpec, *own: Any) -> Any:
        return own[0] if isinstance(own[0], optax.MaskedNode) else function(s, *own)

    return jax.tree.map(mapped, spec, *trees)


def _zeros(spec: ParamSpec, w: jax.Array) -> Moments:
    *batch, m, n = jax.eval_shape(lambda a: as_matrices(a, spec), w).shape

    def side(size: int) -> Side | None:
        return None if size > LARGEST else Side(*(jnp.zeros((*batch, size, size), w.dtype) for _ in range(2)))

    return Moments(jnp.zeros_like(w), jnp.zeros_like(w), side(m), side(n))


def _remembered(spec: ParamSpec, g: jax.Array, old: Moments, *, b1: float, b2: float) -> Moments:
    """The moments and factors with a gradient in them; the first is only in the factors, as there is no basis yet."""
    matrices = as_matrices(g, spec)
    # Both moments are made of the same turned numbers: rounding, where they are nothing else, cancels in their ratio.
    turned = _turned(matrices, old).reshape(g.shape)
    return Moments(
        mu=b1 * old.mu + (1 - b1) * turned,
        nu=b2 * old.nu + (1 - b2) * turned**2,
        rows=None if old.rows is None else old.rows.take(matrices @ matrices.mT, b2),
        columns=None if old.columns is None else old.columns.take(matrices.mT @ matrices, b2),
    )


def _turned(a: jax.Array, moments: Moments) -> jax.Array:
    """Matrices [..., m, n] in the eigenbasis."""
    a = a if moments.rows is None else moments.rows.basis.mT @ a
    return a if moments.columns is None else a @ moments.columns.basis


def _turned_back(a: jax.Array, moments: Moments) -> jax.Array:
    a = a if moments.rows is None else moments.rows.basis @ a
    return a if moments.columns is None else a @ moments.columns.basis.mT


def _begun(_spec: ParamSpec, old: Moments) -> Moments:
    rows, columns = (None if side is None else side.begun() for side in (old.rows, old.columns))
    return old.replace(rows=rows, columns=columns)


def _followed(spec: ParamSpec, old: Moments) -> Moments:
    """The bases after a power iteration, the first moment turned into them, the second in their columns' order."""
    nu, rows, columns = as_matrices(old.nu, spec), old.rows, old.columns
    if rows is not None:
        rows, order = rows.followed()
        nu = jnp.take_along_axis(nu, order[..., :, None], axis=-2)
    if columns is not None:
        columns, order = columns.followed()
        nu = jnp.take_along_axis(nu, order[..., None, :], axis=-1)
    new = old.replace(nu=nu.reshape(old.nu.shape), rows=rows, columns=columns)
    mu = _turned(_turned_back(as_matrices(old.mu, spec), old), new)
    return new.replace(mu=mu.reshape(old.mu.shape))
