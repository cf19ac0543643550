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
    outside = {name: leaf for name, leaf in spec.items() if name != "layers"}
    for path, leaf in jax.tree_util.tree_flatten_with_path(outside)[0]:
        yield Part(path, (), leaf, names.source(path_name(path), None))
    for i, stack in enumerate(plan_stacks(cfg.layers)):
        for j, kind in enumerate(stack.pattern):
            where = (jax.tree_util.DictKey("layers"), jax.tree_util.SequenceKey(i), jax.tree_util.SequenceKey(j))
            layers = [stack.layer(j, repeat) for repeat in range(stack.repeats)]
            for path, leaf in jax.tree_util.tree_flatten_with_path(spec["layers"][i][j])[0]:
                yield from _layer_parts((*where, *path), leaf, names, kind, path_name(path), layers)


def _layer_parts(
    path: LeafPath, leaf: ParamSpec, names: Names, kind: LayerKind, name: str, layers: list[int]
) -> Iterator[Part]:
    source, entry = names.source(name, kind), leaf.drop_leading()
    for repeat, layer in enumerate(layers):
        placed = replace(source, name=source.name.replace("{l}", str(layer)))
        if "{e}" not in placed.name:
            yield Part(path, (repeat,), entry, placed)
            continue
        for e in range(entry.shape[0]):
            named = replace(placed, name=placed.name.replace("{e}", str(e)))
            yield Part(path, (repeat, e), entry.drop_leading(), named)
