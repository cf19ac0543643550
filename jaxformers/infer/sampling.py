"""The next token from logits: penalties, temperature, top-k, top-p, min-p and a draw, each row with its own settings.

Pure functions over arrays of fixed shape, so that requests with different settings share one compiled step and new
values never compile again. What a whole batch may skip (all greedy, no top-k or top-p, no penalties) is in a static
`Plan`, made on the host.

A draw depends on its row's logits, seed and position, on nothing else: a row's tokens are the same alone, in any batch
and in any slot. This module knows nothing about text, stopping or caches.

Dims: B batch, V vocabulary, T prompt time.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

# Smaller temperatures are greedy: accelerators flush subnormal floats to zero, and would divide by it.
SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)

Values = float | Sequence[float] | np.ndarray


class Plan(NamedTuple):
    """What a batch needs, fixed at compile time. A plan that asks for more than the rows need changes no token."""

    greedy_only: bool = False  # no row draws: no noise is made
    filters: bool = True  # some row that draws has top-k or top-p, which search the row; min-p costs nothing
    penalties: bool = True  # some row has a penalty, which needs `TokenCounts`


class _Knob(NamedTuple):
    dtype: type
    allowed: Callable[[np.ndarray], np.ndarray]
    words: str


_KNOBS = {
    "temperature": _Knob(np.float32, lambda v: np.isfinite(v) & (v >= 0), "finite and at least 0 (0 is greedy)"),
    "top_k": _Knob(np.int32, lambda v: v >= 0, "an integer of at least 0 (0 is off)"),
    "top_p": _Knob(np.float32, lambda v: (v > 0) & (v <= 1), "above 0 and at most 1 (1 is off)"),
    "min_p": _Knob(np.float32, lambda v: (v >= 0) & (v <= 1), "from 0 to 1 (0 is off)"),
    "repetition_penalty": _Knob(np.float32, lambda v: (v >= 0.01) & (v <= 100), "from 0.01 to 100 (1 is off)"),
    "presence_penalty": _Knob(np.float32, lambda v: np.abs(v) <= 2, "from -2 to 2 (0 is off)"),
    "frequency_penalty": _Knob(np.float32, lambda v: np.abs(v) <= 2, "from -2 to 2 (0 is off)"),
    "seed": _Knob(np.uint32, lambda v: v >= 0, "an integer from 0 to 2**32 - 1"),
}


@struct.dataclass
class SamplingParams:
    """How each row chooses its tokens; every leaf is [B]. `create` makes a checked one from plain numbers."""

    temperature: jax.Array  # float32; 0 takes the most likely token
    top_k: jax.Array  # int32; keep the k most likely; 0 is off
    top_p: jax.Array  # float32; keep the most likely whose mass reaches p (arXiv:1904.09751); 1 is off
    min_p: jax.Array  # float32; keep those at least this fraction as likely as the best (arXiv:2407.01082); 0 is off
    repetition_penalty: jax.Array  # float32; divides logits > 0 and multiplies others (arXiv:1909.05858); 1 is off
    presence_penalty: jax.Array  # float32; subtracted once from the logit of each generated token; 0 is off
    frequency_penalty: jax.Array  # float32; subtracted each time the token was generated; 0 is off
    seed: jax.Array  # uint32; rows with one seed draw alike, so distinct samples of one prompt need distinct seeds

    @classmethod
    def create(
        cls,
        batch: int,
        *,
        temperature: Values = 1.0,
        top_k: Values = 0,
        top_p: Values = 1.0,
        min_p: Values = 0.0,
        repetition_penalty: Values = 1.0,
        presence_penalty: Values = 0.0,
        frequency_penalty: Values = 0.0,
        seed: Values = 0,
    ) -> "SamplingParams":
        """Parameters for `batch` rows, each knob one number for all rows or a sequence of one per row.

        The leaves are NumPy arrays, to be looked at (`plan`) and edited on the host; jit or device_put moves them.
        Raises `ValueError` that names the knob, the value and what is allowed.
        """
        given = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "seed": seed,
        }
        return cls(**{name: _checked(name, values, batch) for name, values in given.items()})

    def plan(self) -> Plan:
        """What these rows need, read on the host: not for use under jit."""
        draws = np.asarray(self.temperature) >= SMALLEST_TEMPERATURE
        cuts = (np.asarray(self.top_k) > 0) | (np.asarray(self.top_p) < 1)
        penalties = (
            np.any(np.asarray(self.repetition_penalty) != 1)
            or np.any(np.asarray(self.presence_penalty) != 0)
            or np.any(np.asarray(self.frequency_penalty) != 0)
        )
        return Plan(greedy_only=not draws.any(), filters=bool(np.any(draws & cuts)), penalties=bool(penalties))


def _checked(name: str, values: Values, batch: int) -> np.ndarray:
    """`values` as one [batch] array of the knob's dtype, every one of them allowed."""
    knob = _KNOBS[name]
    try:
        exact = np.asarray(values, np.float64)  # holds every int32 and uint32
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is {values!r}, but must be a number or one per row: {knob.words}") from None
    if exact.shape not in ((), (batch,)):
        raise ValueError(f"{name} has shape {exact.shape}, but must be one number or one for each of {batch} rows")
    with np.errstate(all="ignore"):
        typed = exact.astype(knob.dtype)
    is_whole = knob.dtype is np.float32 or typed == exact
    for value in np.extract(~(knob.allowed(typed) & is_whole), exact)[:1]:
        raise ValueError(f"{name} is {value:.12g}, but must be {knob.words}")
    return np.broadcast_to(typed, (batch,)).copy()


@struct.dataclass
class TokenCounts:
    """The tokens each row has seen, which is what penalties depend on."""

    prompt: jax.Array  # [B, V] bool; in the prompt
    generated: jax.Array  # [B, V] int32; times generated

    @classmethod
    def from_prompts(cls, tokens: jax.Array, valid: jax.Array, *, vocab_size: int) -> "TokenCounts":
        """Counts before the first generated token; `tokens` int [B, T], of which padding is not `valid` [B, T]."""
        B = tokens.shape[0]
        rows = jnp.arange(B)[:, None]
        present = jnp.where(valid, tokens, vocab_size)  # out of range, hence dropped
        prompt = jnp.zeros((B, vocab_size), bool).at[rows, present].set(True, mode="drop")
        return cls(prompt, jnp.zeros((B, vocab_size), jnp.int32))

    def add(self, tokens: jax.Array, active: jax.Array | None = None) -> "TokenCounts":
        """These counts with one more generated token [B] in each row, or in each `active` [B] one."""
        B = tokens.shape[0]
        more = jnp.ones((B,), jnp.int32) if active is None else active.astype(jnp.int32)
        return self.replace(generated=self.generated.at[jnp.arange(B), tokens].add(more))


@struct.dataclass
class Sampled:
    """One token per row."""

    tokens: jax.Array  # [B] int32
    logprobs: jax.Array | None  # [B] float32, or None where they were not asked for


def sample(
    logits: jax.Array,
    params: SamplingParams,
    positions: jax.Array,
    *,
    plan: Plan,
    counts: TokenCounts | None = None,
    logprobs: bool = False,
) -> Sampled:
    """The next token of each row, from float32 `logits` [B, V].

    `positions` [B] int numbers the draws of a row: the index of the token in its sequence, or of the generated token.
    With the row's seed it is all that the randomness depends on, so a continued row draws on as if never interrupted.
    `plan` and `logprobs` are static. `counts` is needed where the plan has penalties, and unused elsewhere.

    Steps, in the order of Hugging Face: penalties, temperature, top-k, top-p, min-p, then Gumbel-max. Temperature 0 is
    the argmax of the penalised logits. `logprobs` are of the model's own distribution: before penalties, temperature
    and filters.
    """
    assert logits.dtype == jnp.float32, logits.dtype
    penalised = logits
    if plan.penalties:
        assert counts is not None, "penalties need the tokens seen so far"
        penalised = penalise(logits, params, counts)
    tokens = jnp.argmax(penalised, axis=-1)
    if not plan.greedy_only:
        drawable = filter_logits(penalised, params, search=plan.filters)
        drawn = first_best(drawable + gumbel(params.seed, positions, logits.shape[-1]))
        tokens = jnp.where(params.temperature < SMALLEST_TEMPERATURE, tokens, drawn)
    chosen = logprobs_of(logits, tokens) if logprobs else None
    return Sampled(tokens.astype(jnp.int32), chosen)


def penalise(logits: jax.Array, params: SamplingParams, counts: TokenCounts) -> jax.Array:
    """Logits [B, V] after the repetition penalty (prompt and generated tokens; arXiv:1909.05858), and after OpenAI's
    presence and frequency penalties (generated tokens only): `- presence * (count > 0) - frequency * count`."""
    generated = counts.generated > 0
    factor = params.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(counts.prompt | generated, repeated, logits)
    presence = params.presence_penalty[:, None] * generated.astype(jnp.float32)
    frequency = params.frequency_penalty[:, None] * counts.generated.astype(jnp.float32)
    return logits - presence - frequency


def filter_logits(logits: jax.Array, params: SamplingParams, *, search: bool = True) -> jax.Array:
    """Logits [B, V] over temperature, -inf where a filter removed the token: their softmax is what is drawn from.

    The best token is at 0 and always kept; tokens as likely as the last one kept are kept too, whatever their order.
    `search=False` skips top-k and top-p. A greedy row, which draws nothing, is taken at temperature 1.
    """
    greedy = params.temperature < SMALLEST_TEMPERATURE
    temperature = jnp.where(greedy, 1.0, params.temperature)[:, None]
    # How far behind the best: no temperature overflows it, and min-p bounds it without a softmax.
    gaps = (logits.max(axis=-1, keepdims=True) - logits) / temperature
    widest = -jnp.log(params.min_p)[:, None]
    if search:
        top_k = _widest_of_top_k(gaps, params.top_k[:, None])
        top_p = _widest_of_top_p(jnp.where(gaps <= top_k, gaps, jnp.inf), params.top_p[:, None])
        widest = jnp.minimum(widest, jnp.minimum(top_k, top_p))
    return jnp.where(gaps <= widest, -gaps, -jnp.inf)


def _widest_of_top_k(gaps: jax.Array, top_k: jax.Array) -> jax.Array:
    """The gap [B, 1] of the k-th best token: one is kept if fewer than k are better."""
    enough = jnp.where(top_k > 0, top_k.astype(jnp.float32), jnp.inf)
    return _widest_with_less_before(enough, gaps, jnp.ones_like(gaps))


def _widest_of_top_p(gaps: jax.Array, top_p: jax.Array) -> jax.Array:
    """The gap [B, 1] of the nucleus' last token: one is kept if the better ones have less than p of the mass."""
    mass = jnp.exp(-gaps)
    enough = jnp.where(top_p < 1, top_p * mass.sum(axis=-1, keepdims=True), jnp.inf)
    return _widest_with_less_before(enough, gaps, mass)


def _widest_with_less_before(enough: jax.Array, gaps: jax.Array, weights: jax.Array) -> jax.Array:
    """The largest gap [B, 1] such that all smaller gaps of the row weigh less than `enough` [B, 1] together.

    A binary search over the bits of the answer, exact in 31 sums; a sort of the row would cost ten times more on CPU.
    """
    bits = jax.lax.bitcast_convert_type(gaps, jnp.int32)  # ordered as the floats are, because none is negative

    def settle_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (1 << (30 - i))
        before = jnp.sum(jnp.where(bits < candidate, weights, 0.0), axis=-1, keepdims=True)
        return jnp.where(before < enough, candidate, found)

    found = jax.lax.fori_loop(0, 31, settle_bit, jnp.zeros(enough.shape, jnp.int32))
    infinity = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)  # the bits above it are no number
    return jax.lax.bitcast_convert_type(jnp.minimum(found, infinity), jnp.float32)


def gumbel(seeds: jax.Array, positions: jax.Array, vocab_size: int) -> jax.Array:
    """Gumbel noise [B, V]; adding it to logits makes the argmax a draw from their softmax."""

    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        # The generator is named, because tokens must not change with the process's default.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (vocab_size,), jnp.float32)

    return jax.vmap(row)(seeds, positions)


def first_best(values: jax.Array) -> jax.Array:
    # An argmax, in the form whose passes XLA:CPU vectorizes: over values made on the spot, a third of argmax's time.
    return jnp.argmax(values == values.max(axis=-1, keepdims=True), axis=-1)


def logprobs_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
