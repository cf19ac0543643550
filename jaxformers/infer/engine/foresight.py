"""Guesses by the model's own modules for multi-token prediction (arXiv:2412.19437, section 2.2; `models.mtp`).

Module m reads, at a place t of a text, what was made of the text up to t by module m - 1, or by the decoder, and the
token at t + m + 1, and predicts the one behind that. What it looks back at stands in pages of its own, with the numbers
of the engine's pages, at t: it depends on tokens further on, so a prefix is only found where these are the same too.
Behind the text the last module goes on from its own states, for as many tokens as are to be guessed.

B slots, C tokens of a piece of a prompt, D model, M modules, k tokens guessed at a time, L = k + M last places
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxformers.infer.engine.choosing import choose
from jaxformers.infer.engine.placement import paged_runtime
from jaxformers.infer.engine.programs import NO_TOKEN, VECTORIZED, after, piece_positions
from jaxformers.infer.engine.running import Running, slots_of
from jaxformers.infer.engine.sizes import Sizes
from jaxformers.infer.engine.state import IDLE, Rows, State, split_pools, whole
from jaxformers.infer.generate import Prepared
from jaxformers.infer.request import EngineConfig
from jaxformers.models.cache import LayerCache
from jaxformers.models.config import ModelConfig
from jaxformers.models.decoder import embed, gather_shared, make_context, unembed
from jaxformers.models.layers import named_norm, norm
from jaxformers.models.mtp import run_module
from jaxformers.models.paged import Paged, Pool, init_pools
from jaxformers.models.params import Params, mtp_spec
from jaxformers.models.runtime import Runtime


@flax.struct.dataclass
class Sight:
    """What the modules need of each slot: `pools` of pages, one dict a module; and of its last L places before the
    newest token, what the decoder made of them, `hidden` [B, L, D] before the final norm, and the `tokens` behind them,
    int32 [B, L]. `first` int32 [B]: from that place on the modules are yet to read; what a slot has of places before it
    may be another request's."""

    pools: list[dict[str, Pool]]
    hidden: jax.Array
    tokens: jax.Array
    first: jax.Array

    def caches(self, table: jax.Array) -> list[LayerCache]:
        """The modules' caches of rows with these pages."""
        return [{name: Paged(pool, table) for name, pool in module.items()} for module in self.pools]

    def with_caches(self, caches: Sequence[LayerCache]) -> Sight:
        """With what the modules wrote."""
        return self.replace(pools=[{name: paged.pool for name, paged in cache.items()} for cache in caches])

    def placed(self, shard: Callable[..., jax.Array]) -> Sight:
        """With pools split as the engine's are, and all else whole on every device."""
        hidden, tokens, first = whole((self.hidden, self.tokens, self.first), shard)
        return Sight(split_pools(self.pools, shard), hidden, tokens, first)


class Foresight:
    """A `Drafter` that chooses by the request's own settings. The first `draft_tokens` modules are run; `ahead` is how
    many these are. ValueError for a model that has none."""

    def __init__(self, model: Prepared, config: EngineConfig, sizes: Sizes, mesh: Mesh):
        cfg = model.config
        if not cfg.mtp_modules:
            told = f"this {cfg.family} model was loaded without modules for multi-token prediction"
            raise ValueError(f"speculate is 'mtp', but {told}; `load(ref, mtp=True)` takes those along that it has")
        self.ahead = min(cfg.mtp_modules, config.draft_tokens)
        self._params = model.params | {"mtp": model.params["mtp"][: self.ahead]}
        self._count = config.draft_tokens
        self._model: dict[str, Any] = {"cfg": cfg, "runtime": paged_runtime(model, sizes, mesh)}
        with jax.set_mesh(mesh):
            self._sight = init_sight(**self._model, sizes=sizes, modules=self.ahead, count=self._count)

    def read(
        self, state: State, slot: np.int32, tokens: np.ndarray, start: np.int32, length: np.int32, x: jax.Array
    ) -> None:
        self._sight = read(self._params, self._sight, state.tables[0], slot, tokens, start, length, x, **self._model)

    def guess(self, state: State, runs: Sequence[Running]) -> jax.Array:
        table = state.tables[0]
        self._sight, guesses = guess(
            self._params,
            self._sight,
            table,
            state.rows,
            slots_of(runs, table.shape[0]),
            count=self._count,
            **self._model,
        )
        return guesses

    def follow(self, tokens: jax.Array, x: jax.Array) -> None:
        self._sight = follow(self._sight, tokens, x, runtime=self._model["runtime"])

    def note(self, run: Running, tokens: Sequence[int]) -> None:
        """Nothing: they are known on the device."""


@functools.partial(jax.jit, static_argnames=("cfg", "runtime", "sizes", "modules", "count"))
def init_sight(*, cfg: ModelConfig, runtime: Runtime, sizes: Sizes, modules: int, count: int) -> Sight:
    """Before the first request."""
    layers = cfg.replace(layers=cfg.layers[-1:] * modules)
    pools = init_pools(layers, [sizes.pages] * modules, sizes.page_size, dtype=sizes.pool_dtype(runtime.dtype))
    places = (sizes.slots, count + modules)
    hidden = jnp.zeros((*places, cfg.d_model), runtime.dtype)
    return Sight(pools, hidden, jnp.zeros(places, jnp.int32), jnp.zeros(sizes.slots, jnp.int32)).placed(runtime.shard)


@functools.partial(jax.jit, static_argnames=("cfg", "runtime"), donate_argnames="sight", compiler_options=VECTORIZED)
def read(
    params: Params,
    sight: Sight,
    table: jax.Array,
    slot: jax.Array,
    tokens: jax.Array,
    start: jax.Array,
    length: jax.Array,
    x: jax.Array,
    *,
    cfg: ModelConfig,
    runtime: Runtime,
) -> Sight:
    """Reads into the modules' caches what the decoder made, x [C, D], of a piece of a prompt of `length`, with its
    tokens from position `start` on and M further ones, int32 [C + M]."""
    modules, size = _Modules.of(params, cfg, runtime), len(x)
    states, caches = modules.states(x[None]), sight.caches(table[slot][None])
    for m, cache in enumerate(caches):
        positions = piece_positions(tokens[:size], start, length - 1 - m)  # as long as what it reads is of the prompt
        step = modules.run(m, states, tokens[None, m + 1 :][:, :size], positions[None], cache)
        caches[m], states = step.cache, step.states
    count = (piece_positions(tokens[:size], start, length - 1) >= 0).sum()
    hidden, behind = _last(sight.hidden[slot], x, count), _last(sight.tokens[slot], tokens[1 : size + 1], count)
    sight = sight.replace(
        hidden=sight.hidden.at[slot].set(hidden),
        tokens=sight.tokens.at[slot].set(behind),
        # The last M places of a prompt stand in pages that no other request has, and are always read by its own.
        first=sight.first.at[slot].set(length - 1 - len(caches)),
    )
    return sight.with_caches(caches).placed(runtime.shard)


@functools.partial(jax.jit, static_argnames="runtime", donate_argnames="sight")
def follow(sight: Sight, tokens: jax.Array, x: jax.Array, *, runtime: Runtime) -> Sight:
    """With the tokens int32 [B, k + 1] that came, NO_TOKEN behind the last, and what the decoder made, x [B, k + 1, D],
    of the one before each."""
    count, shift = (tokens != NO_TOKEN).sum(axis=1), jax.vmap(_last)
    hidden, behind = shift(sight.hidden, x, count), shift(sight.tokens, tokens, count)
    return sight.replace(hidden=hidden, tokens=behind).placed(runtime.shard)


def _last(old: jax.Array, new: jax.Array, count: jax.Array) -> jax.Array:
    """The last of old entries and `count` new ones, as many as the old ones are."""
    return jax.lax.dynamic_slice_in_dim(jnp.concatenate([old, new]), count, len(old))


@functools.partial(
    jax.jit, static_argnames=("count", "cfg", "runtime"), donate_argnames="sight", compiler_options=VECTORIZED
)
def guess(
    params: Params,
    sight: Sight,
    table: jax.Array,
    rows: Rows,
    wanted: jax.Array,
    *,
    count: int,
    cfg: ModelConfig,
    runtime: Runtime,
) -> tuple[Sight, jax.Array]:
    """The next tokens int32 [B, k] of every slot as the modules guess them; NO_TOKEN where none are `wanted` bool [B],
    and where the newest token is a text's first.

    First they read what has come since the last call. What they read of guesses is overwritten in the next one.
    """
    modules = _Modules.of(params, cfg, runtime)
    newest, active = rows.position, rows.position != IDLE
    places = newest[:, None] + jnp.arange(-sight.hidden.shape[1], 0, dtype=jnp.int32)
    is_read = active[:, None] & (places >= jnp.maximum(sight.first, 0)[:, None])
    positions = jnp.where(is_read, places, -1)
    told = _Told(
        rows.replace(tells=jnp.zeros_like(rows.tells)),
        is_read[:, -1],
        jnp.full((len(wanted), count), NO_TOKEN, jnp.int32),
    )
    states, tokens, caches = modules.states(sight.hidden), sight.tokens, sight.caches(table)
    for m, cache in enumerate(caches):
        step = modules.run(m, states, tokens, positions, cache)
        caches[m], states = step.cache, step.states
        told = told.with_next(m, modules.logits(m, step.x[:, -1]))
        tokens = jnp.concatenate([tokens[:, 1:], told.rows.token[:, None]], axis=1)
    last = len(caches) - 1

    def extend(i: jax.Array, carry: tuple[LayerCache, jax.Array, _Told]) -> tuple[LayerCache, jax.Array, _Told]:
        cache, states, told = carry
        positions = jnp.where(told.goes_on, newest + i - len(caches), -1)
        step = modules.run(last, states, told.rows.token[:, None], positions[:, None], cache)
        return step.cache, step.states, told.with_next(i, modules.logits(last, step.x[:, 0]))

    caches[last], _, told = jax.lax.fori_loop(last + 1, count, extend, (caches[last], states[:, -1:], told))
    first = jnp.where(active, newest - last, sight.first)
    sight = sight.with_caches(caches).replace(first=first).placed(runtime.shard)
    return sight, jnp.where(wanted[:, None], told.guesses, NO_TOKEN)


class _Step(NamedTuple):
    """What a module made of a call: x [B, T, D] before its norm, `states` after it, and its cache."""

    x: jax.Array
    states: jax.Array
    cache: LayerCache


class _Modules(NamedTuple):
    """The modules of a model, and what they share with it."""

    params: Params
    cfg: ModelConfig
    runtime: Runtime

    @classmethod
    def of(cls, params: Params, cfg: ModelConfig, runtime: Runtime) -> _Modules:
        return cls(gather_shared(params, cfg, runtime), cfg, runtime)

    def states(self, x: jax.Array) -> jax.Array:
        """What the first module reads of the decoder's hidden states [..., D]."""
        return named_norm(self.params, "final_norm", x, self.cfg)

    def run(self, m: int, states: jax.Array, tokens: jax.Array, positions: jax.Array, cache: LayerCache) -> _Step:
        """Module m over states [B, T, D] and further tokens, int32 [B, T], at positions int32 [B, T] (-1: nowhere)."""
        p = self.runtime.gather(self.params["mtp"][m], mtp_spec(self.cfg))
        ctx = make_context(self.cfg, self.runtime, positions, None)
        token = embed(self.params, self.cfg, tokens, positions, self.runtime)
        x, new, _ = run_module(p, states, token, ctx, self.cfg, cache)
        assert new is not None
        return _Step(x, norm(p["norm"], x, self.cfg), new)

    def logits(self, m: int, x: jax.Array) -> jax.Array:
        """float32 [B, V] of what module m made, x [B, D]."""
        head = self.params | {"final_norm": self.params["mtp"][m]["norm"]}
        return self.runtime.shard(unembed(head, self.cfg, x, self.runtime), None, None)


@flax.struct.dataclass
class _Told:
    """Rows behind the guesses so far; which slots go on, bool [B]; and the guesses, int32 [B, k]."""

    rows: Rows
    goes_on: jax.Array
    guesses: jax.Array

    def with_next(self, i: int | jax.Array, logits: jax.Array) -> _Told:
        """With guess number i, chosen by float32 logits [B, V] with the noise of its place."""
        tokens, _ = choose(logits, self.rows)
        guesses = self.guesses.at[:, i].set(jnp.where(self.goes_on, tokens, NO_TOKEN))
        return _Told(*after(self.rows, tokens, self.goes_on), guesses)
