"""Every mesh gives what one device gives: loss, gradient norm and updated parameters over five steps, in float32.

Adam divides a gradient by the root of its own square, so where a gradient is nearly zero, as those of weights that
cancel, its rounding error alone decides the sign of a whole update and grows from step to step: that is the
optimizer's, not the mesh's. An eps well above such gradients (and below the others) keeps updates proportional to
gradients there, so that 1e-5 measures what the mesh computes. Matmuls are in full float32 for the same reason.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import pytest
from tiny import LLAMA, packed_batch, random_params, relative_error

from jaxformers.families import read_config
from jaxformers.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from jaxformers.train.build import Trainer
from jaxformers.train.config import (
    LossConfig,
    OptimizerConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrainConfig,
)
from jaxformers.train.state import state_shardings

TOLERANCE = 1e-5
STEPS, ROWS, LENGTH = 5, 32, 32
DENSE = LLAMA | {"vocab_size": 64, "num_attention_heads": 8, "head_dim": 8}
MODELS = {
    "dense": DENSE,
    "moe": DENSE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "mla": DENSE
    | {
        "model_type": "deepseek_v3",
        "head_dim": 4,  # of the rotated part
        "num_key_value_heads": 8,
        "q_lora_rank": 20,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
    },
    "windows, soft caps, tied": DENSE
    | {"model_type": "gemma2", "sliding_window": 5, "query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    "sinks and windows": DENSE
    | {
        "model_type": "gpt_oss",
        "sliding_window": 5,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
    # Neither the vocabulary, nor heads, nor widths are a multiple of any mesh here.
    "odd": DENSE
    | {
        "model_type": "qwen2",
        "vocab_size": 67,
        "hidden_size": 30,
        "intermediate_size": 45,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}

MODELS["mtp"] = MODELS["mla"] | {"num_nextn_predict_layers": 2}


@dataclass(frozen=True)
class Run:
    """Loss and gradient norm [steps, 2] of a run, and its plain parameters at the end."""

    metrics: np.ndarray
    params: Any


@dataclass(frozen=True)
class Case:
    model: str
    mesh: dict[str, int] = field(hash=False)
    accumulation: int = 1
    layers: str = "scan"
    remat: str = "none"
    chunk: int | str = "none"
    context: str = "auto"
    loss: tuple[tuple[str, Any], ...] = ()
    zero: int = 0
    sequence_parallel: bool = False

    def __str__(self) -> str:
        axes = " x ".join(f"{axis}{size}" for axis, size in self.mesh.items() if size > 1) or "one device"
        extras = [f"accumulation {self.accumulation}", self.layers, f"remat {self.remat}", f"chunk {self.chunk}"]
        extras += [self.context] if self.context != "auto" else []
        extras += [f"{name} {value}" for name, value in self.loss]
        extras += [f"zero {self.zero}"] * bool(self.zero) + ["sequence parallel"] * self.sequence_parallel
        return f"{self.model} on {axes}, {', '.join(extras)}"


def batches() -> list[dict[str, np.ndarray]]:
    return [packed_batch(ROWS, LENGTH, seed=seed) for seed in range(STEPS)]


def trainer_of(case: Case) -> Trainer:
    config = MeshConfig(**{"fsdp": 1} | case.mesh)
    count = int(np.prod(list(case.mesh.values())))
    return Trainer(
        read_config(MODELS[case.model]),
        make_mesh(config, devices=jax.devices()[:count]),
        LENGTH,
        train=TrainConfig(steps=10, batch_size=ROWS, accumulation=case.accumulation),
        runtime=RuntimeConfig(
            layers=case.layers,
            remat=case.remat,
            context=case.context,
            zero=case.zero,
            sequence_parallel=case.sequence_parallel,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-3, clip_norm=0.5),
        schedule=ScheduleConfig(warmup_steps=2),
        loss=LossConfig(chunk=case.chunk, z_loss=1e-3, balance_loss=0.01, router_z_loss=1e-3, **dict(case.loss)),
    )


def placed_state(trainer: Trainer) -> Any:
    """The same start on every mesh."""
    state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), trainer.plain_state)
    state = state.replace(params=random_params(trainer.cfg))
    return trainer.from_plain(jax.device_put(state, state_shardings(trainer.plain_state)))


def place(batch: dict[str, np.ndarray], trainer: Trainer) -> dict[str, jax.Array]:
    if trainer.column_order is not None:
        batch = {name: a[:, trainer.column_order] for name, a in batch.items()}
    return {name: jax.device_put(a, batch_sharding(a.shape, trainer.mesh)) for name, a in batch.items()}


def compiled_step(trainer: Trainer, state: Any, batch: Any) -> Any:
    """The step, compiled without LLVM's optimisations, which take most of the time and change no partitioning."""
    return trainer.program.step.lower(state, batch).compile(compiler_options={"xla_backend_optimization_level": "0"})


def train(case: Case) -> Run:
    trainer = trainer_of(case)
    with jax.set_mesh(trainer.mesh), jax.default_matmul_precision("highest"):
        state, placed = placed_state(trainer), [place(batch, trainer) for batch in batches()]
        step, metrics = compiled_step(trainer, state, placed[0]), []
        for batch in placed:
            state, found = step(state, batch)
            metrics.append((float(found["objective"]), float(found["grad_norm"])))
        return Run(np.array(metrics), jax.device_get(trainer.to_plain(state).params))


@functools.cache
def one_device(model: str, loss: tuple[tuple[str, Any], ...] = (), accumulation: int = 1) -> Run:
    return train(Case(model, {}, accumulation, loss=loss))


ONE: dict[str, int] = {}
FSDP8, DP8, TP8 = {"fsdp": 8}, {"dp": 8}, {"tp": 8}
TP4_DP2, FSDP2_TP4, FSDP4_TP2 = {"dp": 2, "tp": 4}, {"fsdp": 2, "tp": 4}, {"fsdp": 4, "tp": 2}
ALL_THREE = {"dp": 2, "fsdp": 2, "tp": 2}
WINDOWS = "windows, soft caps, tied"

CASES = [
    Case("dense", ONE, accumulation=4, layers="unroll"),
    Case("dense", FSDP8),
    Case("dense", FSDP8, accumulation=4, layers="unroll"),
    Case("dense", TP4_DP2),
    Case("dense", TP4_DP2, accumulation=4),
    Case("dense", FSDP2_TP4, layers="unroll", chunk=8),
    Case("dense", FSDP2_TP4, accumulation=4),
    Case("moe", FSDP2_TP4, accumulation=4),
    Case("mla", FSDP8, remat="full", accumulation=4),
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
    Case("moe", ONE, accumulation=4, remat="full"),
    Case("moe", FSDP8, accumulation=4),
    Case("moe", TP4_DP2, layers="unroll"),
    Case("moe", TP8, accumulation=4),
    Case("moe", ALL_THREE, remat="full"),
    Case("mla", TP4_DP2, accumulation=4),
    Case("mla", FSDP2_TP4, layers="unroll"),
    Case("mla", TP8),
    Case(WINDOWS, FSDP8, accumulation=4, layers="unroll"),
    Case(WINDOWS, FSDP2_TP4, accumulation=4, remat="dots"),
    Case(WINDOWS, TP8),
    Case("odd", FSDP8, accumulation=4),
    Case("odd", TP4_DP2, accumulation=4, layers="unroll"),
    Case("odd", FSDP2_TP4, remat="full", chunk=8),
]


def assert_equal_to_one_device(case: Case) -> None:
    over_microbatches = ("balance_over", "batch") in case.loss  # the one loss that accumulation changes
    found = train(case)
    truth = one_device(case.model, case.loss, case.accumulation if over_microbatches else 1)
    assert np.isfinite(truth.metrics).all()
    assert np.ptp(truth.metrics[:, 1]) > 0, "the run goes somewhere"
    np.testing.assert_allclose(found.metrics, truth.metrics, rtol=TOLERANCE)
    assert relative_error(found.params, truth.params) < TOLERANCE


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


def compiled(case: Case) -> Any:
    trainer = trainer_of(case)
    with jax.set_mesh(trainer.mesh):
        state = placed_state(trainer)
        return compiled_step(trainer, state, place(batches()[0], trainer))


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
