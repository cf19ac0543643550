"""A model as users hold it: read from any reference, written as a Hugging Face directory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxformers.data.gguf_tokenizer import gguf_tokenizer
from jaxformers.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from jaxformers.families import read_config
from jaxformers.families.common import without_mtp
from jaxformers.hub.convert import import_deferred, import_params
from jaxformers.hub.fp8 import open_weights
from jaxformers.hub.gguf import open_gguf
from jaxformers.hub.gguf_models import gguf_config, gguf_generation, gguf_tensors
from jaxformers.hub.mtp import choose_modules
from jaxformers.hub.pretrained import read_generation_config, write_pretrained
from jaxformers.hub.resolve import classify, resolve
from jaxformers.hub.safetensors import Deferred
from jaxformers.models.config import ModelConfig
from jaxformers.models.params import Params, model_spec
from jaxformers.parallel.mesh import MeshConfig, make_mesh, param_shardings, single_device_mesh
from jaxformers.starting import saved_model
from jaxformers.train.checkpoint import FOLDER, Checkpointer
from jaxformers.train.stored import named_leaves

DTYPES = ("float32", "bfloat16", "float16")
TOKENIZER_FOLDER = "tokenizer"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Model:
    """A model and all that goes with it.

    params is the plain tree of `model_spec(config)`, placed on the mesh. dtype is what it computes in. generation is
    its generation_config.json, empty where there is none.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    mesh: Mesh
    dtype: str = "float32"
    generation: dict[str, Any] = field(default_factory=dict)


def load(
    ref: str | Path,
    *,
    mesh: Mesh | MeshConfig | None = None,
    dtype: str | None = None,
    ema: bool = False,
    mtp: bool = False,
) -> Model:
    """The model that `ref` means: a Hugging Face directory, a `.gguf` file, a hub id, a run or one of its checkpoints.

    mesh: where its parameters are placed; None = the first device. dtype: of parameters and computation; None keeps the
    parameters as stored and computes in float32 on CPU, in bfloat16 elsewhere unless they are stored as float32. ema:
    the moving average of a run's parameters in place of the last ones. mtp: with the modules for multi-token
    prediction, if it has some, to be trained or written again; generation has no use for them.

    ValueError in one line for whatever keeps it from being loaded.
    """
    _check_dtype(dtype)
    found = find_model(ref, mtp=mtp)
    mesh = make_mesh(mesh) if isinstance(mesh, MeshConfig) else mesh or single_device_mesh()
    params = found.read_params(mesh, dtype=dtype, ema=ema)
    compute = dtype or _default_compute_dtype(params, mesh)
    return Model(found.config, params, found.tokenizer, mesh, compute, found.generation)


@dataclass(frozen=True)
class FoundModel:
    """A model whose weights have not been read yet. tensors are a checkpoint's, under Hugging Face names; step is a
    run's, and has_ema says whether it kept a moving average."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer | None
    generation: dict[str, Any]
    tensors: Mapping[str, Any] | None = None
    step: int | None = None
    has_ema: bool = False

    def read_params(self, mesh: Mesh, *, dtype: str | None = None, ema: bool = False) -> Params:
        """The parameters (or their moving average), each tensor straight into its place on the mesh; dtype None keeps
        them as stored."""
        if ema and not self.has_ema:
            raise ValueError(
                f"{self.path} holds no moving average; a run keeps one with train.ema_decay or train.average"
            )
        places = param_shardings(model_spec(self.config), mesh)
        with jax.set_mesh(mesh):
            if self.tensors is not None:
                return import_params(self.config, self.tensors, shardings=places, dtype=dtype)
            abstract = jax.tree.map(
                lambda spec, place: jax.ShapeDtypeStruct(spec.shape, dtype or np.float32, sharding=place),
                model_spec(self.config),
                places,
            )
            assert self.step is not None
            with Checkpointer(self.path) as checkpoints:
                return checkpoints.restore_params(self.step, abstract, ema=ema)

    def deferred_params(self, *, dtype: str | None = "float32") -> Params:
        """The parameters with `Deferred` leaves, each read into host memory when its turn comes; dtype None keeps a
        leaf as stored, or float32 where its tensors are stored in several dtypes."""
        if self.tensors is not None:
            return import_deferred(self.config, self.tensors, dtype=dtype)
        assert self.step is not None
        spec = model_spec(self.config)
        with Checkpointer(self.path) as checkpoints:
            stored = checkpoints.stored(self.step)
        wanted = {f"params.{name}": leaf for name, leaf in named_leaves(spec).items()}
        if missing := sorted(wanted.keys() - stored.keys()):
            raise ValueError(f"step {self.step} of {self.path} lacks {', '.join(missing)}")
        leaves = [Deferred(leaf.shape, np.dtype(np.float32), stored[name].read) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(spec), leaves)


def find_model(ref: str | Path, *, mtp: bool = False) -> FoundModel:
    """What `ref` means, told from everything but its weights, with or without modules for multi-token prediction.
    ValueError as `load` raises it."""
    path = resolve(ref)
    match classify(path):
        case "huggingface":
            generation = read_generation_config(path)
            config, tensors = choose_modules(read_config(path), open_weights(path), mtp=mtp)
            return FoundModel(path, config, _tokenizer_at(path), generation, tensors=tensors)
        case "gguf":
            return _find_gguf(path)
        case "run":
            return _find_run(path, None, mtp=mtp)
        case "checkpoint":
            return _find_run(path.absolute().parent.parent, int(path.absolute().name), mtp=mtp)
        case kind:
            raise ValueError(f"{ref} is a {kind} file, which cannot be loaded as a model; name its directory")


def _find_gguf(path: Path) -> FoundModel:
    """All of a model from one file."""
    file = open_gguf(path)
    config = gguf_config(file)
    tokenizer = gguf_tokenizer(file.metadata, origin=str(path))
    return FoundModel(path, config, tokenizer, gguf_generation(file), tensors=gguf_tensors(file))


def _find_run(run: Path, step: int | None, *, mtp: bool) -> FoundModel:
    """A run's checkpoint, the newest one unless a step is named."""
    with Checkpointer(run) as checkpoints:
        if step is not None:
            checkpoints.check(step)
        else:
            step = checkpoints.newest_good(_log.warning)
        if step is None:
            raise ValueError(f"{run} has no checkpoint yet")
        meta = checkpoints.meta(step)
        has_ema = any(name.startswith("ema.") for name in checkpoints.stored(step))
    tokenizer = _tokenizer_at(run / TOKENIZER_FOLDER)
    config = saved_model(meta, run / FOLDER / str(step))
    config = without_mtp(config) if config.mtp_modules and not mtp else config
    return FoundModel(run, config, tokenizer, meta.get("generation", {}), step=step, has_ema=has_ema)


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; it is one of {', '.join(DTYPES)}")


def _default_compute_dtype(params: Params, mesh: Mesh) -> str:
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return "float32" if on_cpu or params["embed"].dtype == np.float32 else "bfloat16"


def _tokenizer_at(path: Path) -> Tokenizer | None:
    """The tokenizer of a directory; None where there is none, as for weights alone."""
    return load_tokenizer(path) if has_tokenizer(path) else None


def save_pretrained(
    model: Model, directory: str | Path, *, dtype: str | None = None, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes a Hugging Face directory that `transformers` opens: weights, config, generation config, tokenizer.

    dtype: of the written weights; None keeps the parameters' own.
    """
    save_found(model, model.params, directory, dtype=dtype, max_shard_bytes=max_shard_bytes)


def save_found(
    model: Model | FoundModel,
    params: Params,
    directory: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """As `save_pretrained`, of these parameters, whose leaves may be `Deferred`."""
    _check_dtype(dtype)
    if model.tokenizer is not None:
        model.tokenizer.save(Path(directory))
    write_pretrained(
        directory, model.config, params, generation=model.generation, dtype=dtype, max_shard_bytes=max_shard_bytes
    )
