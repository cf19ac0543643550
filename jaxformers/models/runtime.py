"""How to run a model, as opposed to what it computes: nothing here changes a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxformers.models.attention import dot_product
from jaxformers.models.ffn import local_experts
from jaxformers.models.params import Params

Remat = Literal["none", "full", "dots", "projections"]
# What the backward pass finds of a layer, by `checkpoint_name`, besides the layer's input.
KEPT = {"full": (), "dots": ("matmul",), "projections": ("q", "k", "v", "mixed", "gate", "up")}
HOST_MEMORY = "pinned_host"  # of the machine that a device sits in, where the device reads it itself


def no_shard(x: jax.Array, *_axes: str | None) -> jax.Array:
    """The placement of an activation on one device: leave it."""
    return x


def no_gather(params: Params, _spec: Params) -> Params:
    """Weights that every device already holds whole: leave them."""
    return params


@dataclass(frozen=True)
class Runtime:
    """How to run a model.

    dtype: of activations and of weights at use. remat: what the backward pass recomputes: nothing, all of a layer, all
    but its matmuls, or all but its projections. layers: one scanned body for equal layers (compiles fast at any
    depth), or every layer unrolled (runs faster on CPU and in decoding).
    offload: what the backward pass finds of a layer waits for it in the host's memory.
    run_stack(stage, layers, x, rows), if given, runs the longest stack; run_loss, that stack and all behind it (see
    `parallel.pipeline`). shard(x, *axes) places an activation; gather(params, spec) brings weights together for use;
    keep, if given, is the `jax.checkpoint` policy of scanned layers where remat is none: it gives up such weights, as
    keeping those of all layers would undo that they are split. attend, experts: kernels. observe: what layers show of
    their inside (see `models.observe`).
    """

    dtype: Any = jnp.float32
    remat: Remat = "none"
    offload: bool = False
    layers: Literal["scan", "unroll"] = "scan"
    shard: Callable[..., jax.Array] = no_shard
    gather: Callable[[Params, Params], Params] = no_gather
    keep: Callable[..., bool] | None = None
    attend: Callable[..., jax.Array] = dot_product
    experts: Callable[..., jax.Array] = local_experts
    run_stack: Callable[..., Any] | None = None
    run_loss: Callable[..., Any] | None = None
    observe: frozenset[str] = frozenset()

    def rematerialize(self, body: Callable[..., Any], *, scanned: bool | None = None) -> Callable[..., Any]:
        """`body` whose backward pass recomputes what `remat` says. scanned: whether it runs inside a scan; None: as
        `layers` says."""
        if self.remat == "none":
            if self.keep is None or self.layers == "unroll":
                return body
            return jax.checkpoint(body, policy=self.keep, prevent_cse=False)
        scanned = self.layers == "scan" if scanned is None else scanned
        names, policies = KEPT[self.remat], jax.checkpoint_policies
        policy = policies.save_only_these_names(*names)
        if self.offload:
            policy = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=["input", *names],
                offload_src="device",
                offload_dst=HOST_MEMORY,
            )
        # The barrier that stops CSE from undoing the recomputation is not needed inside a scan.
        return jax.checkpoint(body, policy=policy, prevent_cse=not scanned)
