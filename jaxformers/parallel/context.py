"""Attention over a mesh: each device computes its rows and heads, and the context axis splits the tokens of a row.

The only place that turns the mesh and the settings into the `attend` of a `Runtime`, and that knows in which order the
tokens of a row then lie.

B batch, T time, H heads, K kv heads
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxformers.models.attention import Scores, dot_product
from jaxformers.models.blockwise import blockwise_attention, head_slopes
from jaxformers.models.masks import Visibility
from jaxformers.parallel.mesh import AXES, spec_of
from jaxformers.parallel.ring import ring_attention
from jaxformers.parallel.ulysses import ulysses_attention

Attention = Literal["auto", "dot_product", "blockwise"]
ContextKind = Literal["auto", "ring", "ulysses"]
Attend = Callable[..., jax.Array]

# From here on the plain attention's temporaries outweigh all else: 268 MiB a layer and row at 2,048 tokens and 1,048 at
# 4,096, where the blockwise one has 22 and 32 (8 heads of 64, float32, compiled with the gradient).
LONG = 2048


def make_attend(
    attention: Attention, context: ContextKind, mesh: Mesh, *, num_heads: int, sequence_length: int
) -> Attend:
    """The attention of a training step over rows of `sequence_length` tokens on this mesh.

    Without a context axis, `auto` is the plain attention up to `LONG` tokens and the blockwise one from there.
    ValueError for a length or a number of heads that the mesh cannot split, naming those that it can.
    """
    cp = mesh.shape["cp"]
    if cp == 1:
        blockwise = attention == "blockwise" or (attention == "auto" and sequence_length >= LONG)
        return dot_product if not blockwise else blockwise_attention if mesh.size == 1 else on_mesh("local", mesh)
    if attention == "dot_product":
        raise ValueError(
            f"runtime: attention=dot_product needs whole rows, which cp={cp} splits; use auto or blockwise"
        )
    _check_length(context, cp, sequence_length)
    if context == "ulysses":
        _check_heads(num_heads, mesh.shape)
    return on_mesh("ulysses" if context == "ulysses" else "ring", mesh)


def _check_length(context: ContextKind, cp: int, length: int) -> None:
    unit = cp if context == "ulysses" else 2 * cp
    if length % unit:
        below, above = length // unit * unit, (length // unit + 1) * unit
        nearest = f"{below} and {above}" if below else f"{above}"
        raise ValueError(
            f"data.sequence_length is {length}, which cp={cp} cannot split into {unit} equal parts; "
            f"nearest legal: {nearest}"
        )


def _check_heads(num_heads: int, sizes: Mapping[str, int]) -> None:
    cp, tp = sizes["cp"], sizes["tp"]
    here = num_heads // tp if num_heads % tp == 0 else num_heads
    if here % cp:
        legal = ", ".join(str(n) for n in range(1, here + 1) if here % n == 0)
        raise ValueError(
            f"runtime: context=ulysses cannot split {here} heads a device over cp={cp}; "
            f"make cp one of {legal}, or use ring"
        )


def column_order(context: ContextKind, cp: int, length: int) -> np.ndarray | None:
    """In which order the tokens of a row are laid out over the context axis, int64 [T]; None = as they come.

    For a ring in zigzag: of 2 cp equal parts device i holds parts i and 2 cp - 1 - i, so that all devices have as many
    visible pairs of query and key.
    """
    if cp == 1 or context == "ulysses":
        return None
    parts = np.arange(length).reshape(2 * cp, -1)
    return np.concatenate([parts[[i, -1 - i]].ravel() for i in range(cp)])


def on_mesh(kind: Literal["local", "ring", "ulysses"], mesh: Mesh) -> Attend:
    """The attention of this kind with `dot_product`'s signature, each device at work on its rows, tokens and heads.

    Kv heads fewer than the devices that share them are repeated. Must be traced under `jax.set_mesh`.
    """
    inside = {"local": blockwise_attention, "ring": ring_attention, "ulysses": ulysses_attention}[kind]

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility, scores: Scores, *, sinks: jax.Array | None = None
    ) -> jax.Array:
        rows, seq, heads, _ = spec_of(("batch", "seq", "heads", None), q.shape, mesh)
        assert visible.q_positions.shape == q.shape[:2]
        head_axes = tuple(axis for axis in (heads, "cp" if kind == "ulysses" else None) if axis)
        k, v = _for_shards(k, head_axes, mesh), _for_shards(v, head_axes, mesh)
        tokens, per_head = PartitionSpec(rows, seq, heads), PartitionSpec(head_axes)
        taken = jax.sharding.get_abstract_mesh().manual_axes

        def here(
            q: jax.Array,
            k: jax.Array,
            v: jax.Array,
            visible: Visibility,
            sinks: jax.Array | None,
            slopes: jax.Array | None,
        ) -> jax.Array:
            return inside(q, k, v, visible, scores, sinks=sinks, slopes=slopes)

        island = jax.shard_map(
            here,
            in_specs=(tokens, tokens, tokens, PartitionSpec(rows, seq), per_head, per_head),
            out_specs=tokens,
            axis_names=set(AXES) - set(taken),
        )
        return island(q, k, v, visible, sinks, head_slopes(q, scores))

    return attend


def _for_shards(k: jax.Array, axes: tuple[str, ...], mesh: Mesh) -> jax.Array:
    """k [B, T, K, N] with its heads repeated as often as it takes for these mesh axes to split them."""
    kv_heads, shards = k.shape[2], math.prod(mesh.shape[axis] for axis in axes)
    repeats = math.lcm(kv_heads, shards) // kv_heads
    return k if repeats == 1 else jnp.repeat(k, repeats, axis=2)
