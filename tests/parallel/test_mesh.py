"""Mesh sizes, and the rules that place named dims on mesh axes."""

import logging

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxformers.models.params import ParamSpec
from jaxformers.parallel import mesh as mesh_module
from jaxformers.parallel.mesh import (
    AXES,
    MeshConfig,
    batch_sharding,
    batch_shards,
    gatherer,
    make_mesh,
    param_shardings,
    sharder,
    single_device_mesh,
    spec_of,
)


@pytest.fixture
def dropped(caplog):
    """The log of dropped axes, from an empty memory of what was logged before."""
    mesh_module._log_dropped.cache_clear()
    caplog.set_level(logging.WARNING, logger=mesh_module.log.name)
    return caplog


def test_every_axis_is_there_and_the_default_shards_parameters_over_all_devices():
    assert MeshConfig().sizes(8) == {"pp": 1, "dp": 1, "fsdp": 8, "ep": 1, "cp": 1, "tp": 1}
    mesh = make_mesh()
    assert mesh.axis_names == AXES
    assert mesh.size == mesh.shape["fsdp"] == 8


def test_auto_is_what_the_other_axes_leave():
    assert MeshConfig(tp=4).sizes(8)["fsdp"] == 2
    assert MeshConfig(dp="auto", fsdp=2, tp=2).sizes(16)["dp"] == 4
    assert MeshConfig(tp=8).sizes(8)["fsdp"] == 1


def test_the_fastest_links_are_the_innermost_axis():
    devices = make_mesh(MeshConfig(tp=4)).devices.reshape(2, 4)
    assert [[d.id for d in row] for row in devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    "settings, devices, message",
    [
        ({"tp": 3}, 8, "mesh: fsdp=auto, tp=3 needs 3 devices, but there are 8; nearest legal: 2 and 4"),
        ({"dp": 2, "fsdp": 2}, 8, "mesh: dp=2, fsdp=2 needs 4 devices, but there are 8; nearest legal: 8"),
        ({"dp": 4, "fsdp": 4}, 8, "mesh: dp=4, fsdp=4 needs 16 devices, but there are 8; nearest legal: 8"),
        ({"tp": 16}, 8, "mesh: fsdp=auto, tp=16 needs 16 devices, but there are 8; nearest legal: 8"),
        ({"fsdp": 1}, 8, "mesh: all sizes 1 needs 1 device, but there are 8; nearest legal: 8"),
        ({"dp": "auto"}, 8, "mesh: dp and fsdp are both auto; at most one axis may be"),
        ({"tp": 0}, 8, "mesh: tp is 0; an axis size is at least 1, or auto"),
        ({"dp": -2}, 8, "mesh: dp is -2; an axis size is at least 1, or auto"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_in_one_line(settings, devices, message):
    with pytest.raises(ValueError) as caught:
        MeshConfig(**settings).sizes(devices)
    assert str(caught.value) == message


def test_dims_go_to_the_axes_of_their_rule():
    mesh = make_mesh(MeshConfig(dp=2, fsdp=2, tp=2))
    assert spec_of(("embed", "heads", None), (8, 4, 16), mesh) == P("fsdp", "tp", None)
    assert spec_of(("vocab", "embed"), (64, 8), mesh) == P("tp", "fsdp")
    assert spec_of(("batch", "seq", None), (8, 32, 4), mesh) == P(("dp", "fsdp"), None, None)
    assert spec_of((), (), mesh) == P()


def test_a_mesh_axis_is_used_once():
    mesh = make_mesh(MeshConfig(fsdp=2, dp=1, tp=4))
    assert spec_of(("heads", "mlp"), (4, 8), mesh) == P("tp", None)
    # Rows are over fsdp already, so a dim named embed stays whole.
    assert spec_of(("batch", None, "embed"), (8, 3, 8), mesh) == P("fsdp", None, None)


def test_an_axis_that_does_not_divide_is_dropped_and_logged_once(dropped):
    mesh = make_mesh(MeshConfig(fsdp=2, tp=4))
    for _ in range(3):
        assert spec_of(("embed", "kv_heads", None), (8, 2, 16), mesh) == P("fsdp", None, None)
    assert dropped.messages == ["tp=4 does not divide a kv_heads dim of 2, which stays whole on every device"]


def test_a_batch_goes_to_those_data_axes_that_divide_it_together(dropped):
    mesh = make_mesh(MeshConfig(dp=4, fsdp=2))
    assert batch_sharding((8, 32), mesh).spec == P(("dp", "fsdp"), None)
    assert batch_sharding((4, 32), mesh).spec == P("dp", None)
    assert "fsdp=2 does not divide a batch dim of 4" in dropped.text
    assert batch_shards(mesh.shape) == 8


def test_nothing_is_dropped_or_placed_on_one_device(dropped):
    mesh = single_device_mesh()
    assert spec_of(("embed", "heads"), (7, 3), mesh) == P(None, None)
    assert not dropped.messages
    x = jnp.ones(3)
    assert sharder(mesh)(x, "embed") is x
    assert gatherer(mesh)({"w": x}, {"w": ParamSpec((3,), ("embed",))})["w"] is x


def test_parameters_are_placed_by_their_declaration():
    mesh = make_mesh(MeshConfig(fsdp=4, tp=2))
    specs = {"a": [ParamSpec((3, 8, 4), ("layers", "embed", "mlp"))], "b": ParamSpec((8,), (None,))}
    places = param_shardings(specs, mesh)
    assert places["a"][0].spec == P(None, "fsdp", "tp")
    assert places["b"].spec == P(None)


def test_weights_are_gathered_over_fsdp_alone_and_their_gradients_scattered_back():
    mesh = make_mesh(MeshConfig(fsdp=4, tp=2))
    spec = {"w": ParamSpec((8, 4), ("embed", "mlp"))}
    place = param_shardings(spec, mesh)
    gather = gatherer(mesh)
    with jax.set_mesh(mesh):
        w = jax.device_put({"w": jnp.arange(32.0).reshape(8, 4)}, place)
        gathered = jax.jit(lambda w: gather(w, spec))(w)["w"]
        gradient = jax.jit(jax.grad(lambda w: (gather(w, spec)["w"] ** 2).sum()), out_shardings=place)(w)["w"]
    assert gathered.sharding.shard_shape(gathered.shape) == (8, 2)
    assert gradient.sharding.shard_shape(gradient.shape) == (2, 2)
    assert (gathered == w["w"]).all()
    assert (gradient == 2 * w["w"]).all()
