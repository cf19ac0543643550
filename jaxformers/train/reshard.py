"""A checkpoint written again in other chunks, an array at a time: what another mesh reads fastest.

Restoring onto any mesh works from any chunks; each device then reads the chunks that its part touches.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from jaxformers.train.checkpoint import FOLDER, CheckpointError
from jaxformers.train.folders import UNFINISHED, reason_of, seal
from jaxformers.train.integrity import CHECKSUMS
from jaxformers.train.retention import META_FILE
from jaxformers.train.stored import StoredArray, kvstore, open_stored

# Of a state's folder: the database, and what describes its chunks or its devices.
_DATABASE_FILES = ("d", "manifest.ocdbt", "ocdbt.process_*")
_SHARDINGS, _ARRAYS, _TREE = "_sharding", "array_metadatas", "_METADATA"
_WRITTEN = {"compressor": {"id": "zstd", "level": 1}, "dimension_separator": ".", "order": "C", "filters": None}


def reshard(
    checkpoint: Path,
    run: Path,
    chunks: Mapping[str, tuple[int, ...]],
    *,
    meta: Mapping[str, Any],
    done: Callable[[int], None] = lambda _bytes: None,
) -> Path:
    """Writes `checkpoint` into the run directory `run` with these chunks of its arrays and this meta; its path there.

    All else is copied. It appears complete, with checksums, or not at all. One array is in memory at a time; `done`
    hears of each one's bytes. CheckpointError where something cannot be read or written, ValueError where the step is
    there already.
    """
    target = run / FOLDER / checkpoint.name
    if target.exists():
        raise ValueError(f"{target} exists; name another run directory, or remove that checkpoint first")
    unfinished = target.with_name(f"{UNFINISHED}{checkpoint.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        ignored = shutil.ignore_patterns(*_DATABASE_FILES, _SHARDINGS, _ARRAYS, CHECKSUMS)
        shutil.copytree(checkpoint, unfinished, ignore=ignored)
        (unfinished / META_FILE).write_text(json.dumps(meta), encoding="utf-8")
        _write_state(checkpoint / "state", unfinished / "state", chunks, done)
        seal(unfinished, target)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot write {target}: {reason_of(error)}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _write_state(
    source: Path, target: Path, chunks: Mapping[str, tuple[int, ...]], done: Callable[[int], None]
) -> None:
    stored = open_stored(source)
    assert stored.keys() == chunks.keys()
    for array in stored.values():
        _write_array(array, target, chunks[array.name])
        done(array.dtype.itemsize * int(np.prod(array.shape, dtype=np.int64)))
    tree = json.loads((target / _TREE).read_text(encoding="utf-8"))
    for entry in tree["tree_metadata"].values():
        name = ".".join(key["key"] for key in entry["key_metadata"])
        if name in chunks:
            entry["value_metadata"]["write_shape"] = list(chunks[name])
    (target / _TREE).write_text(json.dumps(tree), encoding="utf-8")
    arrays = [{"param_name": n, "write_shape": c, "chunk_shape": c, "ext_metadata": None} for n, c in chunks.items()]
    (target / _ARRAYS).mkdir()
    described = {"array_metadatas": [{"array_metadata": array} for array in arrays]}
    (target / _ARRAYS / "process_0").write_text(json.dumps(described), encoding="utf-8")


def _write_array(array: StoredArray, target: Path, chunks: tuple[int, ...]) -> None:
    content = array.read()
    name = "bfloat16" if content.dtype.name == "bfloat16" else content.dtype.str
    metadata = {**_WRITTEN, "shape": array.shape, "chunks": chunks, "dtype": name}
    spec = {
        "driver": "zarr",
        "kvstore": kvstore(target, array.name + "/"),
        "metadata": metadata,
        # What is zero everywhere is written too: Orbax takes a chunk that is not there for a damaged checkpoint.
        "store_data_equal_to_fill_value": True,
    }
    with tensorstore.Transaction() as together:  # all chunks under one commit
        tensorstore.open(spec, create=True).result().with_transaction(together).write(content).result()
