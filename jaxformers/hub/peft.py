"""Low-rank adapters as `peft` keeps them: adapter_config.json and adapter_model.safetensors, in and out.

A module there is a whole tensor of the checkpoint, [out, in]; here it may be several weights, each a slice of the
outputs. Slices of one module share the first matrix of an adapter that was read; of one that was trained here each has
its own, and then the module's has the sum of their ranks.

R rank
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.families.common import untied
from jaxformers.hub.layout import Part, parts
from jaxformers.hub.safetensors import Deferred, open_tensors, read_metadata, write_file
from jaxformers.hub.targets import BIAS, WEIGHT, Module, check_module, modules, plan_leaves
from jaxformers.models.adapters import Adapter, LeafRanks, adapted_spec, input_dims
from jaxformers.models.config import ModelConfig
from jaxformers.models.params import Params, path_name
from jaxformers.models.quantized import Quantized
from jaxformers.models.weights import LoRA, dense

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
FINGERPRINT_KEY = "base_fingerprint"  # in the metadata of the weights
_ROOT = "base_model.model."
_SUFFIXES = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
# Settings under which an adapter is something else than a sum of two factors, and the values without effect.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to start that leave another base behind


@dataclass(frozen=True)
class LowRank:
    """One module's adapter: a [R, in], b [out, R], what their product is multiplied by, and DoRA's magnitude [out]."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter by module name. whole: tensors that were trained themselves, by the name that the base has for them.
    base and fingerprint: which model it is of, as far as it says."""

    modules: Mapping[str, LowRank]
    whole: Mapping[str, np.ndarray] = field(default_factory=dict)
    base: str | None = None
    fingerprint: str | None = None
    rslora: bool = False
    dropout: float = 0.0


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter."""
    return (path / CONFIG_FILE).is_file()


def read_adapter(directory: str | Path) -> PeftAdapter:
    """The adapter of a directory. ValueError in one line for one that is damaged, or of a kind that is not known."""
    directory = Path(directory)
    config = _read_config(directory)
    rslora, found = bool(config.get("use_rslora")), {}
    whole: dict[str, np.ndarray] = {}
    for key, tensor in open_tensors(directory / WEIGHTS_FILE).items():
        name = key.removeprefix(_ROOT)
        suffix = next((s for s in _SUFFIXES if name.endswith(s)), None)
        if suffix is None:
            whole[name.replace(".base_layer.", ".")] = tensor
        else:
            found.setdefault(name.removesuffix(suffix), {})[_SUFFIXES[suffix]] = tensor
    low_ranks = {}
    for name, factors in found.items():
        if not {"a", "b"} <= factors.keys() or factors["a"].shape[0] != factors["b"].shape[-1]:
            raise ValueError(f"{directory}: the two matrices of {name} do not belong together")
        rank = factors["a"].shape[0]
        alpha = _by_pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
        low_ranks[name] = LowRank(**factors, scale=alpha / (math.sqrt(rank) if rslora else rank))
    return PeftAdapter(
        low_ranks,
        whole,
        config.get("base_model_name_or_path"),
        read_metadata(directory / WEIGHTS_FILE).get(FINGERPRINT_KEY),
        rslora,
        float(config.get("lora_dropout") or 0.0),
    )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{directory} is no adapter: it has no {CONFIG_FILE}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"{path}: peft_type is {kind!r}; only LORA is known")
    for key, plain in _PLAIN.items():
        if key in config and config[key] not in plain:
            raise ValueError(f"{path}: {key} is {config[key]!r}, which is not known; only {plain[0]!r} is")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise ValueError(f"{path}: init_lora_weights={start} changed the base too, which the adapter does not hold")
    if not isinstance(config.get("lora_alpha"), (int, float)):
        raise ValueError(f"{path}: lora_alpha is {config.get('lora_alpha')!r}; it must be a number")
    return config


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value for a module, as `peft` looks it up: patterns are regular expressions of a name's end."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def stack_adapters(adapters: Sequence[PeftAdapter], weights: Sequence[float]) -> PeftAdapter:
    """One adapter that adds what these add, each times its weight: ranks are put together, so nothing is lost.
    ValueError for adapters that cannot be added."""
    assert len(adapters) == len(weights) > 0
    if len(adapters) == 1 and weights[0] == 1:
        return adapters[0]
    for adapter in adapters:
        if adapter.whole or any(low.magnitude is not None for low in adapter.modules.values()):
            raise ValueError(
                "adapters with magnitudes (dora) or weights of their own (bias, modules_to_save) cannot be added to "
                "others, or weighted; merge one at a time"
            )
    joined = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        found = [(low, w) for adapter, w in zip(adapters, weights, strict=True) if (low := adapter.modules.get(name))]
        a = np.concatenate([_float32(low.a) for low, _ in found])
        b = np.concatenate([_float32(low.b) * np.float32(w * low.scale) for low, w in found], axis=1)
        joined[name] = LowRank(a, b, 1.0)
    return PeftAdapter(joined, base=adapters[0].base, fingerprint=adapters[0].fingerprint)


def _float32(a: np.ndarray) -> np.ndarray:
    return np.asarray(a).astype(np.float32)


def fit_adapter(adapter: PeftAdapter, cfg: ModelConfig, *, where: object = "the adapter") -> Adapter:
    """Ranks and scales of the model's weights. ValueError for an adapter of another model, by names and shapes."""
    every = modules(cfg)
    if unknown := [name for name in adapter.modules if name not in every]:
        raise ValueError(
            f"{where} is of another base: {cfg.family} has no module {unknown[0]}"
            + (f" (nor {len(unknown) - 1} others of it)" if len(unknown) > 1 else "")
        )
    for name, low in adapter.modules.items():
        wide = (low.a.shape[1], low.b.shape[0])
        if wide != every[name].dims:
            raise ValueError(
                f"{where} is of another base: its {name} is {wide[0]} to {wide[1]} wide, the model's "
                f"{every[name].dims[0]} to {every[name].dims[1]}"
            )
        check_module(cfg, every[name], rank=_rank(low), dora=low.magnitude is not None)
    own = {part.source.name: part.disk_shape() for part in parts(cfg)}
    for name, tensor in adapter.whole.items():
        if own.get(name) != tensor.shape:
            shape = f"is {list(own[name])}" if name in own else "there is none"
            raise ValueError(f"{where} is of another base: its {name} is {list(tensor.shape)}, in the model {shape}")
    found = {name: every[name] for name in adapter.modules}
    ranks = {name: _rank(low) for name, low in adapter.modules.items()}
    scales = {name: low.scale for name, low in adapter.modules.items()}
    dora = any(low.magnitude is not None for low in adapter.modules.values())
    biases = frozenset(path_name(part.path) for part in parts(cfg) if part.source.name in adapter.whole)
    return Adapter(plan_leaves(cfg, found, ranks, scales), dora, adapter.dropout, biases)


def _rank(low: LowRank) -> int:
    return low.a.shape[0]


def attach(params: Params, cfg: ModelConfig, adapter: PeftAdapter, *, where: object = "the adapter") -> Params:
    """The plain tree with an adapter: `LoRA` leaves of NumPy arrays around the given weights, and tensors that the
    adapter holds whole in place of the model's."""
    plan, every = fit_adapter(adapter, cfg, where=where), modules(cfg)
    made: dict[str, LoRA] = {}
    specs = jax.tree_util.tree_flatten_with_path(adapted_spec(cfg, plan), is_leaf=lambda s: isinstance(s, LoRA))[0]
    for path, spec in specs:
        if isinstance(spec, LoRA):
            zeros = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), spec.replace(base=None))
            made[path_name(path)] = zeros.replace(scale=plan.leaves[path_name(path)].scales, dropout=0.0)
    for name, low in adapter.modules.items():
        for part in every[name].parts:
            _fill(made[path_name(part.path)], part, low)
    params = _with_whole(params, cfg, adapter.whole)

    def placed(path: Any, w: Any) -> Any:
        found = made.get(path_name(path))
        return w if found is None else found.replace(base=w)

    return jax.tree_util.tree_map_with_path(placed, params)


def _fill(leaf: LoRA, part: Part, low: LowRank) -> None:
    """Writes a module's adapter, as far as it is this weight's, into the weight's entry."""
    rank = _rank(low)
    a, b = leaf.a[part.index], leaf.b[part.index]
    a[..., :rank] = _float32(low.a).T.reshape(*a.shape[:-1], rank)
    b[:rank] = _outputs(part, rank).from_disk(_float32(low.b))
    if low.magnitude is not None:
        leaf.magnitude[part.index][...] = _outputs(part, 1).from_disk(_float32(low.magnitude).reshape(-1, 1))[0]


def _outputs(part: Part, rank: int) -> Part:
    """Where a weight's outputs lie in a matrix [out, R] of its module, as the weight itself lies in its tensor."""
    spec, source = part.spec, part.source
    first = spec.num_batch
    if first or (source.view and source.axis == 0):
        raise ValueError(f"{source.name} has no form in peft's terms: it holds experts, or slices of inputs, in one")
    outs = spec.shape[first + input_dims(spec) :]
    spec = replace(spec, shape=(rank, *outs), axes=(None,) * (1 + len(outs)), n_in=1)
    return replace(
        part,
        spec=spec,
        source=replace(source, view=(rank, *source.view[1:]) if source.view else (), transposed=True, shape=()),
    )


def _with_whole(params: Params, cfg: ModelConfig, whole: Mapping[str, np.ndarray]) -> Params:
    """The tree with these tensors in place of what the model has under their names."""
    entries: dict[str, list[tuple[tuple[int, ...], np.ndarray]]] = {}
    for part in parts(cfg):
        if part.source.name in whole:
            entries.setdefault(path_name(part.path), []).append((part.index, part.from_disk(whole[part.source.name])))

    def replaced(path: Any, w: Any) -> Any:
        for index, entry in entries.get(path_name(path), ()):
            w = jnp.asarray(w).at[index].set(jnp.asarray(entry, w.dtype)) if index else jnp.asarray(entry, w.dtype)
        return w

    return jax.tree_util.tree_map_with_path(replaced, params)


def detach(params: Params, cfg: ModelConfig, adapter: Adapter, *, rslora: bool = False) -> PeftAdapter:
    """The adapter of a plain tree with one, of which only what it trains is read. ValueError for a module that `peft`
    has no form for."""
    leaves = {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda w: isinstance(w, LoRA))[0]
    }
    found = {}
    for name, module in modules(cfg).items():
        plans = [adapter.leaves.get(path_name(part.path)) for part in module.parts]
        if plans[0] is not None and plans[0].ranks[module.parts[0].index].any():
            found[name] = _joined(module, leaves, [plan for plan in plans if plan is not None])
    own = {path: np.asarray(leaves[path]) for path in adapter.biases}
    return PeftAdapter(found, _whole_tensors(cfg, own), rslora=rslora, dropout=adapter.dropout)


def _joined(module: Module, leaves: Mapping[str, LoRA], plans: Sequence[LeafRanks]) -> LowRank:
    """The adapter of a module, of those of its slices."""
    entries = []
    for part, plan in zip(module.parts, plans, strict=True):
        leaf, rank = leaves[path_name(part.path)], int(np.max(plan.ranks[part.index]))
        a, b = np.asarray(leaf.a[part.index]), np.asarray(leaf.b[part.index])
        _outputs(part, rank)  # which refuses what has no such form
        length = None if leaf.magnitude is None else np.asarray(leaf.magnitude[part.index])
        entries.append((part, a[..., :rank].reshape(-1, rank), b[:rank], length))
    shared = all(np.array_equal(entries[0][1], a) for _, a, _, _ in entries)
    starts = [0] * len(entries) if shared else np.cumsum([0, *(a.shape[1] for _, a, _, _ in entries[:-1])]).tolist()
    total = entries[0][1].shape[1] if shared else sum(a.shape[1] for _, a, _, _ in entries)
    width = module.dims[1]
    joined, lengths = np.zeros((width, total), np.float32), np.zeros((width, 1), np.float32)
    for (part, a, b, length), start in zip(entries, starts, strict=True):
        _outputs(part, a.shape[1]).to_disk(joined[:, start : start + a.shape[1]], b)
        if length is not None:
            _outputs(part, 1).to_disk(lengths, length[None])
    firsts = [entries[0][1]] if shared else [a for _, a, _, _ in entries]
    scale = float(plans[0].scales[module.parts[0].index])
    has_lengths = entries[0][3] is not None
    return LowRank(np.concatenate(firsts, axis=1).T, joined, scale, lengths[:, 0] if has_lengths else None)


def _whole_tensors(cfg: ModelConfig, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors that these weights are (a part of), of which all parts are among them."""
    tensors: dict[str, np.ndarray] = {}
    for part in parts(cfg):
        if path_name(part.path) in leaves:
            entry = leaves[path_name(part.path)][part.index]
            part.to_disk(tensors.setdefault(part.source.name, np.zeros(part.disk_shape(), entry.dtype)), entry)
    return tensors


def write_adapter(directory: str | Path, adapter: PeftAdapter, cfg: ModelConfig) -> None:
    """Writes a directory that `peft` opens, weights first."""
    directory, every = Path(directory), modules(cfg)
    tensors: dict[str, np.ndarray] = {}
    for name, low in adapter.modules.items():
        kind, tail = ("lora_embedding_", "") if every[name].is_table else ("lora_", WEIGHT)
        tensors[f"{_ROOT}{name}.{kind}A{tail}"] = np.ascontiguousarray(low.a)
        tensors[f"{_ROOT}{name}.{kind}B{tail}"] = np.ascontiguousarray(low.b)
        if low.magnitude is not None:
            tensors[f"{_ROOT}{name}.lora_magnitude_vector"] = low.magnitude
    for name, tensor in adapter.whole.items():
        module, _, leaf = name.rpartition(".")
        tensors[f"{_ROOT}{module}{'.base_layer' if module in adapter.modules else ''}.{leaf}"] = tensor
    metadata = {} if adapter.fingerprint is None else {FINGERPRINT_KEY: adapter.fingerprint}
    write_file(directory / WEIGHTS_FILE, tensors, metadata=metadata)
    text = json.dumps(_config(adapter, every), indent=2, sort_keys=True)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _config(adapter: PeftAdapter, every: Mapping[str, Module]) -> dict[str, Any]:
    ranks = {name: _rank(low) for name, low in adapter.modules.items()}
    root: Callable[[int], float] = math.sqrt if adapter.rslora else float
    alphas = {name: _number(low.scale * root(_rank(low))) for name, low in adapter.modules.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    conv1d = any(not part.source.transposed for name in ranks for part in every[name].parts)
    biases = [name for name in adapter.whole if name.endswith(BIAS)]
    apart = [name for name in biases if name.removesuffix(BIAS) not in adapter.modules]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(name): x for name, x in alphas.items() if x != alpha},
        "target_modules": _targets(adapter.modules, every),
        "use_rslora": adapter.rslora,
        "use_dora": any(low.magnitude is not None for low in adapter.modules.values()),
        "bias": "all" if apart else "lora_only" if biases else "none",
        "fan_in_fan_out": conv1d,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _number(value: float) -> int | float:
    """A whole number as one; float32 scales come back as the alphas they were made of."""
    near = float(f"{value:.6g}")
    return int(near) if near.is_integer() else near


def _targets(found: Mapping[str, Any], every: Mapping[str, Module]) -> list[str]:
    """The modules by their last names where that means them and no others, else whole."""
    kinds = {name.rpartition(".")[2] for name in found}
    return sorted(kinds) if sum(name.rpartition(".")[2] in kinds for name in every) == len(found) else sorted(found)


def merged_model(params: Params, cfg: ModelConfig) -> tuple[Params, ModelConfig]:
    """The plain tree with every weight as one array, and its architecture: an adapter of a tied embedding is none of
    the head, which then becomes a weight of its own. Leaves may be NumPy's or `Deferred`."""
    unties = cfg.tie_embeddings and isinstance(params["embed"], LoRA)
    head = {"lm_head": _turned(params["embed"].base)} if unties else {}
    whole = jax.tree.map(_merged, params, is_leaf=lambda w: isinstance(w, (LoRA, Quantized)))
    return whole | head, untied(cfg) if unties else cfg


def _turned(table: Any) -> Any:
    if isinstance(table, Deferred):
        return Deferred(table.shape[::-1], table.dtype, lambda: np.asarray(table).T)
    return table.T


def _merged(w: Any) -> Any:
    if isinstance(w, LoRA) and isinstance(base := w.base, Deferred):
        return Deferred(
            base.shape, base.dtype, lambda: np.asarray(w.replace(base=jnp.asarray(np.asarray(base))).merged())
        )
    return dense(w)
