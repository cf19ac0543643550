"""An optimizer's moments in 8 bits a number: block-wise dynamic quantization (arXiv:2110.02861).

Between updates a moment is one byte a number, with one float32 scale for each block of up to 256 along its last dim: a
code stands for one of 256 values, densest near zero, times its block's scale. An update decodes, computes in float32
and encodes again. Of second moments the root is what is stored, as it is what an update divides by; none but zero
becomes zero, so no update grows by it.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxformers.models.params import Params, ParamSpec
from jaxformers.train.moments import Names, map_moments

BLOCK = 256  # most numbers under one scale
LEAST_BLOCK = 32  # under shorter ones, scales would take what codes save
LEAST_SIZE = 4096  # of an array whose moments are in 8 bits, one layer's share; smaller ones stay float32
Kind = Literal["signed", "root"]


@flax.struct.dataclass
class Blocks:
    """codes uint8, shaped as the parameter; scales float32 [..., blocks], the largest magnitude of each block."""

    codes: jax.Array
    scales: jax.Array


def code_values(kind: Kind) -> np.ndarray:
    """What the 256 codes stand for, ascending, float32 in [-1, 1], or in [0, 1] of roots.

    A decade from 10^-7 on has twice as many values, evenly spaced, as the one below; 0 and 1 are among them.
    """
    bits = 0 if kind == "signed" else 1
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2 ** (i + bits) + 1)
        means = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*means, *(-means if kind == "signed" else ())]
    return np.sort(np.asarray(values, np.float32))


def block_length(shape: tuple[int, ...]) -> int:
    """Numbers in a block of an array of this shape: the largest divisor of its last dim up to `BLOCK`."""
    last = shape[-1]
    return max(size for size in range(1, min(last, BLOCK) + 1) if last % size == 0)


def encode(x: jax.Array, kind: Kind) -> Blocks:
    """Float32 numbers as the nearest codes; of roots, x holds the squares."""
    values = code_values(kind)
    magnitudes = jnp.sqrt(x) if kind == "root" else x
    blocks = magnitudes.reshape(*x.shape[:-1], -1, block_length(x.shape))
    scales = jnp.abs(blocks).max(axis=-1)
    shares = blocks / jnp.where(scales > 0, scales, 1.0)[..., None]
    codes = jnp.searchsorted((values[:-1] + values[1:]) / 2, shares, method="scan_unrolled").astype(jnp.uint8)
    if kind == "root":
        codes = jnp.where(blocks > 0, jnp.maximum(codes, jnp.uint8(1)), codes)
    return Blocks(codes.reshape(x.shape), scales)


def decode(blocks: Blocks, kind: Kind) -> jax.Array:
    """The float32 numbers that codes stand for."""
    shape = blocks.codes.shape
    values = jnp.asarray(code_values(kind)).at[blocks.codes].get(mode="promise_in_bounds")
    shares = values.reshape(*blocks.scales.shape, -1)
    x = (shares * blocks.scales[..., None]).reshape(shape)
    return x**2 if kind == "root" else x


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
        return map_moments(coded, tx.init(params), spec)

    def update(grads: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        state = map_moments(decoded, state, spec, is_leaf=lambda node: isinstance(node, Blocks))
        updates, state = tx.update(grads, state, params)
        return updates, map_moments(coded, state, spec)

    return optax.GradientTransformation(init, update)


def _kind(holder: Names) -> Kind:
    """optax calls second moments nu."""
    return "root" if holder[-1] == "nu" else "signed"
