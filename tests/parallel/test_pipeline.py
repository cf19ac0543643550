"""Pipelines: equal to one device whatever the schedule, refused where they do not fit, and what they cost."""

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import pytest
from test_equal_to_one_device import DENSE, LENGTH, TOLERANCE, Run, batches, compiled_step, place, placed_state
from tiny import assert_bit_equal, packed_batch, relative_error

from jaxformers.families import read_config
from jaxformers.models.config import plan_stacks
from jaxformers.parallel.mesh import MeshConfig, make_mesh
from jaxformers.train.build import Trainer
from jaxformers.train.config import LossConfig, OptimizerConfig, RuntimeConfig, ScheduleConfig, TrainConfig

DEEP = DENSE | {"num_hidden_layers": 8, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "dense": DEEP,
    "moe": DEEP | {"model_type": "mixtral"} | EXPERTS,
    "tied": DEEP | {"model_type": "qwen2", "tie_word_embeddings": True},
    # A stack of four pairs, global ones at every second layer, then a stack of one.
    "mixed stacks": DEEP
    | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 9,
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 8,
    },
    # A dense layer before the sparse ones that are pipelined.
    "mla, dense first": DEEP
    | {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 5,
        "head_dim": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 4,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
    },
}
PP2, PP4 = {"pp": 2}, {"pp": 4}
FSDP, TP, DP = PP2 | {"fsdp": 2}, PP2 | {"tp": 2}, PP2 | {"dp": 2}


@dataclass(frozen=True)
class Case:
    model: str
    mesh: dict[str, int] = field(hash=False)
    accumulation: int = 1
    chunk: int | str = "none"
    runtime: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        axes = " x ".join(f"{axis}{size}" for axis, size in self.mesh.items()) or "one device"
        settings = ", ".join(f"{name} {value}" for name, value in self.runtime.items())
        return f"{self.model} on {axes}, accumulation {self.accumulation}, chunk {self.chunk}, {settings}"


def trainer_of(case: Case, **train: Any) -> Trainer:
    count = int(np.prod(list(case.mesh.values()), dtype=int))
    return Trainer(
        read_config(MODELS[case.model]),
        make_mesh(MeshConfig(**{"fsdp": 1} | case.mesh), devices=jax.devices()[:count]),
        LENGTH,
        train=TrainConfig(**{"steps": 10, "batch_size": 32, "accumulation": case.accumulation} | train),
        runtime=RuntimeConfig(**{"layers": "scan"} | case.runtime),
        optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-3, clip_norm=0.5),
        schedule=ScheduleConfig(warmup_steps=2),
        loss=LossConfig(chunk=case.chunk, z_loss=1e-3, balance_loss=0.01, router_z_loss=1e-3),
    )


def train(case: Case) -> Run:
    trainer = trainer_of(case)
    with jax.set_mesh(trainer.mesh), jax.default_matmul_precision("highest"):
        state, placed = placed_state(trainer), [place(batch, trainer) for batch in batches()[:3]]
        step, metrics = compiled_step(trainer, state, placed[0]), []
        for batch in placed:
            state, found = step(state, batch)
            metrics.append([float(found[name]) for name in ("objective", "loss", "grad_norm")])
        return Run(np.array(metrics), jax.device_get(trainer.to_plain(state).params))


@functools.cache
def one_device(model: str) -> Run:
    return train(Case(model, {}))


CASES = [
    Case("dense", PP4),
    Case("dense", FSDP, accumulation=2, runtime={"pipeline": "interleaved"}),
    Case("moe", PP2, runtime={"pipeline": "1f1b"}),
    Case("mixed stacks", TP, runtime={"remat": "full"}),
]
INTERLEAVED, ONE_F_ONE_B = {"pipeline": "interleaved"}, {"pipeline": "1f1b"}
MORE_CASES = [
    Case("dense", PP2),
    Case("dense", PP2, runtime={"microbatches": 1}),
    Case("dense", TP, chunk=8),
    Case("dense", DP, accumulation=2),
    Case("dense", DP, runtime=ONE_F_ONE_B),
    Case("dense", FSDP, accumulation=2, chunk=8, runtime=ONE_F_ONE_B),
    Case("dense", TP, runtime=ONE_F_ONE_B),
    Case("dense", PP4, runtime=ONE_F_ONE_B | {"microbatches": 2}),
    Case("dense", PP4, runtime=INTERLEAVED | {"microbatches": 16}),
    Case("dense", PP2, runtime=INTERLEAVED | {"virtual_stages": 4, "microbatches": 2}),
    Case("dense", PP4, runtime={"stages": (1, 3, 2, 2)}),
    Case("dense", FSDP, runtime=INTERLEAVED | {"stages": (1, 3, 2, 2)}),
    Case("moe", PP2 | {"fsdp": 2, "tp": 2}, accumulation=2),
    Case("moe", PP4, runtime={"remat": "full"}),
    Case("moe", TP, runtime=INTERLEAVED),
    Case("moe", PP2, runtime={"stages": (3, 5)}),
    Case("moe", PP2, runtime=ONE_F_ONE_B | {"stages": (5, 3)}),
    Case("tied", PP4),
    Case("tied", FSDP, accumulation=2, runtime=ONE_F_ONE_B),
    Case("tied", TP, runtime=INTERLEAVED),
    Case("mixed stacks", PP4, accumulation=2),
    Case("mixed stacks", FSDP, runtime=ONE_F_ONE_B),
    Case("mixed stacks", PP2, runtime=INTERLEAVED),
    Case("mla, dense first", FSDP),
    Case("mla, dense first", PP2, runtime=ONE_F_ONE_B),
]


def assert_equal_to_one_device(case: Case) -> None:
    found, truth = train(case), one_device(case.model)
    assert np.isfinite(truth.metrics).all()
    np.testing.assert_allclose(found.metrics, truth.metrics, rtol=TOLERANCE)
    assert relative_error(found.params, truth.params) < TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_pipeline_trains_as_one_device_does(case):
    assert_equal_to_one_device(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_CASES, ids=str)
def test_further_pipelines_train_as_one_device_does(case):
    assert_equal_to_one_device(case)
