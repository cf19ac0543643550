"""From settings to the functions of a run: the runtime on a mesh, the loss, the optimizer and the compiled step."""

from __future__ import annotations

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxformers.models.config import ModelConfig
from jaxformers.models.runtime import Runtime
from jaxformers.parallel.mesh import gatherer, sharder
from jaxformers.train.config import RuntimeConfig

UNROLLED_LAYERS = 32  # deeper models compile too long when every layer is its own code


def make_runtime(config: RuntimeConfig, cfg: ModelConfig, mesh: Mesh) -> Runtime:
    """The runtime of a training step on this mesh.

    On CPU, layers are unrolled (scanned weights are copied every step) and, on one device, projections are fused.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    layers = config.layers
    if layers == "auto":
        layers = "unroll" if on_cpu and cfg.num_layers <= UNROLLED_LAYERS else "scan"
    return Runtime(
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        layers=layers,
        fuse=on_cpu and mesh.size == 1,
        shard=sharder(mesh),
        gather=gatherer(mesh),
    )
