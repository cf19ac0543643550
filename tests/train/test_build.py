"""A trainer: its two layouts of one state, what it refuses, and what it computes in."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LLAMA, assert_bit_equal, packed_batch, random_params

from jaxformers.families import read_config
from jaxformers.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from jaxformers.train.build import Trainer
from jaxformers.train.config import LossConfig, RuntimeConfig, TrainConfig
from jaxformers.train.losses import Totals, lm_loss
from jaxformers.train.optimizer_config import ScheduleConfig
from jaxformers.train.runtimes import make_runtime
from jaxformers.train.state import state_shardings

# A pattern of two kinds of layers, twice, so that layouts have something to mix up.
CFG = read_config(
    LLAMA
    | {
        "model_type": "gemma2",
        "vocab_size": 64,
        "head_dim": 8,
        "sliding_window": 8,
        "num_hidden_layers": 4,
        "query_pre_attn_scalar": 8,
        "tie_word_embeddings": True,
    }
)


def trainer_on(mesh=None, *, cfg=CFG, layers="scan", **settings) -> Trainer:
    mesh = mesh or make_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])
    train = TrainConfig(steps=10, batch_size=8, ema_decay=0.9)
    parts = {"runtime": RuntimeConfig(layers=layers), "schedule": ScheduleConfig(warmup_steps=2)} | settings
    return Trainer(cfg, mesh, 32, **{"train": train} | parts)


def filled_state(trainer: Trainer):
    """A state in the form of checkpoints, every leaf of which holds other numbers."""
    draw = np.random.default_rng(0)
    abstract = trainer.plain_state
    state = jax.tree.map(lambda a: draw.integers(0, 1000, a.shape).astype(a.dtype), abstract)
    return jax.device_put(state, state_shardings(abstract))


@pytest.mark.parametrize("axes", [{"fsdp": 1}, {"fsdp": 2, "tp": 4}])
def test_a_state_survives_the_way_into_the_layout_it_runs_from_and_back(axes):
    count = int(np.prod(list(axes.values())))
    trainer = trainer_on(make_mesh(MeshConfig(**axes), devices=jax.devices()[:count]), layers="unroll")
    state = filled_state(trainer)
    before = jax.device_get(state)
    with jax.set_mesh(trainer.mesh):
        inside = trainer.from_plain(state)
        outside = trainer.to_plain(inside)
    assert "blocks" in inside.params
    assert "layers" not in inside.params
    assert_bit_equal(jax.device_get(outside), before)
    for found, asked in zip(jax.tree.leaves(outside), jax.tree.leaves(trainer.plain_state), strict=True):
        assert found.sharding.is_equivalent_to(asked.sharding, found.ndim)


def test_a_scanned_state_is_already_in_the_form_that_checkpoints_hold():
    trainer = trainer_on()
    state = filled_state(trainer)
    assert trainer.to_plain(state) is state
    assert trainer.from_plain(state) is state


def test_the_first_state_is_the_same_on_every_mesh_and_in_both_layouts():
    cfg = read_config(LLAMA | {"num_hidden_layers": 1, "tie_word_embeddings": True})

    def first(trainer):
        with jax.set_mesh(trainer.mesh):
            return jax.device_get(trainer.to_plain(trainer.init(3)))

    one = first(trainer_on(cfg=cfg))
    assert int(one.step) == 0
    assert_bit_equal(one.ema, one.params)
    assert all(not np.any(m) for m in jax.tree.leaves((one.opt_state[0].mu, one.opt_state[0].nu)))
    assert one.params["embed"].std() == pytest.approx(cfg.d_model**-0.5, rel=0.05)
    assert_bit_equal(first(trainer_on(make_mesh(MeshConfig(fsdp=4, tp=2)), cfg=cfg, layers="unroll")), one)


def test_bfloat16_computes_low_and_keeps_parameters_moments_and_average_in_float32():
    trainer = trainer_on(runtime=RuntimeConfig(dtype="bfloat16", layers="scan"))
    with jax.set_mesh(trainer.mesh):
        state = filled_state(trainer).replace(params=jax.tree.map(jnp.asarray, random_params(CFG)))
        state, metrics = trainer.program.step(state, packed_batch(8))
    floats = [
        a for a in jax.tree.leaves((state.params, state.opt_state, state.ema)) if jnp.issubdtype(a.dtype, jnp.floating)
    ]
    assert {a.dtype for a in floats} == {np.dtype("float32")}
    counts = {"skipped_total", "skipped_in_a_row", "spikes_total"}
    assert {a.dtype for name, a in metrics.items() if name not in counts} == {np.dtype("float32")}
    low = float(metrics["loss"])
    exact = trainer_on()
    nll, weight = exact.program.evaluate(jax.tree.map(jnp.asarray, random_params(CFG)), packed_batch(8))
    full = float(nll / weight)
    assert low != full
    assert low == pytest.approx(full, rel=1e-2)


def test_an_evaluation_is_the_cross_entropy_of_the_whole_batch_whatever_the_microbatches():
    settings = {"train": TrainConfig(steps=10, batch_size=8, accumulation=4), "loss": LossConfig(chunk=8, z_loss=0.5)}
    params, batch = jax.tree.map(jnp.asarray, random_params(CFG)), jax.tree.map(jnp.asarray, packed_batch(8))
    trainer = trainer_on(**settings)
    nll, weight = trainer.program.evaluate(params, batch)
    runtime = make_runtime(RuntimeConfig(layers="scan"), CFG, trainer.mesh)
    plain = partial(lm_loss, cfg=CFG, runtime=runtime, config=LossConfig(chunk="none"))
    _, sums = jax.jit(plain)(params, batch, Totals.of(batch))
    assert float(weight) == float(batch["weights"].sum())
    assert float(nll / weight) == pytest.approx(float(sums.nll / sums.weight), rel=1e-5)


def test_layers_are_unrolled_on_cpu_unless_they_are_many_or_the_least_memory_is_wanted():
    mesh = make_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])
    deep = read_config(LLAMA | {"num_hidden_layers": 33})
    assert make_runtime(RuntimeConfig(), CFG, mesh).layers == "unroll"
    assert make_runtime(RuntimeConfig(), deep, mesh).layers == "scan"
    assert make_runtime(RuntimeConfig(remat="dots"), CFG, mesh).layers == "unroll"
    assert make_runtime(RuntimeConfig(remat="full"), CFG, mesh).layers == "scan"
    assert make_runtime(RuntimeConfig(layers="scan"), CFG, mesh).layers == "scan"
    assert make_runtime(RuntimeConfig(layers="unroll"), deep, mesh).layers == "unroll"


def test_settings_that_do_not_fit_each_other_are_refused_before_compiling():
    with pytest.raises(ValueError, match="warmup_steps is 10; it must be below the run's 10 steps"):
        trainer_on(schedule=ScheduleConfig(warmup_steps=10)).check()
    trainer_on().check()


def test_a_programs_cost_is_that_of_the_whole_mesh_and_batch():
    program = trainer_on(make_mesh(MeshConfig(fsdp=8))).program
    assert program.tokens_after(3) == 3 * 8 * 32
    assert program.peak_flops > 0
    one = trainer_on().program
    assert program.peak_flops == pytest.approx(8 * one.peak_flops), "eight CPU devices share one machine"
    assert program.flops_per_token == one.flops_per_token > 6 * 4 * 32 * 48 * 3


def test_a_batch_is_placed_by_rows():
    mesh = make_mesh(MeshConfig(dp=2, fsdp=2, tp=2))
    placed = jax.device_put(packed_batch(8)["tokens"], batch_sharding((8, 32), mesh))
    assert placed.sharding.shard_shape(placed.shape) == (2, 32)


def test_rows_that_tensor_shards_cannot_split_are_refused_with_the_nearest_lengths():
    mesh = make_mesh(MeshConfig(fsdp=1, tp=8))
    for length, nearest in ((30, "24 and 32"), (6, "8")):
        for apart in (True, False):
            trainer = replace(trainer_on(mesh, runtime=RuntimeConfig(sequence_parallel=apart)), sequence_length=length)
            if not apart:
                trainer.check()
                continue
            with pytest.raises(ValueError) as caught:
                trainer.check()
            assert str(caught.value) == (
                f"runtime: sequence_parallel cannot split rows of {length} tokens over 8 devices; nearest legal: "
                + nearest
            )
