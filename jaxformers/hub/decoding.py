"""A checkpoint straight in the layout that a CPU decodes from: what `layout.prepare` makes of the plain tree, without
that tree.

Checkpoints keep nearly every matrix output-major, as a CPU reads it fastest; the plain tree has them the other way and
stacked. Going there and back copies a model four times and holds it twice, for most of the time that loading takes.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxformers.hub.convert import dtype_of, planned
from jaxformers.hub.copying import assign, empty_aligned, is_aligned
from jaxformers.hub.layout import Part
from jaxformers.hub.safetensors import ArrayLike, release
from jaxformers.models.config import ModelConfig
from jaxformers.models.layout import fuse_layer, head_output_major, keeps_dtype, output_major, prepare, unstack
from jaxformers.models.params import Params, ParamSpec, model_spec

THREADS = 4  # each holds what it has read of one layer


@dataclass(frozen=True)
class _Entry:
    """A leaf, or what one layer has of it: its parts by what is left of their index, and its dtype in the end."""

    parts: Mapping[tuple[int, ...], Part]
    dtype: np.dtype

    def of_layer(self, layer: int) -> _Entry:
        return _Entry({index[1:]: part for index, part in self.parts.items() if index[0] == layer}, self.dtype)


def import_decoding(
    cfg: ModelConfig, tensors: Mapping[str, ArrayLike], *, dtype: Any, place: jax.sharding.Sharding, stored: Any = None
) -> Params:
    """The parameters that a checkpoint holds as `layout.prepare` leaves them on one CPU, to compute in `dtype`. Layers
    are read and laid out side by side, in threads. No modules for multi-token prediction.

    stored: the dtype of the plain tree, as for `import_params`; what `prepare` leaves as it is keeps that. ValueError
    as from `import_params`.
    """
    assert not cfg.mtp_modules
    tensors, by_leaf = planned(cfg, tensors)
    dtype = np.dtype(dtype)

    def entry(path: Any, _spec: Any) -> _Entry:
        made = dtype_of(by_leaf[path], tensors, stored) if keeps_dtype(path) else dtype
        return _Entry({part.index: part for part in by_leaf[path]}, made)

    rest = unstack(jax.tree_util.tree_map_with_path(entry, model_spec(cfg)), cfg, take=_Entry.of_layer)
    blocks, join = rest.pop("blocks"), functools.partial(_joined, dtype=dtype)

    def lay_out_rest() -> Params:
        return _settled(head_output_major(_read(rest, tensors)), dtype)

    def lay_out(block: Params) -> Params:
        return _settled(output_major(fuse_layer(_read(block, tensors), join=join)), dtype)

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), thread_name_prefix="loading") as threads:
        laid_out = threads.submit(lay_out_rest)  # first, as the embedding takes longest
        host = {"blocks": list(threads.map(lay_out, blocks))} | laid_out.result()
    return jax.tree.map(lambda array: jax.make_array_from_callback(array.shape, place, lambda _: array), host)


def decoding_shapes(
    cfg: ModelConfig, tensors: Mapping[str, ArrayLike], *, dtype: Any, place: jax.sharding.Sharding, stored: Any = None
) -> Params:
    """The tree that `import_decoding` makes, with `jax.ShapeDtypeStruct` leaves: nothing is read."""
    tensors, by_leaf = planned(cfg, tensors)

    def shape(path: Any, spec: ParamSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, dtype_of(by_leaf[path], tensors, stored))

    plain = jax.tree_util.tree_map_with_path(shape, model_spec(cfg))
    made = jax.eval_shape(functools.partial(prepare, cfg=cfg, dtype=np.dtype(dtype), whole=True, on_cpu=True), plain)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), made)


def _read(entries: Params, tensors: Mapping[str, ArrayLike]) -> Params:
    """Arrays in the shapes of the plain tree's entries, views of the tensors wherever strides can express it. A tensor
    that several are part of is made once."""

    @functools.cache
    def whole(name: str) -> np.ndarray:
        tensor = tensors[name]
        return tensor if isinstance(tensor, np.ndarray) else tensor.__array__()

    def read(entry: _Entry) -> np.ndarray:
        if () in entry.parts:
            part = entry.parts[()]
            return part.from_disk(whole(part.source.name))
        experts = tuple(last + 1 for last in max(entry.parts))
        out = empty_aligned((*experts, *next(iter(entry.parts.values())).spec.shape), entry.dtype)
        for index, part in entry.parts.items():
            _take(out[(*index, ...)], part.from_disk(whole(part.source.name)))
        return out

    def read_as_kept(path: Any, entry: _Entry) -> np.ndarray:
        return read(entry).astype(entry.dtype, copy=False) if keeps_dtype(path) else read(entry)

    return jax.tree_util.tree_map_with_path(read_as_kept, entries)


def _joined(weights: list[np.ndarray], *, n_in: int, dtype: np.dtype) -> np.ndarray:
    """As `weights.concat_outputs` of weights with at most one input dim, in memory output-major."""
    rows = [w.reshape(*w.shape[:n_in], math.prod(w.shape[n_in:])).T for w in weights]
    out = empty_aligned((sum(map(len, rows)), *rows[0].shape[1:]), dtype)
    ends = itertools.accumulate(map(len, rows))
    for w, end in zip(rows, ends, strict=True):
        _take(out[end - len(w) : end], w)
    return out.T


def _settled(params: Params, dtype: np.dtype) -> Params:
    """With every leaf in memory that JAX takes over as it is, and in its final dtype."""

    def settle(path: Any, array: np.ndarray) -> np.ndarray:
        made = array.dtype if keeps_dtype(path) else dtype
        if array.dtype == made and is_aligned(array):
            return array
        out = empty_aligned(array.shape, made)
        _take(out, array)
        return out

    return jax.tree_util.tree_map_with_path(settle, params)


def _take(target: np.ndarray, source: np.ndarray) -> None:
    assign(target, source)
    release(source)
