"""Moments in 8 bits: what a code may be wrong by, and that training hardly notices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.models.params import ParamSpec, linear_spec
from jaxformers.train.eight_bit import Blocks, block_length, decode, encode, is_coded
from jaxformers.train.optim import make_optimizer
from jaxformers.train.optimizer_config import OptimizerConfig


def heavy_tailed(shape, seed=0):
    """Numbers over eight decades, as moments are."""
    draw = np.random.default_rng(seed)
    return (draw.standard_normal(shape) * 10.0 ** draw.uniform(-6, 2, shape)).astype(np.float32)


def code_values(kind) -> np.ndarray:
    """What codes stand for, ascending: the paper's dynamic tree, without its lone 1."""
    values = [0.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2 ** (decade + (kind == "root")) + 1)
        values += [*(10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2)]
    return np.sort(np.array(values + [-value for value in values[1:] if kind == "signed"]))


def blocks_of(x, length):
    return x.reshape(*x.shape[:-1], -1, length)


@pytest.mark.parametrize("shape", [(4, 512), (3, 8, 96), (2, 4, 64, 300)])
@pytest.mark.parametrize("kind", ["signed", "root"])
def test_every_number_becomes_the_nearest_code_of_its_block(kind, shape):
    x = heavy_tailed(shape)
    x = x**2 if kind == "root" else x
    coded = jax.jit(encode, static_argnums=1)(x, kind)
    assert (coded.codes.shape, coded.codes.dtype) == (shape, np.uint8 if kind == "root" else np.int8)
    length = block_length(shape)
    exact = blocks_of(np.sqrt(x) if kind == "root" else x, length)
    highest = code_values(kind)[-1]
    np.testing.assert_allclose(coded.scales, np.abs(exact).max(-1) / highest, rtol=1e-6)
    shares = exact.astype(np.float64) / np.asarray(coded.scales, np.float64)[..., None]
    least = np.abs(shares[..., None] - code_values(kind)).min(-1)
    found = jax.jit(decode, static_argnums=1)(coded, kind)
    found = blocks_of(np.sqrt(found) if kind == "root" else found, length) / np.asarray(coded.scales)[..., None]
    tiny = (kind == "root") & (shares < code_values(kind)[1])
    np.testing.assert_allclose(np.abs(found - shares)[~tiny], least[~tiny], atol=2e-6)
    np.testing.assert_allclose(found[tiny], code_values(kind)[1], rtol=1e-5)


def test_the_codes_are_255_values_whose_neighbours_are_never_far_apart():
    for kind, widest, error in (("signed", 0.9 / 64, 0.2), ("root", 0.9 / 128, 0.12)):
        values = code_values(kind)
        assert len(set(values)) == 255
        assert (np.diff(values) > 0).all()
        assert np.diff(values).max() < widest + 1e-6
        # What a thousandth of the largest, or more, is wrong by in relation to itself.
        shares = np.geomspace(1e-3, values[-1], 1000)
        nearest = values[np.abs(shares[:, None] - values).argmin(1)]
        assert (np.abs(nearest - shares) / shares).max() < error


def test_zero_stays_zero_and_no_other_second_moment_becomes_it():
    x = np.zeros((2, 64), np.float32)
    x[1, :2] = 1.0, 1e-30
    found = jax.jit(lambda x: decode(encode(x, "root"), "root"))(x)
    assert not np.any(found[0])
    assert found[1, 1] > 0
    assert not np.any(found[1, 2:])


def test_small_parameters_and_short_rows_stay_whole():
    assert is_coded(linear_spec((64, 64), ("embed", "mlp")))
    assert not is_coded(linear_spec((64, 63), ("embed", "mlp")))  # below 4096
    assert not is_coded(linear_spec((64, 257), ("embed", "mlp")))  # a prime: blocks of one
    assert not is_coded(ParamSpec((2048,), (None,), "ones").stacked(8))  # a layer's is small


SPEC = {"embed": ParamSpec((64, 256), ("vocab", "embed"), "normal", 256), "norm": ParamSpec((256,), (None,), "ones")}
OPTIMIZERS = {"adamw": 2, "adopt": 2, "lion": 1, "sgd": 1, "muon": 2}


def descend(name: str, state: str, steps: int = 60):
    """(distance to where a quadratic of very different curvatures is least, before and after, the state)."""
    draw = np.random.default_rng(0)
    aim = jax.tree.map(lambda s: jnp.asarray(draw.standard_normal(s.shape, dtype=np.float32)), SPEC)
    curvature = jax.tree.map(lambda s: jnp.asarray(10.0 ** draw.uniform(-2, 0, s.shape), jnp.float32), SPEC)
    rate = 0.5 if name == "sgd" else 0.03
    config = OptimizerConfig(name=name, learning_rate=rate, weight_decay=0.0, state=state)
    tx = make_optimizer(config, lambda step: rate * (1 - step / steps), SPEC)
    params = jax.tree.map(jnp.zeros_like, aim)
    moments = tx.init(params)

    @jax.jit
    def step(params, moments):
        with jax.numpy_dtype_promotion("standard"):
            grads = jax.tree.map(lambda c, p, a: c * (p - a), curvature, params, aim)
            updates, moments = tx.update(grads, moments, params)
        return jax.tree.map(jnp.add, params, updates), moments

    def distance(params):
        gaps = jax.tree.map(lambda c, p, a: (c * (p - a) ** 2).sum(), curvature, params, aim)
        return float(sum(jax.tree.leaves(gaps)))

    before = distance(params)
    for _ in range(steps):
        params, moments = step(params, moments)
    return before, distance(params), moments


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_arrives_where_it_does_with_whole_moments(name):
    before, whole, _ = descend(name, "float32")
    _, coded, moments = descend(name, "int8")
    assert whole < 0.5 * before
    assert coded < whole + 0.02 * before
    found = [node for node in jax.tree.leaves(moments, is_leaf=lambda n: isinstance(n, Blocks)) if is_blocks(node)]
    assert len(found) == OPTIMIZERS[name]
    assert {node.codes.shape for node in found} == {(64, 256)}
    assert all(node.codes.dtype.itemsize == 1 for node in found)
    assert sum(node.codes.nbytes + node.scales.nbytes for node in found) == len(found) * 64 * (256 + 4)


def is_blocks(node) -> bool:
    return isinstance(node, Blocks)
