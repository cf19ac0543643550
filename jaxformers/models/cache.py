"""The key/value cache as a pytree: one dict of buffers a layer, written in place when donated.

Slot s of a row holds position s, so rows of different lengths share a batch, right-padded prompts need no mask (a later
token overwrites what padding wrote before anything can see it), and causality hides slots that are not written yet.

    B batch, T time, S slots, K kv heads, N head dim, M value dim
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxformers.models.config import LayerKind, ModelConfig

LayerCache = dict[str, Any]  # of arrays [B, S, ...], or of what stands for one in pages (`paged.Paged`)
Cache = list[LayerCache]


def init_cache(cfg: ModelConfig, batch: int, slots: int, *, dtype: Any = jnp.float32) -> Cache:
    """An empty cache for `batch` rows of up to `slots` positions, one entry a layer in order."""
    return [_layer_cache(cfg, kind, batch, slots, dtype) for kind in cfg.layers]


def _layer_cache(cfg: ModelConfig, kind: LayerKind, batch: int, slots: int, dtype: Any) -> LayerCache:
    if kind.mixer == "mla":
        assert cfg.mla is not None
        return {"latent": jnp.zeros((batch, slots, 1, cfg.mla.kv_rank + cfg.mla.rope_dim), dtype)}
    shape = (batch, slots, cfg.num_kv_heads, cfg.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def write(cache: LayerCache, positions: jax.Array, **new: jax.Array) -> LayerCache:
    """The cache with new [B, T, ...] entries at positions int32 [B, T]. Positions past the last slot are dropped."""
    return {name: _written(cache[name], positions, value) for name, value in new.items()}


def _written(buffer: Any, positions: jax.Array, value: jax.Array) -> Any:
    if not isinstance(buffer, jax.Array):
        return buffer.write(positions, value)  # it knows its own places: a `paged.Paged`
    rows = jnp.arange(positions.shape[0])[:, None]
    return buffer.at[rows, positions].set(value.astype(buffer.dtype))


def cache_slots(cache: Cache) -> int:
    """How many positions a row of the cache holds."""
    return next(iter(cache[0].values())).shape[1]
