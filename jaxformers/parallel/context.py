"""Attention over a mesh: each device computes its rows and heads, and the context axis splits the tokens of a row.

The only place that turns the mesh and the settings into the `attend` of a `Runtime`, and that knows in which order the
tokens of a row then lie.

B batch, T time, H heads, K kv heads
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxformers.models.attention import Scores, dot_product
from jaxformers.models.blockwise import blockwise_attention, head_slopes
from jaxformers.models.config import ModelConfig
from jaxformers.models.masks import Visibility
from jaxformers.parallel.mesh import AXES, nearest_multiples, spec_of
from jaxformers.parallel.ring import ring_attention
from jaxformers.parallel.ulysses import ulysses_attention

Attention = Literal["auto", "dot_product", "blockwise"]
ContextKind = Literal["auto", "ring", "ulysses", "hybrid"]
Attend = Callable[..., jax.Array]

# From here on the plain attention's temporaries outweigh all else: 268 MiB a layer and row at 2,048 tokens and 1,048 at
# 4,096, where the blockwise one has 22 and 32 (8 heads of 64, float32, compiled with the gradient).
LONG = 2048


def make_attend(attention: Attention, context: ContextKind, cfg: ModelConfig, mesh: Mesh, *, length: int) -> Attend:
    """The attention of a training step over rows of `length` tokens on this mesh.

    Without a context axis, `auto` is the plain attention below `LONG` tokens and the blockwise one from there on.
    ValueError for a length or a number of heads that the mesh cannot split, naming those that it can.
    """
    cp = mesh.shape["cp"]
    if cp == 1:
        blockwise = attention == "blockwise" or (attention == "auto" and length >= LONG)
        return dot_product if not blockwise else blockwise_attention if mesh.size == 1 else on_mesh(mesh)
    if attention == "dot_product":
        raise ValueError(
            f"runtime: attention=dot_product needs whole rows, which cp={cp} splits; use auto or blockwise"
        )
    group = group_size(context, cfg, mesh.shape)
    _check_length(cp, group, length)
    return on_mesh(mesh, group=group)


def group_size(context: ContextKind, cfg: ModelConfig, sizes: Mapping[str, int]) -> int:
    """How many neighbours along the context axis trade tokens for heads: 1 for a plain ring, all of them for Ulysses,
    for the hybrid as many as need no copies of kv heads. ValueError for heads that Ulysses cannot split."""
    cp, tp = sizes["cp"], sizes["tp"]

    def here(heads: int) -> int:
        return heads // tp if heads % tp == 0 else heads

    heads = here(cfg.num_heads)
    if context == "hybrid":
        # Fewer kv heads than tensor shards are copied anyway, to one a device or more.
        return math.gcd(cp, heads, here(math.lcm(_kv_heads(cfg), tp)) if cfg.num_heads % tp == 0 else _kv_heads(cfg))
    if context == "ulysses" and heads % cp:
        legal = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(
            f"runtime: context=ulysses cannot split {heads} heads a device over cp={cp}; "
            f"make cp one of {legal}, or use ring"
        )
    return cp if context == "ulysses" else 1


def _kv_heads(cfg: ModelConfig) -> int:
    """Latent attention expands its latent to a key for every head."""
    return cfg.num_heads if cfg.mla else cfg.num_kv_heads


def _check_length(cp: int, group: int, length: int) -> None:
    unit = cp if group == cp else 2 * cp
    if length % unit:
        raise ValueError(
            f"data.sequence_length is {length}, which cp={cp} cannot split into {unit} equal parts; "
            f"nearest legal: {nearest_multiples(length, of=unit)}"
        )


def column_order(context: ContextKind, cfg: ModelConfig, sizes: Mapping[str, int], *, length: int) -> np.ndarray | None:
    """In which order the tokens of a row are laid out over the context axis, int64 [T]; None = as they come.

    A ring of n devices (or groups of them) lies in zigzag: of 2 n equal parts the i-th holds parts i and 2 n - 1 - i,
    so that all have as many visible pairs of query and key.
    """
    ring = sizes["cp"] // group_size(context, cfg, sizes)
    if ring == 1:
        return None
    parts = np.arange(length).reshape(2 * ring, -1)
    return np.concatenate([parts[[i, -1 - i]].ravel() for i in range(ring)])


def on_mesh(mesh: Mesh, *, group: int = 1) -> Attend:
    """Attention with `dot_product`'s signature, each device at work on its rows, tokens and heads.

    Along the context axis, groups of so many devices trade tokens for heads, and a ring joins the groups. Kv heads
    fewer than the devices that share them are repeated. Must be traced under `jax.set_mesh`.
    """
    if mesh.shape["cp"] == 1:
        inside: Attend = blockwise_attention
    else:
        inside = ring_attention if group == 1 else partial(ulysses_attention, group=group)

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility, scores: Scores, *, sinks: jax.Array | None = None
    ) -> jax.Array:
        rows, seq, heads, _ = spec_of(("batch", "seq", "heads", None), q.shape, mesh)
        assert visible.q_positions.shape == q.shape[:2]
        shards = group * (1 if heads is None else mesh.shape[heads])
        k, v = _for_shards(k, shards), _for_shards(v, shards)
        tokens, per_head = PartitionSpec(rows, seq, heads), PartitionSpec(heads)
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

        inputs = (tokens, tokens, tokens, PartitionSpec(rows, seq), per_head, per_head)
        island = partial(jax.shard_map, axis_names=set(AXES) - set(taken))
        run = island(here, in_specs=inputs, out_specs=tokens)
        if taken:
            run = _without_residuals(run, here, partial(island, in_specs=(inputs, tokens)), inputs)
        return run(q, k, v, visible, sinks, head_slopes(q, scores))

    return attend


def _without_residuals(run: Attend, here: Attend, island: Attend, specs: tuple[PartitionSpec, ...]) -> Attend:
    """`run`, whose backward pass computes `here` anew in an island of its own: inside another island, as a pipeline's,
    jax cannot bring what a forward pass keeps from one to the other."""

    def backward(inputs: tuple, gradient: jax.Array) -> tuple:
        def there(inputs: tuple, gradient: jax.Array) -> tuple:
            q, k, v, visible, sinks, slopes = inputs
            _, pull = jax.vjp(lambda q, k, v, sinks: here(q, k, v, visible, sinks, slopes), q, k, v, sinks)
            return pull(gradient)

        d_q, d_k, d_v, d_sinks = island(there, out_specs=(*specs[:3], specs[4]))(inputs, gradient)
        return d_q, d_k, d_v, None, d_sinks, None

    attend = jax.custom_vjp(run)
    attend.defvjp(lambda *inputs: (run(*inputs), inputs), backward)
    return attend


def _for_shards(k: jax.Array, shards: int) -> jax.Array:
    """k [B, T, K, N] with its heads repeated as often as it takes to split them into so many shards."""
    repeats = math.lcm(k.shape[2], shards) // k.shape[2]
    return k if repeats == 1 else jnp.repeat(k, repeats, axis=2)
