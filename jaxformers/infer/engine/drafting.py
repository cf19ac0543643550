"""Guesses of the tokens to come, for `programs.verify` to check several at a time.

What a guess is decides only how fast tokens come: which ones come is the model's choice alone. A guess may be what once
followed the same few tokens in the text itself ("ngram"), what a smaller model of the same vocabulary chooses ("draft";
arXiv:2211.17192), or what the model's own modules for that choose ("mtp", see `foresight`). Whatever chooses draws with
the noise that the model will draw with, so where the two distributions agree they mostly choose the same token.

B slots, C tokens of a piece of a prompt, k tokens guessed at a time
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxformers.infer.engine.choosing import choose
from jaxformers.infer.engine.foresight import Foresight
from jaxformers.infer.engine.placement import mesh_of, paged_runtime
from jaxformers.infer.engine.programs import NO_TOKEN, VECTORIZED, after, piece_positions
from jaxformers.infer.engine.running import Running, slots_of
from jaxformers.infer.engine.sizes import Sizes
from jaxformers.infer.engine.state import IDLE, Rows, State
from jaxformers.infer.generate import Prepared
from jaxformers.infer.request import EngineConfig
from jaxformers.models.config import DynamicScaling, LongRopeScaling, ModelConfig
from jaxformers.models.decoder import gather_shared, hidden_states, unembed
from jaxformers.models.paged import Pool, init_pools
from jaxformers.models.params import Params
from jaxformers.models.runtime import Runtime
from jaxformers.parallel.mesh import replicated

LOOKUPS = (3, 2)  # how many of the last tokens are looked for in the text before them, the most telling first


class Drafter(Protocol):
    """Guesses for the slots of one engine."""

    ahead: int  # tokens behind a piece of a prompt on which what is kept of the piece depends

    def read(
        self, state: State, slot: np.int32, tokens: np.ndarray, start: np.int32, length: np.int32, x: jax.Array
    ) -> None:
        """Takes note of a piece of a prompt, as `programs.prefill_chunk` was told of it, with the tokens `ahead` of it:
        int32 [C + ahead]; and of what the layers made of it, x [C, D]."""
        ...

    def guess(self, state: State, runs: Sequence[Running]) -> np.ndarray | jax.Array:
        """int32 [B, k]: what may come next for these requests; NO_TOKEN where nothing is guessed, as in other slots."""
        ...

    def follow(self, tokens: jax.Array, x: jax.Array) -> None:
        """Takes note of the tokens int32 [B, k + 1] that came of its guesses, NO_TOKEN behind the last, and of what the
        layers made of those before each, x [B, k + 1, D]."""
        ...

    def note(self, run: Running, tokens: Sequence[int]) -> None:
        """Takes note of the tokens that came, on the host."""
        ...


def make_drafter(
    config: EngineConfig, model: Prepared, sizes: Sizes, draft: Prepared | None, mesh: Mesh
) -> Drafter | None:
    """What `config.speculate` names. ValueError where it and the models do not go together."""
    cfg, kinds = model.config, (None, "ngram", "draft", "mtp")
    if config.speculate not in kinds:
        raise ValueError(f"speculate is {config.speculate!r}; it must be one of {kinds}")
    if (config.speculate == "draft") != (draft is not None):
        told = "names a draft model, but none is given" if draft is None else "leaves a draft model without work"
        raise ValueError(f"speculate is {config.speculate!r}, which {told}")
    if config.speculate is None:
        return None
    if any(kind.rope and isinstance(kind.rope.scaling, DynamicScaling | LongRopeScaling) for kind in cfg.layers):
        told = f"positions of this {cfg.family} model turn by the length of the text"
        raise ValueError(f"speculate is {config.speculate!r}, but {told}, so that tokens must come one by one")
    if config.speculate == "mtp":
        return Foresight(model, config, sizes, mesh)
    if draft is None:
        return NGrams(config.slots, config.draft_tokens)
    if draft.config.vocab_size != cfg.vocab_size:
        raise ValueError(f"the draft model has {draft.config.vocab_size} tokens, and the model {cfg.vocab_size}")
    if draft.config.learned_positions and draft.config.context_length < sizes.max_length:
        told = f"the draft model has positions up to {draft.config.context_length}"
        raise ValueError(f"{told}, but max_length is {sizes.max_length}")
    if (there := set(mesh_of(draft.params).devices.flat)) != set(mesh.devices.flat):
        told = f"the draft model is on {len(there)} device(s), and the model on {mesh.size}"
        raise ValueError(f"{told}; both must be on the same ones")
    return DraftModel(draft, config, sizes, mesh)


class NGrams:
    """Guesses what followed the last tokens where they came before: good where texts repeat their prompts."""

    ahead = 0

    def __init__(self, slots: int, count: int):
        self._shape = (slots, count)
        self._texts: WeakKeyDictionary[Running, Text] = WeakKeyDictionary()

    def read(
        self, state: State, slot: np.int32, tokens: np.ndarray, start: np.int32, length: np.int32, x: jax.Array
    ) -> None:
        """Nothing: the whole prompt is looked at once its continuation begins."""

    def guess(self, state: State, runs: Sequence[Running]) -> np.ndarray:
        guesses = np.full(self._shape, NO_TOKEN, np.int32)
        for run in runs:
            if run not in self._texts:
                self._texts[run] = Text(run.request.prompt)
            found = self._texts[run].guess(self._shape[1])
            guesses[run.slot, : len(found)] = found
        return guesses

    def follow(self, tokens: jax.Array, x: jax.Array) -> None:
        """Nothing: tokens are noted on the host."""

    def note(self, run: Running, tokens: Sequence[int]) -> None:
        if run in self._texts:
            self._texts[run].extend(tokens)


class Text:
    """Tokens so far, and where each few of them last stood before others."""

    def __init__(self, tokens: Sequence[int]):
        self._tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Goes on with these."""
        for token in tokens:
            for n in LOOKUPS:
                self._behind[tuple(self._tokens[-n:])] = len(self._tokens)
            self._tokens.append(int(token))

    def guess(self, count: int) -> list[int]:
        """What comes if the text goes on as it did before, again and again; empty where nothing is like its end."""
        for n in LOOKUPS:
            if (start := self._behind.get(tuple(self._tokens[-n:]))) is not None and len(self._tokens) >= n:
                period = len(self._tokens) - start
                return [self._tokens[start + i % period] for i in range(count)]
        return []


class DraftModel:
    """Guesses what a smaller model would choose by the request's own settings. Its keys and values stand in pages of
    its own with the numbers of the engine's pages, so a prefix that is found is found for both."""

    ahead = 0

    def __init__(self, model: Prepared, config: EngineConfig, sizes: Sizes, mesh: Mesh):
        self._params, self._count = model.params, config.draft_tokens
        self._model: dict[str, Any] = {"cfg": model.config, "runtime": paged_runtime(model, sizes, mesh)}
        counts = [sizes.pages] * model.config.num_layers
        pools = init_pools(model.config, counts, config.page_size, dtype=model.runtime.dtype)
        self._pools = jax.device_put(pools, replicated(mesh))

    def read(
        self, state: State, slot: np.int32, tokens: np.ndarray, start: np.int32, length: np.int32, x: jax.Array
    ) -> None:
        self._pools = read(self._params, self._pools, state.tables[0], slot, tokens, start, length, **self._model)

    def guess(self, state: State, runs: Sequence[Running]) -> jax.Array:
        wanted, rows = slots_of(runs, state.tables[0].shape[0]), state.rows
        self._pools, guesses = guess(
            self._params, self._pools, state.tables[0], rows, wanted, count=self._count, **self._model
        )
        return guesses

    def follow(self, tokens: jax.Array, x: jax.Array) -> None:
        """Nothing: where the engine's rows stand says all."""

    def note(self, run: Running, tokens: Sequence[int]) -> None:
        """Nothing: where the engine's rows stand says all."""


Pools = list[dict[str, Pool]]


@functools.partial(jax.jit, static_argnames=("cfg", "runtime"), donate_argnames="pools", compiler_options=VECTORIZED)
def read(
    params: Params,
    pools: Pools,
    table: jax.Array,
    slot: jax.Array,
    tokens: jax.Array,
    start: jax.Array,
    length: jax.Array,
    *,
    cfg: ModelConfig,
    runtime: Runtime,
) -> Pools:
    """Reads tokens int32 [C] of a prompt into the draft model's cache, as `programs.prefill_chunk` does."""
    params = gather_shared(params, cfg, runtime)
    positions = piece_positions(tokens, start, length - 1)[None]
    state = _state(pools, table, None)
    cache, last = state.cache((table[slot][None],)), (length - 1)[None]
    hidden = hidden_states(params, cfg, tokens[None], positions=positions, cache=cache, last=last, runtime=runtime)
    return state.with_cache(hidden.cache).pools


def _state(pools: Pools, table: jax.Array, rows: Rows | None) -> State:
    """The draft model's part of what an engine keeps: all of its layers have the pages of those that look back all the
    way."""
    return State(pools, (table,), rows, recent=(False,) * len(pools))


@functools.partial(
    jax.jit, static_argnames=("count", "cfg", "runtime"), donate_argnames="pools", compiler_options=VECTORIZED
)
def guess(
    params: Params,
    pools: Pools,
    table: jax.Array,
    rows: Rows,
    wanted: jax.Array,
    *,
    count: int,
    cfg: ModelConfig,
    runtime: Runtime,
) -> tuple[Pools, jax.Array]:
    """The draft model's own next tokens int32 [B, k] of every slot, NO_TOKEN where none are `wanted` bool [B].

    It reads the last of them too, behind which the next guesses may begin.
    """
    params = gather_shared(params, cfg, runtime)
    rows = rows.replace(tells=jnp.zeros_like(rows.tells))
    state = _state(pools, table, rows)

    def extend(i: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        state, guesses = carry
        rows = state.rows
        hidden = hidden_states(
            params,
            cfg,
            rows.token[:, None],
            positions=rows.position[:, None],
            cache=state.cache(state.tables),
            runtime=runtime,
        )
        tokens, _ = choose(unembed(params, cfg, hidden.x[:, 0], runtime), rows)
        active = rows.position != IDLE
        told = jnp.where(active & wanted, tokens, NO_TOKEN)
        state = state.with_cache(hidden.cache).replace(rows=after(rows, tokens, active).rows)
        return state, guesses.at[:, i].set(told)

    guesses = jnp.full((table.shape[0], count + 1), NO_TOKEN, jnp.int32)
    state, guesses = jax.lax.fori_loop(0, count + 1, extend, (state, guesses))
    return state.pools, guesses[:, :count]
