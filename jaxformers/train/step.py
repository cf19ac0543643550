"""One update, and one evaluation, as pure functions of state and batch.

B batch, A microbatches, T time
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxformers.models.observe import Seen
from jaxformers.models.params import Params
from jaxformers.train.config import GuardConfig
from jaxformers.train.guard import guarded
from jaxformers.train.losses import Batch, Sums, Totals
from jaxformers.train.optim import clip_scale
from jaxformers.train.state import TrainState

Metrics = dict[str, jax.Array]
Loss = Callable[[Params, Batch, Totals], tuple[jax.Array, Sums]]
Measure = Callable[[Sums, Totals, Mapping[str, Params]], Metrics]


def split_microbatches(batch: Batch, count: int) -> dict[str, jax.Array]:
    """[B, ...] -> [A, B / A, ...], interleaved: row i goes to microbatch i mod A, so every device keeps its rows."""
    return {name: a.reshape(-1, count, *a.shape[1:]).swapaxes(0, 1) for name, a in batch.items()}


def value_and_gradient(
    loss: Loss,
    params: Params,
    batch: Batch,
    *,
    accumulation: int,
    place_gradient: Callable[[Params], Params] = lambda grads: grads,
) -> tuple[jax.Array, Sums, Params]:
    """Loss, sums and gradient of a whole batch, computed in `accumulation` microbatches: equal to one, up to
    rounding."""
    totals = Totals.of(batch)

    def gradient(params: Params, batch: Batch, totals: Totals) -> tuple[tuple[jax.Array, Sums], Params]:
        values, grads = jax.value_and_grad(loss, has_aux=True)(params, batch, totals)
        return values, place_gradient(grads)

    if accumulation == 1:
        (value, sums), grads = gradient(params, batch, totals)
        return value, sums, grads

    def part(microbatch: Batch) -> tuple[Any, Seen | None]:
        (value, sums), grads = gradient(params, microbatch, totals)
        return ((value, sums.replace(seen=None)), grads), sums.seen  # which does not add up

    def add(carry: Any, microbatch: Batch) -> tuple[Any, Seen | None]:
        new, seen = part(microbatch)
        return jax.tree.map(jnp.add, carry, new), seen

    microbatches = split_microbatches(batch, accumulation)
    first = {name: a[0] for name, a in microbatches.items()}
    shapes, _ = jax.eval_shape(part, first)
    (values, grads) = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    zeros = values, place_gradient(grads)
    ((value, sums), grads), seen = jax.lax.scan(add, zeros, microbatches)
    return value, sums.replace(seen=None if seen is None else seen.over_microbatches()), grads


def make_train_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    guard: GuardConfig,
    accumulation: int = 1,
    clip_norm: float | None = None,
    average: Callable[[Params, Params, jax.Array], Params] | None = None,
    balance: Callable[[Params, jax.Array], Params] | None = None,
    clip_logits: Callable[[Params, jax.Array], Params] | None = None,
    place_gradient: Callable[[Params], Params] = lambda grads: grads,
    extend: Callable[[Batch], Batch] = lambda batch: batch,
    fetch: Callable[[TrainState], TrainState] = lambda state: state,
    complete: Callable[[Params, TrainState], Params] = lambda params, _state: params,
    measure: Measure | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function (state, batch) -> (state after one update, metrics as scalars: counts int32, all others float32).

    schedule is the one `tx` follows, to be reported. guard says which updates are left out. grad_norm is the global
    norm before clipping to `clip_norm`.
    average(average, parameters, updates made) is the average after an update.
    balance(parameters, load [sparse layers, E]) moves, after the optimizer, what it does not: experts' biases.
    clip_logits(parameters, largest attention logits [layers, H]) scales down, then, what makes those too large.
    place_gradient pins a microbatch's gradient to its place on the mesh. extend gives the batch what the loss needs
    beside it, before it is split. fetch brings what of a state is elsewhere to the devices, for the update.
    complete(parameters, state) is the model that the loss sees of the trained parameters. measure adds metrics of its
    own, from the gradient before clipping, the proposed update, and the parameters before it.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = extend(batch)

        def of_trained(params: Params, batch: Batch, totals: Totals) -> tuple[jax.Array, Sums]:
            return loss(complete(params, state), batch, totals)

        value, sums, grads = value_and_gradient(
            of_trained, state.params, batch, accumulation=accumulation, place_gradient=place_gradient
        )
        state = fetch(state)
        norm, raw = optax.tree.norm(grads), grads
        scale = clip_scale(norm, clip_norm)
        grads = jax.tree.map(lambda g: g * scale, grads)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by its integer step
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            rate = jnp.asarray(schedule(state.step - state.guard.skipped), jnp.float32)
        params = optax.apply_updates(state.params, updates)
        if balance is not None:
            params = balance(params, sums.load)
        if clip_logits is not None:
            params = clip_logits(params, sums.seen.logits)
        ema = state.ema
        if ema is not None and average is not None:
            ema = average(ema, params, state.step + 1 - state.guard.skipped)
        metrics = {"objective": value, "grad_norm": norm, "lr": rate, **mean_metrics(sums, Totals.of(batch))}
        if clip_logits is not None:
            metrics["max_attention_logit"] = sums.seen.logits.max()
        if measure is not None:
            trees = {"grad": raw, "update": updates, "param": state.params}
            metrics |= measure(sums, Totals.of(batch), trees)
        before, after = (state.params, state.opt_state, state.ema), (params, opt_state, ema)
        (params, opt_state, ema), kept, guarding = guarded(
            state.guard, guard, loss=metrics["loss"], norm=norm, before=before, after=after
        )
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema, guard=kept)
        return state, metrics | guarding

    return step


def mean_metrics(sums: Sums, totals: Totals) -> Metrics:
    """Per-target means: `loss` is the cross-entropy in nats, `accuracy` the share of targets that were likeliest."""
    metrics = {"loss": sums.nll / totals.weight, "accuracy": sums.correct / totals.weight, "targets": sums.weight}
    if sums.mtp is not None:
        metrics["mtp_loss"] = sums.mtp
    if sums.source_nll is not None:
        # Not a number where the batch had no target of a source.
        metrics["loss_by_source"] = sums.source_nll / sums.source_weight
    if sums.load is not None:
        # The busiest expert's load relative to an even one, in the worst layer: 1 is perfect balance.
        metrics["expert_load_max"] = (sums.load.max(axis=-1) / jnp.maximum(sums.load.mean(axis=-1), 1e-9)).max()
        metrics["expert_dropped"] = sums.dropped / jnp.maximum(sums.load.sum(), 1.0)
    return metrics
