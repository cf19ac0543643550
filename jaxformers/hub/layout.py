"""Where every weight of a model lies in its family's checkpoint: one plan, read in both directions.

A `Part` is one leaf's entry for one layer (and expert) and the slice of the named tensor that holds it. Import groups
parts by leaf, export groups them by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import numpy as np

from jaxformers.families import names_of
from jaxformers.families.common import Names, Source
from jaxformers.models.config import LayerKind, ModelConfig, plan_stacks
from jaxformers.models.params import ParamSpec, model_spec, path_name

LeafPath = tuple[Any, ...]


@dataclass(frozen=True)
class Part:
    """`params[path][index]` is the slice `source` of a tensor; `spec` is that entry's, without layer and expert
    dims."""

    path: LeafPath
    index: tuple[int, ...]
    spec: ParamSpec
    source: Source

    def disk_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor in the checkpoint."""
        if self.source.shape:
            return self.source.shape
        full, batch = self.source.view or self.spec.shape, self.spec.num_batch
        if self.spec.n_in:
            # A view keeps the inputs in one dim; a spec may have them in several.
            first_out = batch + (1 if self.source.view else self.spec.n_in)
            rows, columns = prod(full[batch:first_out]), prod(full[first_out:])
            return (*full[:batch], columns, rows) if self.source.transposed else (*full[:batch], rows, columns)
        if self.source.view or self.spec.flat:
            return (*full[:batch], prod(full[batch:]))
        return full

    def from_disk(self, tensor: np.ndarray) -> np.ndarray:
        """The entry, shaped as its spec: a view of the tensor wherever strides can express it."""
        if self.spec.n_in and self.source.transposed:
            tensor = np.swapaxes(tensor, -1, -2)
        if self.source.view:
            tensor = tensor.reshape(self.source.view)
        return tensor[self._slice()].reshape(self.spec.shape)

    def to_disk(self, tensor: np.ndarray, entry: np.ndarray) -> None:
        """Writes the entry into its place in the whole tensor."""
        if self.spec.n_in and self.source.transposed:
            tensor = np.swapaxes(tensor, -1, -2)
        # Splitting dims never copies, so these stay views of the tensor.
        place = tensor.reshape(self.source.view or self.spec.shape, copy=False)[self._slice()]
        place[...] = entry.reshape(place.shape)

    def _slice(self) -> tuple[Any, ...]:
        if not (self.source.view or self.spec.shape):
            return (...,)  # a scalar has no axis to slice
        return (slice(None),) * self.source.axis + (slice(self.source.start, self.source.stop),)


def parts(cfg: ModelConfig) -> Iterator[Part]:
    """Every part of the model, leaf by leaf."""
    spec, names = model_spec(cfg), names_of(cfg)
    outside = {name: leaf for name, leaf in spec.items() if name not in ("layers", "mtp")}
    for path, leaf in jax.tree_util.tree_flatten_with_path(outside)[0]:
        yield Part(path, (), leaf, names.source(path_name(path), None))
    for i, stack in enumerate(plan_stacks(cfg.layers)):
        for j, kind in enumerate(stack.pattern):
            where = (jax.tree_util.DictKey("layers"), jax.tree_util.SequenceKey(i), jax.tree_util.SequenceKey(j))
            layers = [stack.layer(j, repeat) for repeat in range(stack.repeats)]
            for path, leaf in jax.tree_util.tree_flatten_with_path(spec["layers"][i][j])[0]:
                source = names.source(path_name(path), kind)
                for repeat, layer in enumerate(layers):
                    yield from _layer_parts((*where, *path), (repeat,), leaf.drop_leading(), source, layer)
    for m, module in enumerate(spec.get("mtp", ())):
        where = (jax.tree_util.DictKey("mtp"), jax.tree_util.SequenceKey(m))
        for path, leaf in jax.tree_util.tree_flatten_with_path(module)[0]:
            source = _module_source(names, path_name(path), cfg.layers[-1])
            yield from _layer_parts((*where, *path), (), leaf, source, cfg.num_layers + m)


def copies(cfg: ModelConfig) -> Iterator[Part]:
    """Tensors that repeat a weight of the model for a module that shares it: written, and not read."""
    spec, names = model_spec(cfg), names_of(cfg)
    for m in range(cfg.mtp_modules):
        for leaf, name in names.copies.items():
            own = leaf if leaf in spec else "embed"  # a tied head
            source = Source(name.replace("{l}", str(cfg.num_layers + m)))
            yield Part((jax.tree_util.DictKey(own),), (), spec[own], source)


def _module_source(names: Names, name: str, kind: LayerKind) -> Source:
    """Where a weight of a module for multi-token prediction lies; its layer's are named as any layer's are."""
    own = name.removeprefix("layer.")
    return names.source(f"mtp.{name}", None) if own == name else names.source(own, kind)


def _layer_parts(
    path: LeafPath, index: tuple[int, ...], entry: ParamSpec, source: Source, layer: int
) -> Iterator[Part]:
    """One layer's entry of a leaf, and each of its experts."""
    placed = replace(source, name=source.name.replace("{l}", str(layer)))
    if "{e}" not in placed.name:
        yield Part(path, index, entry, placed)
        return
    for e in range(entry.shape[0]):
        named = replace(placed, name=placed.name.replace("{e}", str(e)))
        yield Part(path, (*index, e), entry.drop_leading(), named)
