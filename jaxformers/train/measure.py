"""What a run measures of its model beside the loss: inside the step, as arrays with a row for each layer, and what the
lines of metrics call it.

L layers, E experts, H heads, S sources
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.models.config import ModelConfig, plan_stacks
from jaxformers.models.observe import PLACES
from jaxformers.models.params import Params
from jaxformers.train.config import MonitorValue
from jaxformers.train.losses import Sums, Totals

EACH_LAYER = "layers.*"  # in a metric's name: its value has a row for each layer, or for each sparse one


def make_measure(
    values: Sequence[MonitorValue], cfg: ModelConfig, *, tidy: Callable[[Params], Params] = lambda tree: tree
) -> Callable[[Sums, Totals, Mapping[str, Params]], dict[str, jax.Array]]:
    """The function (sums, totals, trees shaped like the parameters by name) -> what `values` ask for, as arrays whose
    names `name_metrics` understands.

    tidy: the plain tree's layers of a tree whose leaves keep only their first dim.
    """

    def measure(sums: Sums, totals: Totals, trees: Mapping[str, Params]) -> dict[str, jax.Array]:
        found: dict[str, jax.Array] = {}
        if "norms" in values:
            for name, tree in trees.items():
                norms = module_norms(tree, cfg, tidy=tidy)
                found |= {f"{name}_norm/{module}": norm for module, norm in norms.items()}
        if "experts" in values and sums.load is not None:
            load = sums.load[: sum(kind.ffn == "moe" for kind in cfg.layers)]
            found[f"expert_load/{EACH_LAYER}"] = load / jnp.maximum(load.mean(axis=-1, keepdims=True), 1e-9)
        if sums.seen is not None and sums.seen.squares is not None:
            assert sums.seen.largest is not None
            rms = jnp.sqrt(sums.seen.squares / totals.tokens)
            for i, place in enumerate(PLACES):
                found[f"activation_rms/{EACH_LAYER}.{place}"] = rms[:, i]
                found[f"activation_max/{EACH_LAYER}.{place}"] = sums.seen.largest[:, i]
        if sums.seen is not None and sums.seen.logits is not None:
            found[f"max_attention_logit/{EACH_LAYER}"] = sums.seen.logits
        return found

    return measure


def module_norms(
    tree: Params, cfg: ModelConfig, *, tidy: Callable[[Params], Params] = lambda tree: tree
) -> dict[str, jax.Array]:
    """The Euclidean norm of each module of a tree shaped like the parameters: float32 [L] for the kinds of modules
    that layers have (attn, ffn, norm: what stands in a layer by itself), a scalar for what is outside of them."""
    squares = jax.tree_util.tree_map_with_path(_square, tree)
    if "layers" in squares:
        squares = tidy(squares)
    found: dict[str, list[Any]] = {}
    pieces: dict[str, list[tuple[tuple[int, ...], jax.Array]]] = {}
    for path, value in jax.tree_util.tree_flatten_with_path(squares)[0]:
        keys = [getattr(entry, "key", getattr(entry, "idx", None)) for entry in path]
        if keys[0] in ("layers", "blocks"):
            layers, inside = _layers_of(keys, cfg)
            module = str(inside[0]) if len(inside) > 1 else "norm"
            pieces.setdefault(f"{EACH_LAYER}.{module}", []).append((layers, value.reshape(-1)))
        else:
            found.setdefault(str(keys[0]), []).append(value)
    norms = {name: jnp.sqrt(sum(values[1:], values[0])) for name, values in found.items()}
    return norms | {name: jnp.sqrt(_by_layer(parts, cfg.num_layers)) for name, parts in pieces.items()}


def _square(path: Any, a: jax.Array) -> jax.Array:
    """The sum of squares of a leaf, one for each repeat of a stacked layer."""
    square = jnp.square(a.astype(jnp.float32))
    return square.sum(axis=tuple(range(1, a.ndim))) if path[0].key == "layers" else square.sum()


def _layers_of(keys: Sequence[Any], cfg: ModelConfig) -> tuple[tuple[int, ...], Sequence[Any]]:
    """The numbers of the layers that a leaf of the plain tree, or of one with a buffer a layer, holds, and its path
    inside of one."""
    if keys[0] == "blocks":
        return (keys[1],), keys[2:]
    stack = plan_stacks(cfg.layers)[keys[1]]
    return tuple(stack.layer(keys[2], repeat) for repeat in range(stack.repeats)), keys[3:]


def _by_layer(parts: Sequence[tuple[tuple[int, ...], jax.Array]], count: int) -> jax.Array:
    """[L]: values [n] of n layers each, added up; 0 for a layer that has none."""
    totals: dict[tuple[int, ...], jax.Array] = {}
    for layers, values in parts:
        totals[layers] = totals[layers] + values if layers in totals else values
    held = [layer for layers in totals for layer in layers]
    missing = [layer for layer in range(count) if layer not in held]
    values = jnp.concatenate([*totals.values(), jnp.zeros(len(missing), jnp.float32)])
    return values[np.argsort([*held, *missing])]


def name_metrics(values: Mapping[str, Any], cfg: ModelConfig, sources: Sequence[str]) -> dict[str, Any]:
    """What a step returned, as numbers and lists of numbers by their names in a line of metrics."""
    named: dict[str, Any] = {}
    for name, value in values.items():
        value = np.asarray(value)
        if name == "loss_by_source":
            losses = zip(sources, value.tolist(), strict=True)
            named |= {f"loss/{source}": loss for source, loss in losses if loss == loss}
        elif EACH_LAYER in name:
            sparse = [i for i, kind in enumerate(cfg.layers) if kind.ffn == "moe"]
            layers = range(cfg.num_layers) if len(value) == cfg.num_layers else sparse
            rows = zip(layers, value.tolist(), strict=True)
            named |= {name.replace("*", str(layer), 1): row for layer, row in rows}
        else:
            named[name] = value.item() if value.ndim == 0 else value.tolist()
    return named
