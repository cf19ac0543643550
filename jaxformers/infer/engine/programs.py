"""The programs of an engine: pure functions from its state to its state. There are no others, and each has one shape.

B slots, C tokens of a piece of a prompt, V vocabulary, W pages of a slot at most, n tokens made in a call at most
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from jaxformers.infer.engine.choosing import Logprobs, choose
from jaxformers.infer.engine.state import IDLE, Rows, State
from jaxformers.models.bank import Bank, put, with_rows
from jaxformers.models.config import ModelConfig
from jaxformers.models.decoder import gather_shared, hidden_states, unembed
from jaxformers.models.layers import named_norm
from jaxformers.models.paged import NOWHERE
from jaxformers.models.params import Params
from jaxformers.models.runtime import Runtime

NO_TOKEN = -1

# Of programs that attend in pages. At its third level, LLVM unrolls a loop over the 64 dims of a head before it looks
# for vectors, and then finds none: on CPU, keys are gathered one number at a time, at half the speed.
VECTORIZED = {"xla_backend_optimization_level": 2}


@flax.struct.dataclass
class Decoded:
    """What a call made: tokens int32 [B, n], NO_TOKEN where a slot made none, and their log-probabilities."""

    tokens: jax.Array
    logprobs: Logprobs


@functools.partial(jax.jit, donate_argnames="state")
def admit(state: State, slot: jax.Array, tables: tuple[jax.Array, ...], row: Rows) -> State:
    """Gives a slot to a request: its pages, each int32 [W], and what it needs of the slot. It makes no token yet."""
    rows = jax.tree.map(lambda every, one: every.at[slot].set(one), state.rows, row)
    return state.with_pages(slot, tables).replace(rows=rows)


@functools.partial(jax.jit, donate_argnames="bank")
def put_adapter(bank: Bank, number: jax.Array, factors: Bank) -> Bank:
    """Puts an adapter's factors where there is room for them."""
    return put(bank, number, factors)


@functools.partial(jax.jit, donate_argnames="state")
def turn(state: State, slot: jax.Array, tables: tuple[jax.Array, ...]) -> State:
    """Says which pages a slot has by now."""
    return state.with_pages(slot, tables)


@functools.partial(jax.jit, static_argnames=("cfg", "runtime"), donate_argnames="state", compiler_options=VECTORIZED)
def prefill_chunk(
    params: Params,
    state: State,
    slot: jax.Array,
    tokens: jax.Array,
    start: jax.Array,
    end: jax.Array,
    last: jax.Array,
    *,
    cfg: ModelConfig,
    runtime: Runtime,
) -> tuple[State, jax.Array]:
    """Reads tokens int32 [C] of a prompt into the cache, those of positions from `start` to before `end`, and what the
    layers made of them [C, D]. `last` is the position of the prompt's last token.

    A prompt to be continued is not read to its last token: decoding begins with it, so that what follows a prompt is
    always computed in one way.
    """
    params = with_rows(gather_shared(params, cfg, runtime), state.rows.adapter[slot][None])
    positions = piece_positions(tokens, start, end)
    tables = tuple(table[slot][None] for table in state.tables)
    hidden = hidden_states(
        params,
        cfg,
        tokens[None],
        positions=positions[None],
        cache=state.cache(tables),
        last=last[None],
        runtime=runtime,
    )
    return state.with_cache(hidden.cache).placed(runtime.shard), runtime.shard(hidden.x[0], None, None)


def piece_positions(tokens: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
    """int32 [C]: where the tokens of a piece that begins at `start` stand; -1 from `end` on."""
    positions = start + jnp.arange(tokens.shape[0], dtype=jnp.int32)
    return jnp.where(positions < end, positions, -1)


@functools.partial(jax.jit, static_argnames=("cfg", "runtime"))
def score(params: Params, x: jax.Array, tokens: jax.Array, *, cfg: ModelConfig, runtime: Runtime) -> Logprobs:
    """The log-probabilities of the tokens int32 [C] behind those that the layers made x [C, D] of."""
    logits = unembed(gather_shared(params, cfg, runtime), cfg, x, runtime)
    return Logprobs.of(runtime.shard(logits, None, None), tokens)


@functools.partial(jax.jit, static_argnames=("cfg", "runtime"))
def pool(params: Params, x: jax.Array, weights: jax.Array, *, cfg: ModelConfig, runtime: Runtime) -> jax.Array:
    """The sum float32 [D] of what the layers made x [C, D], after the final norm, times weights float32 [C]; rows of
    weight 0 do not count, whatever is in them."""
    states = named_norm(gather_shared(params, cfg, runtime), "final_norm", x, cfg).astype(jnp.float32)
    return jnp.where(weights[:, None] != 0, states * weights[:, None], 0.0).sum(axis=0)


@functools.partial(jax.jit, donate_argnames="state")
def start(state: State, slot: jax.Array, token: jax.Array, position: jax.Array) -> State:
    """Lets a slot make tokens: behind `token`, the last one of its prompt."""
    rows = state.rows
    token, position = rows.token.at[slot].set(token), rows.position.at[slot].set(position)
    return state.replace(rows=rows.replace(token=token, position=position))


@functools.partial(jax.jit, donate_argnames="state")
def allow(state: State, slot: jax.Array, tokens: jax.Array) -> State:
    """Says which tokens bool [V] may come next in a slot."""
    return state.replace(rows=state.rows.replace(allowed=state.rows.allowed.at[slot].set(tokens)))


@functools.partial(jax.jit, donate_argnames="state")
def release(state: State, slot: jax.Array) -> State:
    """Takes a slot, and its pages, from its request."""
    rows = state.rows.replace(position=state.rows.position.at[slot].set(IDLE))
    return state.replace(tables=tuple(table.at[slot].set(NOWHERE) for table in state.tables), rows=rows)


@functools.partial(
    jax.jit, static_argnames=("most", "cfg", "runtime"), donate_argnames="state", compiler_options=VECTORIZED
)
def decode(
    params: Params, state: State, count: jax.Array, *, most: int, cfg: ModelConfig, runtime: Runtime
) -> tuple[State, Decoded]:
    """Up to `count` more tokens in every slot that makes some; n is `most`.

    A slot goes idle behind a stop id, which is told too, and behind the last token of its request.
    """
    params = with_rows(gather_shared(params, cfg, runtime), state.rows.adapter)
    slots = state.rows.token.shape[0]
    nothing = Logprobs.nothing(slots, most, vocab_size=cfg.vocab_size)
    made = Decoded(jnp.full((slots, most), NO_TOKEN, jnp.int32), nothing)

    def goes_on(carry: tuple[jax.Array, State, Decoded]) -> jax.Array:
        i, state, _ = carry
        return (i < count) & (state.rows.position != IDLE).any()

    def extend(carry: tuple[jax.Array, State, Decoded]) -> tuple[jax.Array, State, Decoded]:
        i, state, made = carry
        state, new = _step(params, state, cfg, runtime)
        return i + 1, state, jax.tree.map(lambda every, one: every.at[:, i].set(one), made, new)

    _, state, made = jax.lax.while_loop(goes_on, extend, (jnp.int32(0), state, made))
    return state, made


def _step(params: Params, state: State, cfg: ModelConfig, runtime: Runtime) -> tuple[State, Decoded]:
    """One more token in every slot: what `decode` repeats, with leaves [B, ...]."""
    rows = state.rows
    active = rows.position != IDLE
    hidden = hidden_states(
        params,
        cfg,
        rows.token[:, None],
        positions=rows.position[:, None],
        cache=state.cache(state.tables),
        runtime=runtime,
    )
    logits = unembed(params, cfg, hidden.x[:, 0], runtime)
    tokens, logprobs = choose(runtime.shard(logits, None, None), rows)
    made = Decoded(jnp.where(active, tokens, NO_TOKEN), logprobs)
    rows = after(rows, tokens, active).rows
    return state.with_cache(hidden.cache).replace(rows=rows).placed(runtime.shard), made


class After(NamedTuple):
    """Rows that took a token, and which of those that did may take another, bool [B]."""

    rows: Rows
    goes_on: jax.Array


def after(rows: Rows, tokens: jax.Array, active: jax.Array) -> After:
    """Rows behind one more token int32 [B] of each `active` [B] one; the others stay as they are."""
    place = rows.position + 1
    stopped = jnp.take_along_axis(rows.stops, tokens[:, None], axis=1)[:, 0]
    goes_on = active & ~stopped & (place < rows.end)
    rows = rows.replace(
        token=jnp.where(active, tokens, rows.token),
        position=jnp.where(active, jnp.where(goes_on, place, IDLE), rows.position),
        counts=rows.counts.add(tokens, active),
    )
    return After(rows, goes_on)


class Verified(NamedTuple):
    """What came of guesses, and what the layers made of the tokens that were read for it: x [B, n, D]."""

    state: State
    made: Decoded
    x: jax.Array


@functools.partial(jax.jit, static_argnames=("cfg", "runtime"), donate_argnames="state", compiler_options=VECTORIZED)
def verify(params: Params, state: State, guesses: jax.Array, *, cfg: ModelConfig, runtime: Runtime) -> Verified:
    """One to k + 1 more tokens in every slot that makes some, in one pass over guesses int32 [B, k] of them (NO_TOKEN:
    none); n is k + 1.

    Each token is the one that the model chooses there, with the noise of its place: a guess that is another ends the
    slot's part of this call, and what was read of it and behind it is overwritten before anything sees it. So tokens
    are those that come without guesses, drawn ones too; rejection sampling (arXiv:2211.17192) would keep no more than
    their distribution.
    """
    params = with_rows(gather_shared(params, cfg, runtime), state.rows.adapter)
    rows, (slots, count) = state.rows, guesses.shape
    guessed = jnp.cumprod(guesses != NO_TOKEN, axis=1, dtype=jnp.int32) > 0
    is_read = jnp.concatenate([jnp.ones((slots, 1), bool), guessed], axis=1)
    places = rows.position[:, None] + jnp.arange(count + 1, dtype=jnp.int32)
    is_read &= (rows.position != IDLE)[:, None] & (places < rows.end[:, None])
    hidden = hidden_states(
        params,
        cfg,
        jnp.concatenate([rows.token[:, None], jnp.maximum(guesses, 0)], axis=1),
        positions=jnp.where(is_read, places, -1),
        cache=state.cache(state.tables),
        runtime=runtime,
    )
    logits = unembed(params, cfg, hidden.x.reshape(slots * (count + 1), -1), runtime)
    logits = runtime.shard(logits.reshape(slots, count + 1, -1), None, None, None)
    rows, made = _accept(logits, rows, guesses)
    state = state.with_cache(hidden.cache).replace(rows=rows).placed(runtime.shard)
    return Verified(state, made, runtime.shard(hidden.x, None, None, None))


def _accept(logits: jax.Array, rows: Rows, guesses: jax.Array) -> tuple[Rows, Decoded]:
    """The tokens chosen by float32 logits [B, n, V], as long as the guesses int32 [B, n - 1] before them were right."""
    slots, most, vocab_size = logits.shape
    nothing = Logprobs.nothing(slots, most, vocab_size=vocab_size)
    made = Decoded(jnp.full((slots, most), NO_TOKEN, jnp.int32), nothing)
    guesses = jnp.pad(guesses, ((0, 0), (0, 1)), constant_values=NO_TOKEN)

    def goes_on(carry: tuple[jax.Array, Rows, jax.Array, Decoded]) -> jax.Array:
        return carry[2].any()

    def extend(carry: tuple[jax.Array, Rows, jax.Array, Decoded]) -> tuple[jax.Array, Rows, jax.Array, Decoded]:
        i, rows, going, made = carry
        tokens, logprobs = choose(jax.lax.dynamic_index_in_dim(logits, i, axis=1, keepdims=False), rows)
        new = Decoded(jnp.where(going, tokens, NO_TOKEN), logprobs)
        made = jax.tree.map(lambda every, one: every.at[:, i].set(one), made, new)
        rows, may_go_on = after(rows, tokens, going)
        return i + 1, rows, may_go_on & (tokens == guesses[:, i]), made

    _, rows, _, made = jax.lax.while_loop(goes_on, extend, (jnp.int32(0), rows, rows.position != IDLE, made))
    return rows, made
