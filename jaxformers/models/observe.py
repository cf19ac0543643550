"""What a forward pass shows of its inside: how large activations are, and attention logits. Nothing of it is
differentiated, and nothing is computed that is not asked for.

B batch, T query time, S key time, D model, H heads, K kv heads, G = H // K, N head dim
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp

from jaxformers.models.attention import Scores
from jaxformers.models.context import Context
from jaxformers.models.masks import Visibility
from jaxformers.models.routing import MoEStats, concat_layers, join_layers

Observable = Literal["activations", "attention_logits"]
PLACES = ("stream", "attn", "ffn")  # the residual stream behind a layer, and what its two halves added to it
_QUERIES_AT_ONCE = 512


@flax.struct.dataclass
class Seen:
    """Of one layer or, with a leading dim, of each, over the tokens that are not padding; None where not asked for.

    squares float32 [3]: the sum over tokens of the mean square at each of `PLACES`; largest float32 [3]: the largest
    magnitude there. logits float32 [H]: the largest scaled product of a query and a key that it sees, before soft caps
    and biases, which is what QK-clip looks at (arXiv:2507.20534).
    """

    squares: jax.Array | None = None
    largest: jax.Array | None = None
    logits: jax.Array | None = None

    def over_microbatches(self) -> Seen:
        """That of a whole batch, of what each of its microbatches showed [A, ...]."""
        return Seen(
            None if self.squares is None else self.squares.sum(axis=0),
            None if self.largest is None else self.largest.max(axis=0),
            None if self.logits is None else self.logits.max(axis=0),
        )


@flax.struct.dataclass
class LayerStats:
    """What one layer says beside its output; joined, leaves of `moe` are [sparse layers, ...] and of `seen` [layers,
    ...]."""

    moe: MoEStats | None = None
    seen: Seen | None = None


def join_stats(layers: list[LayerStats]) -> LayerStats:
    """Those of each layer as one."""
    return LayerStats(
        join_layers([stats.moe for stats in layers if stats.moe is not None]),
        join_layers([stats.seen for stats in layers if stats.seen is not None]),
    )


def concat_stats(parts: list[LayerStats]) -> LayerStats:
    """Those of successive layers [layers, ...] as one."""
    return LayerStats(concat_layers([part.moe for part in parts]), concat_layers([part.seen for part in parts]))


class Watch:
    """Looks at one layer while it is traced: give the layer `context`, then ask `seen`."""

    def __init__(self, ctx: Context):
        self._asked, self._segments, self._logits = ctx.observe, ctx.segment_ids, None
        self.context = replace(ctx, attend=self._attend) if "attention_logits" in ctx.observe else ctx
        self._attend_to = ctx.attend

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility, scores: Scores, **more: Any
    ) -> jax.Array:
        self._logits = max_logits(q, k, visible, scores)
        return self._attend_to(q, k, v, visible, scores, **more)

    def seen(self, *places: jax.Array) -> Seen | None:
        """What the layer showed; activations [B, T, D] are given in the order of `PLACES`."""
        if not self._asked:
            return None
        if "activations" not in self._asked:
            return Seen(logits=self._logits)
        found = [_measure(x, self._segments) for x in places]
        squares, largest = (jnp.stack(values) for values in zip(*found, strict=True))
        return Seen(squares, largest, self._logits)


def _measure(x: jax.Array, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The sum over tokens of the mean square of x [B, T, D], and its largest magnitude."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    if segment_ids is not None:
        x = jnp.where(segment_ids[..., None] > 0, x, 0.0)
    return jnp.square(x).mean(axis=-1).sum(), jnp.abs(x).max()


def max_logits(q: jax.Array, k: jax.Array, visible: Visibility, scores: Scores) -> jax.Array:
    """The largest scaled product of each head's queries [B, T, H, N] with keys [B, S, K, N] they see, float32 [H].

    It costs the products once more, as attention kernels keep none; a few hundred queries at a time, so memory grows
    with the length alone.
    """
    q, k = jax.lax.stop_gradient((q, k))
    b, t, h, n = q.shape
    q = q.reshape(b, t, k.shape[2], h // k.shape[2], n)

    def of(piece: tuple[jax.Array, Visibility]) -> jax.Array:
        q, visible = piece
        mask = visible.mask(scores.window)
        if visible.q_segments is not None:
            mask &= visible.q_segments[:, :, None] > 0
        logits = scores.scale * jnp.einsum("btkgn,bskn->bkgts", q, k, preferred_element_type=jnp.float32)
        return jnp.where(mask[:, None, None], logits, -jnp.inf).max(axis=(0, 3, 4)).reshape(h)

    pieces = next(n for n in range(1, t + 1) if t % n == 0 and t // n <= _QUERIES_AT_ONCE)
    if pieces == 1:
        return of((q, visible))

    # Interleaved: every device that holds a part of each row has a part of each piece.
    def split(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a.reshape(a.shape[0], -1, pieces, *a.shape[2:]), 2, 0)

    def look(piece: tuple[jax.Array, ...]) -> jax.Array:
        q, positions, *segments = piece
        return of((q, visible.replace(q_positions=positions, q_segments=segments[0] if segments else None)))

    segments = () if visible.q_segments is None else (split(visible.q_segments),)
    return jax.lax.map(look, (split(q), split(visible.q_positions), *segments)).max(axis=0)
