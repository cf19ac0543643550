"""An optimizer's moments in 8 bits a number: block-wise dynamic quantization (arXiv:2110.02861).

Between updates a moment is one byte a number, with one float32 scale for each block of up to 256 along its last dim: a
code stands for one of 255 values, densest near zero, times its block's scale. An update decodes, computes in float32
and encodes again. Of second moments the root is what is stored, as it is what an update divides by; none but zero
becomes zero, so no update grows by it.

Values are seven decades, each with twice as many, evenly spaced, as the one below. Codes count them from zero, so that
both ways are arithmetic: tables would be gathers, which compile and run many times slower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxformers.models.params import Params, ParamSpec
from jaxformers.train.moments import Names, map_moments

BLOCK = 256  # most numbers under one scale
LEAST_BLOCK = 32  # under shorter ones, scales would take what codes save
LEAST_SIZE = 4096  # of an array whose moments are in 8 bits, one layer's share; smaller ones stay float32
DECADES = 7
Kind = Literal["signed", "root"]


@flax.struct.dataclass
class Blocks:
    """codes, shaped as the parameter: int8 whose sign is the number's, or uint8 of roots. scales float32 [..., blocks]:
    the largest magnitude of each block, over that of the highest code."""

    codes: jax.Array
    scales: jax.Array


def block_length(shape: tuple[int, ...]) -> int:
    """Numbers in a block of an array of this shape: the largest divisor of its last dim up to `BLOCK`."""
    last = shape[-1]
    return max(size for size in range(1, min(last, BLOCK) + 1) if last % size == 0)


def encode(x: jax.Array, kind: Kind) -> Blocks:
    """Float32 numbers as the nearest codes; of roots, x holds the squares."""
    numbers, values = jnp.sqrt(x) if kind == "root" else x, _Values(kind)
    blocks = numbers.reshape(*x.shape[:-1], -1, block_length(x.shape))
    scales = jnp.abs(blocks).max(axis=-1) / values.highest
    shares = jnp.abs(blocks) / jnp.where(scales > 0, scales, 1.0)[..., None]
    codes = values.nearest(shares)
    if kind == "root":
        codes = jnp.where(blocks > 0, jnp.maximum(codes, 1.0), codes).astype(jnp.uint8)
    else:
        codes = (jnp.sign(blocks) * codes).astype(jnp.int8)
    return Blocks(codes.reshape(x.shape), scales)


def decode(blocks: Blocks, kind: Kind) -> jax.Array:
    """The float32 numbers that codes stand for."""
    codes = blocks.codes.astype(jnp.float32).reshape(*blocks.scales.shape, -1)
    x = jnp.sign(codes) * _Values(kind).of(jnp.abs(codes)) * blocks.scales[..., None]
    x = x.reshape(blocks.codes.shape)
    return x**2 if kind == "root" else x


class _Values:
    """The values that codes 0, 1, ... stand for: 0, then decade i's from 10^(i - 7) to 10^(i - 6), `counts[i]` of them
    in the middle of as many equal cells. Codes and values are float32."""

    def __init__(self, kind: Kind):
        counts = [2 ** (i + (kind == "root")) for i in range(DECADES)]
        tops = [10.0 ** (i + 1 - DECADES) for i in range(DECADES)]
        lowest = [top * (0.1 + 0.45 / n) for top, n in zip(tops, counts, strict=True)]
        highest = [top * (1 - 0.45 / n) for top, n in zip(tops, counts, strict=True)]
        self._counts, self._tops, self._lowest = counts, tops, lowest
        self._first = [sum(counts[:i]) + 1 for i in range(DECADES)]  # codes
        self._borders = [(below + above) / 2 for below, above in zip(highest, lowest[1:], strict=False)]
        self.highest = highest[-1]

    def of(self, codes: jax.Array) -> jax.Array:
        count, top, first = self._in_decade(codes, self._first[1:])
        return jnp.where(codes > 0, top * (0.1 + 0.9 * (codes - first + 0.5) / count), 0.0)

    def nearest(self, values: jax.Array) -> jax.Array:
        count, top, first = self._in_decade(values, self._borders)
        cell = jnp.clip(jnp.floor((values / top - 0.1) / 0.9 * count), 0.0, count - 1)
        return jnp.where(values < self._lowest[0] / 2, 0.0, first + cell)

    def _in_decade(self, a: jax.Array, borders: Sequence[float]) -> list[jax.Array]:
        """Number of values, upper end and first code of each element's decade, which borders[i] begins at i + 1."""
        found = []
        for facts in (self._counts, self._tops, self._first):
            chosen = jnp.full(a.shape, facts[0], jnp.float32)
            for border, fact in zip(borders, facts[1:], strict=True):
                chosen = jnp.where(a >= border, jnp.float32(fact), chosen)
            found.append(chosen)
        return found


def is_coded(spec: ParamSpec) -> bool:
    """Whether a parameter's moments are in 8 bits."""
    layers = spec.shape[0] if "layers" in spec.axes else 1
    size = math.prod(spec.shape) // layers
    return size >= LEAST_SIZE and block_length(spec.shape) >= LEAST_BLOCK


def in_eight_bits(tx: optax.GradientTransformation, spec: Params) -> optax.GradientTransformation:
    """The same optimizer with its moments in 8 bits between updates."""

    def coded(leaf: Any, s: ParamSpec | None, holder: Names) -> Any:
        return encode(leaf, _kind(holder)) if s is not None and is_coded(s) else leaf

    def decoded(leaf: Any, s: ParamSpec | None, holder: Names) -> Any:
        del s
        return decode(leaf, _kind(holder)) if isinstance(leaf, Blocks) else leaf

    def init(params: Params) -> Any:
        # Moments begin at zero. To encode that would be constants of the parameters' size for the compiler to fold.
        state = tx.init(params)
        shapes = jax.eval_shape(lambda: map_moments(coded, state, spec))
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    def update(grads: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        state = map_moments(decoded, state, spec, is_leaf=lambda node: isinstance(node, Blocks))
        updates, state = tx.update(grads, state, params)
        return updates, map_moments(coded, state, spec)

    return optax.GradientTransformation(init, update)


def _kind(holder: Names) -> Kind:
    """optax calls second moments nu."""
    return "root" if holder[-1] == "nu" else "signed"
