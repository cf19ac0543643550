"""The learning rate as a function of the step."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from jaxformers.train.config import ScheduleConfig


def make_schedule(config: ScheduleConfig, *, peak: float, steps: int) -> optax.Schedule:
    """Step (0 for the first update) -> learning rate. Linear warm-up to `peak`, then the named shape until `steps`.

    The first update already has a rate above zero: step i of the warm-up gets (i + 1) / warmup_steps of the peak.
    """
    warmup = config.warmup_steps
    if warmup >= steps:
        raise ValueError(f"schedule: warmup_steps is {warmup}; it must be below the run's {steps} steps")
    after = _shape(config, peak, steps)
    if not warmup:
        return after
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def _shape(config: ScheduleConfig, peak: float, steps: int) -> optax.Schedule:
    """The rate from the end of the warm-up on, by steps since then; it reaches its final value at the run's last
    step."""
    final, last = config.final_fraction, max(steps - config.warmup_steps - 1, 1)
    match config.name:
        case "constant":
            return optax.constant_schedule(peak)
        case "cosine":
            return optax.cosine_decay_schedule(peak, last, alpha=final)
        case "linear":
            return optax.linear_schedule(peak, peak * final, last)
        case "wsd":
            decay = min(max(round(steps * config.decay_fraction), 1), last)
            return optax.linear_schedule(peak, peak * final, decay, transition_begin=last - decay)
        case "inverse_sqrt":
            offset = max(config.warmup_steps, 1)
            # join_schedules also asks for the steps before, whose rate it then leaves out.
            return lambda step: peak * jnp.sqrt(offset / (offset + jnp.maximum(step, 0)))
