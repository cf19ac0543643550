"""The difference between two models, tensor by tensor, each read once and let go of.

Knows names and numbers; nothing of models, files or devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from jaxformers.hub.safetensors import ArrayLike, Deferred, release

_BLOCK = 1 << 20  # elements compared at a time, as float64


@dataclass(frozen=True)
class TensorDifference:
    """How B's tensor differs from A's. max_abs is the largest distance of two elements, relative that over the largest
    magnitude in A (both infinite where only one side is NaN, NaN where shapes differ). `shapes` and `dtypes` are A's
    and B's."""

    name: str
    max_abs: float
    relative: float
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]

    @property
    def same_shape(self) -> bool:
        return self.shapes[0] == self.shapes[1]

    @property
    def same_dtype(self) -> bool:
        return self.dtypes[0] == self.dtypes[1]


@dataclass(frozen=True)
class Comparison:
    """Every tensor that both have, and the names that only A (`missing` in B) or only B (`extra`) has."""

    tensors: tuple[TensorDifference, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]

    def different(self, tolerance: float | None) -> list[TensorDifference]:
        """Those that are not equal: in any bit's value or in dtype, or with a tolerance only in relative distance."""
        if tolerance is None:
            return [t for t in self.tensors if not (t.same_shape and t.same_dtype and t.max_abs == 0)]
        return [t for t in self.tensors if not (t.same_shape and t.relative <= tolerance)]

    def is_equal(self, tolerance: float | None) -> bool:
        return not (self.missing or self.extra or self.different(tolerance))


def compare_tensors(
    a: Mapping[str, ArrayLike], b: Mapping[str, ArrayLike], *, done: Callable[[str], None] = lambda _name: None
) -> Comparison:
    """Compares tensors of the same name; `done` hears of each. Values are compared as float64, whatever the dtypes."""
    # Tensors that are made from larger arrays come cheapest in their own order; files do not mind any.
    lead = a if any(isinstance(tensor, Deferred) for tensor in a.values()) else b
    found = {}
    for name in lead:
        if name in a and name in b:
            found[name] = _difference(name, a[name], b[name])
            done(name)
    missing, extra = (n for n in a if n not in b), (n for n in b if n not in a)
    return Comparison(tuple(found[name] for name in a if name in found), tuple(missing), tuple(extra))


def _difference(name: str, a: ArrayLike, b: ArrayLike) -> TensorDifference:
    shapes = tuple(a.shape), tuple(b.shape)
    dtypes = np.dtype(a.dtype).name, np.dtype(b.dtype).name
    if shapes[0] != shapes[1]:
        return TensorDifference(name, math.nan, math.nan, shapes, dtypes)
    left, right = np.asarray(a), np.asarray(b)
    flat = left.reshape(-1), right.reshape(-1)
    distance = magnitude = 0.0
    for start in range(0, flat[0].size, _BLOCK):
        x, y = (side[start : start + _BLOCK].astype(np.float64) for side in flat)
        distance = max(distance, _distance(x, y))
        magnitude = max(magnitude, float(np.abs(x[np.isfinite(x)]).max(initial=0.0)))
    for side in (left, right):
        release(side)
    relative = distance / magnitude if magnitude else (math.inf if distance else 0.0)
    return TensorDifference(name, distance, relative, shapes, dtypes)


def _distance(x: np.ndarray, y: np.ndarray) -> float:
    """Equal infinities and NaNs at the same place are no distance."""
    differs = (x != y) & ~(np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore"):
        distances = np.abs(x[differs] - y[differs])
    return float(np.where(np.isnan(distances), np.inf, distances).max(initial=0.0))
