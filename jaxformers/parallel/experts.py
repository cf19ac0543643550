"""The experts of a mixture on a mesh: each device holds some of them, and tokens travel to where their experts are.

A `shard_map` island over every axis of the mesh but pp. Rows of a batch lie on the data axes, of which ep is one, and
experts on ep, so a token's experts may be on any device of its ep group. Two ways to bring both together: every device
of the group sees all of its tokens and computes what its own experts make of them (`allgather`), or each token is sent
to the devices of its experts and back (`alltoall`). Knows nothing of routing: which experts a token visits is given.

    b rows and t time on one device, m = b t tokens, k experts a token, D model, F ffn, E experts, e = E / ep held here
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxformers.models.adapters import spec_like
from jaxformers.models.config import ModelConfig
from jaxformers.models.ffn import Mixed, local_experts, run_experts, weigh
from jaxformers.models.params import Params, moe_spec
from jaxformers.parallel.mesh import RULES, axes_in, nearest, spec_of

Dispatch = Literal["auto", "allgather", "alltoall"]
# A way to mix: (experts' weights of this device, x [m, D], weights [m, k], experts [m, k], config) -> float32 [m, D]
# and how many visits of this device's tokens were dropped; None: it never drops any.
Mix = Callable[..., tuple[jax.Array, jax.Array | None]]
RAGGED_BACKENDS = ("gpu", "tpu")  # those with `ragged_all_to_all`


def mesh_experts(
    mesh: Mesh, cfg: ModelConfig, *, dispatch: Dispatch = "auto", capacity_factor: float | None = None
) -> Callable[..., Mixed]:
    """The `experts` of a `Runtime` on this mesh, called under `jax.set_mesh`.

    With `alltoall`, capacity_factor bounds how many visits one device may send to another: that many times an even
    share of its own; further ones, the last in the batch first, are dropped and counted. None drops nothing. `auto`
    is `alltoall` where there is a capacity_factor. ValueError for what the model, mesh or backend cannot do.
    """
    if capacity_factor is not None and dispatch == "allgather":
        raise ValueError("runtime: capacity_factor is for experts=alltoall; experts=allgather drops nothing")
    if mesh.shape["ep"] > 1:
        _check_experts(cfg, mesh.shape["ep"])
        platform = mesh.devices.flat[0].platform
        if dispatch == "alltoall" and capacity_factor is None and platform not in RAGGED_BACKENDS:
            raise ValueError(
                f"runtime: experts=alltoall without a capacity_factor needs ragged_all_to_all, which {platform} does "
                "not have; set runtime.capacity_factor, or experts=allgather"
            )
    if mesh.size == mesh.shape["pp"] or cfg.moe is None:
        return local_experts
    if mesh.shape["ep"] == 1:
        mix = _mix_here
    elif capacity_factor is not None:
        mix = partial(_mix_capped, factor=capacity_factor)
    else:
        mix = _mix_ragged if dispatch == "alltoall" else _mix_gathered
    return partial(_island, mesh=mesh, mix=mix)


def whole_token_experts(mesh: Mesh, cfg: ModelConfig) -> Callable[..., Mixed]:
    """The `experts` of a `Runtime` where every device of the mesh sees all tokens, as in decoding a few: each computes
    what its own experts, and its part of their width, make of them. Called under `jax.set_mesh`. ValueError for a mesh
    that cannot split the model's experts."""
    if mesh.shape["ep"] > 1:
        _check_experts(cfg, mesh.shape["ep"])
    return local_experts if mesh.size == 1 or cfg.moe is None else partial(_whole_token_island, mesh=mesh)


def _whole_token_island(
    p: Params, x: jax.Array, weights: jax.Array, experts: jax.Array, cfg: ModelConfig, *, mesh: Mesh
) -> Mixed:
    """`local_experts` of x [B, T, D] that is whole on every device, as its result is."""
    specs = {name: s for name, s in moe_spec(cfg).items() if not isinstance(s, dict) and "experts" in s.axes}
    # Where fsdp splits weights, they have been brought together for use already.
    places = {name: spec_of(s.axes, s.shape, mesh, RULES | {"embed": ()}) for name, s in specs.items()}
    apart = axes_in(places["down"])

    def body(p: Params, x: jax.Array, weights: jax.Array, experts: jax.Array) -> jax.Array:
        if "tp" in apart and "down_b" in p:
            p["down_b"] = jnp.where(lax.axis_index("tp") == 0, p["down_b"], 0)  # once in the sum
        held = p["up"].shape[0]
        visits = experts - lax.axis_index("ep") * held
        visits = jnp.where((visits >= 0) & (visits < held), visits, held)
        return lax.psum(weigh(run_experts(p, x, visits, cfg), weights), apart)

    island = jax.shard_map(body, in_specs=(places, P(), P(), P()), out_specs=P(), check_vma=False)
    flat = (a.reshape(-1, a.shape[-1]) for a in (x, weights, experts))
    y = island({name: p[name] for name in places}, *flat)
    return Mixed(y.astype(x.dtype).reshape(x.shape), jnp.zeros((), jnp.float32))


def _check_experts(cfg: ModelConfig, ep: int) -> None:
    if cfg.moe is None:
        raise ValueError(f"mesh: ep={ep} needs a model with experts, which {cfg.family} is not; use dp or fsdp")
    count = cfg.moe.num_experts
    if count % ep:
        legal = nearest(ep, (size for size in range(1, count + 1) if count % size == 0))
        raise ValueError(f"mesh: ep={ep} does not divide the model's {count} experts; nearest legal: {legal}")


def _island(
    p: Params, x: jax.Array, weights: jax.Array, experts: jax.Array, cfg: ModelConfig, *, mesh: Mesh, mix: Mix
) -> Mixed:
    """`local_experts` with every array in its place on the mesh: x [B, T, D] -> [B, T, D]."""
    rows = spec_of(("batch", "seq", None), x.shape, mesh)
    token_axes = tuple(axis for name in ("batch", "seq") for axis in RULES[name] if mesh.shape[axis] > 1)
    lost = set(token_axes) - set(axes_in(rows))
    if lost:
        raise ValueError(
            f"a batch of {x.shape[0]} rows of {x.shape[1]} tokens cannot be split over "
            + ", ".join(f"{axis}={mesh.shape[axis]}" for axis in token_axes)
        )
    specs = {name: s for name, s in moe_spec(cfg).items() if not isinstance(s, dict) and "experts" in s.axes}
    arrays = {name: spec_like(s, p[name]) for name, s in specs.items()}
    places = jax.tree.map(lambda s: spec_of(s.axes, s.shape, mesh), arrays)
    # F is split: each device's output is one term of a sum.
    split_width = "tp" in axes_in(spec_of(specs["down"].axes, specs["down"].shape, mesh))
    apart = (*token_axes, "tp") if split_width else token_axes  # axes over which devices compute different things

    def own(w: jax.Array, place: P) -> jax.Array:
        # Before it is cast for use, so that gradients are summed over devices in the dtype that it is kept in.
        shared = tuple(axis for axis in apart if axis not in axes_in(place))
        return lax.pcast(w, shared, to="varying") if shared else w

    def body(p: Params, x: jax.Array, weights: jax.Array, experts: jax.Array) -> Mixed:
        p = jax.tree.map(lambda w, place: _whole_inputs(own(w, place), place), p, places)
        terms = x, weights
        if split_width:
            # Here rather than at each use: a token's gradients are then summed on a device before they are over tp.
            terms = _exact(partial(lax.pcast, axis_name="tp", to="varying"), x), lax.pcast(weights, "tp", to="varying")
        if split_width and "down_b" in p:
            p["down_b"] = jnp.where(lax.axis_index("tp") == 0, p["down_b"], 0)  # once in the sum
        y, dropped = mix(p, *(a.reshape(-1, a.shape[-1]) for a in (*terms, experts)), cfg)
        y = lax.psum(y, "tp") if split_width else y
        dropped = jnp.zeros((), jnp.float32) if dropped is None else lax.psum(dropped, token_axes)
        return Mixed(y.astype(x.dtype).reshape(x.shape), dropped)

    island = jax.shard_map(
        body,
        axis_names={axis for axis, size in mesh.shape.items() if size > 1 and axis != "pp"},
        in_specs=(places, rows, rows, rows),
        out_specs=Mixed(rows, P()),
    )
    return island({name: p[name] for name in places}, x, weights, experts)


def _whole_inputs(w: jax.Array, place: P) -> jax.Array:
    """A weight with the dim that fsdp splits brought together; its gradient is scattered back."""
    entries = tuple(place)
    return lax.all_gather(w, "fsdp", axis=entries.index("fsdp"), tiled=True) if "fsdp" in entries else w


def _exact(collective: Callable[[jax.Array], jax.Array], a: jax.Array) -> jax.Array:
    """A collective whose gradient is a sum over devices. XLA:CPU aborts on sums of bfloat16, so they are float32
    there."""
    if a.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        return collective(a.astype(jnp.float32)).astype(a.dtype)
    return collective(a)


def _mix_here(
    p: Params, x: jax.Array, weights: jax.Array, experts: jax.Array, cfg: ModelConfig
) -> tuple[jax.Array, None]:
    """Every expert is on every device: nothing travels."""
    return weigh(run_experts(p, x, experts, cfg), weights), None


def _mix_gathered(
    p: Params, x: jax.Array, weights: jax.Array, experts: jax.Array, cfg: ModelConfig
) -> tuple[jax.Array, None]:
    """All of the group's tokens come to every device, which adds what its experts make of them to the others' sums."""
    held = p["up"].shape[0]
    gather = partial(lax.all_gather, axis_name="ep", tiled=True)
    everyone_x, everyone_weights, visits = (_exact(gather, a) for a in (x, weights, experts))
    visits -= lax.axis_index("ep") * held
    visits = jnp.where((visits >= 0) & (visits < held), visits, held)
    y = weigh(run_experts(p, everyone_x, visits, cfg), everyone_weights)
    return lax.psum_scatter(y, "ep", scatter_dimension=0, tiled=True), None


class Copies(NamedTuple):
    """One copy of a token for each of its visits, N = m k, sorted by the device that holds the expert.

    order [N]: index of each in [m, k]. target [N]: its device, `ep` for a visit of no expert. sizes, starts [ep]: how
    many go to each device, and where they start.
    """

    order: jax.Array
    target: jax.Array
    sizes: jax.Array
    starts: jax.Array


def _by_device(experts: jax.Array, held: int) -> Copies:
    count = lax.axis_size("ep")
    target = experts.reshape(-1) // held
    order = jnp.argsort(target, stable=True)
    sizes = jnp.bincount(target, length=count).astype(jnp.int32)
    return Copies(order, target[order], sizes, jnp.cumsum(sizes) - sizes)


def _back(y: jax.Array, copies: Copies, weights: jax.Array) -> jax.Array:
    """The weighted sum float32 [m, D] of what came back for each copy, y [N, D]."""
    return weigh(y[jnp.argsort(copies.order)].reshape(*weights.shape, -1), weights)


def capacity(factor: float, *, visits: int, top_k: int, held: int, devices: int) -> int:
    """How many of a device's `visits` (m k) one of `devices` has room for, if each holds `held` experts."""
    most = visits // top_k * min(top_k, held)  # a token visits an expert once
    return min(max(round(factor * visits / devices), 1), most)


def _mix_capped(
    p: Params, x: jax.Array, weights: jax.Array, experts: jax.Array, cfg: ModelConfig, *, factor: float
) -> tuple[jax.Array, jax.Array]:
    """Copies travel in buffers of one size for every pair of devices; those that find no room are dropped."""
    held, count, k = p["up"].shape[0], lax.axis_size("ep"), experts.shape[-1]
    copies = _by_device(experts, held)
    room = capacity(factor, visits=experts.size, top_k=k, held=held, devices=count)

    slots = jnp.arange(room)
    filled = (slots < copies.sizes[:, None]).reshape(-1)  # [ep room]
    source = copies.order[(copies.starts[:, None] + slots).reshape(-1).clip(max=experts.size - 1)]
    exchange = partial(lax.all_to_all, axis_name="ep", split_axis=0, concat_axis=0, tiled=True)
    rows = exchange(jnp.where(filled[:, None], x[source // k], 0))
    visits = exchange(jnp.where(filled, experts.reshape(-1)[source] % held, held))
    y = exchange(run_experts(p, rows, visits[:, None], cfg)[:, 0])

    slot = jnp.arange(experts.size) - copies.starts[copies.target.clip(max=count - 1)]
    arrived = (slot < room) & (copies.target < count)
    y = jnp.where(arrived[:, None], y[jnp.where(arrived, copies.target * room + slot, 0)], 0)
    return _back(y, copies, weights), (copies.sizes.sum() - arrived.sum()).astype(jnp.float32)


class Slices(NamedTuple):
    """The slices of a ragged exchange, [ep] each: where those for each device start here, how long they are, where
    they land there, and how long those are that come from each device."""

    starts: jax.Array
    sizes: jax.Array
    landings: jax.Array
    received: jax.Array


def _mix_ragged(
    p: Params, x: jax.Array, weights: jax.Array, experts: jax.Array, cfg: ModelConfig
) -> tuple[jax.Array, None]:
    """Exactly the copies that visit a device travel to it. There is memory for all of the group's, as one device may
    get them all."""
    held, count, k = p["up"].shape[0], lax.axis_size("ep"), experts.shape[-1]
    copies, me = _by_device(experts, held), lax.axis_index("ep")
    sizes = lax.all_gather(copies.sizes, "ep")  # [from, to]
    starts, landings = jnp.cumsum(sizes, axis=1) - sizes, jnp.cumsum(sizes, axis=0) - sizes
    there = Slices(starts[me], sizes[me], landings[me], sizes[:, me])
    back = Slices(landings[:, me], sizes[:, me], starts[:, me], sizes[me])

    most = count * x.shape[0] * min(k, held)
    rows = _exchange(x[copies.order // k], there, back, most)
    # Shifted by one, so that rows where nothing lands visit no expert.
    visits = _ragged(experts.reshape(-1)[copies.order] % held + 1, there, most) - 1
    visits = jnp.where(visits < 0, held, visits)
    y = _exchange(run_experts(p, rows, visits[:, None], cfg)[:, 0], back, there, experts.size)
    return _back(y, copies, weights), None


def _ragged(rows: jax.Array, slices: Slices, size: int) -> jax.Array:
    """The rows [size, ...] that arrive here, zeros where none does."""
    # Padding of nothing: zeros that differ over the same axes of the mesh as rows do.
    output = jnp.pad(rows[:0], ((0, size), *((0, 0),) * (rows.ndim - 1)))
    return lax.ragged_all_to_all(rows, output, *slices, axis_name="ep")


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _exchange(rows: jax.Array, there: Slices, back: Slices, size: int) -> jax.Array:
    """`_ragged` there, whose gradient travels back."""
    return _ragged(rows, there, size)


def _exchange_forward(
    rows: jax.Array, there: Slices, back: Slices, size: int
) -> tuple[jax.Array, tuple[Slices, jax.Array]]:
    return _ragged(rows, there, size), (back, rows[:, :0])


def _exchange_backward(size: int, saved: tuple[Slices, jax.Array], dy: jax.Array) -> tuple[jax.Array, None, None]:
    back, empty = saved
    return _ragged(dy, back, empty.shape[0]), None, None


_exchange.defvjp(_exchange_forward, _exchange_backward)
