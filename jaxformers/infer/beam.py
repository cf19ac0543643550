"""Beam search: the continuations of the highest total log-probability that keeping a few of them alive finds.

As `transformers` defines it, so that the same settings find the same tokens: finished continuations are compared by
their total log-probability over length ** length_penalty. Token ids only. The device scores every continuation of every
beam and tells the best; what becomes of them is settled on the host, a prompt at a time.

B prompts, K beams of each, T prompt time, S cache slots, V vocabulary, C candidates of a prompt
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.infer.generate import Finish, Prepared, bucket, check_prompts, right_padded, slots_to_read
from jaxformers.models.cache import Cache, init_cache
from jaxformers.models.config import ModelConfig
from jaxformers.models.decoder import gather_shared, hidden_states, unembed
from jaxformers.models.params import Params
from jaxformers.models.runtime import Runtime

NEVER = np.float32(-1e9)  # the score of what must not be chosen


@dataclass(frozen=True, kw_only=True)
class BeamSettings:
    """num_beams: continuations kept alive. length_penalty: above 0 favours long ones, below 0 short ones.
    early_stopping: True ends once num_beams are finished, False once no running beam could be better than they are by
    its present length, "never" only once none could be at any length. ValueError for what is not allowed."""

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"num_beams is {self.num_beams}; it must be at least 1")
        if not -5 <= self.length_penalty <= 5:  # float32 holds the power for any length
            raise ValueError(f"length_penalty is {self.length_penalty}; it must be from -5 to 5")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping is {self.early_stopping!r}; it must be True, False or 'never'")


class Found(NamedTuple):
    """A continuation without the stop id that ended it; its total log-probability, that of the stop id included, over
    length ** length_penalty."""

    tokens: list[int]
    score: float
    finish: Finish


class _Candidates(NamedTuple):
    """The best continuations by one token, in order: total log-probabilities float32, the beams they continue and the
    tokens they add, int32; all [B, C]."""

    scores: np.ndarray
    parents: np.ndarray
    tokens: np.ndarray


def beam_search(
    model: Prepared,
    prompts: Sequence[Sequence[int]],
    settings: BeamSettings,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
) -> list[list[Found]]:
    """The `num_beams` best continuations of each prompt, the best first. ValueError as `Generation` raises it, and for
    more beams than the vocabulary has continuations for."""
    cfg, beams, stops = model.config, settings.num_beams, frozenset(stop_ids)
    check_prompts(prompts, cfg, max_new_tokens)
    most = max(2, 1 + len(stops)) * beams  # so many that num_beams of them go on, even if all stop ids come first
    if most > cfg.vocab_size:
        told = f"num_beams is {beams}, which takes {most} continuations with {len(stops)} stop ids"
        raise ValueError(f"{told}; this model has {cfg.vocab_size} tokens")
    rows = [_Row(settings, stops, max_new_tokens) for _ in prompts]
    tokens, lengths = right_padded(prompts)
    longest, slots = max(lengths), bucket(int(max(lengths)) + max_new_tokens)
    static = {"beams": beams, "most": most, "cfg": cfg, "runtime": model.runtime}
    cache, found = _read(model.params, tokens, lengths, slots=slots, **static)
    for n in range(max_new_tokens):
        found = _Candidates(*jax.device_get(found))
        for row, *candidates in zip(rows, *found, strict=True):
            row.take(_Candidates(*candidates))
        if all(row.is_over for row in rows):
            break
        cache, found = _extend(
            model.params,
            cache,
            np.stack([row.newest for row in rows]),
            np.stack([row.parents for row in rows]),
            np.stack([row.scores for row in rows]),
            lengths + n,
            read_slots=slots_to_read(int(longest) + n + 1, slots),
            **static,
        )
    return [row.finished() for row in rows]


class _Row:
    """The beams of one prompt. Running ones: their total log-probabilities `scores` [K], their `newest` tokens [K] and
    the beams `parents` [K] that these were added to."""

    def __init__(self, settings: BeamSettings, stops: frozenset[int], max_new_tokens: int):
        self._settings, self._stops, self._max = settings, stops, max_new_tokens
        self._length, self.is_over = 0, False
        self._texts: list[list[int]] = [[]] * settings.num_beams
        self.scores = np.zeros(settings.num_beams, np.float32)
        self.newest = self.parents = np.zeros(settings.num_beams, np.int32)
        self._done: list[Found] = []

    def take(self, found: _Candidates) -> None:
        """Goes on with the best candidates, and files those that end here."""
        if self.is_over:
            return
        beams = self._settings.num_beams
        self._length += 1
        ends = np.isin(found.tokens, list(self._stops)) | (self._length == self._max)
        texts = [
            [*self._texts[parent], token] for parent, token in zip(found.parents, found.tokens.tolist(), strict=True)
        ]
        # Those behind the first num_beams stand in for such as end; they are never results themselves.
        self._file([(texts[i], found.scores[i]) for i in range(beams) if ends[i]])
        best = np.argsort(-(found.scores + ends * NEVER), kind="stable")[:beams]
        self._texts = [texts[i] for i in best]
        self.scores, self.newest, self.parents = found.scores[best], found.tokens[best], found.parents[best]
        self.is_over = bool(ends.all()) or self._no_better_ones_to_come()

    def _file(self, ended: list[tuple[list[int], np.float32]]) -> None:
        """Keeps the best of those that are finished."""
        worth = np.float32(self._length**self._settings.length_penalty)
        for text, score in ended:
            stopped = text[-1] in self._stops
            self._done.append(
                Found(text[:-1] if stopped else text, float(score / worth), "stop" if stopped else "length")
            )
        self._done.sort(key=lambda found: -found.score)
        del self._done[self._settings.num_beams :]

    def _no_better_ones_to_come(self) -> bool:
        s = self._settings
        if len(self._done) < s.num_beams:
            return False
        if s.early_stopping is True:
            return True
        longest = s.early_stopping == "never" and s.length_penalty > 0
        length = self._max if longest else self._length
        return bool(self.scores[0] / length**s.length_penalty <= self._done[-1].score)

    def finished(self) -> list[Found]:
        """The results, the best first."""
        return self._done


def _best(logits: jax.Array, scores: jax.Array, most: int) -> _Candidates:
    """The `most` best continuations of each prompt's beams, whose total log-probabilities are `scores` [B, K], from
    float32 logits [B * K, V]."""
    batch, vocab_size = scores.shape[0], logits.shape[-1]
    totals = jax.nn.log_softmax(logits).reshape(*scores.shape, vocab_size) + scores[..., None]
    best, places = jax.lax.top_k(totals.reshape(batch, -1), most)
    return _Candidates(best, places // vocab_size, places % vocab_size)


_STATIC = ("beams", "most", "cfg", "runtime")


@functools.partial(jax.jit, static_argnames=("slots", *_STATIC))
def _read(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    slots: int,
    beams: int,
    most: int,
    cfg: ModelConfig,
    runtime: Runtime,
) -> tuple[Cache, _Candidates]:
    """Reads prompts [B, T] of `lengths` [B]: a cache of B * K rows, and the candidates for their first token, all of
    which continue beam 0."""
    params = gather_shared(params, cfg, runtime)
    batch, time = tokens.shape
    positions = jnp.where(jnp.arange(time) < lengths[:, None], jnp.arange(time), -1)
    cache = init_cache(cfg, batch, slots, dtype=runtime.dtype)
    hidden = hidden_states(params, cfg, tokens, positions=positions, cache=cache, read_slots=time, runtime=runtime)
    last = jnp.take_along_axis(hidden.x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    found = _best(unembed(params, cfg, last, runtime), jnp.zeros((batch, 1)), most)
    return jax.tree.map(lambda buffer: jnp.repeat(buffer, beams, axis=0), hidden.cache), found


@functools.partial(jax.jit, static_argnames=("read_slots", *_STATIC), donate_argnames="cache")
def _extend(
    params: Params,
    cache: Cache,
    newest: jax.Array,
    parents: jax.Array,
    scores: jax.Array,
    position: jax.Array,
    *,
    read_slots: int,
    beams: int,
    most: int,
    cfg: ModelConfig,
    runtime: Runtime,
) -> tuple[Cache, _Candidates]:
    """Each beam's row becomes a copy of its parent's and reads its newest token, all int32 [B, K], at its prompt's
    position int32 [B]; the candidates behind that."""
    params = gather_shared(params, cfg, runtime)
    batch = newest.shape[0]
    rows = (jnp.arange(batch)[:, None] * beams + parents).reshape(-1)
    hidden = hidden_states(
        params,
        cfg,
        newest.reshape(-1, 1),
        positions=jnp.repeat(position, beams)[:, None],
        cache=jax.tree.map(lambda buffer: buffer[rows], cache),
        read_slots=read_slots,
        runtime=runtime,
    )
    return hidden.cache, _best(unembed(params, cfg, hidden.x[:, 0], runtime), scores, most)
