"""A model as users hold it: read from any reference, written as a Hugging Face directory.

What reads runs and adapters comes with the libraries that train and save, which take most of a second to import: it is
imported where it is needed, as most references are neither.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxformers.data.gguf_tokenizer import gguf_tokenizer
from jaxformers.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from jaxformers.families import read_config
from jaxformers.families.common import without_mtp
from jaxformers.hub.convert import import_deferred, import_params
from jaxformers.hub.decoding import decoding_shapes, import_decoding
from jaxformers.hub.fingerprint import fingerprint
from jaxformers.hub.fp8 import open_weights
from jaxformers.hub.gguf import open_gguf
from jaxformers.hub.gguf_models import gguf_config, gguf_generation, gguf_tensors
from jaxformers.hub.layout import LeafPath, parts
from jaxformers.hub.mtp import choose_modules
from jaxformers.hub.peft import fit_adapter, merged_model, read_adapter, stack_adapters
from jaxformers.hub.pretrained import read_generation_config, write_pretrained
from jaxformers.hub.resolve import classify, resolve
from jaxformers.hub.safetensors import Deferred
from jaxformers.infer.generate import Prepared, decode_runtime, prepare_model
from jaxformers.models.adapters import spec_like
from jaxformers.models.config import ModelConfig
from jaxformers.models.params import Params, model_spec
from jaxformers.parallel.mesh import MeshConfig, make_mesh, param_shardings, replicated, single_device_mesh

if TYPE_CHECKING:
    from jaxformers.adapters import FoundAdapter

DTYPES = ("float32", "bfloat16", "float16")
CPU_DTYPE = "float32"  # computes as fast there as any other, or faster
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
    adapter: str | Path | Sequence[str | Path] = (),
    adapter_weights: Sequence[float] | None = None,
) -> Model:
    """The model that `ref` means: a Hugging Face directory, a `.gguf` file, a hub id, a run or one of its checkpoints,
    or an adapter, which is merged into the model that it names as its base.

    mesh: where its parameters are placed; None = the first device. dtype: of parameters and computation; None keeps the
    parameters as stored and computes in float32 on CPU, in bfloat16 elsewhere unless they are stored as float32. ema:
    the moving average of a run's parameters in place of the last ones. mtp: with the modules for multi-token
    prediction, if it has some: to be trained, written again, or for an engine to guess by (`speculate="mtp"`). adapter:
    one or several in peft's format, whose sum (with `adapter_weights`, 1 each by default) is added to the weights.

    ValueError in one line for whatever keeps it from being loaded.
    """
    found = find_to_load(ref, dtype=dtype, adapter=adapter, adapter_weights=adapter_weights, mtp=mtp)
    mesh = make_mesh(mesh) if isinstance(mesh, MeshConfig) else mesh or single_device_mesh()
    params = found.read_params(mesh, dtype=dtype, ema=ema)
    compute = dtype or _default_compute_dtype(params, mesh)
    return Model(found.config, params, found.tokenizer, mesh, compute, found.generation)


def load_to_generate(
    ref: str | Path,
    *,
    dtype: str | None = None,
    ema: bool = False,
    adapter: str | Path | Sequence[str | Path] = (),
    adapter_weights: Sequence[float] | None = None,
) -> Model:
    """The model as `load` gives it on the first device, but with its parameters in the layout that generating runs
    from, which nothing but generating takes: loaded sooner, and in memory once."""
    found = find_to_load(ref, dtype=dtype, adapter=adapter, adapter_weights=adapter_weights)
    return found.load_to_generate(dtype=dtype, ema=ema)


def find_to_load(
    ref: str | Path,
    *,
    dtype: str | None = None,
    adapter: str | Path | Sequence[str | Path] = (),
    adapter_weights: Sequence[float] | None = None,
    mtp: bool = False,
) -> FoundModel:
    """What `load` loads with these arguments. ValueError for a dtype that no model can have, and as `find_model`."""
    _check_dtype(dtype)
    adapters = [adapter] if isinstance(adapter, (str, Path)) else list(adapter)
    return find_model(ref, mtp=mtp, adapters=adapters, adapter_weights=adapter_weights)


@dataclass(frozen=True)
class FoundModel:
    """A model whose weights have not been read yet. tensors are a checkpoint's, under Hugging Face names; step is a
    run's, and has_ema says whether it kept a moving average. Or it is a base with an adapter; config is then that of
    both as one."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer | None
    generation: dict[str, Any]
    tensors: Mapping[str, Any] | None = None
    step: int | None = None
    has_ema: bool = False
    base: FoundModel | None = None
    base_ref: str | None = None
    adapter: FoundAdapter | None = None

    @property
    def fingerprint(self) -> str:
        """Of the weights, to tell this model from others with the same architecture."""
        if self.tensors is None:
            from jaxformers.train.stored import named_leaves

            return fingerprint(named_leaves(self.deferred_params()))
        # Without modules for multi-token prediction, which not every reader asks for.
        own = {part.source.name for part in parts(without_mtp(self.config))}
        return fingerprint({name: tensor for name, tensor in self.tensors.items() if name in own} or self.tensors)

    def read_params(
        self,
        mesh: Mesh,
        *,
        dtype: str | None = None,
        ema: bool = False,
        keep: Callable[[LeafPath, jax.Array], Any] | None = None,
    ) -> Params:
        """The parameters (or their moving average), each tensor straight into its place on the mesh; dtype None keeps
        them as stored. keep: as for `import_params`, where the parameters come from a checkpoint of tensors; others are
        read first, and kept then.
        """
        if ema and not self.has_ema:
            raise ValueError(
                f"{self.path} holds no moving average; a run keeps one with train.ema_decay or train.average"
            )
        places = param_shardings(model_spec(self.config), mesh)
        if self.base is not None:
            with jax.set_mesh(mesh):
                adapted = self.read_adapted(mesh, dtype=dtype, ema=ema)
                merged = jax.jit(lambda p: merged_model(p, self.base.config)[0], out_shardings=places)(adapted)
                return merged if keep is None else jax.tree_util.tree_map_with_path(keep, merged)
        with jax.set_mesh(mesh):
            if self.tensors is not None:
                return import_params(self.config, self.tensors, shardings=places, dtype=dtype, keep=keep)
            abstract = jax.tree.map(
                lambda spec, place: jax.ShapeDtypeStruct(spec.shape, dtype or np.float32, sharding=place),
                model_spec(self.config),
                places,
            )
            assert self.step is not None
            from jaxformers.train.checkpoint import Checkpointer

            with Checkpointer(self.path) as checkpoints:
                restored = checkpoints.restore_params(self.step, abstract, ema=ema)
            return restored if keep is None else jax.tree_util.tree_map_with_path(keep, restored)

    def read_decoding(self, mesh: Mesh, *, dtype: str | None = None, ema: bool = False) -> tuple[Params, str]:
        """The parameters in the layout that decoding runs from, and the dtype that it computes in; None as for `load`.
        The plain tree is let go of, or on one CPU not made at all."""
        if self._is_read_at_once(mesh) and not ema:
            compute, place = dtype or CPU_DTYPE, replicated(mesh)
            with jax.set_mesh(mesh):
                return import_decoding(self.config, self.tensors, dtype=compute, place=place, stored=dtype), compute
        params = self.read_params(mesh, dtype=dtype, ema=ema)
        compute = dtype or _default_compute_dtype(params, mesh)
        return prepare_model(params, self.config, mesh, dtype=compute).params, compute

    def load_to_generate(self, *, dtype: str | None = None, ema: bool = False) -> Model:
        """As the function of this name."""
        mesh = single_device_mesh()
        params, compute = self.read_decoding(mesh, dtype=dtype, ema=ema)
        return Model(self.config, params, self.tokenizer, mesh, compute, self.generation)

    def foreseen(self, mesh: Mesh, *, dtype: str | None = None) -> Prepared | None:
        """What `read_decoding` will return, with leaves that have a shape and a place and no numbers; None where it
        cannot be told."""
        if not self._is_read_at_once(mesh):
            return None
        compute = jnp.dtype(dtype or CPU_DTYPE)
        shapes = decoding_shapes(self.config, self.tensors, dtype=compute, place=replicated(mesh), stored=dtype)
        return Prepared(shapes, self.config, decode_runtime(mesh, compute))

    def _is_read_at_once(self, mesh: Mesh) -> bool:
        return self.tensors is not None and not self.config.mtp_modules and mesh.size == 1 and _on_cpu(mesh)

    def read_adapted(self, mesh: Mesh, *, dtype: str | None = None, ema: bool = False) -> Params:
        """The base's parameters with the adapter beside them, as `LoRA` leaves."""
        assert self.base is not None
        assert self.adapter is not None
        params = self.adapter.attach(self.base.read_params(mesh, dtype=dtype), ema=ema)
        places = param_shardings(jax.tree.map(spec_like, model_spec(self.base.config), params), mesh)
        return jax.device_put(params, places)

    def deferred_params(self, *, dtype: str | None = "float32") -> Params:
        """The parameters with `Deferred` leaves, each read into host memory when its turn comes; dtype None keeps a
        leaf as stored, or float32 where its tensors are stored in several dtypes."""
        if self.tensors is not None:
            return import_deferred(self.config, self.tensors, dtype=dtype)
        if self.base is not None and self.adapter is not None:
            return merged_model(self.adapter.attach(self.base.deferred_params(dtype=dtype)), self.base.config)[0]
        from jaxformers.train.checkpoint import Checkpointer
        from jaxformers.train.stored import named_leaves

        assert self.step is not None
        spec = model_spec(self.config)
        with Checkpointer(self.path) as checkpoints:
            stored = checkpoints.stored(self.step)
        wanted = {f"params.{name}": leaf for name, leaf in named_leaves(spec).items()}
        if missing := sorted(wanted.keys() - stored.keys()):
            raise ValueError(f"step {self.step} of {self.path} lacks {', '.join(missing)}")
        leaves = [Deferred(leaf.shape, np.dtype(np.float32), stored[name].read) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(spec), leaves)


def find_model(
    ref: str | Path,
    *,
    mtp: bool = False,
    adapters: Sequence[str | Path] = (),
    adapter_weights: Sequence[float] | None = None,
) -> FoundModel:
    """What `ref` means, told from everything but its weights, with or without modules for multi-token prediction, and
    with what adapters add to it. ValueError as `load` raises it."""
    found = _find_model(ref, mtp=mtp)
    return _with_adapters(found, adapters, adapter_weights) if adapters else found


def _find_model(ref: str | Path, *, mtp: bool) -> FoundModel:
    path = resolve(ref)
    match classify(path):
        case "adapter":
            return _with_adapters(_base_of(path, read_adapter(path).base, mtp=mtp), [path], None)
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


def _base_of(adapter: Path, base: str | None, *, mtp: bool = False) -> FoundModel:
    """The model that an adapter, or a run of one, was trained on."""
    if not base:
        raise ValueError(f"{adapter} does not say which model it is of; name that model, and this one as its adapter")
    try:
        return _find_model(base, mtp=mtp)
    except ValueError as error:
        raise ValueError(f"the base of {adapter} cannot be opened: {error}") from None


def _with_adapters(base: FoundModel, refs: Sequence[str | Path], weights: Sequence[float] | None) -> FoundModel:
    from jaxformers.adapters import FoundAdapter

    weights = [1.0] * len(refs) if weights is None else weights
    if len(weights) != len(refs):
        raise ValueError(f"there are {len(refs)} adapters and {len(weights)} weights for them; give each one")
    paths = [resolve(ref) for ref in refs]
    for path in paths:
        if classify(path) != "adapter":
            raise ValueError(f"{path} is of the kind {classify(path)}, not an adapter (adapter_config.json)")
    read = [read_adapter(path) for path in paths]
    for path, adapter in zip(paths, read, strict=True):
        fit_adapter(adapter, base.config, where=path)
        _check_base(path, adapter.fingerprint, base)
    adapter = FoundAdapter(stack_adapters(read, weights), base.config)
    return replace(
        base,
        base=base,
        base_ref=read[0].base or str(base.path),
        tensors=None,
        step=None,
        has_ema=False,
        config=adapter.merged_config,
        adapter=adapter,
    )


def _check_base(path: Path, expected: str | None, base: FoundModel) -> None:
    if expected is not None and (found := base.fingerprint) != expected:
        raise ValueError(
            f"{path} is an adapter of another base: its weights have the fingerprint {expected}, those of {base.path} "
            f"{found}"
        )


def _find_gguf(path: Path) -> FoundModel:
    """All of a model from one file."""
    file = open_gguf(path)
    config = gguf_config(file)
    tokenizer = gguf_tokenizer(file.metadata, origin=str(path))
    return FoundModel(path, config, tokenizer, gguf_generation(file), tensors=gguf_tensors(file))


def _find_run(run: Path, step: int | None, *, mtp: bool) -> FoundModel:
    """A run's checkpoint, the newest one unless a step is named."""
    from jaxformers.starting import saved_model
    from jaxformers.train.checkpoint import FOLDER, Checkpointer

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
    if meta["config"].get("lora") is not None:
        return _find_adapter_run(run, step, meta, tokenizer, mtp=mtp, has_ema=has_ema)
    config = saved_model(meta, run / FOLDER / str(step))
    config = without_mtp(config) if config.mtp_modules and not mtp else config
    return FoundModel(run, config, tokenizer, meta.get("generation", {}), step=step, has_ema=has_ema)


def _find_adapter_run(
    run: Path, step: int, meta: Mapping[str, Any], tokenizer: Tokenizer | None, *, mtp: bool, has_ema: bool
) -> FoundModel:
    """The base of a run that trained an adapter, with the adapter of one of its checkpoints."""
    from jaxformers.adapters import saved_adapter

    base = _base_of(run, meta["base"]["ref"], mtp=mtp)
    _check_base(run, meta["base"]["fingerprint"], base)
    adapter = saved_adapter(run, step, meta, base.config)
    return FoundModel(
        run,
        adapter.merged_config,
        tokenizer,
        meta.get("generation", {}),
        step=step,
        has_ema=has_ema,
        base_ref=meta["base"]["ref"],
        base=base,
        adapter=adapter,
    )


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; it is one of {', '.join(DTYPES)}")


def _default_compute_dtype(params: Params, mesh: Mesh) -> str:
    return CPU_DTYPE if _on_cpu(mesh) or params["embed"].dtype == np.float32 else "bfloat16"


def _on_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


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
