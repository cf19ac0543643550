"""Which weights of a model have a low-rank adapter, and the parameter tree with them: its specs, its start, its parts.

Knows trees and ranks; what names users give the weights is another module's business.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.models.config import ModelConfig, longest_stack, plan_stacks
from jaxformers.models.params import Params, ParamSpec, model_spec, path_name
from jaxformers.models.quantized import Quantized, Scheme, group_shape, quantize
from jaxformers.models.weights import LoRA, LoRABank, dense


@dataclass(frozen=True, eq=False)
class LeafRanks:
    """The adapters of one leaf: the rank and the scale of each entry along its layers and experts, as arrays of those
    dims. An entry without one has rank 0; the leaf's is the largest, and others have zeros in what they do not use."""

    ranks: np.ndarray
    scales: np.ndarray

    @property
    def rank(self) -> int:
        return int(self.ranks.max())


@dataclass(frozen=True, eq=False)
class Adapter:
    """A model's adapters. leaves: of each weight that has some, by path name. dora: with magnitudes. dropout: of their
    inputs in training. biases: path names of biases that are trained beside them. base: how frozen linear weights are
    kept."""

    leaves: Mapping[str, LeafRanks]
    dora: bool = False
    dropout: float = 0.0
    biases: frozenset[str] = field(default_factory=frozenset)
    base: Scheme | Literal["bfloat16"] | None = None


def is_adapted(node: Any) -> bool:
    return isinstance(node, LoRA)


def input_dims(spec: ParamSpec) -> int:
    """The number of input dims of a weight; a table's is its rows."""
    return spec.n_in or 1


def adapter_spec(spec: ParamSpec, base: Any, *, rank: int, dora: bool, dropout: float = 0.0) -> LoRA:
    """The specs of a weight with an adapter of this rank; `base` is that of the weight as it is kept."""
    n, split = spec.num_batch, spec.num_batch + input_dims(spec)
    batch, ins, outs = spec.axes[:n], spec.axes[n:split], spec.axes[split:]
    shape, width = spec.shape, math.prod(spec.shape[n:split])
    return LoRA(
        base,
        ParamSpec((*shape[:split], rank), (*batch, *ins, None), "normal", width, split - n),
        ParamSpec((*shape[:n], rank, *shape[split:]), (*batch, None, *outs), "normal", rank, 1),
        ParamSpec(shape[:n], batch, "ones"),
        ParamSpec((*shape[:n], *shape[split:]), (*batch, *outs), "ones") if dora else None,
        dropout=dropout,
    )


def quantized_spec(spec: ParamSpec, scheme: Scheme) -> Quantized:
    """The specs of a linear weight in few bits."""
    n, split = spec.num_batch, spec.num_batch + spec.n_in
    batch, shape = spec.shape[:n], spec.shape
    groups, size = group_shape(math.prod(shape[n:split]), scheme)
    # Groups are spread over devices as inputs are, or where there is one group, its inputs.
    places = (None, spec.axes[n]) if groups == 1 else (spec.axes[n], None)
    out, names = math.prod(shape[split:]), (*spec.axes[:n], *places, spec.axes[split])
    rows, dtype = (size, "int8") if scheme == "int8" else (size // 2, "uint8")
    return Quantized(
        ParamSpec((*batch, groups, rows, out), names, "zeros", dtype=dtype),
        ParamSpec((*batch, groups, 1, out), (*names[:-2], None, names[-1]), "ones"),
        shape[n:split],
        shape[split:],
        scheme,
    )


def spec_like(spec: ParamSpec, w: Any) -> Any:
    """The specs of a weight of any kind, whose array would have this one."""
    if isinstance(w, LoRA):
        kept = spec_like(spec, w.base)
        found = adapter_spec(spec, kept, rank=w.a.shape[-1], dora=w.magnitude is not None, dropout=w.dropout)
        batch = spec.num_batch
        key = ParamSpec((*spec.shape[:batch], 2), (*spec.axes[:batch], None)) if w.key is not None else None
        return found.replace(key=key)
    if isinstance(w, LoRABank):
        whole = [ParamSpec(leaf.shape, (None,) * leaf.ndim) for leaf in (w.a, w.b)]
        rows = None if w.rows is None else ParamSpec(w.rows.shape, (None,))
        return LoRABank(spec_like(spec, w.base), *whole, rows)
    return quantized_spec(spec, w.scheme) if isinstance(w, Quantized) else spec


def adapted_spec(cfg: ModelConfig, adapter: Adapter) -> Params:
    """`model_spec` with adapters in their places."""

    def make(path: Any, spec: ParamSpec) -> Any:
        kept = _kept_spec(spec, adapter.base) if _is_packed(path, spec) else spec
        found = adapter.leaves.get(path_name(path))
        if found is None:
            return kept
        dora = adapter.dora and spec.n_in > 0
        return adapter_spec(spec, kept, rank=found.rank, dora=dora, dropout=adapter.dropout)

    return jax.tree_util.tree_map_with_path(make, model_spec(cfg))


def _kept_spec(spec: ParamSpec, base: Scheme | Literal["bfloat16"] | None) -> Any:
    if base is None:
        return spec
    return replace(spec, dtype="bfloat16") if base == "bfloat16" else quantized_spec(spec, base)


def _is_packed(path: Any, spec: ParamSpec) -> bool:
    """Whether a frozen base keeps this weight in few bits: linear layers, without the head and routers."""
    return spec.n_in > 0 and path_name(path).rpartition(".")[2] not in ("lm_head", "router")


def add_adapter(params: Params, cfg: ModelConfig, adapter: Adapter, key: jax.Array) -> Params:
    """The plain tree with new adapters, which do nothing yet.

    As in `peft`, a linear layer's first matrix is uniform within 1 / sqrt(inputs) and its second one zero; a table's
    first is zero and its second normal. Weights may be as `keep_weight` makes them already.
    """
    specs = adapted_spec(cfg, adapter)

    def make(path: Any, spec: Any, w: jax.Array) -> Any:
        w = keep_weight(w, base_spec(spec))
        if not is_adapted(spec):
            return w
        name = path_name(path)
        return _start(spec, w, adapter.leaves[name], jax.random.fold_in(key, zlib.crc32(name.encode())))

    return jax.tree_util.tree_map_with_path(make, specs, params, is_leaf=lambda s: isinstance(s, (LoRA, Quantized)))


def base_spec(spec: Any) -> Any:
    """The specs of a weight without its adapter, from those of `adapted_spec`."""
    return spec.base if is_adapted(spec) else spec


def keep_weight(w: Any, spec: Any) -> Any:
    """A weight as a frozen base keeps it, from the specs of that; one that is so already stays."""
    if isinstance(w, Quantized):
        return w
    if isinstance(spec, ParamSpec):
        return w.astype(spec.dtype)
    return quantize(w, spec.scheme, n_in=len(spec.ins), num_batch=len(spec.codes.shape) - 3)


def _start(spec: LoRA, base: Any, found: LeafRanks, key: jax.Array) -> LoRA:
    a, b = jnp.zeros(spec.a.shape, jnp.float32), jnp.zeros(spec.b.shape, jnp.float32)
    used = used_ranks(found)
    n = found.ranks.ndim
    if is_table(spec):
        b = jax.random.normal(key, spec.b.shape) * used.reshape(*used.shape, *(1,) * (b.ndim - n - 1))
    else:
        bound = spec.a.fan_in**-0.5
        a = jax.random.uniform(key, spec.a.shape, minval=-bound, maxval=bound)
        a = a * used.reshape(*found.ranks.shape, *(1,) * (a.ndim - n - 1), -1)
    made = LoRA(base, a, b, jnp.asarray(found.scales, jnp.float32), dropout=spec.dropout)
    return made if spec.magnitude is None else made.replace(magnitude=made.lengths())


def is_table(spec: LoRA) -> bool:
    """Whether an adapter is that of a table, which is looked up; from its specs."""
    return isinstance(spec.base, ParamSpec) and spec.base.n_in == 0


def used_ranks(found: LeafRanks) -> np.ndarray:
    """float32 [batch..., R]: 1 for what an entry uses of its leaf's rank, 0 for the rest."""
    return (np.arange(found.rank) < found.ranks[..., None]).astype(np.float32)


def merge(params: Params) -> Params:
    """The tree with every weight as one array: adapters added up, fewer bits unpacked."""
    return jax.tree.map(dense, params, is_leaf=lambda w: isinstance(w, (LoRA, Quantized)))


def trainable(specs: Params, biases: frozenset[str] = frozenset()) -> Params:
    """Which of a tree's arrays an adapter's training changes, as a tree of bools like these specs."""

    def of(path: Any, spec: Any) -> Any:
        if not is_adapted(spec):
            return jax.tree.map(lambda _: path_name(path) in biases, spec)
        mask = jax.tree.map(lambda _: False, spec)
        return mask.replace(a=True, b=True, magnitude=None if spec.magnitude is None else True)

    return jax.tree_util.tree_map_with_path(of, specs, is_leaf=is_adapted)


def partition(tree: Any, mask: Any) -> tuple[Any, Any]:
    """Two trees of one form: the leaves where the mask is true, and the others; None where a leaf is in the other."""
    kept = jax.tree.map(lambda m, leaf: leaf if m else None, mask, tree)
    return kept, jax.tree.map(lambda m, leaf: None if m else leaf, mask, tree)


def combine(first: Any, second: Any) -> Any:
    """The tree that `partition` cut in two."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)


def at_places(params: Params, places: jax.Array | None) -> Params:
    """The tree whose adapters with dropout are told which tokens they see: int32 [B, T], each one's number in the
    batch. None: as it is."""

    def told(w: Any) -> Any:
        return w.replace(places=places) if is_adapted(w) and w.key is not None else w

    return params if places is None else jax.tree.map(told, params, is_leaf=is_adapted)


def with_keys(params: Params, cfg: ModelConfig, key: jax.Array, *, slots: np.ndarray | None = None) -> Params:
    """The tree (plain, unstacked or arranged for a pipeline) with a key for the dropout of every adapter.

    A layer's key depends on its number and the weight's name, not on how the tree is laid out. slots: which repeat
    each place of the longest stack holds, where a pipeline has changed their order.
    """
    stacks = plan_stacks(cfg.layers)

    def keyed(path: Any, w: Any) -> Any:
        if not is_adapted(w):
            return w
        layers, name = np.int32(cfg.num_layers), path_name(path)
        if path[0].key == "blocks":
            layers, name = np.int32(path[1].idx), path_name(path[2:])
        elif path[0].key == "layers":
            i, j = path[1].idx, path[2].idx
            arranged = slots is not None and i == longest_stack(stacks)
            repeats = slots if arranged else np.arange(stacks[i].repeats)
            layers, name = np.asarray([stacks[i].layer(j, int(r)) for r in repeats], np.int32), path_name(path[3:])
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        keys = jax.vmap(lambda layer: jax.random.fold_in(own, layer))(np.atleast_1d(layers))
        return w.replace(key=jax.random.key_data(keys if np.ndim(layers) else keys[0]))

    return jax.tree_util.tree_map_with_path(keyed, params, is_leaf=is_adapted)
