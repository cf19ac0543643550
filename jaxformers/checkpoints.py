"""Models and checkpoints as files: compared, averaged, merged into one file, split again, cut for another mesh.

References are opened here as everywhere; what is done with them streams, a leaf or tensor at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType
from pydantic import ValidationError

from jaxformers.api import TOKENIZER_FOLDER, FoundModel, find_model, save_found
from jaxformers.config import RunConfig, dump_yaml, explain
from jaxformers.hub.average import average_leaves
from jaxformers.hub.convert import export_tensors
from jaxformers.hub.fp8 import open_weights
from jaxformers.hub.resolve import classify, resolve
from jaxformers.hub.safetensors import ArrayLike, Deferred, open_tensors, write_file, write_tensors
from jaxformers.models.config import ModelConfig
from jaxformers.models.params import Params
from jaxformers.parallel.mesh import AXES, MeshConfig
from jaxformers.starting import saved_model
from jaxformers.train.build import Trainer
from jaxformers.train.checkpoint import Checkpointer, CheckpointError
from jaxformers.train.integrity import find_damage
from jaxformers.train.reshard import reshard
from jaxformers.train.restore import check_fits
from jaxformers.train.shelf import find_checkpoints
from jaxformers.train.stored import named_leaves
from jaxformers.training import trainer_of

# What stands beside weights in a directory and is no part of the model's description.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf", ".*")
Done = Callable[[int], None]  # hears of bytes that are done


def tensors_of(ref: str | Path) -> Mapping[str, ArrayLike]:
    """The tensors of a reference of any kind by Hugging Face name, each read when its turn comes."""
    path = resolve(ref)
    kind = classify(path)
    if kind == "safetensors":
        return open_tensors(path)
    if kind == "huggingface":
        return open_weights(path)
    found = find_model(path, mtp=True)
    return found.tensors if found.tensors is not None else export_tensors(found.config, found.deferred_params())


def average(
    refs: Sequence[str],
    directory: Path,
    *,
    weights: Sequence[float],
    dtype: str | None = None,
    done: Done = lambda _bytes: None,
) -> None:
    """Writes the weighted sum of models of one architecture as a Hugging Face directory, computed in float32.

    weights: of each, as `average_weights` gives them. dtype: of what is written; None = float32. config and tokenizer
    are the first model's. `done` hears of the bytes of each averaged leaf.
    """
    check_free(directory)
    models = [find_model(ref, mtp=True) for ref in refs]
    for ref, model in zip(refs[1:], models[1:], strict=True):
        _check_alike(refs[0], models[0], ref, model)
    leaves = average_leaves([model.deferred_params() for model in models], weights)
    save_found(models[0], _counted(leaves, done), directory, dtype=dtype)


def _check_alike(ref: str, model: FoundModel, other_ref: str, other: FoundModel) -> None:
    a, b = model.config, other.config
    if names := a.differences(b):
        raise ValueError(f"{ref} and {other_ref} are not of one architecture: they differ in {', '.join(names)}")
    tokenizers = model.tokenizer, other.tokenizer
    if all(tokenizers) and tokenizers[0].fingerprint != tokenizers[1].fingerprint:  # type: ignore[union-attr]
        raise ValueError(f"{ref} and {other_ref} have different tokenizers; an average of them would mean nothing")


def merge(ref: str, out: Path, *, done: Done = lambda _bytes: None) -> None:
    """Writes the tensors of a reference into one file, bit for bit: `out` itself, if it ends in .safetensors, else
    model.safetensors in the directory `out`, with all that makes a model of it."""
    if out.suffix != ".safetensors":
        _write_directory(ref, out, max_shard_bytes=None, done=done)
        return
    if out.exists():
        raise ValueError(f"{out} exists; choose another name, or remove it first")
    write_file(out, _counted_tensors(_stored_tensors(ref), done))


def split(ref: str, directory: Path, *, max_shard_bytes: int, done: Done = lambda _bytes: None) -> None:
    """Writes a reference as a Hugging Face directory of files of at most `max_shard_bytes`, bit for bit."""
    _write_directory(ref, directory, max_shard_bytes=max_shard_bytes, done=done)


def _write_directory(ref: str, directory: Path, *, max_shard_bytes: int | None, done: Done) -> None:
    check_free(directory)
    path = resolve(ref)
    limit = 2**62 if max_shard_bytes is None else max_shard_bytes
    if classify(path) in ("huggingface", "safetensors"):
        write_tensors(directory, _counted_tensors(open_tensors(path), done), max_shard_bytes=limit)
        for file in _beside_weights(path) if path.is_dir() else ():
            shutil.copyfile(file, directory / file.name)
        return
    found = find_model(path, mtp=True)
    params = _counted(found.deferred_params(dtype=None), done)
    save_found(found, params, directory, max_shard_bytes=limit)


def _stored_tensors(ref: str) -> Mapping[str, ArrayLike]:
    """As `tensors_of`, but as they lie in the files: blocks of float8 and their scales stay what they are."""
    path = resolve(ref)
    return open_tensors(path) if classify(path) in ("huggingface", "safetensors") else tensors_of(path)


def _beside_weights(directory: Path) -> Iterator[Path]:
    for file in sorted(directory.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in _WEIGHTS):
            yield file


def check_free(directory: Path) -> None:
    """ValueError unless a directory may be made there, or is empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not an empty directory; choose another destination")


def _counted(params: Params, done: Done) -> Params:
    return jax.tree.map(lambda leaf: _counted_tensor(leaf, done), params)


def _counted_tensors(tensors: Mapping[str, ArrayLike], done: Done) -> dict[str, Deferred]:
    return {name: _counted_tensor(tensor, done) for name, tensor in tensors.items()}


def _counted_tensor(tensor: ArrayLike, done: Done) -> Deferred:
    """The same tensor, of which `done` hears when it is read."""

    def load() -> Any:
        read = tensor.__array__()
        done(read.nbytes)
        return read

    return Deferred(tensor.shape, tensor.dtype, load)


def reshard_checkpoint(
    ref: str, run: Path, mesh: MeshConfig, *, starts: Callable[[int], None], done: Done = lambda _bytes: None
) -> Path:
    """Writes a training checkpoint (or a run's newest) into the run directory `run` with the chunks of another mesh;
    its path there.

    No devices are needed. A new run directory gets the config, with that mesh, and the tokenizer too. `starts` hears
    of all bytes there will be. CheckpointError for one that is damaged, ValueError for a mesh it cannot have.
    """
    checkpoint = _one_checkpoint(ref)
    source = checkpoint.parent.parent
    with Checkpointer(source) as checkpoints:
        checkpoints.check(int(checkpoint.name))
        meta, stored = checkpoints.meta(int(checkpoint.name)), checkpoints.stored(int(checkpoint.name))
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    config = _config_of(meta, checkpoint, run, sizes)
    state = named_leaves(_trainer(config, saved_model(meta, checkpoint), sizes).plain_state)
    check_fits(stored, state, where=checkpoint)
    chunks = {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in state.items()}
    starts(sum(leaf.size * leaf.dtype.itemsize for leaf in state.values()))
    meta = {**meta, "config": config.model_dump(mode="json"), "mesh": sizes}
    is_new = not (run / "config.yaml").exists()
    written = reshard(checkpoint, run, chunks, meta=meta, done=done)
    if is_new:
        if (source / TOKENIZER_FOLDER).is_dir():
            shutil.copytree(source / TOKENIZER_FOLDER, run / TOKENIZER_FOLDER, dirs_exist_ok=True)
        (run / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    return written


def _one_checkpoint(ref: str) -> Path:
    found = find_checkpoints(ref)
    if not found:
        raise CheckpointError(f"{ref} has no checkpoint yet")
    if not found[-1].name.isdecimal():
        raise CheckpointError(f"{found[-1]} was set aside as damaged; name one that is whole")
    return next((path for path in reversed(found) if not find_damage(path)), found[-1])


def _config_of(meta: Mapping[str, Any], checkpoint: Path, run: Path, sizes: Mapping[str, int]) -> RunConfig:
    try:
        return RunConfig.model_validate({**meta["config"], "run_dir": str(run), "mesh": dict(sizes)})
    except ValidationError as error:
        raise CheckpointError(f"the config in {checkpoint} is of another version: {explain(error)}") from None


def _trainer(config: RunConfig, cfg: ModelConfig, sizes: Mapping[str, int]) -> Trainer:
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    # Where arrays wait has no part in their shape.
    runtime = config.runtime.model_copy(update={"offload": "none"})
    config = config.model_copy(update={"runtime": runtime})
    return trainer_of(config, cfg, mesh)  # type: ignore[arg-type]  # shapes and shardings need no devices
