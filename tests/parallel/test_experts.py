"""Experts spread over a mesh make of tokens what all of them on one device make, whichever way tokens reach them."""

import functools
import re
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tiny import one_sparse_layer, relative_error

from jaxformers.models.config import MoE
from jaxformers.models.context import Context
from jaxformers.models.ffn import local_experts, moe
from jaxformers.models.params import moe_spec
from jaxformers.models.runtime import Runtime, no_shard
from jaxformers.parallel import experts as experts_module
from jaxformers.parallel.experts import capacity, mesh_experts
from jaxformers.parallel.mesh import MeshConfig, batch_sharding, make_mesh, param_shardings

B, T, D, F, E = 8, 6, 16, 8, 8
PLAIN = MoE(num_experts=E, top_k=3, d_ff=F)
KINDS = {
    "plain": PLAIN,
    "limited to groups": replace(
        PLAIN, score="sigmoid", select_bias=True, groups=4, top_groups=2, group_score="top2", scale=2.5
    ),
    "biased": replace(PLAIN, expert_bias=True, router_bias=True, score="softmax_topk"),
    "with a shared expert": replace(PLAIN, shared_d_ff=8, shared_gate=True),
    "one a token": replace(PLAIN, top_k=1, normalize=False),
    "as wide as no mesh": replace(PLAIN, d_ff=7),
}
EP2, EP4, EP8 = {"ep": 2}, {"ep": 4}, {"ep": 8}
EP2_TP2, EP2_FSDP2, DP2_EP2 = {"ep": 2, "tp": 2}, {"ep": 2, "fsdp": 2}, {"dp": 2, "ep": 2}
ALL_DATA, NO_EP = {"dp": 2, "fsdp": 2, "ep": 2}, {"dp": 2, "fsdp": 2, "tp": 2}


config = functools.partial(one_sparse_layer, d_model=D, d_ff=F)


def mesh_of(sizes):
    return make_mesh(MeshConfig(**{"fsdp": 1} | sizes), devices=jax.devices()[: int(np.prod(list(sizes.values())))])


def inputs(m: MoE):
    """Weights, tokens whose router prefers some experts, and documents with padding behind them."""
    draw = np.random.default_rng(0)
    p = jax.tree.map(lambda spec: draw.standard_normal(spec.shape).astype(np.float32), moe_spec(config(m)))
    x = draw.standard_normal((B, T, D)).astype(np.float32)
    segment_ids = (np.arange(T) < draw.integers(2, T + 1, (B, 1))).astype(np.int32)
    return p, x, segment_ids


def run(m: MoE, kernel, p, x, segment_ids):
    """The layer's output and sums, and the gradients of a loss that every output enters."""

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def both(p, x, segment_ids):
        ctx = Context(jnp.zeros((B, T), jnp.int32), segment_ids, {}, no_shard, Runtime().attend, kernel)

        def loss(p, x):
            y, stats = moe(p, x, ctx, config(m))
            valid = (segment_ids > 0)[..., None]
            return (jnp.where(valid, y, 0) ** 2).mean(), (jnp.where(valid, y, 0), stats)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(p, x)

    (_, (y, stats)), grads = both(p, x, segment_ids)
    return jax.device_get((y, grads, stats))


@functools.cache
def truth(kind: str):
    return run(KINDS[kind], local_experts, *inputs(KINDS[kind]))


def on_mesh(kind: str, sizes, **settings):
    m, mesh = KINDS[kind], mesh_of(sizes)
    p, x, segment_ids = inputs(m)
    with jax.set_mesh(mesh):
        p = jax.device_put(p, param_shardings(moe_spec(config(m)), mesh))
        x, segment_ids = (jax.device_put(a, batch_sharding(a.shape, mesh)) for a in (x, segment_ids))
        return run(m, mesh_experts(mesh, config(m), **settings), p, x, segment_ids)


def ragged_by_gathering(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all` as its documentation describes it, for backends without it."""
    me = lax.axis_index(axis_name)
    sent, starts, sizes, landings = (
        lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)
    )
    for source in range(sent.shape[0]):
        place = jnp.arange(output.shape[0]) - landings[source, me]
        mine = (place >= 0) & (place < sizes[source, me])
        rows = sent[source][(starts[source, me] + place).clip(0, operand.shape[0] - 1)]
        output = jnp.where(mine.reshape(-1, *(1,) * (output.ndim - 1)), rows, output)
    return output


@pytest.fixture
def ragged(monkeypatch):
    monkeypatch.setattr(lax, "ragged_all_to_all", ragged_by_gathering)
    monkeypatch.setattr(experts_module, "RAGGED_BACKENDS", ("cpu",))


SLOW_KINDS = ("plain", "one a token", "as wide as no mesh")  # whose paths the other kinds take too


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW_KINDS)) for k in KINDS])
def test_gathered_tokens_give_what_one_device_gives(kind):
    assert relative_error(on_mesh(kind, EP2_TP2), truth(kind)) < 1e-5


@pytest.mark.parametrize(
    "sizes", [ALL_DATA, *(pytest.param(s, marks=pytest.mark.slow) for s in (EP8, EP2_FSDP2, NO_EP))], ids=str
)
def test_gathering_is_exact_on_every_mesh(sizes):
    assert relative_error(on_mesh("biased", sizes), truth("biased")) < 1e-5


@pytest.mark.parametrize("kind, sizes", [("biased", EP2_TP2), pytest.param("one a token", EP8, marks=pytest.mark.slow)])
def test_tokens_sent_with_room_enough_give_what_one_device_gives(kind, sizes):
    found = on_mesh(kind, sizes, capacity_factor=float(E))
    assert relative_error(found, truth(kind)) < 1e-5
    assert found[2].dropped == 0


@pytest.mark.parametrize(
    "kind, sizes", [("biased", EP2_TP2), pytest.param("limited to groups", DP2_EP2, marks=pytest.mark.slow)]
)
def test_ragged_exchanges_drop_nothing(kind, sizes, ragged):
    assert relative_error(on_mesh(kind, sizes, dispatch="alltoall"), truth(kind)) < 1e-5


@pytest.mark.parametrize("factor", [0.25, 1.25])
def test_visits_without_room_are_dropped_and_counted_as_a_loop_over_devices_does(factor):
    y, _, stats = on_mesh("plain", EP4, capacity_factor=factor)
    expected, dropped = capped_by_hand(factor, devices=4)
    assert dropped > 0
    assert stats.dropped == dropped
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


def capped_by_hand(factor: float, *, devices: int):
    """The layer with visits counted one by one, in order, for each pair of devices."""
    m = KINDS["plain"]
    p, x, segment_ids = inputs(m)
    shares, out, dropped = B // devices, np.zeros_like(x), 0
    room = round(factor * shares * T * m.top_k / devices)
    for device in range(devices):
        sent = Counter()
        for b, t in np.ndindex(shares, T):
            row = device * shares + b
            if not segment_ids[row, t]:
                continue
            logits = x[row, t] @ p["router"]
            chosen = np.argsort(-logits, kind="stable")[: m.top_k]
            weights = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
            for e, weight in zip(chosen, weights, strict=True):
                sent[e // (E // devices)] += 1
                if sent[e // (E // devices)] > room:
                    dropped += 1
                    continue
                gate, up = x[row, t] @ p["gate"][e], x[row, t] @ p["up"][e]
                out[row, t] += weight * ((gate / (1 + np.exp(-gate)) * up) @ p["down"][e])
    return out, dropped


def test_room_is_never_more_than_all_tokens_need_nor_less_than_one():
    assert capacity(1.0, visits=24, top_k=3, held=2, devices=4) == 6
    assert capacity(100.0, visits=24, top_k=3, held=2, devices=4) == 16
    assert capacity(100.0, visits=24, top_k=3, held=8, devices=4) == 24
    assert capacity(0.001, visits=24, top_k=3, held=2, devices=4) == 1


@pytest.mark.parametrize("settings", [{}, {"capacity_factor": 2.0}], ids=str)
def test_all_tokens_may_go_to_one_device_and_others_get_none(settings, monkeypatch):
    m = KINDS["one a token"]
    p, x, segment_ids = inputs(m)
    x, p["router"] = np.abs(x), np.zeros((D, E), np.float32)
    p["router"][:, 5] = 1.0
    monkeypatch.setitem(globals(), "inputs", lambda m: (p, x, segment_ids))
    found = on_mesh("one a token", EP2, **settings)
    expected = run(m, local_experts, p, x, segment_ids)
    assert relative_error(found[:2], expected[:2]) < 1e-5
    np.testing.assert_array_equal(found[2].load, np.eye(E)[5] * segment_ids.sum())


COLLECTIVE = r" = [^\n]*? (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


GATHERED, SENT = {"all-gather": 3, "reduce-scatter": 1}, {"all-to-all": 3, "all-reduce": 1}


@pytest.mark.parametrize(
    "sizes, settings, forward, backward",
    [
        (EP4, {}, GATHERED, {"all-gather": 1, "reduce-scatter": 2}),
        (EP4, {"capacity_factor": 2.0}, SENT, {"all-to-all": 2}),
        (EP2_TP2, {}, GATHERED | {"all-reduce": 1}, {"all-gather": 1, "reduce-scatter": 2, "all-reduce": 2}),
        ({"dp": 4}, {}, {}, {"all-reduce": 3}),
        ({"fsdp": 4}, {}, {"all-gather": 3}, {"reduce-scatter": 3}),
        ({"tp": 4}, {}, {"all-reduce": 1}, {"all-reduce": 2}),
    ],
    ids=str,
)
def test_collectives_are_those_of_the_textbook(sizes, settings, forward, backward):
    """Tokens, weights and visits are gathered, and outputs scattered; or tokens and visits are sent, outputs sent back
    and drops counted. fsdp gathers each weight and scatters its gradient, dp sums it; tp sums outputs, and gradients of
    tokens and of their weights. Gradients travel the same ways back, those of visits, which are integers, do not."""
    m, mesh = KINDS["plain"], mesh_of(sizes)
    p, x, _ = inputs(m)
    cfg, kernel = config(m), mesh_experts(mesh, config(m), **settings)
    p = {name: p[name] for name in ("gate", "up", "down")}

    def loss(p, x, weights, visits):
        y, dropped = kernel(p, x, weights, visits, cfg)
        return (y * y.shape[0]).sum(axis=(1, 2)), dropped  # a sum for each row needs no collective

    def gradients(p, x, weights, visits, dy):
        value, pull, dropped = jax.vjp(functools.partial(loss, visits=visits), p, x, weights, has_aux=True)
        return value, pull(dy), dropped

    with jax.set_mesh(mesh):
        p = jax.device_put(p, {name: param_shardings(moe_spec(cfg), mesh)[name] for name in p})
        weights, visits = np.ones((B, T, 3), np.float32), np.ones((B, T, 3), np.int32)
        arrays = [jax.device_put(a, batch_sharding(a.shape, mesh)) for a in (x, weights, visits)]
        dy = jax.device_put(np.ones(B, np.float32), arrays[0].sharding.update(spec=arrays[0].sharding.spec[:1]))
        assert collectives(loss, p, *arrays) == forward
        assert collectives(gradients, p, *arrays, dy) == Counter(forward) + Counter(backward)


def collectives(function, *args) -> Counter:
    # Unoptimised, all-reduces stay apart that would be combined into one.
    options = {"xla_disable_hlo_passes": "all-reduce-combiner,cpu-all-reduce-combiner"}
    program = jax.jit(function).lower(*args).compile(compiler_options=options).as_text()
    return Counter(re.findall(COLLECTIVE, program))


@pytest.mark.parametrize(
    "m, sizes, settings, message",
    [
        (PLAIN, {"ep": 3}, {}, "mesh: ep=3 does not divide the model's 8 experts; nearest legal: 2 and 4"),
        (
            replace(PLAIN, num_experts=2, top_k=1),
            EP4,
            {},
            "mesh: ep=4 does not divide the model's 2 experts; nearest legal: 2",
        ),
        (None, EP2, {}, "mesh: ep=2 needs a model with experts, which none is not; use dp or fsdp"),
        (PLAIN, EP2, {"dispatch": "alltoall"}, "runtime: experts=alltoall without a capacity_factor needs ragged_all"),
        (PLAIN, EP2, {"dispatch": "allgather", "capacity_factor": 1.0}, "runtime: capacity_factor is for experts=all"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(m, sizes, settings, message):
    with pytest.raises(ValueError) as caught:
        mesh_experts(mesh_of(sizes), replace(config(PLAIN), moe=m), **settings)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sizes", [{"dp": 2}, EP2_TP2], ids=str)
def test_gradients_in_bfloat16_are_those_of_one_device(sizes):
    """XLA:CPU aborts where a gradient is summed over devices in bfloat16."""
    cfg, mesh, random = config(PLAIN), mesh_of(sizes), np.random.default_rng(0)
    specs = {name: spec for name, spec in moe_spec(cfg).items() if name in ("gate", "up", "down")}
    p = {name: random.normal(size=spec.shape).astype(np.float32) for name, spec in specs.items()}
    x = jnp.asarray(random.normal(size=(B, T, D)), jnp.bfloat16)
    weights = jnp.asarray(random.random((B, T, PLAIN.top_k)), jnp.float32)
    visits = jnp.asarray(random.permuted(np.tile(np.arange(E), (B, T, 1)), axis=-1)[..., : PLAIN.top_k], jnp.int32)

    def gradients(kernel):
        def total(p, x):
            return jnp.square(kernel(p, x, weights, visits, cfg).x.astype(jnp.float32)).sum()

        return jax.jit(jax.grad(total, argnums=(0, 1)))(p, x)

    truth = gradients(local_experts)
    with jax.set_mesh(mesh):
        ours = gradients(mesh_experts(mesh, cfg))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
        assert relative_error(np.asarray(a, np.float32), np.asarray(b, np.float32)) < 0.02
