"""Hugging Face safetensors: weights read as memory-mapped NumPy arrays, and written one tensor at a time.

A safetensors file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, data_offsets) and the
raw little-endian data (https://huggingface.co/docs/safetensors). A model is one `model.safetensors`, or shards
named by `model.safetensors.index.json`. Files come from strangers, so every field of a header is checked before use.

This module knows nothing about models, tensor names or devices.
"""

import itertools
import json
import math
import mmap
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Protocol

import ml_dtypes
import numpy as np
from numpy.lib.array_utils import byte_bounds

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_FILES = "model-*-of-*.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
MAX_DIMS = 64  # NumPy's
MAX_ELEMENTS = 2**59  # of 8 bytes or less each

# In the reference implementation's order, which the writer follows: tensors of a later dtype come earlier in a file, so
# that the widest are aligned. Its sub-byte dtypes (F4, F6_*) have no NumPy view and are refused like any unknown name.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "C64": np.dtype("<c8"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
DTYPE_NAMES: dict[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


class ArrayLike(Protocol):
    """What can be written: a NumPy or JAX array, a memory-mapped view, or a `Deferred` one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray: ...


@dataclass(frozen=True)
class Deferred:
    """An array that does not exist yet: `load` makes it when its turn comes, and only then.

    dtype is the one it has unless another is asked for; `load` may give a wider one.
    """

    shape: tuple[int, ...]
    dtype: Any
    load: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.load()).astype(dtype or self.dtype, copy=False)


def open_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a model directory or of one `.safetensors` file, by name, as read-only memory-mapped views.

    Nothing but headers is read: `.shape` and `.dtype` are free, and a slice costs the bytes of that slice. bfloat16 and
    float8 arrive as `ml_dtypes` dtypes. A view keeps its file open, also after the file has been replaced.

    Raises `ValueError` if the path holds no safetensors, a shard is missing, or a file is damaged or malformed.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory")
    if path.is_file():
        return _open_file(path)
    if (path / SINGLE_FILE).is_file():
        return _open_file(path / SINGLE_FILE)
    if (path / INDEX_FILE).is_file():
        return _open_shards(path)
    raise ValueError(_nothing_to_read(path))


def release(view: np.ndarray) -> None:
    """Lets go of the memory that reading a view of `open_tensors` took; other arrays are left alone.

    What is read again comes from the file again, so a model may be loaded that leaves no room for its files.
    """
    base: Any = view
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED") or not view.nbytes:
        return
    lowest, highest = byte_bounds(view)
    start = np.frombuffer(base, np.uint8, 1).ctypes.data
    first_page = (lowest - start) // mmap.PAGESIZE * mmap.PAGESIZE
    base.madvise(mmap.MADV_DONTNEED, first_page, highest - start - first_page)


def _nothing_to_read(directory: Path) -> str:
    if any(directory.glob("pytorch_model*.bin")):
        convert = f"AutoModelForCausalLM as M; d = {str(directory)!r}; M.from_pretrained(d).save_pretrained(d)"
        return (
            f"{directory} has only pickled weights (pytorch_model.bin), which are never loaded because unpickling runs "
            f'code; if you trust them, convert once: python -c "from transformers import {convert}"'
        )
    others = sorted(file.name for file in directory.glob("*.safetensors"))
    found = f"; it has {', '.join(others[:5])}, so name one file, or add the index" if others else ""
    return f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{found}"


def _open_shards(directory: Path) -> dict[str, np.ndarray]:
    index = directory / INDEX_FILE
    shard_of = _read_weight_map(index)
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(shard_of.values())):
        if not (directory / shard).is_file():
            raise ValueError(f"{index} names the shard {shard!r}, which is not there")
        found = _open_file(directory / shard)
        if twice := tensors.keys() & found.keys():
            raise ValueError(f"{directory}: tensor {min(twice)!r} is in {shard!r} and in another shard")
        if absent := {name for name, home in shard_of.items() if home == shard} - found.keys():
            raise ValueError(f"{index} places tensor {min(absent)!r} in {shard!r}, which does not have it")
        tensors |= found
    return tensors


def _read_weight_map(index: Path) -> dict[str, str]:
    content = _parse_json(index.read_bytes(), index)
    shard_of = content.get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise ValueError(f"{index}: 'weight_map' must map tensor names to file names")
    for name, shard in shard_of.items():
        if shard in ("", ".", "..") or any(character in shard for character in "/\\\0"):
            raise ValueError(
                f"{index}: the shard of {name!r} is {shard!r}, but must be a file name in the same directory"
            )
    return shard_of


def _open_file(path: Path) -> dict[str, np.ndarray]:
    """The views of one file, after its header has been checked against its size."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a .safetensors file; pickled weights (.bin, .pt, .pth) are never loaded")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"{path} is truncated or no safetensors file: it has {size} bytes and announces a header of {length} "
                f"(at most {MAX_HEADER_BYTES})"
            )
        header = _parse_json(file.read(length), path)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + length
    return {
        name: np.ndarray(entry.shape, entry.dtype, buffer=data, offset=start + entry.begin)
        for name, entry in _check_header(header, size - start, path).items()
    }


@dataclass(frozen=True)
class _Entry:
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int = 0  # bytes, from the end of the header

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.begin + self.nbytes


def _check_header(header: dict[str, Any], data_bytes: int, path: Path) -> dict[str, _Entry]:
    """The header's tensors, which fill the data exactly: in range, no overlap, no hole."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: '__metadata__' must map strings to strings")
    entries = {name: _check_entry(name, fields, path) for name, fields in header.items()}
    covered = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != covered:
            fault = "overlaps another" if entry.begin < covered else "leaves a hole before it"
            raise ValueError(f"{path}: tensor {name!r} at bytes [{entry.begin}, {entry.end}) {fault}")
        covered = entry.end
    if covered != data_bytes:
        fault = "is truncated" if covered > data_bytes else "has bytes that belong to no tensor"
        raise ValueError(f"{path} {fault}: its header describes {covered} bytes of data, and it has {data_bytes}")
    return entries


def _check_entry(name: str, fields: Any, path: Path) -> _Entry:
    """One tensor's dtype, shape and offsets, each of the right type and all three consistent."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype_name, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise ValueError(f"{where} has the unknown dtype {dtype_name!r}; known: {', '.join(DTYPES)}")
    # A dim beside a 0 is not bounded by the file, yet the product without zeros must fit an address for NumPy.
    if not _are_sizes(shape) or len(shape) > MAX_DIMS or math.prod(size for size in shape if size) > MAX_ELEMENTS:
        raise ValueError(f"{where} has a shape that is not a list of at most {MAX_DIMS} sizes that fit memory")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{where} has data_offsets that are not [begin, end]")
    begin, end = offsets
    entry = _Entry(DTYPES[dtype_name], tuple(shape), begin)
    if end != entry.end:
        raise ValueError(f"{where} spans {end - begin} bytes, but {dtype_name} of shape {shape} takes {entry.nbytes}")
    return entry


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)  # a bool is no size


def _parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    """A JSON object in which no key comes twice; `json` itself would silently keep the last."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            (name, times), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the name {name!r} comes {times} times")
        return mapping

    try:
        content = json.loads(raw.decode(), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged header or index: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged header or index: a JSON object is expected, not {type(content).__name__}")
    return content


def write_tensors(
    directory: str | Path,
    tensors: Mapping[str, ArrayLike],
    *,
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> None:
    """Write `tensors` as the weights of a Hugging Face model, in the layout of `save_pretrained`.

    One `model.safetensors`, or, above `max_shard_bytes`, `model-00001-of-0000N.safetensors` and an index. Each tensor
    is made a NumPy array when it is written and released after, so `Deferred` ones never exist together; they are made
    in the order of `tensors`, whatever their order in the files. `metadata` goes into each header; the default says
    what `transformers` wants to read there.

    Every byte is on disk under a temporary name before any weights already in `directory` are touched, which are then
    replaced; on an error they stay as they were. Tensors may be views of the very files that are replaced.

    Raises `ValueError` for a dtype or name that the format does not have, and `OSError` (a full disk) with one line.
    """
    # Imported here because reading, which is what most runs do, needs nothing of it.
    from huggingface_hub import split_state_dict_into_shards_factory

    assert tensors, "a model without tensors"
    directory = Path(directory)
    entries = {name: _entry_to_write(name, tensor) for name, tensor in tensors.items()}
    plan = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    total = {"total_parameters": sum(entry.size for entry in entries.values()), **plan.metadata}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as temporary:
            shards = {
                Path(temporary, file_name): {name: entries[name] for name in names}
                for file_name, names in plan.filename_to_tensors.items()
            }
            _write_files(shards, tensors, metadata)
            if plan.is_sharded:
                index = {"metadata": total, "weight_map": plan.tensor_to_filename}
                _write_index(Path(temporary, INDEX_FILE), index)
            _replace_weights(directory, Path(temporary))
    except OSError as error:
        size = plan.metadata["total_size"] / 1e9
        raise OSError(error.errno, f"cannot write {size:.3g} GB of weights to {directory}: {error.strerror}") from None


def _entry_to_write(name: str, tensor: ArrayLike) -> _Entry:
    dtype = np.dtype(tensor.dtype)
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"tensor {name!r} has dtype {dtype}, which safetensors lacks; it has {', '.join(DTYPES)}")
    if name == "__metadata__":
        raise ValueError("no tensor may be named '__metadata__': safetensors keeps that name for itself")
    return _Entry(dtype, tuple(tensor.shape))


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts that a `.safetensors` file, already opened by `open_tensors`, carries beside its tensors."""
    with Path(path).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return dict(header.get("__metadata__") or {})


def write_file(
    path: str | Path, tensors: Mapping[str, ArrayLike], *, metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Writes `tensors` as one `.safetensors` file, which appears complete or not at all, one tensor at a time, with
    texts beside them.

    Raises as `write_tensors` does.
    """
    path = Path(path)
    entries = {name: _entry_to_write(name, tensor) for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as temporary:
            unnamed = Path(temporary, path.name)
            _write_files({unnamed: entries}, tensors, {"format": "pt", **metadata})
            os.replace(unnamed, path)
    except OSError as error:
        size = sum(entry.nbytes for entry in entries.values()) / 1e9
        raise OSError(error.errno, f"cannot write {size:.3g} GB of weights to {path}: {error.strerror}") from None


def _write_files(
    files: Mapping[Path, Mapping[str, _Entry]], tensors: Mapping[str, ArrayLike], metadata: Mapping[str, str]
) -> None:
    """Headers first, then each tensor into its place, in the order in which `tensors` has them."""
    places = {name: (path, start) for path, entries in files.items() for name, start in _begin(path, entries, metadata)}
    entry_of = {name: entry for entries in files.values() for name, entry in entries.items()}
    for name, tensor in tensors.items():
        path, start = places[name]
        with path.open("r+b") as file:
            file.seek(start)
            file.write(_data_bytes(name, tensor, entry_of[name]))
    for path in files:
        with path.open("r+b") as file:
            _to_disk(file)


def _begin(path: Path, entries: Mapping[str, _Entry], metadata: Mapping[str, str]) -> list[tuple[str, int]]:
    """Writes a file's header; the names of its tensors and the bytes they begin at."""
    rank = {dtype: -place for place, dtype in enumerate(DTYPES.values())}
    order = sorted(entries, key=lambda name: (rank[entries[name].dtype], name))
    header = _header_bytes({name: entries[name] for name in order}, metadata)
    path.write_bytes(header)
    ends = itertools.accumulate((entries[name].nbytes for name in order), initial=len(header))
    return list(zip(order, ends, strict=False))


def _data_bytes(name: str, tensor: ArrayLike, entry: _Entry) -> np.ndarray:
    array = np.asarray(tensor)
    assert (array.shape, array.dtype) == (entry.shape, entry.dtype), name
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _header_bytes(entries: Mapping[str, _Entry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, entry in entries.items():
        offsets = (begin, begin + entry.nbytes)
        header[name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": offsets}
        begin += entry.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # the data starts aligned
    return len(raw).to_bytes(8, "little") + raw


def _write_index(path: Path, index: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(index, indent=2, sort_keys=True) + "\n")
        _to_disk(file)


def _to_disk(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _replace_weights(directory: Path, temporary: Path) -> None:
    """Move the files of `temporary` into `directory` and remove the weights that were there.

    Readers prefer `model.safetensors` to an index and need one of them, and both are single renames, so that at no
    moment the directory reads as a mixture. Only an index whose shards' names come again must go first.
    """
    old = {directory / SINGLE_FILE, directory / INDEX_FILE, *directory.glob(SHARD_FILES)}
    new = {path.name: path for path in temporary.iterdir()}
    targets = {directory / name for name in new}
    if any(path.match(SHARD_FILES) for path in old & targets):
        (directory / INDEX_FILE).unlink(missing_ok=True)
    for name in sorted(new):  # shards, then the index: "-" sorts before "."
        os.replace(new[name], directory / name)
    for path in old - targets:
        path.unlink(missing_ok=True)
