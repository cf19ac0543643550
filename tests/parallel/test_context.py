"""Rows split over devices: ring and Ulysses attention equal the plain one, and train as one device does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import packed_batch

from jaxformers.models.attention import Scores, dot_product
from jaxformers.models.masks import Visibility
from jaxformers.parallel.context import column_order, make_attend, on_mesh
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


MESHES = {
    "ring": [{"cp": 8}, {"cp": 2, "tp": 4}, {"cp": 2, "dp": 2, "fsdp": 2}],
    "ulysses": [{"cp": 8}, {"cp": 2, "tp": 4}, {"cp": 2, "dp": 2, "fsdp": 2}],
    "local": [{"dp": 2, "tp": 4}],
}
EVERYTHING = Scores(0.7, window=9, softcap=3.0, alibi=1.0)


@pytest.mark.parametrize("kind, sizes", [(kind, sizes) for kind, meshes in MESHES.items() for sizes in meshes], ids=str)
def test_attention_over_a_mesh_equals_the_plain_one_with_its_windows_caps_biases_sinks_and_documents(kind, sizes):
    """With two kv heads, which is fewer than most of these meshes split heads into."""
    mesh, shape = mesh_of(**sizes), {"kv_heads": 2, "value_dim": 6}
    order = column_order("auto" if kind == "ring" else "ulysses", mesh.shape["cp"], LENGTH)
    order = np.arange(LENGTH) if order is None else order
    truth = values_and_gradients(dot_product, EVERYTHING, order=np.arange(LENGTH), **shape)
    with jax.set_mesh(mesh):
        found = values_and_gradients(on_mesh(kind, mesh), EVERYTHING, order=order, **shape)
    for ours, expected in zip(found, truth, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
