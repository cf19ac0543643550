"""AdEMAMix: Adam with a second, slow mean of the gradients beside the fast one (arXiv:2409.03137).

The update is optax's. Here is how far the slow mean has come to count at each step of a run, without which the first
thousand steps diverge.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax
from optax.contrib import scale_by_ademamix

SLOW = 0.9999  # the slow mean's decay at the end of the run
SHARE = 5.0  # of the slow mean in an update at the end of the run; the fast one's is 1


def warmed_up_ademamix(*, b1: float, b2: float, eps: float, steps: int) -> optax.GradientTransformation:
    """AdEMAMix over a run of so many steps: the slow mean's share grows evenly from zero, and its half-life from that
    of b1 (section 3 of the paper)."""
    # A mean's half-life is log(1/2) / log(decay), so it is what lies between the inverse logarithms.
    fast, slow = (1 / math.log(decay) if decay else 0.0 for decay in (b1, SLOW))

    def progress(count: jax.Array) -> jax.Array:
        return jnp.minimum((count + 1) / jnp.float32(steps), 1.0)

    def decay(count: jax.Array) -> jax.Array:
        done = progress(count)
        return jnp.exp(1 / ((1 - done) * fast + done * slow))

    return scale_by_ademamix(b1, b2, b3=decay, alpha=lambda count: SHARE * progress(count), eps=eps)
