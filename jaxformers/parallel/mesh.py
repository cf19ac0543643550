"""The device mesh and the rules from logical dim names to its axes.

Model code names the dims of an array; only this module knows the mesh. A parallelism is a mesh shape, not another rule
set: `fsdp=8` shards parameters over eight devices, `dp=2, tp=4` replicates them twice and splits heads in four.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from pydantic import BaseModel, ConfigDict, Field

from jaxformers.models.adapters import spec_like
from jaxformers.models.params import Params, ParamSpec
from jaxformers.models.runtime import no_gather, no_shard

log = logging.getLogger(__name__)

AXES = ("pp", "dp", "fsdp", "ep", "cp", "tp")  # outermost first: slow links left, fast links right
Rules = Mapping[str, tuple[str, ...]]
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("dp", "fsdp", "ep"),
    "seq": ("cp",),
    "stream": ("cp",),  # time, where layers add to the residual stream
    "embed": ("fsdp",),
    "vocab": ("tp",),
    "heads": ("tp",),
    "kv_heads": ("tp",),
    "mlp": ("tp",),
    "experts": ("ep",),
    "layers": ("pp",),
}
SEQUENCE_PARALLEL = RULES | {"stream": ("cp", "tp")}  # arXiv:2205.05198
WHOLE_ROWS = RULES | {"seq": (), "stream": ()}
SPLIT_REPLICAS = RULES | {"embed": ("fsdp", "dp")}  # what replicas need not all hold (arXiv:1910.02054)
AxisSize = int | Literal["auto"]


class MeshConfig(BaseModel):
    """Sizes of the mesh's axes. At most one is `auto`: the devices that the others leave."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pp: AxisSize = Field(1, description="Pipeline stages.")
    dp: AxisSize = Field(1, description="Data parallel: whole replicas of the parameters.")
    fsdp: AxisSize = Field("auto", description="Fully sharded data parallel: parameters split and gathered at use.")
    ep: AxisSize = Field(1, description="Expert parallel: experts split over devices.")
    cp: AxisSize = Field(1, description="Context parallel: the sequence split over devices.")
    tp: AxisSize = Field(1, description="Tensor parallel: heads, feed-forward width and vocabulary split over devices.")

    def sizes(self, num_devices: int) -> dict[str, int]:
        """The size of each axis on this many devices. ValueError if they do not multiply to it."""
        wanted = {axis: getattr(self, axis) for axis in AXES}
        shown = ", ".join(f"{axis}={size}" for axis, size in wanted.items() if size != 1)
        bad = [axis for axis, size in wanted.items() if size != "auto" and size < 1]
        if bad:
            raise ValueError(f"mesh: {bad[0]} is {wanted[bad[0]]}; an axis size is at least 1, or auto")
        free = [axis for axis, size in wanted.items() if size == "auto"]
        if len(free) > 1:
            raise ValueError(f"mesh: {' and '.join(free)} are both auto; at most one axis may be")
        fixed = math.prod(size for size in wanted.values() if size != "auto")
        if num_devices % fixed or (not free and fixed != num_devices):
            need = f"{fixed} device{'s' if fixed > 1 else ''}"
            legal = [size for size in range(1, num_devices + 1) if num_devices % size == 0] if free else [num_devices]
            raise ValueError(
                f"mesh: {shown or 'all sizes 1'} needs {need}, but there are {num_devices}; "
                f"nearest legal: {nearest(fixed, legal)}"
            )
        return {axis: num_devices // fixed if size == "auto" else size for axis, size in wanted.items()}


def nearest(value: int, legal: Iterable[int]) -> str:
    """The legal value next below and the one next above one that is not, for the line that refuses it: `4 and 8`; only
    one of them where there is no other."""
    legal = sorted(legal)
    near = [*[size for size in legal if size < value][-1:], *[size for size in legal if size > value][:1]]
    return " and ".join(str(size) for size in near)


def nearest_multiples(value: int, *, of: int) -> str:
    """`nearest` among the multiples of a number."""
    return nearest(value, range(of, value + of + 1, of))


def make_mesh(config: MeshConfig = MeshConfig(), *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices (or the given ones), every axis present and those unused of size 1."""
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def single_device_mesh() -> Mesh:
    """A mesh of the first local device."""
    return make_mesh(devices=jax.local_devices()[:1])


def spec_of(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules = RULES) -> PartitionSpec:
    """Where an array with these named dims lies. A mesh axis is used once, and only where it divides the dim; an axis
    dropped because it does not divide is logged once."""
    used: set[str] = set()
    placed: list[tuple[str, ...] | str | None] = []
    for name, size in zip(axes, shape, strict=True):
        taken: list[str] = []
        for axis in rules[name] if name else ():
            if axis in used or mesh.shape[axis] == 1:
                continue
            if size % (mesh.shape[axis] * math.prod(mesh.shape[a] for a in taken)):
                _log_dropped(axis, mesh.shape[axis], name, size)
                continue
            taken.append(axis)
            used.add(axis)
        placed.append(tuple(taken) if len(taken) > 1 else taken[0] if taken else None)
    return PartitionSpec(*placed)


@functools.cache
def _log_dropped(axis: str, axis_size: int, name: str, size: int) -> None:
    log.warning("%s=%d does not divide a %s dim of %d, which stays whole on every device", axis, axis_size, name, size)


def param_shardings(specs: Params, mesh: Mesh, rules: Rules = RULES) -> Params:
    """The sharding of every parameter, as a tree like `model_spec`'s."""
    return jax.tree.map(lambda s: NamedSharding(mesh, spec_of(s.axes, s.shape, mesh, rules)), specs)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Where a batch [B, T, ...] lies: rows over the data axes, time over the context axis."""
    axes = ("batch", "seq", *(None,) * (len(shape) - 2))
    return NamedSharding(mesh, spec_of(axes, shape, mesh))


def batch_shards(mesh_sizes: Mapping[str, int]) -> int:
    """How many ways the rows of a batch are split; a microbatch must be a multiple of it."""
    return math.prod(mesh_sizes[axis] for axis in RULES["batch"])


def sharder(mesh: Mesh, rules: Rules = RULES) -> Callable[..., jax.Array]:
    """The `shard` of a `Runtime`: `shard(x, "batch", "seq", None)` pins an activation to its place."""
    if mesh.size == 1:
        return no_shard

    def shard(x: jax.Array, *axes: str | None) -> jax.Array:
        spec = spec_of(axes, x.shape, mesh, rules)
        # Inside an island where some axes are manual, the mesh of the context knows which; the whole mesh does not.
        inside = jax.sharding.get_abstract_mesh().manual_axes
        return jax.lax.with_sharding_constraint(x, spec if inside else NamedSharding(mesh, spec))

    return shard


def gatherer(mesh: Mesh, *, leave: Sequence[str] = ()) -> Callable[[Params, Params], Params]:
    """The `gather` of a `Runtime`: weights sharded by fsdp come together where a layer uses them, and their
    gradients are scattered back. Done here, at the top of a layer, XLA has no reason to gather activations instead.
    Weights with a dim that `leave` names stay as they are, for a kernel that gathers its own."""
    if mesh.shape["fsdp"] == 1:
        return no_gather
    shard = sharder(mesh)

    def whole(spec: ParamSpec, w: jax.Array) -> jax.Array:
        if any(axis in leave for axis in spec.axes):
            return w
        return shard(w, *(None if axis == "embed" else axis for axis in spec.axes))

    def gather(params: Params, specs: Params) -> Params:
        return jax.tree.map(whole, jax.tree.map(spec_like, specs, params), params)

    return gather


def keep_all_but_gathered(mesh: Mesh) -> Callable[..., bool] | None:
    """The `keep` of a `Runtime`: all but weights that were brought together over fsdp, which are told by it that they
    are not split by it, as every activation is; None where nothing is."""
    if mesh.shape["fsdp"] == 1:
        return None

    def keep(primitive: Any, *_operands: Any, **params: Any) -> bool:
        if primitive.name == "sharding_constraint":
            return "fsdp" in axes_in(params["sharding"].spec)
        return not (primitive.name == "all_gather" and "fsdp" in params["axis_name"])

    return keep


def axes_in(spec: PartitionSpec) -> list[str]:
    """The mesh axes that a spec names."""
    return [axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
