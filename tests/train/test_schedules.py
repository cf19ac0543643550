"""Learning rates against their formulas, written out."""

import math

import jax
import numpy as np
import pytest

from jaxformers.train.optimizer_config import ScheduleConfig
from jaxformers.train.schedules import make_schedule

PEAK, STEPS, WARMUP = 3e-3, 100, 10


def rates(steps: int = STEPS, **settings) -> np.ndarray:
    schedule = make_schedule(ScheduleConfig(**settings), peak=PEAK, steps=steps)
    return np.array([float(schedule(step)) for step in range(steps)])


def after_warmup(name: str, final: float, decay_fraction: float = 0.2) -> list[float]:
    """The rate at each step after the warm-up, by the textbook formula; the last step's is the final one."""
    span = STEPS - WARMUP - 1
    done = [step / span for step in range(STEPS - WARMUP)]
    match name:
        case "constant":
            return [PEAK for _ in done]
        case "cosine":
            return [PEAK * (final + (1 - final) * (1 + math.cos(math.pi * x)) / 2) for x in done]
        case "linear":
            return [PEAK * (1 - (1 - final) * x) for x in done]
        case "wsd":
            decay = STEPS * decay_fraction
            return [PEAK * (1 - (1 - final) * max(0, decay - span + step) / decay) for step in range(STEPS - WARMUP)]
        case "inverse_sqrt":
            return [PEAK * math.sqrt(WARMUP / (WARMUP + step)) for step in range(STEPS - WARMUP)]
    raise AssertionError(name)


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd", "inverse_sqrt"])
def test_every_step_has_the_rate_of_the_formula(name, final):
    found = rates(name=name, warmup_steps=WARMUP, final_fraction=final)
    rise = [PEAK * (step + 1) / WARMUP for step in range(WARMUP)]
    np.testing.assert_allclose(found, rise + after_warmup(name, final), rtol=2e-6, atol=1e-9)


def test_the_first_update_already_has_a_rate_and_the_warmup_ends_at_the_peak():
    found = rates(name="constant", warmup_steps=WARMUP)
    assert found[0] == pytest.approx(PEAK / WARMUP)
    assert found[WARMUP - 1] == found[WARMUP] == pytest.approx(PEAK)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 2, STEPS - 2])
def test_decays_begin_at_the_peak_and_end_at_the_final_rate_in_the_last_step(name, warmup):
    found = rates(name=name, warmup_steps=warmup, final_fraction=0.1)
    assert found[warmup] == pytest.approx(PEAK)
    assert found[-1] == pytest.approx(0.1 * PEAK)
    assert (np.diff(found[warmup:]) <= 1e-9).all()


def test_a_warmup_one_step_short_of_the_run_leaves_one_step_at_the_peak():
    assert rates(name="cosine", warmup_steps=STEPS - 1)[-1] == pytest.approx(PEAK)


def test_a_run_of_one_step_has_the_peak_rate():
    assert rates(name="cosine", warmup_steps=0, steps=1) == pytest.approx([PEAK])


def test_wsd_that_decays_all_along_reaches_its_final_rate():
    found = rates(name="wsd", warmup_steps=WARMUP, decay_fraction=1.0, final_fraction=0.0)
    assert found[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_a_polynomial_leaves_a_power_of_what_remains_and_wsd_takes_a_power_of_what_is_done(power):
    span, final = STEPS - WARMUP - 1, 0.1
    found = rates(name="polynomial", warmup_steps=WARMUP, final_fraction=final, power=power)
    left = np.array([(1 - step / span) ** power for step in range(span + 1)])
    np.testing.assert_allclose(found[WARMUP:], PEAK * (final + (1 - final) * left), rtol=2e-6, atol=1e-9)
    found = rates(name="wsd", warmup_steps=WARMUP, final_fraction=final, power=power)
    done = np.array([max(0, step - span + 20) / 20 for step in range(span + 1)])
    np.testing.assert_allclose(found[WARMUP:], PEAK * (1 - (1 - final) * done**power), rtol=2e-6, atol=1e-9)


def test_cosine_cycles_begin_at_the_peak_and_end_at_the_final_rate_each():
    found = rates(name="cosine", warmup_steps=WARMUP, final_fraction=0.1, cycles=3)[WARMUP:]
    one = [PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 29)) / 2) for step in range(30)]
    np.testing.assert_allclose(found, 3 * one, rtol=2e-6)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "linear", "cycles": 2}, "linear does not read cycles (here 2); it is for cosine"),
        ({"name": "cosine", "power": 2.0}, "cosine does not read power (here 2.0); it is for polynomial, wsd"),
    ],
)
def test_a_key_that_the_shape_does_not_read_is_refused(settings, message):
    with pytest.raises(ValueError) as caught:
        ScheduleConfig(**settings)
    assert message in str(caught.value)


@pytest.mark.parametrize("warmup", [STEPS, STEPS + 1])
def test_a_warmup_as_long_as_the_run_is_refused_with_both_numbers(warmup):
    with pytest.raises(ValueError, match=f"warmup_steps is {warmup}; it must be below the run's {STEPS} steps"):
        make_schedule(ScheduleConfig(warmup_steps=warmup), peak=PEAK, steps=STEPS)


def test_a_schedule_is_traceable():
    schedule = make_schedule(ScheduleConfig(warmup_steps=3), peak=PEAK, steps=STEPS)
    with jax.numpy_dtype_promotion("standard"):  # as the step calls it: optax mixes integer steps with floats
        assert float(jax.jit(schedule)(5)) == pytest.approx(float(schedule(5)))
