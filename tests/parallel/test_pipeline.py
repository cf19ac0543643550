"""Pipelines: equal to one device whatever the schedule, refused where they do not fit, and what they cost."""

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import pytest
from test_equal_to_one_device import DENSE, LENGTH, TOLERANCE, Run, batches, compiled_step, place, placed_state
from tiny import LLAMA, assert_bit_equal, relative_error, run_config

from jaxformers.config import load_config
from jaxformers.families import read_config
from jaxformers.parallel.mesh import MeshConfig, make_mesh
from jaxformers.train.build import Trainer
from jaxformers.train.config import LossConfig, OptimizerConfig, RuntimeConfig, ScheduleConfig, TrainConfig
from jaxformers.train.state import state_shardings
from jaxformers.training import fit, prepare_run

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
MODELS["mtp"] = MODELS["mla, dense first"] | {"num_nextn_predict_layers": 1}
PP2, PP4 = {"pp": 2}, {"pp": 4}
INTERLEAVED, ONE_F_ONE_B = {"pipeline": "interleaved"}, {"pipeline": "1f1b"}
BIAS, GLOBAL = (("expert_bias_rate", 0.05),), (("balance_over", "batch"),)
FSDP, TP, DP = PP2 | {"fsdp": 2}, PP2 | {"tp": 2}, PP2 | {"dp": 2}


@dataclass(frozen=True)
class Case:
    model: str
    mesh: dict[str, int] = field(hash=False)
    accumulation: int = 1
    chunk: int | str = "none"
    runtime: dict[str, Any] = field(default_factory=dict, hash=False)
    loss: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        axes = " x ".join(f"{axis}{size}" for axis, size in self.mesh.items()) or "one device"
        settings = ", ".join(f"{name} {value}" for name, value in (*self.runtime.items(), *self.loss))
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
        loss=LossConfig(chunk=case.chunk, z_loss=1e-3, balance_loss=0.01, router_z_loss=1e-3, **dict(case.loss)),
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
def one_device(model: str, loss: tuple[tuple[str, Any], ...] = ()) -> Run:
    return train(Case(model, {}, loss=loss))


CASES = [
    Case("dense", PP4),
    Case("dense", FSDP, accumulation=2, runtime=INTERLEAVED),
    Case("moe", PP2, runtime=ONE_F_ONE_B),
    Case("dense", PP2 | {"cp": 2}),
    Case("moe", PP2 | {"ep": 2}, accumulation=2),
]
MORE_CASES = [
    Case("mixed stacks", TP, runtime={"remat": "full"}),
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
    Case("mla, dense first", PP2 | {"ep": 2}, runtime=ONE_F_ONE_B, loss=BIAS),
    Case("mla, dense first", PP2, runtime={"stages": (1, 3)}, loss=BIAS),
    Case("mla, dense first", PP2, runtime=INTERLEAVED, loss=BIAS),
    Case("moe", PP2 | {"ep": 2, "tp": 2}, runtime=INTERLEAVED, loss=GLOBAL),
    Case("moe", PP2 | {"ep": 2}, runtime={"experts": "alltoall", "capacity_factor": 4.0}),
    Case("moe", PP2 | {"fsdp": 2, "ep": 2}, runtime=ONE_F_ONE_B | {"remat": "full"}),
    Case("moe", PP2 | {"ep": 2, "cp": 2}),
    Case("dense", PP2 | {"cp": 4}, accumulation=2, runtime=INTERLEAVED),
    Case("dense", PP2 | {"cp": 2, "tp": 2}, chunk=8),
    Case("dense", DP | {"tp": 2}, runtime=ONE_F_ONE_B),
    Case("moe", TP | {"ep": 2}, runtime=ONE_F_ONE_B),
    Case("dense", PP2 | {"fsdp": 2, "cp": 2}, runtime={"context": "ulysses", "remat": "full"}),
    Case("tied", PP2 | {"cp": 2}, runtime={"context": "hybrid"}),
    Case("dense", TP, runtime={"sequence_parallel": True}),
    Case("dense", TP, runtime=ONE_F_ONE_B | {"sequence_parallel": True}),
    Case("dense", DP, accumulation=2, runtime={"zero": 2, "stages": (3, 5)}),
    Case("dense", PP2, runtime={"attention": "blockwise"}),
]


def assert_equal_to_one_device(case: Case) -> None:
    found, truth = train(case), one_device(case.model, case.loss)
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


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_step_in_bfloat16_compiles_and_is_near_the_one_in_float32(schedule):
    case = Case("dense", FSDP, runtime={"pipeline": schedule, "dtype": "bfloat16"})
    np.testing.assert_allclose(train(case).metrics[:, :2], one_device("dense").metrics[:, :2], rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("mesh", [PP2, PP4], ids=str)
def test_1f1b_needs_less_memory_than_gpipe_at_eight_microbatches(mesh, remat):
    def temporary_bytes(schedule: str) -> int:
        case = Case("dense", mesh, runtime={"pipeline": schedule, "microbatches": 8, "remat": remat})
        trainer = trainer_of(case)
        with jax.set_mesh(trainer.mesh):
            compiled = compiled_step(trainer, placed_state(trainer), place(batches()[0], trainer))
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes("1f1b") < 0.5 * temporary_bytes("gpipe")


def test_a_stage_holds_its_own_layers_and_activations_alone_travel():
    trainer = trainer_of(Case("dense", PP4))
    with jax.set_mesh(trainer.mesh):
        state = placed_state(trainer)
        program = compiled_step(trainer, state, place(batches()[0], trainer)).as_text()
    for leaf in jax.tree.leaves(state.params["layers"]):
        assert leaf.sharding.shard_shape(leaf.shape)[0] == leaf.shape[0] / 4
    assert "collective-permute" in program
    assert "all-to-all" not in program
    assert "all-gather" not in program


@pytest.mark.parametrize("runtime", [{"stages": (1, 4, 1, 2)}, INTERLEAVED | {"virtual_stages": 2}], ids=str)
def test_a_state_survives_the_order_that_its_stages_want(runtime):
    trainer = trainer_of(Case("dense", PP2 if "pipeline" in runtime else PP4, runtime=runtime))
    draw = np.random.default_rng(0)
    state = jax.tree.map(lambda a: draw.integers(0, 1000, a.shape).astype(a.dtype), trainer.plain_state)
    with jax.set_mesh(trainer.mesh):
        inside = trainer.from_plain(jax.device_put(state, state_shardings(trainer.plain_state)))
        outside = trainer.to_plain(inside)
    assert_bit_equal(jax.device_get(outside), state)
    q = inside.params["layers"][0][0]["attn"]["q"]
    slots = [0, 0, 0, 0, 1, 2, 3, 4, 5, 5, 5, 5, 6, 7, 7, 7] if "stages" in runtime else [0, 1, 4, 5, 2, 3, 6, 7]
    np.testing.assert_array_equal(q, state.params["layers"][0][0]["attn"]["q"][slots])


@pytest.mark.parametrize(
    "model, mesh, runtime, message",
    [
        (
            "dense",
            PP2,
            {"microbatches": 5},
            "runtime.microbatches is 5, but has to divide the 32 rows that a device has of a step; nearest are 4 and 8",
        ),
        (
            "dense",
            DP | {"pp": 4},
            {"microbatches": 32},
            "runtime.microbatches is 32, but has to divide the 16 rows that a device has of a step; nearest are 16",
        ),
        (
            "dense",
            PP4,
            INTERLEAVED | {"microbatches": 2},
            "runtime.microbatches is 2, but has to divide the 32 rows that a device has of a step, and to come in "
            "groups of pp=4 when interleaved; nearest are 4",
        ),
        (
            "dense",
            {"pp": 3},
            {"microbatches": 8},
            "mesh.pp: 3 stages do not divide the 8 layers that the pipeline cuts; the nearest that they do are 6 or "
            "9, or set runtime.stages=[3, 3, 2]",
        ),
        (
            "mixed stacks",
            {"pp": 8},
            {},
            "mesh.pp: 8 stages do not divide the 4 repeats of a pattern of 2 layers that the pipeline cuts; the "
            "nearest that they do are 8",
        ),
        (
            "dense",
            PP4,
            INTERLEAVED | {"virtual_stages": 3},
            "mesh.pp: 12 stages do not divide the 8 layers that the pipeline cuts; the nearest that they do are 12",
        ),
        (
            "dense",
            PP2,
            {"stages": (4, 5)},
            "runtime.stages is [4, 5]; it has to share the 8 layers that the pipeline cuts among 2 stages, at least "
            "one each",
        ),
        (
            "dense",
            PP2 | {"cp": 2},
            ONE_F_ONE_B,
            "runtime.pipeline=1f1b does not go with mesh.cp=2, whose exchanges of both ways could wait for each other; "
            "use gpipe or interleaved",
        ),
        ("dense", PP2, {"layers": "unroll"}, "runtime.layers=unroll does not go with mesh.pp=2; use scan or auto"),
    ],
)
def test_a_pipeline_that_does_not_fit_is_refused_before_anything_is_compiled(model, mesh, runtime, message):
    with pytest.raises(ValueError) as caught:
        trainer_of(Case(model, mesh, runtime=runtime)).check()
    assert str(caught.value) == message


def test_1f1b_refuses_a_loss_that_needs_all_rows_before_any_gradient():
    message = (
        "loss: balance_over=batch needs all rows before any gradient, which runtime.pipeline=1f1b has not; "
        "use balance_over=row, or pipeline=gpipe or interleaved"
    )
    with pytest.raises(ValueError) as caught:
        trainer_of(Case("moe", PP2, runtime=ONE_F_ONE_B, loss=GLOBAL)).check()
    assert str(caught.value) == message


def test_a_dry_run_refuses_a_pipeline_that_does_not_fit(tmp_path):
    values = run_config(tmp_path, mesh={"pp": 2, "fsdp": 4, "dp": 1}, train={"batch_size": 16})
    with pytest.raises(ValueError, match=r"runtime\.microbatches is 4, but has to divide the 2 rows"):
        prepare_run(load_config(values, ["train.accumulation=2"]))


@pytest.mark.slow
def test_a_run_on_a_pipeline_goes_on_without_one_and_continues_its_samples(tmp_path):
    model = LLAMA | {"num_hidden_layers": 4}
    pipelined = {"mesh": {"pp": 2, "fsdp": 4}, "runtime": {"layers": "auto", "pipeline": "interleaved"}}
    values = run_config(
        tmp_path,
        model=model,
        sample={"prompts": ["alpha"], "max_new_tokens": 2},
        train={"steps": 4, "batch_size": 16},
        schedule={"name": "constant"},
        optimizer={"eps": 1e-3},
    )
    whole = fit(values | {"run_dir": str(tmp_path / "whole")}, ["train.steps=6"])
    first = fit(values | pipelined)
    assert len(first.samples) == 1
    second = fit(values, ["train.steps=6"])
    assert second.step == 6
    assert relative_error(second.model.params, whole.model.params) < TOLERANCE
