"""What an optimizer remembers, and which parameter each array of it belongs to.

Optimizers keep trees shaped like the parameters, whose leaves may be smaller things than the parameters themselves
(factors, codes and scales). A parameter's layers come first in them too: that is what lets a state change its form as
parameters do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from jaxformers.models.params import Params, ParamSpec
from jaxformers.parallel.mesh import Rules, spec_of
from jaxformers.train.matrices import column_dims, row_dims

Names = tuple[str, ...]


def map_moments(
    function: Callable[[Any, ParamSpec | None, Names], Any],
    state: Any,
    spec: Params,
    *,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """`function` over an optimizer's state: of each leaf, the spec of the parameter that it belongs to (None: of no
    one) and the names of what holds it, such as ("0", "mu").

    spec is the tree of `ParamSpec`s that the parameters follow.
    """
    known = {_names(path): s for path, s in jax.tree_util.tree_flatten_with_path(spec)[0]}

    def mapped(path: Any, leaf: Any) -> Any:
        names = _names(path)
        for start in range(len(names)):
            for end in range(len(names), start, -1):
                if names[start:end] in known:
                    return function(leaf, known[names[start:end]], names[:start])
        return function(leaf, None, names)

    return jax.tree_util.tree_map_with_path(mapped, state, is_leaf=is_leaf)


def _names(path: Any) -> Names:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def moment_sharding(shape: tuple[int, ...], spec: ParamSpec, mesh: Mesh, rules: Rules) -> NamedSharding:
    """Where an array that belongs to a parameter lies: split as that one along the dims that they share, or as the side
    of its matrices that is as long."""
    if len(shape) == len(spec.shape):
        axes = tuple(
            axis if ours == own else None for axis, ours, own in zip(spec.axes, shape, spec.shape, strict=True)
        )
    else:
        shared = spec.axes[: spec.num_batch]
        axes = (*shared, *(_side_axis(size, spec) for size in shape[len(shared) :]))
    return NamedSharding(mesh, spec_of(axes, shape, mesh, rules))


def _side_axis(size: int, spec: ParamSpec) -> str | None:
    """The axis that the rows, or the columns, of a parameter's matrices are split along, where there are so many."""
    for dims in (row_dims(spec), column_dims(spec)):
        if dims and math.prod(spec.shape[d] for d in dims) == size:
            return spec.axes[dims[0]]
    return None
