"""Every mesh gives what one device gives: loss, gradient norm and updated parameters over five steps, in float32."""

import jax
import numpy as np
import pytest
from runs import (
    WINDOWS,
    Case,
    assert_equal_to_one_device,
    batches,
    compiled,
    compiled_step,
    place,
    placed_state,
    trainer_of,
)

ONE: dict[str, int] = {}
FSDP8, DP8, TP8 = {"fsdp": 8}, {"dp": 8}, {"tp": 8}
TP4_DP2, FSDP2_TP4, FSDP4_TP2 = {"dp": 2, "tp": 4}, {"fsdp": 2, "tp": 4}, {"fsdp": 4, "tp": 2}
ALL_THREE = {"dp": 2, "fsdp": 2, "tp": 2}

CASES = [
    Case("dense", ONE, accumulation=4, layers="unroll"),
    Case("dense", FSDP8),
    Case("dense", FSDP8, accumulation=4, layers="unroll"),
    Case("dense", TP4_DP2),
    Case("dense", TP4_DP2, accumulation=4),
    Case("dense", FSDP2_TP4, layers="unroll", remat="dots", chunk=8),
    Case("dense", FSDP2_TP4, accumulation=4),
    Case("moe", FSDP2_TP4, accumulation=4),
    Case("mla", FSDP8, remat="full", accumulation=4),
    Case("mla, whole queries", FSDP4_TP2),
    Case(WINDOWS, TP4_DP2, chunk=8),
    Case("odd", FSDP4_TP2),
]
MORE_CASES = [
    Case("dense", FSDP8, accumulation=4, remat="dots"),
    Case("dense", TP4_DP2, layers="unroll"),
    Case("dense", TP4_DP2, remat="projections", chunk=8),
    Case("dense", FSDP2_TP4, accumulation=4, remat="full", chunk=8),
    Case("dense", DP8),
    Case("dense", DP8, accumulation=4, chunk=8),
    Case("dense", TP8),  # more shards than the two kv heads
    Case("dense", TP8, accumulation=4, remat="full"),
    Case("dense", FSDP4_TP2, accumulation=4, layers="unroll"),
    Case("dense", ALL_THREE, accumulation=4),
    Case("degenerate", TP4_DP2, accumulation=4),
    Case("degenerate", FSDP8, remat="dots"),
    Case("moe", ONE, accumulation=4, remat="full"),
    Case("moe", FSDP8, accumulation=4),
    Case("moe", TP4_DP2, layers="unroll", remat="full"),
    Case("moe", TP8, accumulation=4),
    Case("moe", ALL_THREE, remat="full"),
    Case("mla", TP4_DP2, accumulation=4),
    Case("mla", FSDP2_TP4, layers="unroll"),
    Case("mla", TP8),
    Case("mla, whole queries", TP4_DP2, accumulation=4, layers="unroll"),
    Case(WINDOWS, FSDP8, accumulation=4, layers="unroll"),
    Case(WINDOWS, FSDP2_TP4, accumulation=4, remat="dots"),
    Case(WINDOWS, TP8),
    Case("odd", FSDP8, accumulation=4),
    Case("odd", TP4_DP2, accumulation=4, layers="unroll"),
    Case("odd", FSDP2_TP4, remat="full", chunk=8),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mesh_trains_as_one_device_does(case):
    assert_equal_to_one_device(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_CASES, ids=str)
def test_further_meshes_train_as_one_device_does(case):
    assert_equal_to_one_device(case)


def test_fsdp_keeps_an_eighth_of_every_matrix_and_moment_on_a_device_and_gathers_weights_for_use():
    trainer = trainer_of(Case("dense", FSDP8))
    with jax.set_mesh(trainer.mesh):
        state = placed_state(trainer)
        batch = place(batches()[0], trainer)
        compiled = compiled_step(trainer, state, batch)
        state, _ = compiled(state, batch)
    for tree in (state.params, state.opt_state[0].mu, state.opt_state[0].nu):
        whole = sum(a.nbytes for a in jax.tree.leaves(tree))
        here = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(tree))
        norms = sum(a.nbytes for a in jax.tree.leaves(tree) if a.sharding.is_fully_replicated)
        assert here == (whole - norms) / 8 + norms
        assert norms < 0.01 * whole
    program = compiled.as_text()
    assert "all-gather" in program
    assert "all-to-all" not in program


EP2, EP4, EP2_TP2 = {"ep": 2}, {"ep": 4}, {"ep": 2, "tp": 2}
EP2_FSDP2, DP2_EP2, DP2_EP2_TP2 = {"fsdp": 2, "ep": 2}, {"dp": 2, "ep": 2}, {"dp": 2, "ep": 2, "tp": 2}
BIAS, GLOBAL = (("expert_bias_rate", 0.05),), (("balance_over", "batch"),)
EP_CASES = [
    Case("moe", EP2_TP2, accumulation=2),
    Case("mla", EP2_FSDP2, remat="full", loss=BIAS),
]
MORE_EP_CASES = [
    Case("moe", EP2),
    Case("moe", EP4, accumulation=2),
    Case("moe", EP2_FSDP2, layers="unroll"),
    Case("moe", DP2_EP2, remat="dots"),
    Case("moe", DP2_EP2, accumulation=2, chunk=8),
    Case("moe", DP2_EP2_TP2, loss=GLOBAL),
    Case("moe", EP2_FSDP2, accumulation=2, loss=GLOBAL),
    Case("mla", EP4, accumulation=2, loss=BIAS),
    Case("mla", DP2_EP2, layers="unroll", loss=BIAS),
    Case("mla", EP2_TP2, remat="projections"),
    Case("mla", ONE, accumulation=4, layers="unroll", loss=BIAS),
    Case("moe", {"ep": 2, "cp": 2}, accumulation=2, loss=GLOBAL),
    Case("mla", {"ep": 2, "cp": 2, "tp": 2}, chunk=8, loss=BIAS),
]


@pytest.mark.parametrize("case", EP_CASES, ids=str)
def test_experts_spread_over_a_mesh_train_as_on_one_device(case):
    assert_equal_to_one_device(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_EP_CASES, ids=str)
def test_experts_spread_over_further_meshes_train_as_on_one_device(case):
    assert_equal_to_one_device(case)


def test_experts_stay_spread_while_training():
    trainer = trainer_of(Case("moe", EP2_TP2))
    for p in trainer.plain_state.params["layers"][0]:
        for name in ("gate", "up", "down"):
            held = p["ffn"][name].sharding.shard_shape(p["ffn"][name].shape)
            assert np.prod(held) * 4 == np.prod(p["ffn"][name].shape)


DP2_FSDP2, DP2_TP2, TP4 = {"dp": 2, "fsdp": 2}, {"dp": 2, "tp": 2}, {"tp": 4}
SHARED_CASES = [
    Case("dense", DP2_FSDP2, accumulation=2, zero=2),
    Case("dense", DP2_TP2, chunk=8, sequence_parallel=True),
]
MORE_SHARED_CASES = [
    Case("dense", DP8, zero=1),
    Case("dense", DP8, accumulation=2, layers="unroll", zero=1),
    Case("dense", DP8, accumulation=2, remat="full", zero=2),
    Case("moe", DP2_EP2, zero=1),
    Case("odd", DP2_TP2, zero=2),
    Case("dense", TP4, layers="unroll", sequence_parallel=True),
    Case("mla", DP2_TP2, accumulation=2, remat="full", sequence_parallel=True),
    Case("moe", EP2_TP2, remat="dots", sequence_parallel=True),
    Case(WINDOWS, FSDP4_TP2, chunk=8, sequence_parallel=True),
    Case("odd", DP2_TP2, sequence_parallel=True),
    Case("dense", {"cp": 2, "tp": 2}, sequence_parallel=True),
    Case("dense", {"dp": 2, "cp": 2, "tp": 2}, chunk=8, zero=2, sequence_parallel=True),
]


@pytest.mark.parametrize("case", SHARED_CASES, ids=str)
def test_what_replicas_and_tensor_shards_share_changes_no_result(case):
    assert_equal_to_one_device(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_SHARED_CASES, ids=str)
def test_what_more_replicas_and_tensor_shards_share_changes_no_result(case):
    assert_equal_to_one_device(case)


def test_replicas_hold_one_copy_of_the_moments_among_them():
    trainer = trainer_of(Case("dense", DP8, zero=1))
    with jax.set_mesh(trainer.mesh):
        state = placed_state(trainer)
    assert all(a.sharding.is_fully_replicated for a in jax.tree.leaves(state.params))
    moments = [a for a in jax.tree.leaves(state.opt_state[0].mu) if a.size > 1000]
    assert moments
    assert all(8 * a.addressable_shards[0].data.size == a.size for a in moments)


def test_sequence_parallel_saves_memory():
    apart, whole = (compiled(Case("dense", TP4, remat="full", sequence_parallel=on)) for on in (True, False))
    assert apart.memory_analysis().temp_size_in_bytes < whole.memory_analysis().temp_size_in_bytes


OFFLOAD_CASES = [
    Case("dense", DP2_FSDP2, remat="dots", offload="both", accumulation=2),
    Case("mla", EP2_FSDP2, remat="full", offload="residuals"),
]
MORE_OFFLOAD_CASES = [
    Case("dense", DP8, offload="optimizer", zero=1, layers="unroll"),
    Case("dense", {"cp": 2, "tp": 2}, remat="projections", offload="both", sequence_parallel=True),
    Case("deep", {"pp": 2, "fsdp": 2}, remat="full", offload="both"),
    Case("deep", {"pp": 2, "dp": 2}, remat="dots", offload="both", pipeline="1f1b"),
    Case("deep moe", {"pp": 2, "ep": 2}, offload="optimizer", stages=(3, 5)),
]


@pytest.mark.parametrize("case", OFFLOAD_CASES, ids=str)
def test_what_waits_in_the_hosts_memory_comes_back_as_it_went(case):
    assert_equal_to_one_device(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_OFFLOAD_CASES, ids=str)
def test_what_waits_in_the_hosts_memory_comes_back_as_it_went_on_further_meshes(case):
    assert_equal_to_one_device(case)


def test_moments_wait_in_the_hosts_memory():
    trainer = trainer_of(Case("dense", DP2_FSDP2, offload="optimizer"))
    with jax.set_mesh(trainer.mesh):
        state = placed_state(trainer)
        batch = place(batches()[0], trainer)
        after, _ = compiled_step(trainer, state, batch)(state, batch)
    for tree in (after.opt_state[0].mu, after.opt_state[0].nu):
        assert {a.sharding.memory_kind for a in jax.tree.leaves(tree)} == {"pinned_host"}
    assert {a.sharding.memory_kind for a in jax.tree.leaves(after.params)} == {"device"}
