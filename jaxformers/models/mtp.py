"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): modules behind the decoder, each of which
predicts one token further than the last. Training runs them over whole texts, an engine to guess what comes next.

What the decoder and each module pass on is what the head reads of them, that is after their norm: the paper leaves it
open, and this is how published checkpoints are run.

B batch, T time, D model, M modules
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxformers.models.adapters import at_places
from jaxformers.models.cache import LayerCache
from jaxformers.models.config import ModelConfig
from jaxformers.models.context import Context
from jaxformers.models.decoder import block, embed, make_context
from jaxformers.models.layers import named_norm, norm
from jaxformers.models.params import Params, mtp_spec
from jaxformers.models.routing import MoEStats, join_layers
from jaxformers.models.runtime import Runtime
from jaxformers.models.weights import linear


def run_modules(
    params: Params,
    x: jax.Array,
    cfg: ModelConfig,
    tokens: jax.Array,
    *,
    positions: jax.Array,
    segment_ids: jax.Array,
    places: jax.Array | None,
    runtime: Runtime,
) -> tuple[list[jax.Array], MoEStats | None]:
    """Hidden states [B, T, D] of each module before its norm, and the experts' sums [M, ...], if any.

    x [B, T, D] is the decoder's, before the final norm. tokens, segment_ids int32 [B, T, M]: what module m reads at
    each place, the token m + 1 places further on, and its document; 0 where the document ends before it, which counts
    as padding. positions and places int32 [B, T] are the decoder's. Embedding and norm are `params`', gathered for use.
    """
    states, found = [], []
    x = named_norm(params, "final_norm", x, cfg)
    for m, p in enumerate(params["mtp"]):
        ctx = make_context(cfg, runtime, positions, segment_ids[..., m], places)
        token = embed(params, cfg, tokens[..., m], positions, runtime)

        def body(p: Params, x: jax.Array, token: jax.Array, ctx: Context = ctx) -> tuple[jax.Array, MoEStats | None]:
            x, _, stats = run_module(runtime.gather(p, mtp_spec(cfg)), x, token, ctx, cfg)
            return x, stats

        x, stats = runtime.rematerialize(body, scanned=False)(p, x, token)
        states.append(x)
        found += [] if stats is None else [stats]
        x = norm(p["norm"], x, cfg)
    return states, join_layers(found)


def run_module(
    p: Params, x: jax.Array, token: jax.Array, ctx: Context, cfg: ModelConfig, cache: LayerCache | None = None
) -> tuple[jax.Array, LayerCache | None, MoEStats | None]:
    """One module over hidden states x [B, T, D], after a norm, and embeddings of further tokens [B, T, D]: hidden
    states [B, T, D] before its own norm, its layer's cache with this call's keys, and the experts' sums."""
    both = jnp.stack([norm(p["token_norm"], token, cfg), norm(p["hidden_norm"], x, cfg)], axis=-2)
    both = ctx.shard(both, "batch", "seq", None, None)
    x = ctx.shard(linear(both, at_places(p["proj"], ctx.places), n_in=2), "batch", "stream", None)
    x, cache, stats = block(p["layer"], x, ctx, cfg, cfg.layers[-1], cache)
    return x, cache, stats.moe
