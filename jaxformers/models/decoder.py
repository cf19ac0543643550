"""The decoder: one pure function from parameters and tokens to logits, for training, prefill and decoding alike.

B batch, T time, D model, V vocabulary
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxformers.models.adapters import at_places
from jaxformers.models.attention import gqa, mla
from jaxformers.models.cache import Cache, LayerCache
from jaxformers.models.config import LayerKind, ModelConfig, Stack, longest_stack, plan_stacks
from jaxformers.models.context import Context
from jaxformers.models.ffn import mlp, moe
from jaxformers.models.layers import named_norm, softcap
from jaxformers.models.layout import unstack
from jaxformers.models.observe import LayerStats, Seen, Watch, concat_stats, join_stats
from jaxformers.models.params import Params, layer_spec, model_spec
from jaxformers.models.recompute import recomputed_late
from jaxformers.models.rope import rotations
from jaxformers.models.routing import MoEStats, each_layer
from jaxformers.models.runtime import Runtime
from jaxformers.models.weights import linear, lookup, output_lengths, transposed_linear

MIXERS = {"gqa": gqa, "mla": mla, "query": gqa}


@flax.struct.dataclass
class Hidden:
    """What the layers made: x [B, T, D] before the final norm, the cache with this call's keys, the experts' sums,
    leaves [sparse layers, ...], and what layers showed of their inside, leaves [layers, ...]."""

    x: jax.Array
    cache: Cache | None = None
    moe: MoEStats | None = None
    seen: Seen | None = None


def block(
    p: Params, x: jax.Array, ctx: Context, cfg: ModelConfig, kind: LayerKind, cache: LayerCache | None
) -> tuple[jax.Array, LayerCache | None, LayerStats]:
    """One layer: x [B, T, D] -> [B, T, D]."""
    p, watch = at_places(p, ctx.places), Watch(ctx)
    x = named_norm(p, "entry_norm", x, cfg)
    normed = ctx.shard(named_norm(p, "attn_norm", x, cfg), "batch", "seq", None)
    attended, cache = MIXERS[kind.mixer](p["attn"], normed, watch.context, cfg, kind, cache)
    attended = ctx.shard(attended, "batch", "seq", None)
    attended = cfg.residual_scale * named_norm(p, "attn_post_norm", attended, cfg)
    if cfg.parallel:
        source = normed if cfg.shared_norm else named_norm(p, "ffn_norm", x, cfg)
        x += attended
    else:
        x = ctx.shard(x + attended, "batch", "stream", None)
        source = ctx.shard(named_norm(p, "ffn_norm", x, cfg), "batch", "seq", None)
    fed, stats = moe(p["ffn"], source, ctx, cfg) if kind.ffn == "moe" else (mlp(p["ffn"], source, ctx, cfg), None)
    fed = ctx.shard(fed, "batch", "seq", None)
    fed = cfg.residual_scale * named_norm(p, "ffn_post_norm", fed, cfg)
    x = ctx.shard(x + fed, "batch", "stream", None)
    return x, cache, LayerStats(stats, watch.seen(x, attended, fed))


def embed(params: Params, cfg: ModelConfig, tokens: jax.Array, positions: jax.Array, runtime: Runtime) -> jax.Array:
    """Token embeddings [B, T, D], with learned positions and the embedding norm where the architecture has them."""
    x = runtime.shard(lookup(params["embed"], tokens, dtype=runtime.dtype), "batch", "seq", None)
    if cfg.embed_scale != 1.0:
        x *= jnp.asarray(cfg.embed_scale, x.dtype)
    if cfg.learned_positions:
        x += lookup(params["positions"], positions + cfg.position_offset, dtype=runtime.dtype)
    return runtime.shard(named_norm(params, "embed_norm", x, cfg), "batch", "stream", None)


def unembed(params: Params, cfg: ModelConfig, x: jax.Array, runtime: Runtime) -> jax.Array:
    """Logits float32 [..., V] of hidden states x [..., D]: the final norm, the head, the scale and the soft cap."""
    x = named_norm(params, "final_norm", x, cfg)
    if cfg.tie_embeddings:
        logits = transposed_linear(x, params["embed"])
    else:
        logits = linear(x, params["lm_head"], out_dtype=jnp.float32)
    if cfg.normalize_head:
        logits /= output_lengths(params["lm_head"])
    if cfg.lm_head_bias:
        logits += params["lm_head_b"].astype(jnp.float32)
    logits = runtime.shard(logits, "batch", *("seq",) * (logits.ndim - 2), "vocab")
    if cfg.logit_scale != 1.0:
        logits *= cfg.logit_scale
    return softcap(logits, cfg.logit_softcap)


def gather_shared(params: Params, cfg: ModelConfig, runtime: Runtime) -> Params:
    """The parameters with all that lies outside the layers (embedding, head, final norm) gathered for use."""
    spec = model_spec(cfg)
    shared = {name: leaf for name, leaf in params.items() if name not in ("layers", "blocks", "mtp")}
    return params | runtime.gather(shared, {name: spec[name] for name in shared})


def hidden_states(
    params: Params,
    cfg: ModelConfig,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    places: jax.Array | None = None,
    cache: Cache | None = None,
    read_slots: int | None = None,
    last: jax.Array | None = None,
    runtime: Runtime = Runtime(),
) -> Hidden:
    """Runs all layers over tokens int32 [B, T].

    positions int32 [B, T] default to 0, 1, ...; segment_ids int32 [B, T] separate documents packed into a row; places
    int32 [B, T] are the tokens' numbers in the batch, which adapters with dropout need. With a cache, this call's keys
    are written at `positions` and queries see all of it (its first `read_slots` slots); a row is then one document.
    `last` int32 [B] is where each row ends of which this call is a part. Parameters are the plain tree or
    `layout.prepare`'s.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    ctx = make_context(cfg, runtime, positions, segment_ids, places, read_slots=read_slots, last=last)
    if "layers" in params and (cache is not None or runtime.layers == "unroll"):
        params = unstack(params, cfg)
    x = embed(params, cfg, tokens, positions, runtime)
    if "blocks" in params:
        return _run_blocks(params["blocks"], x, ctx, cfg, runtime, cache)
    x, stats = run_stacks(params["layers"], x, ctx, cfg, runtime)
    return Hidden(x, moe=stats.moe, seen=stats.seen)


def make_context(
    cfg: ModelConfig,
    runtime: Runtime,
    positions: jax.Array,
    segment_ids: jax.Array | None,
    places: jax.Array | None = None,
    *,
    read_slots: int | None = None,
    last: jax.Array | None = None,
) -> Context:
    """What the layers share about tokens at `positions` int32 [B, T] in documents `segment_ids` int32 [B, T]."""
    return Context(
        positions,
        segment_ids,
        rotations(cfg, positions, last),
        runtime.shard,
        runtime.attend,
        runtime.experts,
        read_slots,
        runtime.observe,
        places,
    )


def run_stacks(
    layers: list[list[Params]], x: jax.Array, ctx: Context, cfg: ModelConfig, runtime: Runtime, *, first: int = 0
) -> tuple[jax.Array, LayerStats]:
    """x [B, T, D] through the model's stacks from number `first` on, as many as `layers` holds; statistics
    [layers, ...] of theirs."""
    stacks = plan_stacks(cfg.layers)
    found: list[LayerStats] = []
    for k, stacked in enumerate(layers, start=first):
        stage = make_stage(cfg, runtime, stacks[k])
        rows = (ctx.positions, ctx.segment_ids, ctx.places)
        if runtime.run_stack is not None and k == longest_stack(stacks):
            x, stats = runtime.run_stack(stage, stacked, x, rows)
        else:
            x, stats = stage(stacked, x, rows, None, ctx=ctx)
        found.append(each_layer(stats))
    return x, concat_stats(found)


def make_stage(cfg: ModelConfig, runtime: Runtime, stack: Stack) -> Callable[..., tuple[jax.Array, LayerStats]]:
    """The function (layers [R, ...], x [B, T, D], rows, active) -> (x, statistics) that runs R repeats of a stack's
    pattern.

    rows are (positions, segment_ids) and, if it has them, places; active bool [R] says which repeats count, None = all.
    The statistics are [R, layers of the pattern, ...], zero for a repeat that does not count.
    """

    def stage(
        layers: list[Params], x: jax.Array, rows: Any, active: jax.Array | None, *, ctx: Context | None = None
    ) -> tuple[jax.Array, LayerStats]:
        return _scan_stack(layers, x, ctx or make_context(cfg, runtime, *rows), cfg, runtime, stack, active)

    return stage


def _run_blocks(
    blocks: list[Params], x: jax.Array, ctx: Context, cfg: ModelConfig, runtime: Runtime, cache: Cache | None
) -> Hidden:
    """Every layer from buffers of its own, one after the other."""
    found: list[LayerStats] = []
    new_cache: Cache = []

    late = runtime.remat != "none" and not runtime.offload and jax.default_backend() == "cpu"

    @functools.cache  # equal layers are traced and lowered once: half of the time to load thirty of them
    def layer_of(kind: LayerKind, stack: int) -> Callable[..., Any]:
        """Layers of this kind in that stack: what is trained of them is the same."""

        def body(p: Params, x: jax.Array, rest: tuple[LayerCache | None, Any]) -> Any:
            entry, arrays = rest
            p, x = runtime.gather(p, layer_spec(cfg, kind)), ctx.save(x, "input")
            return block(p, x, ctx.with_arrays(arrays), cfg, kind, entry)

        layer = runtime.rematerialize(body)
        return jax.jit(recomputed_late(layer) if late else layer)

    stacks = [k for k, stack in enumerate(plan_stacks(cfg.layers)) for _ in stack.pattern * stack.repeats]
    for i, (kind, p) in enumerate(zip(cfg.layers, blocks, strict=True)):
        entry = None if cache is None else cache[i]
        x, entry, stats = layer_of(kind, stacks[i])(p, x, (entry, ctx.arrays))
        found.append(stats)
        if entry is not None:
            new_cache.append(entry)
    joined = join_stats(found)
    return Hidden(x, None if cache is None else new_cache, joined.moe, joined.seen)


def _scan_stack(
    layers: list[Params],
    x: jax.Array,
    ctx: Context,
    cfg: ModelConfig,
    runtime: Runtime,
    stack: Stack,
    active: jax.Array | None,
) -> tuple[jax.Array, LayerStats]:
    """One compiled body for all repeats of a stack's pattern, as `make_stage` says."""

    def body(x: jax.Array, repeat: tuple[list[Params], jax.Array | None]) -> tuple[jax.Array, LayerStats]:
        x = before = ctx.save(x, "input")
        found: list[LayerStats] = []
        layers, runs = repeat
        for p, kind in zip(layers, stack.pattern, strict=True):
            p = runtime.gather(p, layer_spec(cfg, kind))
            x, _, stats = block(p, x, ctx, cfg, kind, None)
            found.append(stats)
        stats = join_stats(found)
        if runs is None:
            return x, stats
        return jnp.where(runs, x, before), jax.tree.map(lambda a: jnp.where(runs, a, 0), stats)

    return jax.lax.scan(runtime.rematerialize(body), x, (layers, active))


def forward(
    params: Params,
    cfg: ModelConfig,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    runtime: Runtime = Runtime(),
) -> jax.Array:
    """Logits float32 [B, T, V] of tokens int32 [B, T]. See `hidden_states` for positions and segment_ids."""
    params = gather_shared(params, cfg, runtime)
    hidden = hidden_states(params, cfg, tokens, positions=positions, segment_ids=segment_ids, runtime=runtime)
    return unembed(params, cfg, hidden.x, runtime)
