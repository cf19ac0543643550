"""Hugging Face tensors to parameters and back, through the one plan of `layout`.

Import streams: each device asks for its slice of a leaf, and only the parts of the files under that slice are read.
Export assembles one tensor at a time.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxformers.families import names_of
from jaxformers.hub.copying import Copying, empty_aligned
from jaxformers.hub.layout import LeafPath, Part, copies, parts
from jaxformers.hub.safetensors import ArrayLike, Deferred, release
from jaxformers.models.config import ModelConfig
from jaxformers.models.params import Params, ParamSpec, model_spec, path_name

MAX_NAMED = 8  # tensors named in an error before it says how many more there are
FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


def import_params(
    cfg: ModelConfig,
    tensors: Mapping[str, ArrayLike],
    *,
    shardings: Any = None,
    dtype: Any = None,
    keep: Callable[[LeafPath, jax.Array], Any] | None = None,
) -> Params:
    """The parameters that a checkpoint holds.

    tensors: whole arrays by name, memory-mapped or made when their turn comes. shardings: a tree like the parameters,
    or one sharding, or None for the default device. dtype: of every parameter; None keeps what each tensor has.
    keep(path, leaf): what takes the place of each leaf, made before the next one is read.

    ValueError lists every missing, unplaced and misshapen tensor, and refuses tensors that are not floating point.
    """
    tensors, by_leaf = planned(cfg, tensors)
    specs, tree = jax.tree_util.tree_flatten_with_path(model_spec(cfg))
    places = _per_leaf(shardings, len(specs))

    def leaf(path: LeafPath, spec: ParamSpec, place: jax.sharding.Sharding) -> Any:
        read = _reader(by_leaf[path], spec.shape, tensors, dtype)
        array = jax.make_array_from_callback(spec.shape, place, read)
        return array if keep is None else jax.block_until_ready(keep(path, array))

    return jax.tree.unflatten(tree, [leaf(*spec, place) for spec, place in zip(specs, places, strict=True)])


def import_deferred(cfg: ModelConfig, tensors: Mapping[str, ArrayLike], *, dtype: Any = None) -> Params:
    """The parameters as `import_params` reads them, each leaf `Deferred`: made in host memory when its turn comes."""
    tensors, by_leaf = planned(cfg, tensors)

    def deferred(path: LeafPath, spec: ParamSpec) -> Deferred:
        made = dtype_of(by_leaf[path], tensors, dtype)
        read = _reader(by_leaf[path], spec.shape, tensors, made)
        return Deferred(spec.shape, made, lambda: read((slice(None),) * len(spec.shape)))

    return jax.tree_util.tree_map_with_path(deferred, model_spec(cfg))


def planned(
    cfg: ModelConfig, tensors: Mapping[str, ArrayLike]
) -> tuple[Mapping[str, ArrayLike], dict[LeafPath, list[Part]]]:
    """The tensors under full names, checked, and which parts of them each leaf is made of."""
    plan = list(parts(cfg))
    tensors = _with_prefix(tensors, [*plan, *copies(cfg)])
    _check(cfg, plan, tensors)
    by_leaf: dict[LeafPath, list[Part]] = defaultdict(list)
    for part in plan:
        by_leaf[part.path].append(part)
    return tensors, by_leaf


def _per_leaf(shardings: Any, count: int) -> list[jax.sharding.Sharding]:
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return [shardings] * count if isinstance(shardings, jax.sharding.Sharding) else jax.tree.leaves(shardings)


def dtype_of(leaf_parts: list[Part], tensors: Mapping[str, ArrayLike], dtype: Any) -> np.dtype:
    """Of a leaf that is made of these parts; dtype None keeps that of the tensors where they have one in common."""
    stored = {tensors[part.source.name].dtype for part in leaf_parts}
    return np.dtype(dtype) if dtype else np.dtype(stored.pop() if len(stored) == 1 else np.float32)


def _reader(
    leaf_parts: list[Part], shape: tuple[int, ...], tensors: Mapping[str, ArrayLike], dtype: Any
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """What reads a slice of one leaf; nothing under other slices is read."""
    by_index = {part.index: part for part in leaf_parts}
    leading, dtype = len(leaf_parts[0].index), dtype_of(leaf_parts, tensors, dtype)

    def read(where: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(*s.indices(size)) for s, size in zip(where, shape, strict=True)]
        out = empty_aligned(tuple(map(len, ranges)), dtype)
        with Copying(release) as copying:
            for position in np.ndindex(*out.shape[:leading]):
                part = by_index[tuple(r[i] for r, i in zip(ranges, position, strict=False))]
                tensor = tensors[part.source.name]
                whole = tensor if isinstance(tensor, np.ndarray) else tensor.__array__(dtype)
                copying.add(out[(*position, ...)], part.from_disk(whole)[(*where[leading:], ...)])
        return out

    return read


def _with_prefix(tensors: Mapping[str, ArrayLike], plan: list[Part]) -> Mapping[str, ArrayLike]:
    """The tensors under full names. Checkpoints of a bare base model leave out its name (`transformer.`, `model.`)."""
    prefix = plan[0].source.name.split(".")[0] + "."
    wanted = {part.source.name for part in plan if part.source.name.startswith(prefix)}
    if any(name in tensors for name in wanted):
        return tensors
    return {prefix + name if prefix + name in wanted else name: tensor for name, tensor in tensors.items()}


def _check(cfg: ModelConfig, plan: list[Part], tensors: Mapping[str, ArrayLike]) -> None:
    names = names_of(cfg)
    shapes = {part.source.name: part.disk_shape() for part in plan}
    ignored = [re.compile(pattern) for pattern in names.ignored]
    own = names.source("embed", None).name
    tied = {names.source("lm_head", None).name: own} if cfg.tie_embeddings and "lm_head" in names.table else {}
    shared = {part.source.name: names.source(path_name(part.path), None).name for part in copies(cfg)}
    known = shapes.keys() | tied.keys() | shared.keys()
    extra = [n for n in tensors if n not in known and not any(p.search(n) for p in ignored)]
    missing = [n for n in shapes if n not in tensors]
    misshapen = [
        f"{n} is {list(tensors[n].shape)}, not {list(shape)}"
        for n, shape in shapes.items()
        if n in tensors and tensors[n].shape != shape
    ]
    mistyped = [f"{n} ({tensors[n].dtype})" for n in shapes if n in tensors and tensors[n].dtype not in FLOATS]
    problems = [
        _listing("missing", missing),
        _listing("without a place in the model", extra),
        _listing("of another shape than config.json says", misshapen),
        _listing("not float64, float32, float16 or bfloat16", mistyped),
        _listing("unlike the embedding although tie_word_embeddings is true", _unlike(tied, tensors)),
        _listing("unlike the model's own although its modules share it", _unlike(shared, tensors)),
    ]
    if any(problems):
        raise ValueError(f"the checkpoint does not fit {cfg.family}: " + "; ".join(p for p in problems if p))


def _unlike(originals: Mapping[str, str], tensors: Mapping[str, ArrayLike]) -> list[str]:
    """The names of copies that are none: some fine-tunings train a tied head and leave the flag as it was."""
    both = [(n, own) for n, own in originals.items() if n in tensors and own in tensors]
    return [n for n, own in both if not np.array_equal(tensors[n], tensors[own])]


def _listing(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{len(names)} tensors {what}: {', '.join(names[:MAX_NAMED])}{more}"


def export_tensors(cfg: ModelConfig, params: Params, *, dtype: Any = None) -> dict[str, Deferred]:
    """The family's tensors by name, each assembled only when it is written. dtype None keeps each parameter's own.

    Leaves may be `Deferred` too. Each is then made once and let go of after its last tensor, if all tensors are
    assembled once; in the order given here, no more leaves exist together than one tensor is made of.
    """
    leaves = dict(jax.tree_util.tree_flatten_with_path(params)[0])
    by_tensor: dict[str, list[Part]] = defaultdict(list)
    for part in (*parts(cfg), *copies(cfg)):
        by_tensor[part.source.name].append(part)
    uses = Counter(part.path for group in by_tensor.values() for part in group)
    leaves = {p: _Shared(leaf, uses[p]) if isinstance(leaf, Deferred) else leaf for p, leaf in leaves.items()}
    return {name: _deferred(group, leaves, dtype) for name, group in by_tensor.items()}


class _Shared:
    """A deferred leaf that several tensors are made of: made for the first use, let go of after the last."""

    def __init__(self, leaf: Deferred, uses: int):
        self.dtype = leaf.dtype
        self._leaf, self._uses = leaf, uses
        self._made: np.ndarray | None = None
        self._left = uses

    def use(self) -> np.ndarray:
        made = self._made = np.asarray(self._leaf) if self._made is None else self._made
        self._left -= 1
        if not self._left:
            self._made, self._left = None, self._uses
        return made


def _deferred(group: list[Part], leaves: Mapping[LeafPath, Any], dtype: Any) -> Deferred:
    shape, dtype = group[0].disk_shape(), np.dtype(dtype or leaves[group[0].path].dtype)

    def assemble() -> np.ndarray:
        tensor = np.empty(shape, dtype)
        for part in group:
            entry = part.from_disk(tensor)
            with Copying() as copying:
                for where, piece in _pieces(leaves[part.path], part.index):
                    copying.add(entry[where], piece)
            if not np.may_share_memory(entry, tensor):  # no strides express it
                part.to_disk(tensor, entry)
        return tensor

    return Deferred(shape, dtype, assemble)


def _pieces(
    leaf: jax.Array | np.ndarray | _Shared, index: tuple[int, ...]
) -> Iterator[tuple[tuple[Any, ...], np.ndarray]]:
    """The pieces of `leaf[index]` that devices hold, and where in it they belong; it is nowhere put together."""
    if isinstance(leaf, _Shared):
        leaf = leaf.use()
    if isinstance(leaf, np.ndarray):
        yield (...,), leaf[(*index, ...)]
        return
    assert leaf.is_fully_addressable
    for shard in leaf.addressable_shards:
        held = [range(*s.indices(size)) for s, size in zip(shard.index, leaf.shape, strict=True)]
        if shard.replica_id == 0 and all(i in here for i, here in zip(index, held, strict=False)):
            local = tuple(i - here.start for i, here in zip(index, held, strict=False))
            piece = shard.data[local] if local else shard.data
            yield (*shard.index[len(index) :], ...), np.asarray(piece)
