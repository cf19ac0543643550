"""What takes longest to compile of an engine, compiled from shapes: while its weights are still on their way.

Nothing depends on it: what was not compiled here, `Engine.warm_up` compiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxformers.infer.engine import programs
from jaxformers.infer.engine.placement import mesh_of, paged_runtime
from jaxformers.infer.engine.sizes import Sizes
from jaxformers.infer.engine.state import State, init_state
from jaxformers.infer.generate import Prepared
from jaxformers.infer.request import EngineConfig
from jaxformers.models.params import Params
from jaxformers.parallel.mesh import replicated


def compile_ahead(model: Prepared, config: EngineConfig) -> None:
    """Compiles, or finds in the compilation cache, side by side, the programs that read prompts and make tokens, as
    `Engine(model, config)` will call them. Those that adapters or guesses change are left to it.

    The leaves of the model's parameters are `jax.ShapeDtypeStruct`, placed on one device as the weights will be.
    """
    if config.adapters or config.speculate:
        return
    mesh, sizes = mesh_of(model.params), Sizes.of(config, model.config)
    static = {"cfg": model.config, "runtime": paged_runtime(model, sizes, mesh)}
    with jax.set_mesh(mesh):
        state = jax.eval_shape(functools.partial(init_state, **static, sizes=sizes))
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated(mesh)), state)

    def compile_one(lower: Callable[..., jax.stages.Lowered]) -> None:
        with jax.set_mesh(mesh):  # each thread's own, and part of what a program is compiled for
            lower(model.params, state, config, static).compile()

    with ThreadPoolExecutor(2, thread_name_prefix="compiling") as threads:
        list(threads.map(compile_one, (_decode, _prefill)))


def _decode(params: Params, state: State, config: EngineConfig, static: dict[str, Any]) -> jax.stages.Lowered:
    return programs.decode.lower(params, state, np.int32(0), most=config.decode_steps, **static)


def _prefill(params: Params, state: State, config: EngineConfig, static: dict[str, Any]) -> jax.stages.Lowered:
    number, tokens = np.int32(0), np.zeros(config.prefill_piece, np.int32)
    return programs.prefill_chunk.lower(params, state, number, tokens, number, number, number, **static)
