"""A key/value cache in pages: rows of any length share one pool of memory, and rows that begin alike share pages.

A table names the pages of each row in order. Attention walks over a row's keys block by block, as far as the longest
row of the call reaches, with an online softmax (arXiv:1805.02867; pages as in arXiv:2309.06180). A block always has the
same shape, and one in which a row sees no key leaves that row's numbers as they are, bit by bit: what a row computes
depends neither on how far its neighbours reach, nor on which pages it was given. Who owns which page is not known here.

B batch, T query time, H heads, K kv heads, G = H // K, N head dim, P pages of the pool, s tokens of a page,
W pages of a table's row, c tokens of a block
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxformers.models.attention import MASKED, Scores
from jaxformers.models.blockwise import Softmax, head_slopes, per_head, softmax_logits
from jaxformers.models.config import LayerKind, ModelConfig
from jaxformers.models.masks import Visibility

LARGEST = 127  # of int8, used in both directions
NOWHERE = 0  # the page that no row owns: what stands at position -1 is written here, and never seen


@flax.struct.dataclass
class Pool:
    """The pages of one buffer: values [P, K, s, N]. In int8, each token's vector of a head is multiplied by its own
    number in scales, float32 [P, K, s]."""

    values: jax.Array
    scales: jax.Array | None = None

    def write(self, page: jax.Array, place: jax.Array, value: jax.Array) -> Pool:
        """With value [B, T, K, N] at places int32 [B, T] of pages int32 [B, T]."""
        if self.scales is None:
            return Pool(self.values.at[page, :, place].set(value.astype(self.values.dtype)))
        value = value.astype(jnp.float32)
        scales = jnp.maximum(jnp.abs(value).max(-1), jnp.finfo(jnp.float32).tiny) / LARGEST
        codes = jnp.round(value / scales[..., None]).astype(jnp.int8)
        return Pool(self.values.at[page, :, place].set(codes), self.scales.at[page, :, place].set(scales))

    def read(self, pages: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Pages int32 [...] -> [..., K, s, N]."""
        values = self.values[pages]
        if self.scales is None:
            return values
        return (values.astype(jnp.float32) * self.scales[pages][..., None]).astype(dtype)


@flax.struct.dataclass
class Paged:
    """One buffer of a layer's cache: its `pool`, and `table` int32 [B, W] with the page of each s positions of a row.
    Entries behind a row's last page are `NOWHERE`, as may be those before all that a query looks back at."""

    pool: Pool
    table: jax.Array

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """That of the same cache in one piece a row: [B, S, K, N]."""
        _, heads, size, width = self.pool.values.shape
        return self.table.shape[0], self.table.shape[1] * size, heads, width

    def write(self, positions: jax.Array, value: jax.Array) -> Paged:
        """With value [B, T, K, N] at positions int32 [B, T]; those at -1 go nowhere."""
        size = self.pool.values.shape[2]
        page = jnp.take_along_axis(self.table, positions // size, axis=1, mode="clip")
        page = jnp.where(positions < 0, NOWHERE, page)
        return self.replace(pool=self.pool.write(page, positions % size, value))

    def block(self, j: jax.Array, pages: int, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Block j of every row, `pages` pages long: [B, K, c, N]; from int8 in this dtype."""
        ids = jax.lax.dynamic_slice_in_dim(self.table, j * pages, pages, axis=1)
        found = self.pool.read(ids, dtype).transpose(0, 2, 1, 3, 4)
        return found.reshape(*found.shape[:2], -1, found.shape[-1])


def init_pools(cfg: ModelConfig, pages: Sequence[int], page_size: int, *, dtype: Any) -> list[dict[str, Pool]]:
    """Empty pools, one dict of buffers a layer, of pages[layer] pages besides the one that is `NOWHERE`."""

    def pool(*shape: int) -> Pool:
        return Pool(jnp.zeros(shape, dtype), jnp.zeros(shape[:-1]) if dtype == jnp.int8 else None)

    def layer(kind: LayerKind, pages: int) -> dict[str, Pool]:
        if kind.mixer == "mla":
            assert cfg.mla is not None
            shapes = {"latent": (1, cfg.mla.kv_rank + cfg.mla.rope_dim)}
        else:
            shapes = dict.fromkeys("kv", (cfg.num_kv_heads, cfg.head_dim))
        return {name: pool(pages + 1, k, page_size, n) for name, (k, n) in shapes.items()}

    return [layer(kind, count) for kind, count in zip(cfg.layers, pages, strict=True)]


def paged_attention(
    q: jax.Array,
    k: Paged,
    v: Paged,
    visible: Visibility,
    scores: Scores,
    *,
    sinks: jax.Array | None = None,
    block: int,
) -> jax.Array:
    """What `attention.dot_product` computes, up to rounding, of keys in pages. q [B, T, H, N] -> [B, T, H, M] in q's
    dtype; sums in float32.

    Queries at position -1 see nothing, and what comes out for them means nothing. `block` is how many keys of a row
    are looked at together; it divides the length of a table's row.
    """
    b, t, h, n = q.shape
    _, slots, kv_heads, m = v.shape
    block = min(block, slots)
    pages = block // k.pool.values.shape[2]
    q = q.reshape(b, t, kv_heads, h // kv_heads, n).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, N]
    positions, slopes = visible.q_positions, per_head(head_slopes(q.reshape(b, t, h, n), scores), kv_heads)
    first_seen, last_seen = _reach_of_rows(positions, scores.window)

    def step(j: jax.Array, so_far: Softmax) -> Softmax:
        places = Visibility(positions, (j * block + jnp.arange(block))[None])
        keys, values = k.block(j, pages, q.dtype), v.block(j, pages, q.dtype)
        # What a page holds of others must not be seen, not even as zero times infinity.
        own = (places.k_positions >= first_seen) & (places.k_positions <= last_seen)
        values = jnp.where(own[:, None, :, None], values, 0)
        products = _products(q, keys)
        logits = softmax_logits(products, places, scores, slopes)
        mask = places.mask(scores.window)[:, None, None]
        top = jnp.maximum(so_far.top, jnp.where(mask, logits, MASKED).max(-1))
        weights = jnp.where(mask, jnp.exp(logits - top[..., None]), 0.0)
        kept = jnp.exp(so_far.top - top)
        mixed = _mixed(weights.astype(values.dtype), values)
        return Softmax(top, so_far.total * kept + weights.sum(-1), so_far.mixed * kept[..., None] + mixed)

    first, end = _reach(positions, scores.window, block)
    shape = (b, kv_heads, h // kv_heads, t)
    nothing = Softmax(jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, m)))
    softmax = jax.lax.fori_loop(first, end, step, nothing)
    y = _finish(softmax, sinks).astype(q.dtype)
    return y.transpose(0, 3, 1, 2, 4).reshape(b, t, h, m)


@cache
def attend_in_pages(block: int) -> Any:
    """`paged_attention` as a runtime's `attend`: the same function each time, so that compiled ones are found again."""
    return partial(paged_attention, block=block)


def _reach_of_rows(positions: jax.Array, window: int | None) -> tuple[jax.Array, jax.Array]:
    """The first and the last position that any query of each row sees, int32 [B, 1]."""
    last = positions.max(axis=1, keepdims=True)
    if window is None:
        return jnp.zeros_like(last), last
    earliest = jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions).min(axis=1, keepdims=True)
    return earliest - (window - 1), last


def _reach(positions: jax.Array, window: int | None, block: int) -> tuple[jax.Array, jax.Array]:
    """The first block that any query at these positions sees, and the one behind the last."""
    end = positions.max() // block + 1
    if window is None:
        return jnp.zeros_like(end), end
    earliest = jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions).min()
    return jnp.maximum(earliest - (window - 1), 0) // block, end


def _products(q: jax.Array, keys: jax.Array) -> jax.Array:
    """q [B, K, G, T, N] with keys [B, K, c, N] -> float32 [B, K, G, T, c]: all queries of a kv head in one matmul."""
    b, k, g, t, n = q.shape
    flat = jnp.einsum("bkqn,bksn->bkqs", q.reshape(b, k, g * t, n), keys, preferred_element_type=jnp.float32)
    return flat.reshape(b, k, g, t, -1)


def _mixed(weights: jax.Array, values: jax.Array) -> jax.Array:
    """weights [B, K, G, T, c] of values [B, K, c, M] -> float32 [B, K, G, T, M]."""
    b, k, g, t, c = weights.shape
    flat = weights.reshape(b, k, g * t, c)
    return jnp.einsum("bkqs,bksm->bkqm", flat, values, preferred_element_type=jnp.float32).reshape(b, k, g, t, -1)


def _finish(softmax: Softmax, sinks: jax.Array | None) -> jax.Array:
    """The weighted mean of the values, after `sinks` [H] took their share."""
    if sinks is None:
        return softmax.mixed / jnp.maximum(softmax.total, jnp.finfo(jnp.float32).tiny)[..., None]
    sink = per_head(sinks, softmax.top.shape[1])
    top = jnp.maximum(softmax.top, sink)
    kept = jnp.exp(softmax.top - top)
    return softmax.mixed * kept[..., None] / (softmax.total * kept + jnp.exp(sink - top))[..., None]
