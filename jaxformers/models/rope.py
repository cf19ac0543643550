"""Rotary position embedding (arXiv:2104.09864) and its scalings.

B batch, T time, H heads, N head dim, R rotated dims
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.models.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelConfig,
    Rope,
    YarnScaling,
)


class Rotation(NamedTuple):
    """sin and cos of every position's angles, float32 [B, T, 1, R/2]."""

    sin: jax.Array
    cos: jax.Array


def inverse_frequencies(rope: Rope) -> np.ndarray:
    """Radians per position of each rotated pair, float64 [R/2]. Scalings by the length of a text are not part of it."""
    base = rope.theta ** -(np.arange(0, rope.dim, 2) / rope.dim)
    match rope.scaling:
        case None | DynamicScaling() | LongRopeScaling():
            return base
        case LinearScaling(factor):
            return base / factor
        case Llama3Scaling():
            return _llama3(base, rope.scaling)
        case YarnScaling():
            return _yarn(base, rope, rope.scaling)


def _llama3(base: np.ndarray, s: Llama3Scaling) -> np.ndarray:
    turns = s.original_positions * base / (2 * np.pi)  # rotations over the original context
    keep = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
    return base * (keep + (1 - keep) / s.factor)


def _yarn(base: np.ndarray, rope: Rope, s: YarnScaling) -> np.ndarray:
    def pair_with(turns: float) -> float:
        """The (fractional) pair that makes this many rotations over the original context."""
        return rope.dim * math.log(s.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(s.beta_fast), pair_with(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    interpolate = np.clip((np.arange(rope.dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    return base * (1 - interpolate + interpolate / s.factor)


def rotation(rope: Rope, positions: jax.Array, last: jax.Array | None = None) -> Rotation:
    """The rotation of each position. positions int32 [B, T].

    Under a dynamic scaling or LongRoPE the frequencies depend on the last position of each row of this call (or on
    `last` int32 [B], where the call is a part of a longer one), as in the reference implementation; keys already in a
    cache keep those that they were written with.
    """
    last = positions.max(axis=1) if last is None else last
    inverse = jnp.asarray(inverse_frequencies(rope), jnp.float32)
    factor: float | jax.Array = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
    if isinstance(rope.scaling, DynamicScaling):
        inverse = _dynamic(rope, rope.scaling, last)
    elif isinstance(rope.scaling, LongRopeScaling):
        inverse, factor = _long(rope.scaling, inverse, last)
    angles = positions[:, :, None, None].astype(jnp.float32) * inverse
    sin = jnp.sin(angles)
    return Rotation((-sin if rope.backward else sin) * factor, jnp.cos(angles) * factor)


def _long(s: LongRopeScaling, inverse: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverse frequencies and factor of each row, [B, 1, 1, R/2] and [B, 1, 1, 1]."""
    is_long = (last >= s.original_positions)[:, None, None, None]
    divisors = jnp.where(is_long, jnp.asarray(s.long, jnp.float32), jnp.asarray(s.short, jnp.float32))
    return inverse / divisors, jnp.where(is_long, jnp.float32(s.long_factor), jnp.float32(s.short_factor))


def _dynamic(rope: Rope, s: DynamicScaling, last: jax.Array) -> jax.Array:
    """Inverse frequencies of each row, [B, 1, 1, R/2]."""
    length = jnp.maximum(last + 1, s.original_positions).astype(jnp.float32)
    growth = s.factor * length / s.original_positions - (s.factor - 1)
    theta = rope.theta * growth ** (rope.dim / (rope.dim - 2))
    exponents = jnp.asarray(np.arange(0, rope.dim, 2) / rope.dim, jnp.float32)
    return theta[:, None, None, None] ** -exponents


def rotations(cfg: ModelConfig, positions: jax.Array, last: jax.Array | None = None) -> dict[Rope, Rotation]:
    """One rotation for each distinct rope of the model, computed once for all layers."""
    ropes = [rope for rope in dict.fromkeys(k.rope for k in cfg.layers) if rope is not None]
    return {rope: rotation(rope, positions, last) for rope in ropes}


def rotate(x: jax.Array, rope: Rope, by: Rotation) -> jax.Array:
    """x [B, T, H, N] with its first `rope.dim` dims rotated, in float32, returned in x's dtype."""
    turned, rest = x[..., : rope.dim].astype(jnp.float32), x[..., rope.dim :]
    if rope.interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
    else:
        a, b = jnp.split(turned, 2, axis=-1)
    a, b = a * by.cos - b * by.sin, b * by.cos + a * by.sin
    turned = jnp.stack([a, b], axis=-1).reshape(turned.shape) if rope.interleaved else jnp.concatenate([a, b], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1) if rest.shape[-1] else turned.astype(x.dtype)
