"""Rows split over devices: ring and Ulysses attention equal the plain one, and train as one device does."""

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from runs import (
    DENSE,
    MODELS,
    SINKS,
    WINDOWS,
    Case,
    assert_equal_to_one_device,
    batches,
    compiled_step,
    place,
    placed_state,
    trainer_of,
)
from tiny import LLAMA, packed_batch, relative_error, run_config

import jaxformers as jf
from jaxformers.config import load_config
from jaxformers.families import read_config
from jaxformers.models.attention import Scores, dot_product
from jaxformers.models.blockwise import blockwise_attention
from jaxformers.models.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    YarnScaling,
)
from jaxformers.models.masks import Visibility
from jaxformers.models.rope import rotation
from jaxformers.parallel.context import LONG, column_order, group_size, make_attend, on_mesh
from jaxformers.parallel.mesh import AXES, MeshConfig, batch_sharding, make_mesh
from jaxformers.train.build import Trainer
from jaxformers.train.config import RuntimeConfig, TrainConfig
from jaxformers.training import prepare_run

QUICK = {"xla_backend_optimization_level": 0}  # compiles fast, computes the same
ROWS, LENGTH, HEADS, HEAD_DIM = 4, 32, 8, 4


def mesh_of(**sizes: int) -> Any:
    sizes = {"fsdp": 1} | sizes
    return make_mesh(MeshConfig(**sizes), devices=jax.devices()[: int(np.prod(list(sizes.values())))])


def values_and_gradients(attend: Any, scores: Scores, *, kv_heads: int, value_dim: int, order: np.ndarray) -> Any:
    """Output and gradients by q, k, v and sinks, of packed rows whose tokens lie in this order."""
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (ROWS, LENGTH, HEADS, HEAD_DIM))
    k = jax.random.normal(keys[1], (ROWS, LENGTH, kv_heads, HEAD_DIM))
    v = jax.random.normal(keys[2], (ROWS, LENGTH, kv_heads, value_dim))
    batch = packed_batch(ROWS, LENGTH)
    positions, segments = (jnp.asarray(batch[name][:, order]) for name in ("positions", "segment_ids"))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array) -> tuple[jax.Array, jax.Array]:
        q, k, v = (x[:, order] for x in (q, k, v))
        y = attend(q, k, v, Visibility(positions, positions, segments, segments), scores, sinks=sinks)
        y = y[:, np.argsort(order)]
        return (y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)).sum(), y

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True), compiler_options=QUICK)
    with jax.default_matmul_precision("highest"):
        (_, y), gradients = step(q, k, v, jax.random.normal(keys[3], (HEADS,)))
    return jax.device_get((y, *gradients))


EVERYTHING = Scores(0.7, window=9, softcap=3.0, alibi=1.0)


@functools.cache
def truth(*, kv_heads: int, value_dim: int) -> Any:
    order = np.arange(LENGTH)
    return values_and_gradients(dot_product, EVERYTHING, order=order, kv_heads=kv_heads, value_dim=value_dim)


CASES_OF_ATTENTION = [
    # (devices that trade tokens for heads, mesh): a ring, Ulysses, a ring of groups, and no context axis
    (1, {"cp": 8}),
    (1, {"cp": 2, "tp": 4}),
    (1, {"cp": 2, "dp": 2, "fsdp": 2}),
    (8, {"cp": 8}),
    (2, {"cp": 2, "tp": 4}),
    (2, {"cp": 4, "tp": 2}),
    (4, {"cp": 8}),
    (1, {"dp": 2, "tp": 4}),
]


@pytest.mark.parametrize("group, sizes", CASES_OF_ATTENTION, ids=str)
def test_attention_over_a_mesh_equals_the_plain_one_with_its_windows_caps_biases_sinks_and_documents(group, sizes):
    """With two kv heads, which is fewer than most of these meshes split heads into, and tokens in any order."""
    mesh, shape = mesh_of(**sizes), {"kv_heads": 2, "value_dim": 6}
    order = np.random.default_rng(0).permutation(LENGTH)
    with jax.set_mesh(mesh):
        found = values_and_gradients(on_mesh(mesh, group=group), EVERYTHING, order=order, **shape)
    for ours, expected in zip(found, truth(**shape), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 2])
def test_attention_over_a_mesh_works_within_a_pipelines_island(group):
    mesh = jax.make_mesh((2, 1, 2, 1, 2, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    scores = Scores(0.5)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, ROWS, LENGTH, heads, HEAD_DIM) for heads in (4, 2, 2)]
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False)]
    arrays.append(jax.random.normal(keys[3], (2, 4)))  # sinks
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))

    def stage(attend: Any, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array, at: jax.Array) -> jax.Array:
        return attend(q[0], k[0], v[0], Visibility(at, at), scores, sinks=sinks[0])[None]

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array) -> jax.Array:
        specs = (*[PartitionSpec("pp")] * 4, PartitionSpec())
        inside = functools.partial(stage, on_mesh(mesh, group=group))
        stages = jax.shard_map(inside, in_specs=specs, out_specs=specs[0], axis_names={"pp"})
        return (stages(q, k, v, sinks, positions) ** 2).sum()

    def plain(*arrays: jax.Array) -> jax.Array:
        both = ([a[i : i + 1] for a in arrays] for i in range(2))
        return sum((stage(dot_product, *one, positions) ** 2).sum() for one in both)

    def gradients(function: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.grad(function, argnums=(0, 1, 2, 3)), compiler_options=QUICK)(*arrays)

    expected = gradients(plain)
    with jax.set_mesh(mesh):
        assert relative_error(gradients(loss), expected) < 1e-5


def test_zigzag_gives_every_device_as_many_pairs_of_query_and_key():
    order = functools.partial(column_order, cfg=read_config(DENSE), length=LENGTH)
    for context, cp, ring in (("auto", 2, 2), ("ring", 4, 4), ("auto", 8, 8), ("hybrid", 8, 4)):
        held = order(context, sizes={"cp": cp, "tp": 1}).reshape(ring, -1)
        assert sorted(held.ravel()) == list(range(LENGTH))
        assert len({sum(int(position) + 1 for position in device) for device in held}) == 1
    assert order("auto", sizes={"cp": 1, "tp": 1}) is None
    assert order("ulysses", sizes={"cp": 4, "tp": 1}) is None


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        LinearScaling(4.0),
        DynamicScaling(4.0, 16),
        Llama3Scaling(8.0, 16, 1.0, 4.0),
        YarnScaling(4.0, 16, attention_factor=1.2),
        LongRopeScaling((1.0, 1.5), (2.0, 3.0), 16, 1.1, 1.3),
    ],
    ids=lambda scaling: type(scaling).__name__,
)
def test_positions_split_over_devices_in_zigzag_turn_as_whole_rows_do(scaling):
    """Also where the frequencies depend on the longest position of a row, which only one device holds."""
    mesh, rope = mesh_of(cp=4, dp=2), Rope(4, scaling=scaling)
    order = column_order("ring", read_config(DENSE), mesh.shape, length=LENGTH)
    positions = packed_batch(ROWS, LENGTH)["positions"]
    placed = jax.device_put(positions[:, order], batch_sharding(positions.shape, mesh))
    found = jax.jit(functools.partial(rotation, rope))(placed)
    for ours, expected in zip(found, rotation(rope, jnp.asarray(positions)), strict=True):
        np.testing.assert_allclose(ours, expected[:, order], rtol=1e-6, atol=1e-6)


def test_the_hybrid_trades_among_as_many_devices_as_have_kv_heads_of_their_own():
    def group(model: str, **sizes: int) -> int:
        return group_size("hybrid", read_config(MODELS[model]), sizes)

    assert group("dense", cp=8, tp=1) == 2
    assert group("dense", cp=4, tp=2) == 1
    assert group("mla", cp=8, tp=1) == 8
    assert group("odd", cp=6, tp=2) == 3


@pytest.mark.parametrize(
    "sizes, settings, length, line",
    [
        (
            {"cp": 4},
            {},
            36,
            "data.sequence_length is 36, which cp=4 cannot split into 8 equal parts; nearest legal: 32 and 40",
        ),
        ({"cp": 8}, {}, 9, "data.sequence_length is 9, which cp=8 cannot split into 16 equal parts; nearest legal: 16"),
        (
            {"cp": 4},
            {"context": "ulysses"},
            38,
            "data.sequence_length is 38, which cp=4 cannot split into 4 equal parts; nearest legal: 36 and 40",
        ),
        (
            {"cp": 4, "tp": 2},
            {"context": "ulysses"},
            32,
            "runtime: context=ulysses cannot split 2 heads a device over cp=4; make cp one of 1, 2, or use ring",
        ),
        (
            {"cp": 2},
            {"attention": "dot_product"},
            32,
            "runtime: attention=dot_product needs whole rows, which cp=2 splits; use auto or blockwise",
        ),
    ],
)
def test_what_a_context_axis_cannot_split_is_refused_before_anything_compiles(tmp_path, sizes, settings, length, line):
    """As `jaxformers train --dry-run` does."""
    sections = {"mesh": {"fsdp": 1, "dp": "auto"} | sizes, "runtime": settings, "data": {"sequence_length": length}}
    config = load_config(run_config(tmp_path, **sections))
    with pytest.raises(ValueError) as caught:
        prepare_run(config)
    assert str(caught.value) == line


def test_attention_goes_block_by_block_where_rows_are_long():
    one, many = mesh_of(), mesh_of(dp=2)
    make = functools.partial(make_attend, context="auto", cfg=read_config(DENSE))
    assert make("auto", mesh=one, length=LONG - 1) is dot_product
    assert make("auto", mesh=one, length=LONG) is blockwise_attention
    assert make("dot_product", mesh=one, length=LONG) is dot_product
    assert make("blockwise", mesh=one, length=8) is blockwise_attention
    assert make("auto", mesh=many, length=8) is dot_product


@pytest.mark.slow
def test_a_run_on_split_rows_trains_evaluates_and_generates_as_another_mesh_does(tmp_path):
    sample = {"prompts": ["alpha beta"], "max_new_tokens": 5, "temperature": 0}
    common = {"train": {"steps": 3, "batch_size": 8, "eval_batches": 1}, "sample": sample}
    split = {"mesh": {"dp": 2, "fsdp": 1, "cp": 4}, "run_dir": str(tmp_path / "split")}
    whole = jf.fit(run_config(tmp_path, **common))
    found = jf.fit(run_config(tmp_path, **common, **split))
    assert found.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5)
    assert found.validation == pytest.approx(whole.validation, rel=1e-5)
    assert found.samples == whole.samples


def test_a_ring_passes_keys_values_and_their_gradients_and_gathers_nothing():
    trainer = trainer_of(Case("dense", {"cp": 4}, chunk=8))
    with jax.set_mesh(trainer.mesh):
        state = placed_state(trainer)
        program = compiled_step(trainer, state, place(batches()[0], trainer)).as_text()
    # Of keys and values: forward, backward, their gradients within the ring's loop and once more to get home; and both
    # times where the keys stand, their positions and segments.
    assert len(re.findall(r" = f32\S* collective-permute\(", program)) == 8
    assert len(re.findall(r" = s32\S* collective-permute\(", program)) == 4
    assert "all-gather" not in program
    assert "all-to-all" not in program


@pytest.mark.slow
def test_memory_of_a_row_of_32k_tokens_falls_with_the_devices_it_is_split_over():
    cfg = read_config(LLAMA | {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 2**15})
    temporaries = []
    for cp in (1, 2, 4, 8):
        runtime, train = RuntimeConfig(layers="scan", remat="full"), TrainConfig(batch_size=1)
        trainer = Trainer(cfg, mesh_of(cp=cp), 2**15, runtime=runtime, train=train)
        with jax.set_mesh(trainer.mesh):
            temporaries.append(step_temporaries(trainer))
    for more, less in itertools.pairwise(temporaries):
        assert less < 0.6 * more, temporaries


def step_temporaries(trainer: Trainer) -> int:
    """Bytes of temporaries a device of the compiled training step."""
    shape = (trainer.train.batch_size, trainer.sequence_length)
    place = batch_sharding(shape, trainer.mesh)
    dtypes = {"weights": jnp.float32} | dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in dtypes.items()}
    compiled = trainer.program.step.lower(trainer.plain_state, batch).compile(compiler_options=QUICK)
    return compiled.memory_analysis().temp_size_in_bytes


CP8, CP2_DP2_TP2, CP2_FSDP4 = {"cp": 8}, {"cp": 2, "dp": 2, "tp": 2}, {"cp": 2, "fsdp": 4}
CP2_TP4, CP4_FSDP2 = {"cp": 2, "tp": 4}, {"cp": 4, "fsdp": 2}
CASES = [
    Case("dense", CP4_FSDP2, accumulation=4, chunk=8),
    Case("dense", CP8, context="ulysses"),  # more devices than the two kv heads
]
MORE_CASES = [
    Case("dense", CP8, chunk=16, accumulation=4),
    Case("dense", CP2_TP4, layers="unroll"),
    Case("dense", CP4_FSDP2, remat="full"),
    Case("dense", CP2_DP2_TP2, remat="projections", context="ulysses", chunk=8, accumulation=4),
    Case("dense", {"cp": 2}, remat="dots"),
    Case("moe", CP2_FSDP4, accumulation=4),
    Case("moe", CP2_TP4, context="ulysses"),
    Case("mla", CP4_FSDP2, accumulation=4),
    Case("mla", CP2_DP2_TP2),
    Case("mla", {"cp": 4, "tp": 2}, context="hybrid"),
    Case("mla", CP8, context="ulysses", remat="full"),
    Case(WINDOWS, CP2_DP2_TP2),
    Case(WINDOWS, CP8, accumulation=4),
    Case(WINDOWS, CP4_FSDP2, context="ulysses"),
    Case(SINKS, CP8),
    Case(SINKS, CP8, context="hybrid", accumulation=4),
    Case("dense", CP8, context="hybrid"),
    Case(SINKS, CP2_DP2_TP2, accumulation=4),
    Case(SINKS, CP2_TP4, context="ulysses", remat="full"),
    Case("odd", CP4_FSDP2, accumulation=4),
    Case("odd", CP2_TP4),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_split_over_devices_train_as_on_one(case):
    assert_equal_to_one_device(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_CASES, ids=str)
def test_further_splits_of_rows_train_as_one_device_does(case):
    assert_equal_to_one_device(case)
