"""One update against the written-out optimizer: the loss here is linear, so its gradient is whatever the batch says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformers.models.params import ParamSpec
from jaxformers.train.average import averaged
from jaxformers.train.config import GuardConfig, TrainConfig
from jaxformers.train.losses import Sums, Totals
from jaxformers.train.optim import decay_mask, make_optimizer
from jaxformers.train.optimizer_config import OptimizerConfig
from jaxformers.train.state import new_state
from jaxformers.train.step import make_train_step, mean_metrics, split_microbatches

SPEC = {
    "embed": ParamSpec((4, 3), ("vocab", "embed")),
    "out": ParamSpec((3, 2), ("embed", None), "residual"),
    "norm": ParamSpec((3,), (None,), "ones"),
    "bias": ParamSpec((2,), (None,), "zeros"),
}
LR, B1, B2, EPS, DECAY = 0.1, 0.9, 0.95, 1e-6, 0.3


def linear_loss(params, batch, totals):
    """Sum over the batch of weight x (parameters . coefficients), over the whole batch's weight."""
    per_row = sum(jnp.einsum("b...,...->b", batch[name], params[name]) for name in params)
    value = (per_row * batch["weights"].sum(axis=-1)).sum()
    zero = jnp.zeros(())
    return value / totals.weight, Sums(nll=value, z=zero, correct=zero, weight=batch["weights"].sum())


def draw_params(seed=0):
    draw = np.random.default_rng(seed)
    return {name: draw.standard_normal(spec.shape).astype(np.float32) for name, spec in SPEC.items()}


def draw_batch(rows=4, seed=0):
    draw = np.random.default_rng(seed)
    batch = {name: draw.standard_normal((rows, *spec.shape)).astype(np.float32) for name, spec in SPEC.items()}
    weights = (np.arange(5) < draw.integers(1, 6, (rows, 1))).astype(np.float32)
    return batch | {"weights": weights, "segment_ids": np.ones((rows, 5), np.int32)}


def gradient_of(batch):
    """The gradient of `linear_loss`: each row's coefficients by its share of all weight."""
    shares = batch["weights"].sum(axis=-1).astype(np.float64)
    return {name: np.tensordot(shares / shares.sum(), batch[name].astype(np.float64), 1) for name in SPEC}


def run(batches, *, config=None, schedule=lambda step: LR, ema=None, guard=GuardConfig(), **settings):
    """Parameters (and metrics) after each batch."""
    config = config or OptimizerConfig(learning_rate=LR, b1=B1, b2=B2, eps=EPS, weight_decay=DECAY)
    tx = make_optimizer(config, schedule, SPEC)
    average = None if ema is None else partial(averaged, config=TrainConfig(ema_decay=ema))
    step = jax.jit(make_train_step(linear_loss, tx, schedule, average=average, guard=guard, **settings))
    params = jax.tree.map(jnp.asarray, draw_params())
    state = new_state(params, tx, jax.random.key(0), guard=guard, ema=ema is not None)
    states, metrics = [], []
    for batch in batches:
        state, found = step(state, batch)
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(found))
    return states, metrics


def adamw(gradients, params, rate=lambda step: LR, decayed=("embed", "out")):
    """Parameters after each gradient, by Loshchilov and Hutter's algorithm 2 in float64."""
    w = {name: value.astype(np.float64) for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in w.items()}
    v = {name: np.zeros_like(value) for name, value in w.items()}
    for t, gradient in enumerate(gradients, start=1):
        for name, g in gradient.items():
            m[name] = B1 * m[name] + (1 - B1) * g
            v[name] = B2 * v[name] + (1 - B2) * g**2
            update = (m[name] / (1 - B1**t)) / (np.sqrt(v[name] / (1 - B2**t)) + EPS)
            w[name] = w[name] - rate(t - 1) * (update + DECAY * w[name] * (name in decayed))
        yield dict(w)


def assert_close(ours, truth, rtol=2e-5):
    for name in truth:
        np.testing.assert_allclose(ours[name], truth[name], rtol=rtol, atol=1e-6, err_msg=name)


def test_the_first_three_steps_are_the_written_out_adamw():
    batches = [draw_batch(seed=seed) for seed in range(3)]
    states, _ = run(batches)
    for state, truth in zip(states, adamw(map(gradient_of, batches), draw_params()), strict=True):
        assert_close(state.params, truth)
    assert int(states[-1].step) == 3


def test_each_update_has_the_rate_that_its_metrics_report():
    def schedule(step):
        return jnp.asarray([0.5, 0.25, 0.125], jnp.float32)[step]

    batches = [draw_batch(seed=seed) for seed in range(3)]
    states, metrics = run(batches, schedule=schedule)
    assert [float(found["lr"]) for found in metrics] == [0.5, 0.25, 0.125]
    truth = list(adamw(map(gradient_of, batches), draw_params(), rate=lambda step: [0.5, 0.25, 0.125][step]))
    assert_close(states[-1].params, truth[-1])


def test_weight_decay_spares_norms_and_biases():
    assert decay_mask(SPEC) == {"embed": True, "out": True, "norm": False, "bias": False}
    states, _ = run([draw_batch()])
    everything = next(adamw([gradient_of(draw_batch())], draw_params(), decayed=tuple(SPEC)))
    assert np.abs(states[0].params["norm"] - everything["norm"]).max() > 1e-3


def test_clipping_scales_the_whole_gradient_to_the_limit_and_reports_the_norm_before():
    batch, limit = draw_batch(), 0.01
    gradient = gradient_of(batch)
    norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    assert norm > limit
    states, metrics = run([batch], clip_norm=limit)
    assert float(metrics[0]["grad_norm"]) == pytest.approx(norm, rel=1e-6)
    # The first step's second moment shows the gradient that the optimizer saw.
    seen = np.sqrt(sum(v.sum() for v in states[0].opt_state[0].nu.values()) / (1 - B2))
    assert seen == pytest.approx(limit, rel=1e-5)


def test_a_gradient_below_the_limit_is_left_alone():
    batch = draw_batch()
    assert_close(run([batch], clip_norm=1e3)[0][0].params, run([batch])[0][0].params, rtol=0)


def test_a_gradient_of_zero_is_clipped_to_zero_and_not_to_nan():
    batch = {name: np.zeros_like(a) if name in SPEC else a for name, a in draw_batch().items()}
    states, metrics = run([batch], clip_norm=1.0)
    assert float(metrics[0]["grad_norm"]) == 0
    assert all(np.isfinite(value).all() for value in states[0].params.values())


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulating_microbatches_weighs_tokens_and_not_rows(accumulation):
    batch = draw_batch(rows=8)
    per_row = batch["weights"].sum(axis=-1)
    assert len(set(per_row)) > 1, "rows with as many targets each would not tell the two apart"
    whole, whole_metrics = run([batch])
    split, split_metrics = run([batch], accumulation=accumulation)
    assert_close(split[0].params, whole[0].params)
    for name in whole_metrics[0]:
        assert float(split_metrics[0][name]) == pytest.approx(float(whole_metrics[0][name]), rel=1e-5), name


def test_microbatches_are_interleaved_so_that_devices_keep_their_rows():
    batch = {"tokens": np.arange(12).reshape(6, 2)}
    split = split_microbatches(batch, 3)["tokens"]
    assert split.shape == (3, 2, 2)
    np.testing.assert_array_equal(split[1], batch["tokens"][[1, 4]])


def test_the_moving_average_follows_its_formula():
    states, _ = run([draw_batch(seed=seed) for seed in range(3)], ema=0.75)
    truth = draw_params()
    for state in states:
        truth = {name: 0.75 * truth[name] + 0.25 * state.params[name] for name in truth}
        assert_close(state.ema, truth)


def test_without_a_decay_there_is_no_average():
    assert run([draw_batch()])[0][0].ema is None


def test_metrics_are_means_over_targets():
    sums = Sums(nll=jnp.float32(30), z=jnp.float32(0), correct=jnp.float32(3), weight=jnp.float32(10))
    batch = {"weights": jnp.ones((2, 5)), "segment_ids": jnp.ones((2, 5), jnp.int32)}
    metrics = mean_metrics(
        sums.replace(load=jnp.array([[1.0, 3.0], [2.0, 2.0]]), dropped=jnp.float32(2)), Totals.of(batch)
    )
    assert {name: float(value) for name, value in metrics.items()} == {
        "loss": 3.0,
        "accuracy": pytest.approx(0.3),
        "targets": 10.0,
        "expert_load_max": 1.5,
        "expert_dropped": 0.25,
    }


def test_a_batch_without_targets_moves_nothing_but_decay_and_is_no_nan():
    batch = draw_batch()
    batch["weights"][:] = 0
    states, metrics = run([batch])
    assert float(metrics[0]["loss"]) == 0
    for name, value in draw_params().items():
        kept = value * (1 - LR * DECAY * (name in ("embed", "out")))
        np.testing.assert_allclose(states[0].params[name], kept, rtol=1e-6)


def test_the_global_norm_is_over_every_leaf():
    _, metrics = run([draw_batch()])
    assert float(metrics[0]["grad_norm"]) == pytest.approx(float(optax.tree.norm(gradient_of(draw_batch()))), rel=1e-6)


# -- guards


def with_loss(batch, loss):
    """The batch moved along one coefficient so that the loss of the first parameters is about this."""
    params = draw_params()
    now = float(linear_loss(params, jax.tree.map(jnp.asarray, batch), Totals.of(batch))[0])
    change = (loss - now) / params["norm"][0]
    return batch | {"norm": batch["norm"] + np.float32([change, 0, 0])}


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_an_update_that_is_not_finite_costs_that_update_and_nothing_else(poison):
    schedule = optax.linear_schedule(0.1, 0.2, 10)
    good = [draw_batch(seed=seed) for seed in range(4)]
    bad = good[1] | {"out": good[1]["out"] * np.float32(poison)}
    clean, _ = run(good, schedule=schedule, ema=0.9)
    guarded, metrics = run([*good[:2], bad, bad, *good[2:]], schedule=schedule, ema=0.9)
    for ours, truth in zip([guarded[i] for i in (0, 1, 4, 5)], clean, strict=True):
        for part in ("params", "opt_state", "ema"):
            jax.tree.map(np.testing.assert_array_equal, getattr(ours, part), getattr(truth, part))
    assert [int(state.step) for state in guarded] == [1, 2, 3, 4, 5, 6]
    assert [int(m["skipped_total"]) for m in metrics] == [0, 0, 1, 2, 2, 2]
    assert [int(m["skipped_in_a_row"]) for m in metrics] == [0, 0, 1, 2, 0, 0]
    np.testing.assert_allclose([m["lr"] for m in metrics], [0.1, 0.11, 0.12, 0.12, 0.12, 0.13], rtol=1e-6)


@pytest.mark.parametrize("policy", ["warn", "skip", "rollback"])
def test_a_spike_is_a_loss_far_above_the_median_in_deviations(policy):
    guard, frozen = (
        GuardConfig(spike=policy, spike_window=8, spike_deviations=3.0),
        OptimizerConfig(learning_rate=1e-30),
    )
    draw = np.random.default_rng(1)
    losses = [float(x) for x in draw.normal(5.0, 0.1, 12)]
    losses[2] = losses[7] = 50.0  # the first comes before there is a median to speak of
    losses[9] = 1.0  # far below is no spike
    batches = [with_loss(draw_batch(seed=seed), loss) for seed, loss in enumerate(losses)]
    _, metrics = run(batches, guard=guard, config=frozen, schedule=lambda step: 1e-30)
    measured, kept, spikes = [float(m["loss"]) for m in metrics], [], []
    for loss in measured:
        last = np.array(kept[-8:])
        middle = np.median(last) if len(last) >= 4 else np.inf
        spikes.append(bool(len(last) >= 4 and loss > middle + 3 * 1.4826 * np.median(np.abs(last - middle))))
        if policy == "warn" or not spikes[-1]:
            kept.append(loss)
    assert [i for i in (2, 7, 9) if spikes[i]] == [7]
    assert np.diff([0] + [int(m["spikes_total"]) for m in metrics]).astype(bool).tolist() == spikes
    assert int(metrics[-1]["skipped_total"]) == (0 if policy == "warn" else sum(spikes))
