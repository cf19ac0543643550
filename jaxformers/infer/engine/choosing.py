"""The next token of every slot, each by the settings of its own request, in one program.

What no running request asks for (draws, filters, penalties, log-probabilities) is branched around on the device, so
that there is one program and not one for each mixture. A branch that a row does not need leaves its numbers as they
are, bit by bit.

B slots, V vocabulary
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from jaxformers.infer.engine.state import IDLE, Rows
from jaxformers.infer.sampling import SMALLEST_TEMPERATURE, filter_logits, first_best, gumbel, logprobs_of, penalise

TOP = 20  # log-probabilities are told of so many likeliest tokens at most


@flax.struct.dataclass
class Logprobs:
    """Natural logarithms of probabilities, float32: of the chosen token [...], and of the likeliest ones `top`
    [..., n], whose ids int32 [..., n] come with them, the best first; n is `TOP`, or V where that is less."""

    chosen: jax.Array
    top: jax.Array
    top_ids: jax.Array

    @classmethod
    def of(cls, logits: jax.Array, tokens: jax.Array) -> Logprobs:
        """From float32 logits [B, V], for tokens int32 [B]."""
        top, ids = jax.lax.top_k(logits, min(TOP, logits.shape[-1]))
        total = jax.nn.logsumexp(logits, axis=-1)
        return cls(logprobs_of(logits, tokens), top - total[:, None], ids.astype(jnp.int32))

    @classmethod
    def nothing(cls, *lead: int, vocab_size: int) -> Logprobs:
        """Zeros with these leading dims."""
        top = min(TOP, vocab_size)
        return cls(jnp.zeros(lead), jnp.zeros((*lead, top)), jnp.zeros((*lead, top), jnp.int32))


def choose(logits: jax.Array, rows: Rows) -> tuple[jax.Array, Logprobs]:
    """Each row's token int32 [B] behind the one that made these float32 logits [B, V], and log-probabilities for those
    that want them: of the model's own distribution, before anything else was done to the logits."""
    active, s = rows.position != IDLE, rows.sampling
    penalises = (s.repetition_penalty != 1) | (s.presence_penalty != 0) | (s.frequency_penalty != 0)
    shaped = jax.lax.cond((active & penalises).any(), lambda: penalise(logits, s, rows.counts), lambda: logits)
    place = rows.position + 1
    ruled_out = ~rows.allowed | (rows.stops & (place <= rows.quiet_end)[:, None])
    shaped = jnp.where(ruled_out, -jnp.inf, shaped + rows.bias)
    draws = active & (s.temperature >= SMALLEST_TEMPERATURE)
    best = jnp.argmax(shaped, axis=-1)
    tokens = jax.lax.cond(draws.any(), lambda: jnp.where(draws, _drawn(shaped, rows, draws), best), lambda: best)
    tokens = tokens.astype(jnp.int32)
    nothing = Logprobs.nothing(logits.shape[0], vocab_size=logits.shape[1])
    return tokens, jax.lax.cond((active & rows.tells).any(), lambda: Logprobs.of(logits, tokens), lambda: nothing)


def _drawn(logits: jax.Array, rows: Rows, draws: jax.Array) -> jax.Array:
    """A draw of each row [B]. The noise is made in one place, whatever filters run: were it made in each branch, it
    could round differently."""
    s = rows.sampling
    filters = draws & ((s.top_k > 0) | (s.top_p < 1))
    kept = jax.lax.cond(
        filters.any(), lambda: filter_logits(logits, s, search=True), lambda: filter_logits(logits, s, search=False)
    )
    return first_best(kept + gumbel(s.seed, rows.position + 1, logits.shape[-1]))
