"""The arrays of a saved training state, one at a time: what they are called, and any slice of them.

They lie in one database of Zarr arrays, named by their path in the state (`params.layers.0.0.attn.q`), in chunks as
the devices held them. Knows nothing of what the arrays mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tensorstore

_ABOUT = "/.zarray"  # behind an array's name: the key of its shape, dtype and chunks
_DATABASE = "manifest.ocdbt"


@dataclass(frozen=True)
class StoredArray:
    """An array of a saved state: shape, dtype and chunks (the shape of what is read at once) cost nothing."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]
    folder: Path = field(repr=False)

    def read(self, where: tuple[slice, ...] = ()) -> np.ndarray:
        """A slice of it; nothing but the chunks under the slice is read."""
        spec = {"driver": "zarr", "kvstore": kvstore(self.folder, self.name + "/")}
        return np.asarray(tensorstore.open(spec, open=True).result()[(*where, ...)].read().result())


def kvstore(folder: Path, path: str = "") -> dict[str, Any]:
    """The database of a state's folder, as tensorstore is told of it."""
    return {"driver": "ocdbt", "base": f"file://{folder.absolute()}/", "path": path}


def open_stored(folder: Path) -> dict[str, StoredArray]:
    """Every array of a state's folder by name. ValueError where it holds no such database."""
    if not (folder / _DATABASE).is_file():
        raise ValueError(f"{folder} holds no saved state ({_DATABASE} is missing)")
    store = tensorstore.KvStore.open(kvstore(folder)).result()
    names = [key.decode().removesuffix(_ABOUT) for key in store.list().result() if key.endswith(_ABOUT.encode())]
    reads = {name: store.read(name + _ABOUT) for name in sorted(names)}
    return {name: _parse(name, json.loads(read.result().value), folder) for name, read in reads.items()}


def _parse(name: str, about: Mapping[str, Any], folder: Path) -> StoredArray:
    dtype = np.dtype(ml_dtypes.bfloat16 if about["dtype"] == "bfloat16" else about["dtype"])
    return StoredArray(name, tuple(about["shape"]), dtype, tuple(about["chunks"]), folder)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree under the names that a saved state has for them."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
