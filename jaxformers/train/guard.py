"""Guards around an update: one that would poison the state is not made, and is counted.

All of it is part of the step's pure function, so what a guard remembers is saved, resumed and equal on any mesh.

W losses that are remembered
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxformers.train.config import GuardConfig

MAD_TO_DEVIATION = 1.4826  # of a normal distribution, its standard deviation over its median absolute deviation


@flax.struct.dataclass
class Guard:
    """int32 counts: updates left out in all and since the last one made, and losses that were spikes. losses float32
    [W]: of the last updates that were made, NaN where there are fewer; None where nobody asks for them."""

    skipped: jax.Array
    in_a_row: jax.Array
    spikes: jax.Array
    losses: jax.Array | None


def new_guard(config: GuardConfig) -> Guard:
    """What is remembered before the first update."""
    losses = None if config.spike == "off" else jnp.full((config.spike_window,), jnp.nan, jnp.float32)
    return Guard(*(jnp.zeros((), jnp.int32) for _ in range(3)), losses)


def is_spike(losses: jax.Array, loss: jax.Array, *, deviations: float) -> jax.Array:
    """Whether a loss lies further above the median of the remembered ones than they allow; bool scalar.

    Nothing is a spike before half of the losses are there, which is when the median says something.
    """
    middle = jnp.nanmedian(losses)
    spread = MAD_TO_DEVIATION * jnp.nanmedian(jnp.abs(losses - middle))
    known = jnp.sum(~jnp.isnan(losses)) * 2 >= losses.size
    return known & (loss > middle + deviations * spread)


def guarded(
    guard: Guard, config: GuardConfig, *, loss: jax.Array, norm: jax.Array, before: Any, after: Any
) -> tuple[Any, Guard, dict[str, jax.Array]]:
    """`after` where the update may be made, else `before` (trees of one form), with what is remembered now and metrics.

    loss: of this step, float32. norm: of its gradient. The metrics are the counts: `skipped_total`, `skipped_in_a_row`
    and `spikes_total`.
    """
    makes = finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    losses, spike = guard.losses, jnp.zeros((), bool)
    if losses is not None:
        spike = finite & is_spike(losses, loss, deviations=config.spike_deviations)
        makes = finite if config.spike == "warn" else finite & ~spike
        losses = jnp.where(makes, jnp.concatenate([losses[1:], loss[None]]), losses)
    left_out = 1 - makes.astype(jnp.int32)
    guard = Guard(
        guard.skipped + left_out, (guard.in_a_row + 1) * left_out, guard.spikes + spike.astype(jnp.int32), losses
    )
    metrics = {"skipped_total": guard.skipped, "skipped_in_a_row": guard.in_a_row, "spikes_total": guard.spikes}
    return jax.tree.map(lambda new, old: jnp.where(makes, new, old), after, before), guard, metrics


def after_rollback(now: Guard, then: Guard, *, steps: int) -> Guard:
    """What a run remembers that went back `steps` steps, to parameters of `then`, and leaves their data out."""
    return then.replace(skipped=then.skipped + steps, in_a_row=now.in_a_row, spikes=now.spikes)
