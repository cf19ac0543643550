"""All that an engine keeps on the device, as one pytree that every program takes and gives back.

B slots, V vocabulary, W pages of a slot at most
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.infer.engine.sizes import Sizes
from jaxformers.infer.request import Request
from jaxformers.infer.sampling import SamplingParams, TokenCounts
from jaxformers.models.config import ModelConfig
from jaxformers.models.paged import NOWHERE, Paged, Pool, init_pools
from jaxformers.models.runtime import Runtime

IDLE = -1  # the position of a slot that makes no tokens


@flax.struct.dataclass
class Rows:
    """What each slot is doing, leaves [B, ...]; without that dim, what one request needs of its slot."""

    token: jax.Array  # int32; the newest, not in the cache yet
    position: jax.Array  # int32; where it stands, IDLE in a slot that waits or is free
    end: jax.Array  # int32; the position of the last token that may come
    quiet_end: jax.Array  # int32; up to here no stop id may come
    tells: jax.Array  # bool; log-probabilities are wanted
    adapter: jax.Array  # int32; the number of its adapter, 0 for none
    sampling: SamplingParams
    counts: TokenCounts
    bias: jax.Array  # float32 [V]; added to logits
    stops: jax.Array  # bool [V]; ids that end the request
    allowed: jax.Array  # bool [V]; the others may not come


@flax.struct.dataclass
class State:
    """`pools` of pages, one dict a layer; `tables`, each slot's pages int32 [B, W]: one for layers that look back all
    the way, and where some keep no more than they look back at, one for those: `recent` says which they are; and
    `rows`."""

    pools: list[dict[str, Pool]]
    tables: tuple[jax.Array, ...]
    rows: Rows
    recent: tuple[bool, ...] = flax.struct.field(pytree_node=False)

    def cache(self, tables: tuple[jax.Array, ...]) -> list[dict[str, Paged]]:
        """The model's cache of rows with these pages."""
        return [
            {name: Paged(pool, tables[recent]) for name, pool in layer.items()}
            for recent, layer in zip(self.recent, self.pools, strict=True)
        ]

    def with_pages(self, slot: jax.Array, tables: tuple[jax.Array, ...]) -> State:
        """With these pages int32 [W] of a slot."""
        return self.replace(tables=tuple(old.at[slot].set(new) for old, new in zip(self.tables, tables, strict=True)))

    def placed(self, shard: Callable[..., jax.Array]) -> State:
        """With pools split over kv heads, as far as these can be split, and all else whole on every device."""
        tables, rows = whole((self.tables, self.rows), shard)
        return self.replace(pools=split_pools(self.pools, shard), tables=tables, rows=rows)

    def with_cache(self, cache: list[dict[str, Paged]]) -> State:
        """With what the model wrote."""
        return self.replace(pools=[{name: paged.pool for name, paged in layer.items()} for layer in cache])


def split_pools(pools: list[dict[str, Pool]], shard: Callable[..., jax.Array]) -> list[dict[str, Pool]]:
    """Pools split over kv heads, as far as these can be split."""
    return jax.tree.map(lambda pool: shard(pool, None, "kv_heads", *(None,) * (pool.ndim - 2)), pools)


def whole(tree: Any, shard: Callable[..., jax.Array]) -> Any:
    """Arrays that every device has all of."""
    return jax.tree.map(lambda a: shard(a, *(None,) * a.ndim), tree)


def new_row(request: Request, seed: int, vocab_size: int, *, adapter: int = 0) -> Rows:
    """What a request needs of its slot, as NumPy arrays; its first token is still to be prefilled."""
    length = len(request.prompt)
    knobs = SamplingParams.create(1, seed=seed, **{name: getattr(request, name) for name in KNOBS})
    bias = np.zeros(vocab_size, np.float32)
    for token, value in request.logit_bias.items():
        bias[token] = value
    return Rows(
        token=np.int32(0),
        position=np.int32(IDLE),
        end=np.int32(length - 1 + request.max_new_tokens),
        quiet_end=np.int32(length - 1 + request.min_new_tokens),
        tells=np.bool_(request.logprobs is not None),
        adapter=np.int32(adapter),
        sampling=jax.tree.map(lambda values: values[0], knobs),
        counts=TokenCounts(_among(request.prompt, vocab_size), np.zeros(vocab_size, np.int32)),
        bias=bias,
        stops=_among(request.stop_ids, vocab_size),
        allowed=np.ones(vocab_size, bool),
    )


KNOBS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def _among(ids: Any, vocab_size: int) -> np.ndarray:
    """bool [V], True at these ids."""
    found = np.zeros(vocab_size, bool)
    found[np.asarray(ids, np.int64)] = True
    return found


@functools.partial(jax.jit, static_argnames=("cfg", "runtime", "sizes"))
def init_state(*, cfg: ModelConfig, runtime: Runtime, sizes: Sizes) -> State:
    """An engine's state before its first request."""
    row = new_row(Request(prompt=(0,)), 0, cfg.vocab_size)
    rows = jax.tree.map(lambda one: jnp.broadcast_to(one, (sizes.slots, *np.shape(one))), row)
    recent = tuple(sizes.recent_pages is not None and kind.window is not None for kind in cfg.layers)
    counts = [sizes.recent_pages if few else sizes.pages for few in recent]
    pools = init_pools(cfg, counts, sizes.page_size, dtype=sizes.pool_dtype(runtime.dtype))
    tables = (jnp.full((sizes.slots, sizes.width), NOWHERE, jnp.int32),) * (2 if any(recent) else 1)
    return State(pools, tables, rows, recent).placed(runtime.shard)
