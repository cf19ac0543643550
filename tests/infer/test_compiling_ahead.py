"""An engine's longest programs, compiled from shapes before there are weights."""

from collections.abc import Iterator

import jax
import pytest
from tiny import LLAMA, random_params

from jaxformers.families import read_config
from jaxformers.infer.engine import Engine
from jaxformers.infer.engine.ahead import compile_ahead
from jaxformers.infer.generate import Prepared, prepare_model
from jaxformers.infer.request import EngineConfig
from jaxformers.parallel.mesh import replicated, single_device_mesh


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The names of programs as they are compiled, by any thread."""
    names: list[str] = []

    def note(event: str, _seconds: float, *, fun_name: str = "", **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def without_numbers(model: Prepared) -> Prepared:
    def shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return model._replace(params=jax.tree.map(shape, model.params))


def test_an_engine_finds_what_was_compiled_before_its_weights_came(compiled, quick_compilation):
    cfg, mesh = read_config(LLAMA), single_device_mesh()
    model = prepare_model(jax.device_put(random_params(cfg), replicated(mesh)), cfg, mesh)
    sizes = EngineConfig(slots=3, max_length=48, prefill_piece=16, prefill_chunk=16)
    foreseen = without_numbers(model)
    compiled.clear()
    compile_ahead(foreseen, sizes)
    assert sorted(compiled) == ["jit(decode)", "jit(prefill_chunk)"]
    compiled.clear()
    Engine(model, sizes).warm_up()
    assert "jit(admit)" in compiled
    assert not {"jit(decode)", "jit(prefill_chunk)"} & set(compiled)
