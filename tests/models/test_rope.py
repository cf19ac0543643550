"""Rotary embeddings equal the reference's frequencies, and the rotation written out pair by pair."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxformers.models.config import DynamicScaling, LinearScaling, Llama3Scaling, Rope, YarnScaling
from jaxformers.models.rope import inverse_frequencies, rotate, rotation

DIM, THETA, CONTEXT = 64, 500_000.0, 1024
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256}
# rope_parameters of a config.json -> what we make of them
SCALINGS = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, LinearScaling(4.0)),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        Llama3Scaling(8.0, 256, 1.0, 4.0),
    ),
    "yarn": (YARN, YarnScaling(8.0, 256, 0.1 * math.log(8) + 1)),
    "yarn, not truncated": (YARN | {"truncate": False}, YarnScaling(8.0, 256, 0.1 * math.log(8) + 1, truncate=False)),
    "yarn, other turns": (
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
        YarnScaling(8.0, 256, 1.3, 16.0, 2.0),
    ),
}


def reference(parameters: dict, **call) -> tuple[np.ndarray, float]:
    """Inverse frequencies and the factor on sin and cos."""
    config = transformers.LlamaConfig(
        hidden_size=4 * DIM,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_theta": THETA} | parameters,
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, **call)
    return frequencies.double().numpy(), factor


def angles_of(turned) -> np.ndarray:
    return np.arctan2(np.asarray(turned.sin, np.float64), np.asarray(turned.cos, np.float64))


def test_without_a_scaling_pair_i_turns_by_theta_to_the_minus_2i_over_dim():
    expected = [THETA ** (-2 * i / DIM) for i in range(DIM // 2)]
    np.testing.assert_allclose(inverse_frequencies(Rope(DIM, THETA)), expected, rtol=1e-12)


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies_are_the_references(name):
    parameters, scaling = SCALINGS[name]
    expected, factor = reference(parameters)
    np.testing.assert_allclose(inverse_frequencies(Rope(DIM, THETA, scaling=scaling)), expected, rtol=2e-6)
    turned = rotation(Rope(DIM, THETA, scaling=scaling), jnp.array([[3]], jnp.int32))
    np.testing.assert_allclose(np.hypot(turned.sin, turned.cos), factor, rtol=1e-6)


def test_the_scalings_differ_from_each_other_here():
    # Otherwise the comparisons above could pass by accident.
    found = [inverse_frequencies(Rope(DIM, THETA, scaling=s)) for _, s in SCALINGS.values()]
    found.append(inverse_frequencies(Rope(DIM, THETA)))
    for i, one in enumerate(found):
        assert all(np.abs(one / other - 1).max() > 1e-3 for other in found[:i])


@pytest.mark.parametrize("length", [5, CONTEXT, CONTEXT + 1, 4 * CONTEXT])
def test_a_dynamic_base_follows_the_length_past_the_context(length):
    expected, _ = reference({"rope_type": "dynamic", "factor": 3.0}, seq_len=length)
    turned = rotation(Rope(DIM, THETA, scaling=DynamicScaling(3.0, CONTEXT)), jnp.array([[1, length - 1]], jnp.int32))
    np.testing.assert_allclose(angles_of(turned)[0, 0, 0], expected, rtol=1e-5)


def test_a_dynamic_base_is_each_rows_own():
    rope = Rope(DIM, THETA, scaling=DynamicScaling(3.0, CONTEXT))
    both = rotation(rope, jnp.array([[1, 8], [1, 4000]], jnp.int32))
    for row, last in enumerate((8, 4000)):
        alone = rotation(rope, jnp.array([[1, last]], jnp.int32))
        np.testing.assert_array_equal(both.sin[row], alone.sin[0])


def test_yarn_interpolates_slow_pairs_and_keeps_fast_ones():
    plain, scaled = (
        inverse_frequencies(Rope(DIM, THETA)),
        inverse_frequencies(Rope(DIM, THETA, scaling=SCALINGS["yarn"][1])),
    )
    assert scaled[0] == plain[0]
    assert scaled[-1] == pytest.approx(plain[-1] / 8)
    # The pairs that turn 32 times and once over the original context bound the blend.
    low, high = (DIM * math.log(256 / (turns * 2 * math.pi)) / (2 * math.log(THETA)) for turns in (32, 1))
    for i, (a, b) in enumerate(zip(plain, scaled, strict=True)):
        mix = min(max((i - math.floor(low)) / (math.ceil(high) - math.floor(low)), 0), 1)
        assert b == pytest.approx(a * (1 - mix) + a / 8 * mix)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 4])
def test_each_pair_is_turned_by_its_angle_and_the_rest_passes_through(interleaved, dim):
    rope = Rope(dim, 100.0, interleaved)
    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((2, 3, 2, 8)).astype(np.float32), np.array([[0, 1, 7], [5, 6, 2]], np.int32)
    expected = x.astype(np.complex128).real.copy()
    for b, t, h, i in np.ndindex(2, 3, 2, dim // 2):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
        number = complex(x[b, t, h, first], x[b, t, h, second])
        number *= np.exp(1j * positions[b, t] * 100.0 ** (-2 * i / dim))
        expected[b, t, h, first], expected[b, t, h, second] = number.real, number.imag
    turned = rotate(jnp.asarray(x), rope, rotation(rope, jnp.asarray(positions)))
    np.testing.assert_allclose(turned, expected, atol=1e-6)


def test_a_bfloat16_input_is_rotated_in_float32():
    rope = Rope(8, 100.0)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 1, 8)), jnp.bfloat16)
    by = rotation(rope, jnp.arange(4)[None] + 1000)
    exact = rotate(x.astype(jnp.float32), rope, by)
    np.testing.assert_array_equal(rotate(x, rope, by), exact.astype(jnp.bfloat16))
