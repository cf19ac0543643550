"""Rows split over devices: ring and Ulysses attention equal the plain one, and train as one device does."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_equal_to_one_device import WINDOWS, Case, assert_equal_to_one_device
from tiny import packed_batch

from jaxformers.models.attention import Scores, dot_product
from jaxformers.models.masks import Visibility
from jaxformers.parallel.context import column_order, on_mesh
from jaxformers.parallel.mesh import MeshConfig, make_mesh

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


MESHES = {
    "ring": [{"cp": 8}, {"cp": 2, "tp": 4}, {"cp": 2, "dp": 2, "fsdp": 2}],
    "ulysses": [{"cp": 8}, {"cp": 2, "tp": 4}, {"cp": 2, "dp": 2, "fsdp": 2}],
    "local": [{"dp": 2, "tp": 4}],
}


@pytest.mark.parametrize("kind, sizes", [(kind, sizes) for kind, meshes in MESHES.items() for sizes in meshes], ids=str)
def test_attention_over_a_mesh_equals_the_plain_one_with_its_windows_caps_biases_sinks_and_documents(kind, sizes):
    """With two kv heads, which is fewer than most of these meshes split heads into."""
    mesh, shape = mesh_of(**sizes), {"kv_heads": 2, "value_dim": 6}
    order = column_order("auto" if kind == "ring" else "ulysses", mesh.shape["cp"], LENGTH)
    order = np.arange(LENGTH) if order is None else order
    with jax.set_mesh(mesh):
        found = values_and_gradients(on_mesh(kind, mesh), EVERYTHING, order=order, **shape)
    for ours, expected in zip(found, truth(**shape), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


CP8, CP2_DP2_TP2, CP2_FSDP4 = {"cp": 8}, {"cp": 2, "dp": 2, "tp": 2}, {"cp": 2, "fsdp": 4}
CP2_TP4, CP4_FSDP2 = {"cp": 2, "tp": 4}, {"cp": 4, "fsdp": 2}
SINKS = "sinks and windows"
CASES = [
    Case("dense", CP4_FSDP2, accumulation=4, chunk=8),
    Case(WINDOWS, CP2_DP2_TP2),
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
    Case("mla", CP8, context="ulysses", remat="full"),
    Case(WINDOWS, CP8, accumulation=4),
    Case(WINDOWS, CP4_FSDP2, context="ulysses"),
    Case(SINKS, CP8),
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
