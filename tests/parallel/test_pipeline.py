"""Pipelines: equal to one device whatever the schedule, refused where they do not fit, and what they cost."""

import jax
import numpy as np
import pytest
from runs import (
    TOLERANCE,
    Case,
    assert_equal_to_one_device,
    batches,
    compiled_step,
    one_device,
    place,
    placed_state,
    train,
    trainer_of,
)
from tiny import LLAMA, assert_bit_equal, relative_error, run_config

from jaxformers.config import load_config
from jaxformers.train.state import state_shardings
from jaxformers.training import fit, prepare_run

PP2, PP4 = {"pp": 2}, {"pp": 4}
INTERLEAVED, ONE_F_ONE_B = {"pipeline": "interleaved"}, {"pipeline": "1f1b"}
BIAS, GLOBAL = (("expert_bias_rate", 0.05),), (("balance_over", "batch"),)
FSDP, TP, DP = PP2 | {"fsdp": 2}, PP2 | {"tp": 2}, PP2 | {"dp": 2}


CASES = [
    Case("deep", PP4),
    Case("deep", FSDP, accumulation=2, **INTERLEAVED),
    Case("deep moe", PP2, **ONE_F_ONE_B),
    Case("deep", PP2 | {"cp": 2}),
    Case("deep moe", PP2 | {"ep": 2}, accumulation=2),
]
MORE_CASES = [
    Case("deep, mixed stacks", TP, remat="full"),
    Case("deep", PP2),
    Case("deep", PP2, microbatches=1),
    Case("deep", TP, chunk=8),
    Case("deep", DP, accumulation=2),
    Case("deep", DP, **ONE_F_ONE_B),
    Case("deep", FSDP, accumulation=2, chunk=8, **ONE_F_ONE_B),
    Case("deep", TP, **ONE_F_ONE_B),
    Case("deep", PP4, **ONE_F_ONE_B, microbatches=2),
    Case("deep", PP4, **INTERLEAVED, microbatches=16),
    Case("deep", PP2, **INTERLEAVED, virtual_stages=4, microbatches=2),
    Case("deep", PP4, stages=(1, 3, 2, 2)),
    Case("deep", FSDP, **INTERLEAVED, stages=(1, 3, 2, 2)),
    Case("deep moe", PP2 | {"fsdp": 2, "tp": 2}, accumulation=2),
    Case("deep moe", PP4, remat="full"),
    Case("deep moe", TP, **INTERLEAVED),
    Case("deep moe", PP2, stages=(3, 5)),
    Case("deep moe", PP2, **ONE_F_ONE_B, stages=(5, 3)),
    Case("deep, tied", PP4),
    Case("deep, tied", FSDP, accumulation=2, **ONE_F_ONE_B),
    Case("deep, tied", TP, **INTERLEAVED),
    Case("deep, mixed stacks", PP4, accumulation=2),
    Case("deep, mixed stacks", FSDP, **ONE_F_ONE_B),
    Case("deep, mixed stacks", PP2, **INTERLEAVED),
    Case("deep mla, dense first", FSDP),
    Case("deep mla, dense first", PP2, **ONE_F_ONE_B),
    Case("deep mla, dense first", PP2 | {"ep": 2}, **ONE_F_ONE_B, loss=BIAS),
    Case("deep mla, dense first", PP2, stages=(1, 3), loss=BIAS),
    Case("deep mla, dense first", PP2, **INTERLEAVED, loss=BIAS),
    Case("deep moe", PP2 | {"ep": 2, "tp": 2}, **INTERLEAVED, loss=GLOBAL),
    Case("deep moe", PP2 | {"ep": 2}, experts="alltoall", capacity_factor=4.0),
    Case("deep moe", PP2 | {"fsdp": 2, "ep": 2}, **ONE_F_ONE_B, remat="full"),
    Case("deep moe", PP2 | {"ep": 2, "cp": 2}),
    Case("deep", PP2 | {"cp": 4}, accumulation=2, **INTERLEAVED),
    Case("deep", PP2 | {"cp": 2, "tp": 2}, chunk=8),
    Case("deep", DP | {"tp": 2}, **ONE_F_ONE_B),
    Case("deep moe", TP | {"ep": 2}, **ONE_F_ONE_B),
    Case("deep", PP2 | {"fsdp": 2, "cp": 2}, context="ulysses", remat="full"),
    Case("deep, tied", PP2 | {"cp": 2}, context="hybrid"),
    Case("deep", TP, sequence_parallel=True),
    Case("deep", TP, **ONE_F_ONE_B, sequence_parallel=True),
    Case("deep", DP, accumulation=2, zero=2, stages=(3, 5)),
    Case("deep", PP2, attention="blockwise"),
]


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
    case = Case("deep", FSDP, pipeline=schedule, dtype="bfloat16")
    np.testing.assert_allclose(train(case).metrics[:, :2], one_device("deep").metrics[:, :2], rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("mesh", [PP2, PP4], ids=str)
def test_1f1b_needs_less_memory_than_gpipe_at_eight_microbatches(mesh, remat):
    def temporary_bytes(schedule: str) -> int:
        case = Case("deep", mesh, pipeline=schedule, microbatches=8, remat=remat)
        trainer = trainer_of(case)
        with jax.set_mesh(trainer.mesh):
            compiled = compiled_step(trainer, placed_state(trainer), place(batches()[0], trainer))
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes("1f1b") < 0.5 * temporary_bytes("gpipe")


def test_a_stage_holds_its_own_layers_and_activations_alone_travel():
    trainer = trainer_of(Case("deep", PP4))
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
    trainer = trainer_of(Case("deep", PP2 if "pipeline" in runtime else PP4, **runtime))
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
            "deep",
            PP2,
            {"microbatches": 5},
            "runtime.microbatches is 5, but has to divide the 32 rows that a device has of a step; nearest "
            "legal: 4 and 8",
        ),
        (
            "deep",
            DP | {"pp": 4},
            {"microbatches": 32},
            "runtime.microbatches is 32, but has to divide the 16 rows that a device has of a step; nearest legal: 16",
        ),
        (
            "deep",
            PP4,
            INTERLEAVED | {"microbatches": 2},
            "runtime.microbatches is 2, but has to divide the 32 rows that a device has of a step, and to come in "
            "groups of pp=4 when interleaved; nearest legal: 4",
        ),
        (
            "deep",
            {"pp": 3},
            {"microbatches": 8},
            "mesh.pp: 3 stages do not divide the 8 layers that the pipeline cuts; nearest legal: 2 "
            "and 4 stages, or 6 and 9 layers, or set runtime.stages=[3, 3, 2]",
        ),
        (
            "deep, mixed stacks",
            {"pp": 8},
            {},
            "mesh.pp: 8 stages do not divide the 4 repeats of a pattern of 2 layers that the pipeline cuts; "
            "nearest legal: 4 stages, or 8 repeats",
        ),
        (
            "deep",
            PP4,
            INTERLEAVED | {"virtual_stages": 3},
            "mesh.pp: 12 stages do not divide the 8 layers that the pipeline cuts; nearest legal: 8 "
            "stages, or 12 layers",
        ),
        (
            "deep",
            PP2,
            {"stages": (4, 5)},
            "runtime.stages is [4, 5]; it has to share the 8 layers that the pipeline cuts among 2 stages, at least "
            "one each",
        ),
        (
            "deep",
            PP2 | {"cp": 2},
            ONE_F_ONE_B,
            "runtime.pipeline=1f1b does not go with mesh.cp=2, whose exchanges of both ways could wait for each other; "
            "use gpipe or interleaved",
        ),
        ("deep", PP2, {"layers": "unroll"}, "runtime.layers=unroll does not go with mesh.pp=2; use scan or auto"),
    ],
)
def test_a_pipeline_that_does_not_fit_is_refused_before_anything_is_compiled(model, mesh, runtime, message):
    with pytest.raises(ValueError) as caught:
        trainer_of(Case(model, mesh, **runtime)).check()
    assert str(caught.value) == message


def test_1f1b_refuses_a_loss_that_needs_all_rows_before_any_gradient():
    message = (
        "loss: balance_over=batch needs all rows before any gradient, which runtime.pipeline=1f1b has not; "
        "use balance_over=row, or pipeline=gpipe or interleaved"
    )
    with pytest.raises(ValueError) as caught:
        trainer_of(Case("deep moe", PP2, **ONE_F_ONE_B, loss=GLOBAL)).check()
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
