"""The modules of a model under the names that its checkpoint has for them, and which of them patterns mean.

What users name (`q_proj`, `model.layers.3.mlp.*`) and what a parameter tree holds meet here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import jax
import numpy as np

from jaxformers.hub.layout import Part, parts
from jaxformers.models.adapters import Adapter, LeafRanks, input_dims
from jaxformers.models.config import ModelConfig
from jaxformers.models.params import model_spec, path_name
from jaxformers.models.quantized import Scheme

ALL_LINEAR = "all-linear"
WEIGHT, BIAS = ".weight", ".bias"
_ROUTER = "router"


@dataclass(frozen=True)
class Module:
    """A linear layer or an embedding of a checkpoint. Its tensor is one weight of ours, or holds several in slices."""

    name: str
    parts: tuple[Part, ...]

    @property
    def is_table(self) -> bool:
        return self.parts[0].spec.n_in == 0

    @property
    def dims(self) -> tuple[int, int]:
        """Inputs and outputs of the whole tensor; of a table, its rows and their width."""
        specs = [part.spec for part in self.parts]
        first = specs[0].num_batch
        split = first + input_dims(specs[0])
        return math.prod(specs[0].shape[first:split]), sum(math.prod(spec.shape[split:]) for spec in specs)


def modules(cfg: ModelConfig) -> dict[str, Module]:
    """Every module that may have an adapter, by name. Routers have none: they are computed apart from the rest."""
    found: dict[str, list[Part]] = {}
    for part in parts(cfg):
        leaf = path_name(part.path).rpartition(".")[2]
        is_matrix = part.spec.n_in or leaf in ("embed", "positions", "queries")
        if is_matrix and leaf != _ROUTER and not (leaf == "lm_head" and cfg.normalize_head):
            found.setdefault(part.source.name.removesuffix(WEIGHT), []).append(part)
    return {name: Module(name, tuple(group)) for name, group in found.items()}


def is_meant(pattern: str, name: str) -> bool:
    """Whether a pattern means the module of this name: it is its name, the end of it, or matches one of these."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def find_modules(
    cfg: ModelConfig, targets: Sequence[str] | str, *, exclude: Sequence[str] = (), key: str = "lora.targets"
) -> dict[str, Module]:
    """The modules that targets mean, without those under what `exclude` means. ValueError for a target that means none,
    with what there is."""
    every = modules(cfg)
    kept = {name: m for name, m in every.items() if not any(_is_under(pattern, name) for pattern in exclude)}
    if targets == ALL_LINEAR:
        return {name: m for name, m in kept.items() if not m.is_table and path_name(m.parts[0].path) != "lm_head"}
    for pattern in targets:
        if not any(is_meant(pattern, name) for name in every):
            raise ValueError(f"{key}: {pattern!r} means no module of {cfg.family}; its modules are {_kinds(every)}")
    return {name: m for name, m in kept.items() if any(is_meant(pattern, name) for pattern in targets)}


def _kinds(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _is_under(pattern: str, name: str) -> bool:
    """Whether a pattern means the name, or what it is a part of."""
    steps = name.split(".")
    return any(is_meant(pattern, ".".join(steps[: i + 1])) for i in range(len(steps)))


@dataclass(frozen=True, kw_only=True)
class Wish:
    """The adapters that a user asks for. ranks and alphas: of modules that patterns mean, in place of rank and alpha.
    exclude: what gets none. The rest is as `models.adapters.Adapter` has it."""

    targets: Sequence[str] | str = ALL_LINEAR
    exclude: Sequence[str] = ()
    rank: int = 8
    alpha: float = 16.0
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    base: Scheme | Literal["bfloat16"] | None = None


def plan_adapter(cfg: ModelConfig, wish: Wish) -> Adapter:
    """The adapters of a model that a wish means. ValueError in one line for a wish that cannot be."""
    found = find_modules(cfg, wish.targets, exclude=wish.exclude)
    if not found:
        raise ValueError(f"lora.targets: nothing is left to train, as train.freeze means all of {wish.targets}")
    for key, patterns in (("ranks", wish.ranks), ("alphas", wish.alphas)):
        for pattern in patterns:
            if not any(is_meant(pattern, name) for name in found):
                raise ValueError(f"lora.{key}: {pattern!r} means no module with an adapter; they are {_kinds(found)}")
    ranks = {name: int(_chosen(wish.ranks, name, wish.rank)) for name in found}
    for name, module in found.items():
        check_module(cfg, module, rank=ranks[name], dora=wish.dora, dropout=wish.dropout)
    roots = {name: math.sqrt(rank) if wish.rslora else rank for name, rank in ranks.items()}
    scales = {name: _chosen(wish.alphas, name, wish.alpha) / roots[name] for name in found}
    leaves = plan_leaves(cfg, found, ranks, scales)
    return Adapter(leaves, wish.dora, wish.dropout, _biases(cfg, wish.bias, found), wish.base)


def check_module(cfg: ModelConfig, module: Module, *, rank: int, dora: bool = False, dropout: float = 0.0) -> None:
    """ValueError for an adapter that a module cannot have."""
    if rank < 1 or rank > min(module.dims):
        raise ValueError(
            f"lora: a rank of {rank} for {module.name}, which is {module.dims[0]} to {module.dims[1]} wide; it is at "
            f"least 1 and at most {min(module.dims)}"
        )
    if dora and module.is_table:
        raise ValueError(f"lora: dora is for linear layers, which {module.name} is not")
    if "experts" in model_axes(cfg)[path_name(module.parts[0].path)]:
        if dora:
            raise ValueError(f"lora: dora is not for experts, such as {module.name}")
        if dropout:
            raise ValueError(f"lora: dropout is not for experts, such as {module.name}; use 0, or other targets")


def model_axes(cfg: ModelConfig) -> dict[str, tuple[str | None, ...]]:
    """The names of each weight's dims, by path name."""
    return {path_name(p): spec.axes for p, spec in jax.tree_util.tree_flatten_with_path(model_spec(cfg))[0]}


def _biases(cfg: ModelConfig, which: str, found: Mapping[str, Module]) -> frozenset[str]:
    """Path names of the biases to be trained."""
    if which == "none":
        return frozenset()
    named = [(part.source.name, path_name(part.path)) for part in parts(cfg) if part.source.name.endswith(BIAS)]
    return frozenset(path for name, path in named if which == "all" or name.removesuffix(BIAS) in found)


def _chosen(values: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first pattern that means a name."""
    return next((value for pattern, value in values.items() if is_meant(pattern, name)), default)


def plan_leaves(
    cfg: ModelConfig, found: Mapping[str, Module], ranks: Mapping[str, int], scales: Mapping[str, float]
) -> dict[str, LeafRanks]:
    """Ranks and scales by module as those of the weights they are made of, by path name."""
    planned: dict[str, LeafRanks] = {}
    batches = _batches(cfg)
    for name, module in found.items():
        for part in module.parts:
            path = path_name(part.path)
            if path not in planned:
                planned[path] = LeafRanks(np.zeros(batches[path], np.int64), np.zeros(batches[path], np.float32))
            planned[path].ranks[part.index], planned[path].scales[part.index] = ranks[name], scales[name]
    return planned


def _batches(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Layers and experts of each weight, as far as it has them, by path name."""
    specs = jax.tree_util.tree_flatten_with_path(model_spec(cfg))[0]
    return {path_name(path): spec.shape[: spec.num_batch] for path, spec in specs}


def frozen_entries(cfg: ModelConfig, patterns: Sequence[str], *, key: str = "train.freeze") -> dict[str, np.ndarray]:
    """Which entries (bool [layers, experts], as far as a weight has them) of weights patterns mean, by path name.
    ValueError for a pattern that means none."""
    held: dict[str, np.ndarray] = {}
    batches = _batches(cfg)
    idle, kinds = dict.fromkeys(patterns), []
    for part in parts(cfg):
        kinds.append(part.source.name)
        meant = [pattern for pattern in patterns if _is_under(pattern, part.source.name)]
        if meant:
            held.setdefault(path_name(part.path), np.zeros(batches[path_name(part.path)], bool))[part.index] = True
        for pattern in meant:
            idle.pop(pattern, None)
    if idle:
        some = ", ".join(dict.fromkeys(name.removesuffix(WEIGHT) for name in kinds[:3]))
        raise ValueError(f"{key}: {next(iter(idle))!r} means no weight of {cfg.family}; they are named like {some}")
    return held
