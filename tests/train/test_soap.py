"""SOAP's directions against the algorithm written out in float64 for one matrix at a time, and what they are good for.

Singular values of the gradients written out are even steps apart: what only rounding decides has no truth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import relative_error

from jaxformers.models.params import linear_spec
from jaxformers.train import soap
from jaxformers.train.optim import make_optimizer
from jaxformers.train.optimizer_config import OptimizerConfig
from jaxformers.train.soap import scale_by_soap

B1, B2, EPS = 0.8, 0.9, 1e-6
SPEC = {
    "q": linear_spec((8, 2, 5), ("embed", "heads", None)).stacked(2),
    "o": linear_spec((2, 4, 8), ("heads", None, "embed"), n_in=2, init="residual").stacked(2),
    "up": linear_spec((3, 8, 8), ("experts", "embed", "mlp")).stacked(2),
}
MATRICES = {"q": (8, 10), "o": (8, 8), "up": (8, 8)}
LIMIT = 9  # the longest side with a factor: not q's columns
STEPS = 13  # the second basis, made behind the eleventh, turns the last two


def gradient(seed: int):
    """Of every leaf; one expert never has any."""
    draw = np.random.default_rng(seed)

    def drawn(spec, shape):
        count = int(np.prod(spec.shape)) // int(np.prod(shape))
        u, _, v = np.linalg.svd(draw.standard_normal((count, *shape)), full_matrices=False)
        return (u * np.arange(1.0, 1.0 + min(shape)) @ v).reshape(spec.shape).astype(np.float32)

    grads = {name: drawn(spec, MATRICES[name]) for name, spec in SPEC.items()}
    grads["up"][:, 2] = 0.0
    return grads


def written_out(gradients: list, limit: int) -> list:
    """The directions of one matrix, in the order of the reference implementation: Algorithm 3, its first step skipped,
    bases renewed behind the update as in Algorithm 4."""
    shape = gradients[0].shape
    sides = [size <= limit for size in shape]
    factors, bases = [np.zeros((size, size)) for size in shape], [np.eye(size) for size in shape]
    m, v, directions = np.zeros(shape), np.zeros(shape), []
    for t, g in enumerate(gradients):
        if t > 0:
            m = B1 * m + (1 - B1) * g
            v = B2 * v + (1 - B2) * (bases[0].T @ g @ bases[1]) ** 2
            turned = bases[0].T @ m @ bases[1]
            step = turned / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + EPS)
            directions.append(bases[0] @ step @ bases[1].T)
        else:
            directions.append(np.zeros(shape))
        factors = [B2 * factor + (1 - B2) * outer for factor, outer in zip(factors, (g @ g.T, g.T @ g), strict=True)]
        for i in (0, 1):
            if sides[i] and t == 0:
                bases[i] = np.linalg.eigh(factors[i])[1]
            elif sides[i] and t % 10 == 0:
                order = np.argsort(-np.diag(bases[i].T @ factors[i] @ bases[i]), kind="stable")
                v = np.take(v, order, axis=i)
                bases[i] = np.linalg.qr(factors[i] @ bases[i][:, order])[0]
    return directions


def test_directions_are_those_of_the_written_out_algorithm(monkeypatch):
    monkeypatch.setattr(soap, "LARGEST", LIMIT)
    gradients = [gradient(seed) for seed in range(STEPS)]
    tx = scale_by_soap(SPEC, b1=B1, b2=B2, eps=EPS)
    state, update, ours = tx.init(gradients[0]), jax.jit(tx.update), []
    assert state.moments["q"].columns is None
    for grads in gradients:
        directions, state = update(grads, state)
        ours.append(directions)
    for name, shape in MATRICES.items():
        seen = np.array([grads[name] for grads in gradients], np.float64).reshape(STEPS, -1, *shape)
        truth = np.stack([written_out(list(one), LIMIT) for one in seen.swapaxes(0, 1)], axis=1)
        for t in range(STEPS):
            assert relative_error(ours[t][name].reshape(truth[t].shape), truth[t]) < 1e-5, (name, t)


def test_bases_stay_orthogonal_and_follow_the_factors():
    """From those of one gradient towards those of another one that is then the only one."""
    tx = scale_by_soap(SPEC, b1=B1, b2=B2, eps=EPS)
    state, update = tx.init(gradient(0)), jax.jit(tx.update)
    _, state = update(gradient(0), state)
    before = state.moments["up"].columns.basis
    for _ in range(41):
        _, state = update(gradient(1), state)
    side = state.moments["up"].columns
    eye = np.broadcast_to(np.eye(8), (2, 3, 8, 8))

    def off_diagonal(basis):
        inside = np.asarray(basis.mT @ side.factor @ basis)
        return np.abs(inside * (1 - eye)).max()

    np.testing.assert_allclose(side.basis.mT @ side.basis, eye, atol=1e-5)
    assert off_diagonal(side.basis) < 0.2 * off_diagonal(before)


def least_loss(name: str) -> float:
    """What is left of a quadratic after 100 updates at the best of several rates: rows and columns have curvatures of
    1 to 1000, and turned axes."""
    draw = np.random.default_rng(0)
    spec = {"w": linear_spec((12, 8), ("embed", "mlp"))}
    scales = [np.logspace(0, 1.5, size) for size in (12, 8)]
    turns = [np.linalg.qr(draw.standard_normal((size, size)))[0] for size in (12, 8)]
    left, right = (jnp.asarray(turn * scale, jnp.float32) for turn, scale in zip(turns, scales, strict=True))
    aim = jnp.asarray(draw.standard_normal((12, 8)), jnp.float32)

    def loss(params):
        return ((left.T @ (params["w"] - aim) @ right) ** 2).mean()

    def trained(rate):
        config = OptimizerConfig(name=name, weight_decay=0.0)
        tx = make_optimizer(config, lambda step: rate * (1 - step / 100), spec)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (jax.tree.map(jnp.add, params, updates), state), None

        params = {"w": jnp.zeros((12, 8))}
        with jax.numpy_dtype_promotion("standard"):
            (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=100)
        return loss(params)

    return float(jax.jit(jax.vmap(trained))(jnp.array([0.01, 0.03, 0.1, 0.3])).min())


def test_a_quadratic_whose_axes_are_turned_comes_down_further_than_with_adamw():
    ours, theirs = least_loss("soap"), least_loss("adamw")
    assert ours < 0.1 * theirs


@pytest.mark.parametrize("settings", [{"state": "int8"}, {"momentum": 0.5}])
def test_what_it_does_not_read_is_refused(settings):
    with pytest.raises(ValueError, match=f"soap does not read {next(iter(settings))}"):
        OptimizerConfig(name="soap", **settings)
