"""Cached generation for a batch of prompts: one prefill, then decoding a few tokens a call.

Token ids only: text, stop strings and tokenizers are the caller's, who may end a row at any time. Shapes come from a
few sizes an octave, so that other prompts seldom compile again. A row's tokens depend on its prompt, its sampling
settings and its seed, and on no other row.

B rows, T prompt time, S cache slots, V vocabulary, C tokens a call makes at most
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxformers.infer.sampling import Plan, Sampled, SamplingParams, TokenCounts, sample
from jaxformers.models.attention import dot_product, single_query
from jaxformers.models.cache import Cache, init_cache
from jaxformers.models.config import ModelConfig
from jaxformers.models.decoder import gather_shared, hidden_states, unembed
from jaxformers.models.layout import prepare
from jaxformers.models.params import Params
from jaxformers.models.runtime import Runtime
from jaxformers.parallel.mesh import WHOLE_ROWS, gatherer, sharder

log = logging.getLogger(__name__)

CHUNK = 8  # tokens of a row between two looks at the host: few enough to read along, enough to hide the call
SMALLEST_BUCKET = 16  # tokens
SMALLEST_READ = 256  # cache slots; reading fewer is not worth another compilation
NO_TOKEN = -1  # fills up the stop ids

Finish = Literal["stop", "length"]


class Prepared(NamedTuple):
    """A model ready to generate: its parameters in the layout that decoding runs from, and how to run it."""

    params: Params
    config: ModelConfig
    runtime: Runtime


class Step(NamedTuple):
    """What one call added to each row. A stop id that ended its row is left out.

    `finish` says why a row is over: "stop" at a stop id or by `Generation.end`, "length" after `max_new_tokens`; None
    while it goes on. `logprobs` are natural logarithms of the chosen tokens' probabilities before penalties,
    temperature and filters; None where they were not asked for.
    """

    tokens: list[list[int]]
    finish: list[Finish | None]
    logprobs: list[list[float]] | None


@functools.cache
def decode_runtime(mesh: Mesh, dtype: Any = jnp.float32) -> Runtime:
    """How to decode on a mesh: the same object each time, so that compiled functions are found again."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return Runtime(
        dtype=jnp.dtype(dtype),
        layers="unroll",
        shard=sharder(mesh, WHOLE_ROWS),  # a context axis only holds copies here
        gather=gatherer(mesh),
        attend=single_query if on_cpu else dot_product,
    )


def prepare_model(params: Params, cfg: ModelConfig, mesh: Mesh, *, dtype: Any = jnp.float32) -> Prepared:
    """A model's plain parameter tree, placed on `mesh`, made ready to generate in `dtype`: a copy of the layers. What
    was made ready before is left as it is."""
    dtype = jnp.dtype(dtype)
    if "blocks" in params:
        return Prepared(params, cfg, decode_runtime(mesh, dtype))
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    prepared = prepare(params, cfg, dtype=dtype, whole=mesh.size == 1, on_cpu=on_cpu)
    return Prepared(prepared, cfg, decode_runtime(mesh, dtype))


class Generation:
    """A batch of prompts being continued, once: iterating yields a `Step` after the prefill, then one after every call
    of up to `CHUNK` tokens a row, until every row is over.

    `sampling` defaults to the likeliest token each time. ValueError for a prompt without tokens or with ids that the
    model does not have, for max_new_tokens below 1, and for texts that outgrow a model's learned positions. Models with
    other positions may go past the context length they were made for; that is logged once.
    """

    def __init__(
        self,
        model: Prepared,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: SamplingParams | None = None,
        stop_ids: Sequence[int] = (),
        logprobs: bool = False,
    ):
        check_prompts(prompts, model.config, max_new_tokens)
        self._model, self._prompts, self._max_new_tokens = model, prompts, max_new_tokens
        self._sampling = SamplingParams.create(len(prompts), temperature=0.0) if sampling is None else sampling
        self._stop_ids = frozenset(stop_ids)
        self._finish: list[Finish | None] = [None] * len(prompts)
        self._done = 0  # tokens that every row has which is not over
        self._static = {
            "cfg": model.config,
            "runtime": model.runtime,
            "plan": self._sampling.plan(),
            "logprobs": logprobs,
        }

    def end(self, row: int) -> None:
        """Ends a row from the next call on, for a caller who found a stop string in its text."""
        self._finish[row] = self._finish[row] or "stop"

    def __iter__(self) -> Iterator[Step]:
        params, stop_ids = self._model.params, _padded_stop_ids(self._stop_ids)
        longest = max(map(len, self._prompts))
        slots = bucket(longest + self._max_new_tokens)
        tokens, lengths = right_padded(self._prompts)
        state, chunk = _prefill(params, tokens, lengths, self._sampling, slots=slots, **self._static)
        yield self._step(chunk, 1)
        while None in self._finish:
            count = min(CHUNK, self._max_new_tokens - self._done)
            over = np.array([finish is not None for finish in self._finish])
            read_slots = slots_to_read(longest + self._done + count, slots)
            state, chunk = _decode(
                params, state, over, count, stop_ids, self._sampling, read_slots=read_slots, **self._static
            )
            yield self._step(chunk, count)

    def _step(self, chunk: Sampled, count: int) -> Step:
        """The `count` new tokens in chunk [B, C], cut where each row ends."""
        tokens, logprobs = jax.device_get((chunk.tokens, chunk.logprobs))
        self._done += count
        lengths = [self._take(row, tokens[row, :count].tolist()) for row in range(len(self._prompts))]

        def cut(values: np.ndarray) -> list[list[Any]]:
            return [values[row, :length].tolist() for row, length in enumerate(lengths)]

        return Step(cut(tokens), list(self._finish), None if logprobs is None else cut(logprobs))

    def _take(self, row: int, tokens: list[int]) -> int:
        """How many of a row's new tokens count. Notes why the row is over, if it is."""
        if self._finish[row]:
            return 0
        for length, token in enumerate(tokens):
            if token in self._stop_ids:
                self._finish[row] = "stop"
                return length
        if self._done == self._max_new_tokens:
            self._finish[row] = "length"
        return len(tokens)


def bucket(size: int) -> int:
    """The least of a few sizes, four an octave, that holds `size`: a quarter too much at most, seldom a new shape."""
    step = max(SMALLEST_BUCKET, power_of_two(size) // 8)
    return -(-size // step) * step


def slots_to_read(reach: int, slots: int) -> int:
    """How much of a cache of `slots` to look at where rows reach up to `reach`: one of few sizes."""
    return min(slots, max(SMALLEST_READ, power_of_two(reach)))


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def check_prompts(prompts: Sequence[Sequence[int]], cfg: ModelConfig, max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not prompts:
        raise ValueError("there is no prompt")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} has no tokens; a model continues at least one, such as its BOS token")
        foreign = [token for token in prompt if not 0 <= token < cfg.vocab_size]
        if foreign:
            raise ValueError(f"prompt {row} has the id {foreign[0]}, but the model's ids are 0 to {cfg.vocab_size - 1}")
    longest = max(map(len, prompts))
    if longest + max_new_tokens <= cfg.context_length:
        return
    told = f"a prompt of {longest} tokens and {max_new_tokens} new ones pass the context length of {cfg.context_length}"
    if cfg.learned_positions:
        raise ValueError(f"{told}, beyond which this model has no positions")
    _log_past_context(told, cfg.context_length)


@functools.cache
def _log_past_context(told: str, _context_length: int) -> None:
    log.warning("%s; what comes then may make less sense", told)


def right_padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as int32 [B, T] with T a bucket, and their lengths int32 [B]."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), bucket(int(lengths.max()))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def _padded_stop_ids(stop_ids: frozenset[int]) -> np.ndarray:
    """int32 [power of two], so that one id more or less compiles nothing."""
    padded = np.full(power_of_two(max(8, len(stop_ids))), NO_TOKEN, np.int32)
    padded[: len(stop_ids)] = sorted(stop_ids)
    return padded


@flax.struct.dataclass
class _State:
    """Between two calls: `token` int32 [B], the newest of each row, belongs at `position` int32 [B] and is not in the
    cache yet."""

    cache: Cache
    token: jax.Array
    position: jax.Array
    counts: TokenCounts | None


_STATIC = ("cfg", "runtime", "plan", "logprobs")


@functools.partial(jax.jit, static_argnames=("slots", *_STATIC))
def _prefill(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    sampling: SamplingParams,
    *,
    slots: int,
    cfg: ModelConfig,
    runtime: Runtime,
    plan: Plan,
    logprobs: bool,
) -> tuple[_State, Sampled]:
    """Reads the prompts [B, T] into a new cache, and the first new token of each row as a chunk [B, 1].

    Padding stands at position -1: it sees nothing and turns nothing, and what it writes falls in the last slot, which
    is overwritten before anything can see it.
    """
    params = gather_shared(params, cfg, runtime)
    batch, time = tokens.shape
    valid = jnp.arange(time) < lengths[:, None]
    positions = jnp.where(valid, jnp.arange(time), -1)
    cache = init_cache(cfg, batch, slots, dtype=runtime.dtype)
    hidden = hidden_states(params, cfg, tokens, positions=positions, cache=cache, read_slots=time, runtime=runtime)
    last = jnp.take_along_axis(hidden.x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    counts = TokenCounts.from_prompts(tokens, valid, vocab_size=cfg.vocab_size) if plan.penalties else None
    logits = unembed(params, cfg, last, runtime)
    new = sample(logits, sampling, lengths, plan=plan, counts=counts, logprobs=logprobs)
    counts = counts.add(new.tokens) if counts else None
    return _State(hidden.cache, new.tokens, lengths, counts), jax.tree.map(lambda a: a[:, None], new)


@functools.partial(jax.jit, static_argnames=("read_slots", *_STATIC), donate_argnames="state")
def _decode(
    params: Params,
    state: _State,
    over: jax.Array,
    count: jax.Array,
    stop_ids: jax.Array,
    sampling: SamplingParams,
    *,
    read_slots: int,
    cfg: ModelConfig,
    runtime: Runtime,
    plan: Plan,
    logprobs: bool,
) -> tuple[_State, Sampled]:
    """Up to `count` more tokens of each row as a chunk [B, CHUNK]; fewer once all rows are over (bool [B]).

    A row that is over stays where it is, and its tokens mean nothing.
    """
    params = gather_shared(params, cfg, runtime)
    batch = over.shape[0]

    def step(state: _State, over: jax.Array) -> tuple[_State, Sampled]:
        hidden = hidden_states(
            params,
            cfg,
            state.token[:, None],
            positions=state.position[:, None],
            cache=state.cache,
            read_slots=read_slots,
            runtime=runtime,
        )
        logits = unembed(params, cfg, hidden.x[:, 0], runtime)
        position = state.position + 1
        new = sample(logits, sampling, position, plan=plan, counts=state.counts, logprobs=logprobs)
        counts = state.counts.add(new.tokens) if state.counts else None
        return _State(hidden.cache, new.tokens, jnp.where(over, state.position, position), counts), new

    def goes_on(carry: Any) -> jax.Array:
        i, _, over, _ = carry
        return (i < count) & ~over.all()

    def extend(carry: Any) -> Any:
        i, state, over, chunk = carry
        state, new = step(state, over)
        chunk = jax.tree.map(lambda all_, one: all_.at[:, i].set(one), chunk, new)
        return i + 1, state, over | jnp.isin(new.tokens, stop_ids), chunk

    chunk = Sampled(jnp.zeros((batch, CHUNK), jnp.int32), jnp.zeros((batch, CHUNK), jnp.float32) if logprobs else None)
    _, state, _, chunk = jax.lax.while_loop(goes_on, extend, (jnp.int32(0), state, over, chunk))
    return state, chunk
