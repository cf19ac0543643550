"""The runtime that a config asks for on a mesh."""

from __future__ import annotations

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxformers.models.config import ModelConfig
from jaxformers.models.runtime import Runtime
from jaxformers.parallel.experts import mesh_experts
from jaxformers.parallel.mesh import RULES, SEQUENCE_PARALLEL, gatherer, keep_all_but_gathered, sharder
from jaxformers.parallel.pipeline import Pipeline
from jaxformers.train.config import RuntimeConfig

UNROLLED_LAYERS = 32  # deeper models compile too long when every layer is its own code


def make_runtime(config: RuntimeConfig, cfg: ModelConfig, mesh: Mesh, *, pipeline: Pipeline | None = None) -> Runtime:
    """The runtime of a training step on this mesh, with attention over whole rows.

    On CPU, `auto` unrolls layers, as scanned weights are copied every step, also with remat=dots; what recomputes more
    wants the least memory, which scanned layers take. Layers of a pipeline are always scanned, as each stage runs its
    own part of one array.
    """
    on_cpu, layers = mesh.devices.flat[0].platform == "cpu", config.layers
    if pipeline is not None:
        if layers == "unroll":
            raise ValueError(f"runtime.layers=unroll does not go with mesh.pp={pipeline.stages}; use scan or auto")
        layers = "scan"
    if layers == "auto":
        unrolls = on_cpu and config.remat in ("none", "dots") and cfg.num_layers <= UNROLLED_LAYERS
        layers = "unroll" if unrolls else "scan"
    experts = mesh_experts(mesh, cfg, dispatch=config.experts, capacity_factor=config.capacity_factor)
    return Runtime(
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        offload=config.offload in ("residuals", "both"),
        layers=layers,
        shard=sharder(mesh, SEQUENCE_PARALLEL if config.sequence_parallel else RULES),
        gather=gatherer(mesh, leave=("experts",)),
        keep=keep_all_but_gathered(mesh),
        experts=experts,
        run_stack=None if pipeline is None else pipeline.run,
        run_loss=pipeline.loss if pipeline is not None and pipeline.schedule == "1f1b" else None,
    )
