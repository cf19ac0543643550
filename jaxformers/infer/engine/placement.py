"""An engine on a mesh: every device sees all tokens, and holds its share of the heads, of the experts and of the cache.

The only module of the engine that knows a mesh.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from jax.sharding import Mesh, NamedSharding

from jaxformers.infer.engine.sizes import Sizes
from jaxformers.infer.generate import Prepared
from jaxformers.models.config import ModelConfig
from jaxformers.models.paged import attend_in_pages
from jaxformers.models.params import Params
from jaxformers.models.runtime import Runtime
from jaxformers.parallel.experts import whole_token_experts
from jaxformers.parallel.mesh import RULES, make_mesh, sharder

SPLIT = ("tp", "ep", "fsdp")  # the axes that split an engine's work or its weights; others would only copy them
WHOLE_TOKENS = RULES | {"batch": (), "seq": (), "stream": ()}


def mesh_of(params: Params) -> Mesh:
    """Where these parameters are."""
    placed = params["embed"].sharding
    if isinstance(placed, NamedSharding):
        return placed.mesh
    return make_mesh(devices=list(placed.device_set))


def paged_runtime(model: Prepared, sizes: Sizes, mesh: Mesh) -> Runtime:
    """How an engine of these sizes runs a model on this mesh. ValueError as `engine_runtime`."""
    return engine_runtime(replace(model.runtime, attend=attend_in_pages(sizes.block)), model.config, mesh)


@functools.cache
def engine_runtime(runtime: Runtime, cfg: ModelConfig, mesh: Mesh) -> Runtime:
    """A runtime for the engine on this mesh: an equal one each time, so that compiled functions are found again.
    ValueError for a mesh on which devices would only repeat each other's work."""
    copying = {axis: size for axis, size in mesh.shape.items() if size > 1 and axis not in SPLIT}
    if "dp" in copying:
        raise ValueError(f"mesh: dp={copying['dp']} makes as many engines, which Replicas.of makes of a model")
    if copying:
        axis, size = next(iter(copying.items()))
        raise ValueError(f"mesh: {axis}={size} splits nothing of an engine's work; use {', '.join(SPLIT)}")
    if mesh.size == 1:
        return runtime
    return replace(runtime, shard=sharder(mesh, WHOLE_TOKENS), experts=whole_token_experts(mesh, cfg))
