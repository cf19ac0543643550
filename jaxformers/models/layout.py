"""Two execution layouts of one parameter tree.

Checkpoints, exports and users see the plain tree, whose layers are stacked. Here it becomes one buffer a layer, and
projections of one input become one matmul: what decoding, and anything on CPU, runs fastest from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxformers.models.adapters import merge
from jaxformers.models.config import ModelConfig, plan_stacks
from jaxformers.models.params import Params, path_name
from jaxformers.models.weights import OutputMajor, concat_outputs

FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}  # projections of one input as one matmul
ROUTING = ("router", "router_b", "select_b")  # computed in float32 whatever the rest is, so kept as they are


def unstack(params: Params, cfg: ModelConfig, *, take: Callable[[Any, int], Any] = lambda a, i: a[i]) -> Params:
    """The tree with `blocks`, one dict a layer in order, in place of stacked `layers`. take(leaf, i) is entry i of a
    stacked leaf."""
    blocks: list[Params] = [{}] * cfg.num_layers
    for run, patterns in zip(plan_stacks(cfg.layers), params["layers"], strict=True):
        for position, stacked in enumerate(patterns):
            for repeat in range(run.repeats):
                blocks[run.layer(position, repeat)] = jax.tree.map(lambda a, r=repeat: take(a, r), stacked)
    return {name: leaf for name, leaf in params.items() if name != "layers"} | {"blocks": blocks}


def unstack_spec(spec: Params, cfg: ModelConfig) -> Params:
    """The specs of the tree that `unstack` makes of one with these."""
    return unstack(spec, cfg, take=lambda leaf, _: leaf.drop_leading())


def stack(params: Params, cfg: ModelConfig) -> Params:
    """The plain tree again: the inverse of `unstack`."""
    blocks = params["blocks"]
    layers = [
        [
            jax.tree.map(lambda *a: jnp.stack(a), *(blocks[run.layer(j, repeat)] for repeat in range(run.repeats)))
            for j in range(len(run.pattern))
        ]
        for run in plan_stacks(cfg.layers)
    ]
    return {name: leaf for name, leaf in params.items() if name != "blocks"} | {"layers": layers}


def fuse_layer(p: Params, *, join: Callable[..., Any] = concat_outputs) -> Params:
    """One layer with q, k, v joined as `qkv` [D, (H + 2K) N] and gate, up as `gate_up` [D, 2F]. join(weights, n_in=...)
    is how, for leaves that are no JAX arrays."""
    p = dict(p)
    if "k" in p["attn"] and "queries" not in p["attn"]:
        p["attn"] = _join(p["attn"], "qkv", join)
    if "gate" in p["ffn"] and "router" not in p["ffn"]:
        p["ffn"] = _join(p["ffn"], "gate_up", join)
    return p


def _join(p: Params, fused: str, join: Callable[..., Any]) -> Params:
    names = FUSED[fused]
    joined = {fused: join([p[name] for name in names], n_in=1)}
    biases = [f"{name}_b" for name in names]
    if biases[0] in p:
        joined[f"{fused}_b"] = join([p[name] for name in biases], n_in=0)
    return {name: leaf for name, leaf in p.items() if name not in (*names, *biases)} | joined


def prepare(params: Params, cfg: ModelConfig, *, dtype: Any, whole: bool, on_cpu: bool) -> Params:
    """The tree to decode from: one buffer a layer, in the compute dtype (routing apart), adapters added up. Modules for
    multi-token prediction stay where the tree has them.

    Where every device holds layers `whole`, projections of one input are fused, and on CPU matrices are kept
    output-major.
    """

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf if keeps_dtype(path) else leaf.astype(dtype)

    prepared = unstack(jax.tree_util.tree_map_with_path(cast, merge(params)), cfg)
    if whole:
        prepared = _with_layers(prepared, fuse_layer)
        if on_cpu:
            prepared = head_output_major(_with_layers(prepared, output_major))
    return prepared


def _with_layers(params: Params, change: Callable[[Params], Params]) -> Params:
    """The tree with each layer changed, those of modules for multi-token prediction too."""
    modules = [p | {"layer": change(p["layer"])} for p in params.get("mtp", ())]
    return params | {"blocks": [change(p) for p in params["blocks"]]} | ({"mtp": modules} if modules else {})


def keeps_dtype(path: tuple[Any, ...]) -> bool:
    """Whether a leaf stays as it is stored, whatever the rest is computed in."""
    return path_name(path).rpartition(".")[2] in ROUTING


def head_output_major(params: Params) -> Params:
    """The tree with its head, if it has one of its own, output-major."""
    head = {name: OutputMajor.of(leaf, n_in=1) for name, leaf in params.items() if name == "lm_head"}
    return params | head


# Projections that only `weights.linear` reads, and their number of input dims.
_PROJECTIONS = {
    "attn": {"q": 1, "k": 1, "v": 1, "qkv": 1, "o": 2},
    "ffn": {"gate": 1, "up": 1, "gate_up": 1, "down": 1},
}


def output_major(p: Params) -> Params:
    """One layer with its dense projections output-major; experts have kernels of their own."""
    p = dict(p)
    for part, names in _PROJECTIONS.items():
        if "router" not in p[part]:
            turned = {name: OutputMajor.of(p[part][name], n_in=n) for name, n in names.items() if name in p[part]}
            p[part] = p[part] | turned
    return p
