"""Pipeline parallelism of one layer stack: stages hold runs of layers, microbatches travel a ring over mesh axis `pp`.

Everything before the stack (embedding, other stacks) and after it is computed alike on every stage. Only `pp` is manual
here; all other axes stay with the compiler, so that the stage function is the one that runs without a pipeline. This
module knows layers as a function and rows as arrays, and nothing of attention, losses or optimizers.

n stages, v rounds, M microbatches, R repeats of the stack's pattern, B rows, b = B / M rows of a microbatch
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxformers.models.config import ModelConfig, longest_stack, plan_stacks
from jaxformers.models.params import Params
from jaxformers.parallel.mesh import nearest, nearest_multiples, sharder

Schedule = Literal["gpipe", "interleaved", "1f1b"]
# (layers [R', ...], x [b, T, D], rows of b, active [R'] or None) -> (x [b, T, D], sums [R', ...])
StageFunction = Callable[[Any, jax.Array, Any, jax.Array | None], tuple[jax.Array, Any]]
# (parameters, x [b, T, D], rows of b) -> (loss, sums of the same kind as a stage's, further sums)
LastFunction = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any, Any]]


@dataclass(frozen=True)
class Pipeline:
    """How the stack is cut and run.

    `repeats[c]` counts the repeats of chunk c, in the model's order; stage c mod n holds it, and rows visit it in round
    c div n. On a device every chunk takes as many slots as the longest one has repeats.
    """

    mesh: Mesh
    schedule: Schedule
    microbatches: int
    repeats: tuple[int, ...]

    @property
    def stages(self) -> int:
        return self.mesh.shape["pp"]

    @property
    def rounds(self) -> int:
        return len(self.repeats) // self.stages

    @cached_property
    def slots(self) -> np.ndarray:
        """The repeat that each slot holds, int [n x v x longest], device by device. A slot that a short chunk leaves
        over holds its last repeat once more, which keeps its numbers finite, and is not run."""
        first = np.cumsum((0, *self.repeats))
        chunks = [r * self.stages + i for i in range(self.stages) for r in range(self.rounds)]
        kept = np.minimum(np.arange(max(self.repeats)), np.array(self.repeats)[chunks, None] - 1)
        return (first[chunks][:, None] + kept).reshape(-1)

    @cached_property
    def active(self) -> np.ndarray | None:
        """Which slots are run, bool [n x v x longest]; None: all of them."""
        active = np.ones(self.slots.shape, bool)
        active[1:] = self.slots[1:] != self.slots[:-1]
        return None if active.all() else active

    @property
    def is_plain(self) -> bool:
        """Whether the slots are the plain tree's repeats in their order."""
        return np.array_equal(self.slots, np.arange(sum(self.repeats)))

    def spec(self, cfg: ModelConfig, specs: Params) -> Params:
        """The specs of the tree that `arrange` makes of one with these."""
        size = len(self.slots)
        return _map_pipelined(lambda s: replace(s, shape=(size, *s.shape[1:])), specs, cfg)

    def arrange(self, params: Params, cfg: ModelConfig) -> Params:
        """The plain tree with the pipelined stack's repeats in the order of their slots."""
        return _map_pipelined(lambda a: a[self.slots], params, cfg)

    def restore(self, params: Params, cfg: ModelConfig) -> Params:
        """The plain tree again: the inverse of `arrange`."""
        return _map_pipelined(self._in_order, params, cfg)

    def _in_order(self, slots: Any) -> Any:
        """Arrays [n x v x longest, ...] of slots as [R, ...]."""
        _, slot_of = np.unique(self.slots, return_index=True)
        return jax.tree.map(lambda a: a[slot_of], slots)

    def run(self, stage: StageFunction, layers: Any, x: jax.Array, rows: Any) -> tuple[jax.Array, Any]:
        """`stage` over the whole stack: x [B, T, D] with `rows` [B, T] -> [B, T, D], and the sums [R, ...]."""
        xs, rows = jax.tree.map(self._split, (x, rows))
        ring = jax.shard_map(
            partial(_ring, stage, self.stages, self.rounds),
            mesh=self.mesh,
            axis_names={"pp"},
            in_specs=(P("pp"), P("pp"), P(), P("pp")),
            out_specs=P("pp"),
            check_vma=False,
        )
        # A copy for each stage, not one for all: the sum of their gradients is then the compiler's to place. The one
        # that `shard_map` would insert makes XLA:CPU abort in bfloat16.
        xs = jnp.broadcast_to(xs, (self.stages, *xs.shape))
        ys, sums = ring(layers, xs, rows, self.active)
        return self._join(_of_stage(ys, self.stages - 1)), self._in_order(sums)

    def loss(
        self, stage: StageFunction, last: LastFunction, layers: Any, tail: Any, x: jax.Array, rows: Any, rates: Any
    ) -> tuple[jax.Array, tuple[Any, Any, Any]]:
        """A loss behind the stack whose gradient is taken while microbatches are still under way (1F1B,
        arXiv:1806.03377).

        The value is rates[0] x the losses of `last` (one, or several in a vector as rates[0] then is), plus all sums
        weighted by rates[1] (a scalar for each leaf); then
        the sums of the stages [R, ...], those of `last`, and its further ones. A stage keeps the inputs of at most
        2n - 1 microbatches and recomputes the rest.
        """

        @jax.custom_vjp
        def total(layers: Any, tail: Any, x: jax.Array, rows: Any, rates: Any) -> tuple[jax.Array, Any]:
            y, sums = self.run(stage, layers, x, rows)
            value, more, further = last(tail, y, rows)
            return _weighted(rates, value, sums, more), (sums, more, further)

        def forward(layers: Any, tail: Any, x: jax.Array, rows: Any, rates: Any) -> tuple[Any, Any]:
            (value, *sums), gradients = self._loss_and_gradients(stage, last, layers, tail, x, rows, rates)
            return (_weighted(rates, value, *sums[:2]), tuple(sums)), gradients

        def backward(gradients: tuple[Any, Any, jax.Array], cotangent: tuple[jax.Array, Any]) -> tuple[Any, ...]:
            scaled = jax.tree.map(lambda g: (g.astype(jnp.float32) * cotangent[0]).astype(g.dtype), gradients)
            return *scaled, None, None

        total.defvjp(forward, backward)
        return total(layers, tail, x, rows, rates)

    def _loss_and_gradients(
        self, stage: StageFunction, last: LastFunction, layers: Any, tail: Any, x: jax.Array, rows: Any, rates: Any
    ) -> tuple[tuple[jax.Array, Any, Any, Any], tuple[Any, Any, jax.Array]]:
        """The loss and all sums, and the gradient of their weighted sum by layers, tail and x."""
        xs, rows = jax.tree.map(self._split, (x, rows))
        ring = jax.shard_map(
            partial(_two_way_ring, stage, last, self.stages),
            mesh=self.mesh,
            axis_names={"pp"},
            in_specs=(P("pp"), P(), P(), P(), P(), P("pp")),
            out_specs=P("pp"),
            check_vma=False,
        )
        d_layers, d_tail, d_xs, sums, of_last = ring(layers, tail, xs, rows, rates, self.active)
        d_tail, (value, more, further) = jax.tree.map(lambda a: a.sum(axis=0), (d_tail, of_last))
        return (value, self._in_order(sums), more, further), (d_layers, d_tail, self._join(_of_stage(d_xs, 0)))

    def _split(self, a: jax.Array) -> jax.Array:
        """[B, T, ...] -> [M, b, T, ...], interleaved: every device keeps its rows."""
        a = a.reshape(-1, self.microbatches, *a.shape[1:]).swapaxes(0, 1)
        return sharder(self.mesh)(a, None, "batch", "seq", *(None,) * (a.ndim - 3))

    def _join(self, a: jax.Array) -> jax.Array:
        return a.swapaxes(0, 1).reshape(-1, *a.shape[2:])


def plan_pipeline(
    cfg: ModelConfig,
    mesh: Mesh,
    *,
    rows: int,
    schedule: Schedule = "gpipe",
    microbatches: int | None = None,
    virtual_stages: int = 2,
    stages: Sequence[int] | None = None,
) -> Pipeline | None:
    """The pipeline of a model on a mesh, None where the mesh has one stage.

    rows: of a batch on one device, to be split into `microbatches` (None = 2 a stage). virtual_stages: chunks that a
    stage of the interleaved schedule holds. stages: how many repeats of the stack's pattern each chunk gets, in the
    model's order; None = as many each. ValueError, with the nearest legal values, for what does not divide.
    """
    n = mesh.shape["pp"]
    if n == 1:
        return None
    count = 2 * n if microbatches is None else microbatches
    step = n if schedule == "interleaved" else 1
    if rows % count or count % step:
        legal = nearest(count, (c for c in range(1, rows + 1) if rows % c == 0 and c % step == 0))
        group = f", and to come in groups of pp={n} when interleaved" if step > 1 else ""
        raise ValueError(
            f"runtime.microbatches is {count}, but has to divide the {rows} rows that a device has of a step{group}; "
            f"{f'nearest legal: {legal}' if legal else f'take {step} rows or more'}"
        )
    chunks = n * (virtual_stages if schedule == "interleaved" else 1)
    return Pipeline(mesh, schedule, count, _repeats(cfg, chunks, stages))


def _repeats(cfg: ModelConfig, chunks: int, stages: Sequence[int] | None) -> tuple[int, ...]:
    """Repeats of the pipelined stack's pattern that each chunk holds."""
    stacks = plan_stacks(cfg.layers)
    stack = stacks[longest_stack(stacks)]
    unit = "layers" if len(stack.pattern) == 1 else f"repeats of a pattern of {len(stack.pattern)} layers"
    whole = f"the {stack.repeats} {unit} that the pipeline cuts"
    if stages is not None:
        if len(stages) != chunks or sum(stages) != stack.repeats or min(stages) < 1:
            raise ValueError(
                f"runtime.stages is {list(stages)}; it has to share {whole} among {chunks} stages, at least one each"
            )
        return tuple(stages)
    if stack.repeats % chunks:
        fewer = nearest(chunks, (c for c in range(1, stack.repeats + 1) if stack.repeats % c == 0))
        near = f"{fewer} stages, or {nearest_multiples(stack.repeats, of=chunks)} {unit.split()[0]}"
        even = [len(part) for part in np.array_split(np.arange(stack.repeats), chunks)]
        uneven = f", or set runtime.stages={even}" if min(even) else ""
        raise ValueError(f"mesh.pp: {chunks} stages do not divide {whole}; nearest legal: {near}{uneven}")
    return (stack.repeats // chunks,) * chunks


def _map_pipelined(function: Callable[[Any], Any], params: Params, cfg: ModelConfig) -> Params:
    """`function` over the leaves of the pipelined stack."""
    layers = list(params["layers"])
    k = longest_stack(plan_stacks(cfg.layers))
    layers[k] = jax.tree.map(function, layers[k])
    return params | {"layers": layers}


def _weighted(rates: Any, value: jax.Array, *sums: Any) -> jax.Array:
    parts = [jax.tree.map(lambda rate, a: (rate * a).sum(), _like(rates[1], found), found) for found in sums]
    return sum(jax.tree.leaves(parts), (rates[0] * value).sum())


def _like(rates: Any, sums: Any) -> Any:
    """The rate of each of the sums' numbers; None of no sums."""
    return None if sums is None else jax.tree.map(lambda rate, a: jnp.broadcast_to(rate, a.shape), rates, sums)


def _take(tree: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda a: a[i], tree)


def _of_stage(a: jax.Array, stage: int) -> jax.Array:
    """One stage's part of a [n, ...], on every stage: a sum with zeros, as XLA sends all of a slice around before."""
    mine = jnp.arange(a.shape[0]).reshape(-1, *(1,) * (a.ndim - 1)) == stage
    return jax.lax.reduce(jnp.where(mine, a, 0), np.zeros((), a.dtype), jax.lax.add, (0,))


def _shift(x: jax.Array, n: int, *, by: int) -> jax.Array:
    """x of the stage `by` places before."""
    return jax.lax.ppermute(x, "pp", [(i, (i + by) % n) for i in range(n)])


def _ring(
    stage: StageFunction, n: int, v: int, layers: Any, xs: jax.Array, rows: Any, active: jax.Array | None
) -> tuple[jax.Array, Any]:
    """One stage's part: xs [1, M, b, T, D] -> ys [1, M, b, T, D], which are the stack's on the last stage alone, and
    this stage's sums [slots, ...].

    Groups of n microbatches go round v times before the next group enters, so what comes back to the first stage is
    always what it needs next (arXiv:2104.04473); with v = 1 that is the plain pipeline, for any M.
    """
    i, m, xs = jax.lax.axis_index("pp"), xs.shape[1], xs[0]
    chunks = jax.tree.map(lambda a: a.reshape(v, -1, *a.shape[1:]), (layers, active))

    def tick(carry: Any, t: jax.Array) -> tuple[Any, jax.Array]:
        inbox, sums = carry
        turn = jnp.clip(t - i, 0, m * v - 1)
        in_round = turn // n % v
        microbatch = turn // (n * v) * n + turn % n if v > 1 else turn
        mine, runs = _take(chunks, in_round) if v > 1 else _take(chunks, 0)
        x = jnp.where((i == 0) & (in_round == 0 if v > 1 else True), xs[microbatch], inbox)
        y, new = stage(mine, x, _take(rows, microbatch), runs)
        works = (t >= i) & (t - i < m * v)
        sums = jax.tree.map(lambda total, a: total.at[in_round].add(jnp.where(works, a, 0)), sums, new)
        return (_shift(y, n, by=1), sums), y

    _, of_chunk = jax.eval_shape(stage, *_take(chunks, 0)[:1], xs[0], _take(rows, 0), _take(chunks, 0)[1])
    start = jnp.zeros_like(xs[0]), jax.tree.map(lambda s: jnp.zeros((v, *s.shape), s.dtype), of_chunk)
    (_, sums), ys = jax.lax.scan(tick, start, jnp.arange(m * v + n - 1))
    done = np.arange(m)
    if v > 1:
        done = done // n * (n * v) + (v - 1) * n + done % n
    return ys[done + n - 1][None], jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), sums)


def _two_way_ring(
    stage: StageFunction,
    last: LastFunction,
    n: int,
    layers: Any,
    tail: Any,
    xs: jax.Array,
    rows: Any,
    rates: Any,
    active: jax.Array | None,
) -> tuple[Any, Any, jax.Array, Any, Any]:
    """One stage's part of a loss and its gradient: every tick takes one microbatch forward and one backward.

    xs [M, b, T, D]. Microbatch k goes forward on stage i at tick k + i and backward at tick k + 2 (n - 1) - i: on the
    last stage at once, and on each stage before it a tick later. Returns the gradients by this stage's layers, by the
    tail [1, ...] and by xs [1, M, b, T, D] (the first stage's count), this stage's sums [slots, ...], and the loss and
    sums of `last` [1, ...].
    """
    i, m = jax.lax.axis_index("pp"), xs.shape[0]
    kept = min(m, 2 * n - 1)

    def whole(layers: Any, tail: Any, x: jax.Array, rows: Any) -> tuple[Any, Any]:
        y, sums = stage(layers, x, rows, active)
        value, more, further = last(tail, y, rows)
        return (y, value, sums, more), further

    def tick(carry: Any, t: jax.Array) -> tuple[Any, None]:
        inbox, d_inbox, inputs, totals, d_xs = carry
        ahead, back = t - i, t - 2 * (n - 1) + i
        k = jnp.clip(ahead, 0, m - 1)
        x = jnp.where(i == 0, xs[k], inbox)
        inputs = inputs.at[jnp.where(ahead == k, k % kept, kept)].set(x, mode="drop")
        outbox = stage(layers, x, _take(rows, k), active)[0]

        k = jnp.clip(back, 0, m - 1)
        works, ends = back == k, (back == k) & (i == n - 1)
        of_rows = _take(rows, k)
        (_, value, sums, more), pull, further = jax.vjp(
            lambda *args: whole(*args, of_rows), layers, tail, inputs[k % kept], has_aux=True
        )
        by_sums, by_more = _where(works, _like(rates[1], sums)), _where(ends, _like(rates[1], more))
        d_y = _where(works & (i < n - 1), d_inbox)
        d_layers, d_tail, d_x = pull((d_y, _where(ends, rates[0]), by_sums, by_more))
        new = (d_layers, d_tail, _where(works, sums), _where(ends, (value, more, further)))
        totals = jax.tree.map(jnp.add, totals, new)
        d_xs = d_xs.at[jnp.where(works & (i == 0), k, m)].set(d_x, mode="drop")
        return (_shift(outbox, n, by=1), _shift(d_x, n, by=-1), inputs, totals, d_xs), None

    (_, value, sums, more), further = jax.eval_shape(whole, layers, tail, xs[0], _take(rows, 0))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (layers, tail, sums, (value, more, further)))
    no_inputs = jnp.zeros((kept, *xs.shape[1:]), xs.dtype)
    start = (no_inputs[0], no_inputs[0], no_inputs, zeros, jnp.zeros_like(xs))
    (_, _, _, totals, d_xs), _ = jax.lax.scan(tick, start, jnp.arange(m + 2 * (n - 1)))
    d_layers, d_tail, sums, of_last = totals
    d_tail, d_xs, of_last = jax.tree.map(lambda a: a[None], (d_tail, d_xs, of_last))
    return d_layers, d_tail, d_xs, sums, of_last


def _where(condition: jax.Array, tree: Any) -> Any:
    """The tree, or zeros where the condition does not hold."""
    return jax.tree.map(lambda a: jnp.where(condition, a, jnp.zeros_like(a)), tree)
