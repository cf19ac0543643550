"""Memory of long rows, as compiled: nothing is run, so any length fits.

    python tests/benchmarks/long_sequences.py [--length 32768]

First the temporaries of one layer's attention and its gradient on one device (a row, 8 heads of 64, 2 kv heads,
float32), plain and block by block. Then those of a whole training step of a small model on each device of cp = 1, 2, 4,
8, as ring and as Ulysses: a row of the given length, layers recomputed, the loss in chunks.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from jaxformers.families import read_config
from jaxformers.models.attention import Scores, dot_product
from jaxformers.models.blockwise import blockwise_attention
from jaxformers.models.masks import Visibility
from jaxformers.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from jaxformers.train.build import Trainer
from jaxformers.train.config import LossConfig, RuntimeConfig, TrainConfig

MODEL = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2**20,
}
MIB = 2**20


def attention_memory(attend: object, length: int) -> float:
    """MiB of temporaries of an attention's gradient."""
    positions = jnp.arange(length)[None]
    visible, scores = Visibility(positions, positions), Scores(64**-0.5)
    q, k = (jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32) for heads in (8, 2))
    gradient = jax.grad(lambda q, k, v: jnp.square(attend(q, k, v, visible, scores)).sum(), argnums=(0, 1, 2))
    return jax.jit(gradient).lower(q, k, k).compile().memory_analysis().temp_size_in_bytes / MIB


def step_memory(length: int, *, cp: int, context: str) -> float:
    """MiB of temporaries on each device of a training step."""
    mesh = make_mesh(MeshConfig(fsdp=1, cp=cp), devices=jax.devices()[:cp])
    trainer = Trainer(
        read_config(MODEL),
        mesh,
        length,
        train=TrainConfig(batch_size=1),
        runtime=RuntimeConfig(layers="scan", remat="full", context=context),
        loss=LossConfig(chunk=1024),
    )
    place = batch_sharding((1, length), mesh)
    dtypes = {"weights": jnp.float32} | dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32)
    batch = {name: jax.ShapeDtypeStruct((1, length), dtype, sharding=place) for name, dtype in dtypes.items()}
    with jax.set_mesh(mesh):
        compiled = trainer.program.step.lower(trainer.plain_state, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2**15)
    length = parser.parse_args().length
    jax.config.update("jax_num_cpu_devices", 8)
    print("tokens     plain  blockwise   (MiB, one layer's attention and gradient)")
    for exponent in range(10, 16):
        plain, blocks = (attention_memory(attend, 2**exponent) for attend in (dot_product, blockwise_attention))
        print(f"{2**exponent:6d} {plain:9.1f} {blocks:10.1f}")
    print(f"    cp      ring    ulysses   (MiB a device, a training step over a row of {length})")
    for cp in (1, 2, 4, 8):
        ring, ulysses = (step_memory(length, cp=cp, context=context) for context in ("ring", "ulysses"))
        print(f"{cp:6d} {ring:9.1f} {ulysses:10.1f}", flush=True)


if __name__ == "__main__":
    main()
