"""Room for several low-rank adapters beside the linear weights of a tree to decode from, and what goes into it.

How many there may be, and of which rank, is fixed when the room is made, so that adapters come and go without anything
being compiled. Linear layers of mixers and of feed-forward networks have room; experts, routers, embeddings and heads
have none. Number 0 is no adapter, and stays zero.

n adapters and none, R rank
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.models.adapters import is_adapted
from jaxformers.models.config import ModelConfig
from jaxformers.models.layout import FUSED, unstack
from jaxformers.models.params import Params, ParamSpec, layer_spec, path_name
from jaxformers.models.weights import LoRA, LoRABank

# Where weights are that only `weights.linear` reads, by the path of their dict in a layer.
_ROOM = {
    ("attn",): ("q", "k", "v", "o", "q_a", "q_b", "kv_a", "k_rope"),
    ("ffn",): ("gate", "up", "down"),
    ("ffn", "shared"): ("gate", "up", "down"),
}


class Factors(NamedTuple):
    """One weight's room: a [n + 1, in, R] and b [n + 1, R, out]; or one adapter's part of it, without the first dim."""

    a: Any
    b: Any


Bank = dict[str, Factors]  # by the path name of the weight


@dataclass(frozen=True)
class _Place:
    """A weight of the tree to decode from: the names of the plain tree's that it is made of, and their specs."""

    path: tuple[str | int, ...]
    names: tuple[str, ...]
    specs: tuple[ParamSpec, ...]

    @property
    def key(self) -> str:
        return ".".join(map(str, self.path))

    @property
    def dims(self) -> tuple[int, list[int]]:
        """Inputs, and outputs of each weight."""
        n = self.specs[0].n_in
        return math.prod(self.specs[0].shape[:n]), [math.prod(spec.shape[n:]) for spec in self.specs]


def empty_bank(params: Params, cfg: ModelConfig, *, count: int, rank: int, dtype: Any) -> Bank:
    """Room for `count` adapters of this rank beside the weights of a prepared tree: zeros, as NumPy arrays."""
    bank = {}
    for place in _places(params, cfg):
        inputs, outs = place.dims
        width = rank * len(outs)
        shapes = (count + 1, inputs, width), (count + 1, width, sum(outs))
        bank[place.key] = Factors(*(np.zeros(shape, dtype) for shape in shapes))
    return bank


def adapter_factors(tree: Params, params: Params, cfg: ModelConfig, *, rank: int, dtype: Any) -> Bank:
    """What an adapter, the `LoRA` leaves of a plain tree whose other leaves do not matter, puts into the room: NumPy
    arrays. ValueError for one that has no room there."""
    _check(tree, rank)
    alone = jax.tree.map(lambda w: w.replace(base=None) if is_adapted(w) else None, tree, is_leaf=is_adapted)
    blocks = unstack(alone, cfg)["blocks"]
    found = {}
    for place in _places(params, cfg):
        inputs, outs = place.dims
        made = Factors(np.zeros((inputs, rank * len(outs)), dtype), np.zeros((rank * len(outs), sum(outs)), dtype))
        home = _at(blocks, place.path[:-1])
        for i, name in enumerate(place.names):
            leaf: LoRA | None = home.get(name)
            if leaf is not None:
                own = slice(i * rank, i * rank + leaf.a.shape[-1])
                made.a[:, own] = np.asarray(leaf.a, np.float32).reshape(inputs, -1) * np.float32(leaf.scale)
                made.b[own, sum(outs[:i]) : sum(outs[: i + 1])] = np.asarray(leaf.b).reshape(-1, outs[i])
        found[place.key] = made
    return found


def with_bank(params: Params, cfg: ModelConfig, bank: Mapping[str, Factors]) -> Params:
    """The prepared tree with this room beside its weights."""
    blocks = jax.tree.map(lambda leaf: leaf, params["blocks"])  # new dicts around the same arrays
    for place in _places(params, cfg):
        home, name = _at(blocks, place.path[:-1]), place.path[-1]
        home[name] = LoRABank(home[name], *bank[place.key])
    return params | {"blocks": blocks}


def with_rows(params: Params, rows: jax.Array) -> Params:
    """The tree whose row i is computed with adapter number rows[i], int32 [B]."""

    def chosen(w: Any) -> Any:
        return w.replace(rows=rows) if isinstance(w, LoRABank) else w

    return jax.tree.map(chosen, params, is_leaf=lambda w: isinstance(w, LoRABank))


def put(bank: Bank, number: jax.Array, factors: Bank) -> Bank:
    """The room with these of one adapter."""
    return jax.tree.map(lambda every, one: every.at[number].set(jnp.asarray(one, every.dtype)), bank, factors)


def _places(params: Params, cfg: ModelConfig) -> Iterator[_Place]:
    for i, kind in enumerate(cfg.layers):
        block, spec = params["blocks"][i], layer_spec(cfg, kind)
        for path, names in _ROOM.items():
            home, specs = _at(block, path), _at(spec, path)
            if home is None or "router" in home:
                continue
            for name in home:
                parts = FUSED.get(name, (name,))
                if parts[0] in names:
                    yield _Place((i, *path, name), parts, tuple(specs[part] for part in parts))


def _at(tree: Any, path: tuple[str | int, ...]) -> Any:
    """What stands at a path; None where nothing does."""
    for step in path:
        if isinstance(tree, dict) and step not in tree:
            return None
        tree = tree[step]
    return tree


def _check(tree: Params, rank: int) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_adapted)[0]:
        if not is_adapted(leaf):
            continue
        name = path_name(path)
        steps = name.split(".")
        has_room = steps[0] == "layers" and steps[-1] in _ROOM.get(tuple(steps[3:-1]), ())
        if not has_room or leaf.scale.ndim > 1:  # one number for each layer, and for experts one for each of these
            raise ValueError(f"the adapter changes {name}, for which there is no room beside others; merge it instead")
        if leaf.magnitude is not None:
            raise ValueError(f"the adapter has magnitudes (dora) of {name}, which cannot be one of several; merge it")
        if leaf.a.shape[-1] > rank:
            raise ValueError(f"the adapter has the rank {leaf.a.shape[-1]} at {name}; there is room for {rank}")
