"""The learning rate as a function of the step."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import optax

from jaxformers.train.optimizer_config import ScheduleConfig


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
        case "cosine" if config.cycles > 1:
            return _restarted(config, peak, last + 1)
        case "cosine":
            return optax.cosine_decay_schedule(peak, last, alpha=final)
        case "linear":
            return optax.linear_schedule(peak, peak * final, last)
        case "polynomial":
            return optax.polynomial_schedule(peak, peak * final, config.power, last)
        case "wsd":
            decay = min(max(round(steps * config.decay_fraction), 1), last)
            if config.power == 1:
                return optax.linear_schedule(peak, peak * final, decay, transition_begin=last - decay)
            return lambda step: peak * (1 - (1 - final) * jnp.clip((step - last + decay) / decay, 0, 1) ** config.power)
        case "inverse_sqrt":
            offset = max(config.warmup_steps, 1)
            # join_schedules also asks for the steps before, whose rate it then leaves out.
            return lambda step: peak * jnp.sqrt(offset / (offset + jnp.maximum(step, 0)))


def _restarted(config: ScheduleConfig, peak: float, steps: int) -> optax.Schedule:
    """Cosine decays one after the other, each as long as the next (but for rounding) and each from the peak to the
    final rate (arXiv:1608.03983)."""
    starts = [round(steps * cycle / config.cycles) for cycle in range(config.cycles + 1)]
    spans = [max(end - start - 1, 1) for start, end in itertools.pairwise(starts)]
    decays = [optax.cosine_decay_schedule(peak, span, alpha=config.final_fraction) for span in spans]
    return optax.join_schedules(decays, starts[1:-1])
