"""A parameter as the matrices it holds: one a layer and expert, from input dims to output dims.

What preconditions whole matrices sees them through this, so that a stack of layers, or attention's weights [D, H, N],
are the same matrices as in a checkpoint.
"""

from __future__ import annotations

import math

import jax

from jaxformers.models.params import ParamSpec


def is_matrix(spec: ParamSpec) -> bool:
    """Whether a parameter holds matrices: linear layers and tables, not norms and biases."""
    _, rows, columns = _split(spec)
    return (spec.n_in > 0 or spec.init in ("normal", "residual")) and min(math.prod(rows), math.prod(columns)) > 1


def is_hidden_matrix(spec: ParamSpec) -> bool:
    """Whether a parameter holds matrices between hidden features: no table of embeddings and no head."""
    return is_matrix(spec) and spec.n_in > 0 and "vocab" not in spec.axes


def as_matrices(a: jax.Array, spec: ParamSpec) -> jax.Array:
    """[*layers and experts, rows, columns] of a parameter, or of anything shaped like it; rows are its input dims."""
    batch, rows, columns = _split(spec)
    return a.reshape(*batch, math.prod(rows), math.prod(columns))


def row_dims(spec: ParamSpec) -> tuple[int, ...]:
    """The parameter's dims that are a matrix's rows."""
    batch, rows, _ = _split(spec)
    return tuple(range(len(batch), len(batch) + len(rows)))


def column_dims(spec: ParamSpec) -> tuple[int, ...]:
    """The parameter's dims that are a matrix's columns; of norms and biases all but layers and experts."""
    batch, rows, _ = _split(spec)
    return tuple(range(len(batch) + len(rows), len(spec.shape)))


def _split(spec: ParamSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Sizes of the dims that count matrices, and of a matrix's rows and columns. A table's rows are its first dim."""
    first = spec.num_batch
    table = spec.init in ("normal", "residual") and len(spec.shape) - first > 1
    last = first + (spec.n_in or int(table))
    return spec.shape[:first], spec.shape[first:last], spec.shape[last:]
