"""The average beside the parameters against its definition, and what of its settings is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from jaxformers.train.average import averaged
from jaxformers.train.config import TrainConfig

START, UPDATES = 100.0, 9
PARAMETERS = np.random.default_rng(0).standard_normal(UPDATES)  # after each update


def averages(**settings) -> list[float]:
    config, average, found = TrainConfig(steps=UPDATES, **settings), {"w": jnp.float32(START)}, []
    for made, value in enumerate(PARAMETERS, start=1):
        average = averaged(average, {"w": jnp.float32(value)}, jnp.int32(made), config)
        found.append(float(average["w"]))
    return found


@pytest.mark.parametrize("first", [1, 4])
def test_a_plain_average_is_the_mean_of_what_entered_it(first):
    found = averages(average="sma", average_from=first)
    np.testing.assert_allclose(found[: first - 1], PARAMETERS[: first - 1], rtol=1e-6)
    for made in range(first, UPDATES + 1):
        entered = [PARAMETERS[i - 1] for i in range(first, made + 1)]
        assert found[made - 1] == pytest.approx(np.mean(entered), rel=1e-5), made


def test_a_plain_average_from_the_start_counts_the_initial_parameters():
    assert averages(average="sma")[-1] == pytest.approx((START + PARAMETERS.sum()) / (UPDATES + 1), rel=1e-5)


@pytest.mark.parametrize("first", [0, 4])
def test_an_exponential_average_begins_with_the_parameters_of_its_first_update(first):
    found = averages(ema_decay=0.75, average_from=first)
    truth = START
    for made, value in enumerate(PARAMETERS, start=1):
        truth = value if made <= first else 0.75 * truth + 0.25 * value
        assert found[made - 1] == pytest.approx(truth, rel=1e-5), made


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"average": "ema"}, "average=ema does not go with ema_decay=None; ema needs one, sma none"),
        ({"average": "sma", "ema_decay": 0.9}, "average=sma does not go with ema_decay=0.9; ema needs one, sma none"),
        ({"average_from": 2}, "average_from needs an average; set average=sma, or ema_decay"),
        ({"average": "sma", "average_from": 11}, "average_from is 11, which a run of 10 steps does not reach"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValidationError) as caught:
        TrainConfig(steps=10, **settings)
    assert message in str(caught.value)
