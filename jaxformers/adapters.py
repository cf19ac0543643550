"""Adapters as users hold them: read from `peft`'s files or from a run's checkpoint, and written as `peft`'s files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxformers.families.common import untied
from jaxformers.hub.peft import PeftAdapter, attach, detach, fit_adapter, merged_model, read_adapter, write_adapter
from jaxformers.hub.resolve import resolve
from jaxformers.models.adapters import Adapter, adapted_spec, combine, is_adapted, partition, trainable
from jaxformers.models.config import ModelConfig
from jaxformers.models.params import Params, model_spec
from jaxformers.parallel.mesh import param_shardings
from jaxformers.train.checkpoint import Checkpointer
from jaxformers.train.config import LoRAConfig
from jaxformers.train.lora import make_adapter
from jaxformers.train.stored import StoredArray, named_leaves

if TYPE_CHECKING:
    from jaxformers.api import FoundModel


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter of a model `config`, in `peft`'s form or as a checkpoint's arrays."""

    source: PeftAdapter | SavedAdapter
    config: ModelConfig

    def attach(self, params: Params, *, ema: bool = False) -> Params:
        """The base's plain tree with `LoRA` leaves; ema: with the moving average of a run's adapter."""
        if isinstance(self.source, PeftAdapter):
            return attach(params, self.config, self.source)
        return self.source.attach(params, ema=ema)

    @property
    def merged_config(self) -> ModelConfig:
        """The architecture of both as one: an adapter of a tied embedding unties it."""
        return untied(self.config) if self.config.tie_embeddings and self._has_embedding else self.config

    @property
    def _has_embedding(self) -> bool:
        return "embed" in self.plan.leaves

    @property
    def plan(self) -> Adapter:
        """Which weights it is of."""
        return fit_adapter(self.source, self.config) if isinstance(self.source, PeftAdapter) else self.source.plan

    def in_peft_form(self, *, ema: bool = False) -> PeftAdapter:
        """As `peft` has it. ValueError for a module that it has no form for."""
        if isinstance(self.source, PeftAdapter):
            return self.source
        trained = self.source.read(ema=ema)
        return detach(trained, self.config, self.source.plan, rslora=self.source.rslora)


@dataclass(frozen=True)
class SavedAdapter:
    """The adapter in a checkpoint of a run."""

    plan: Adapter
    stored: Mapping[str, StoredArray]
    specs: Params
    rslora: bool

    def read(self, *, ema: bool = False) -> Params:
        """What the run trained, as NumPy arrays; None in place of all else."""
        group = "ema" if ema else "params"
        mask = trainable(self.specs, self.plan.biases)
        trained = partition(self.specs, mask)[0]
        arrays = [self.stored[f"{group}.{name}"].read() for name in named_leaves(trained)]
        return jax.tree.unflatten(jax.tree.structure(trained), arrays)

    def attach(self, params: Params, *, ema: bool = False) -> Params:
        """The base's plain tree with what the run trained."""
        scales = {name: found.scales for name, found in self.plan.leaves.items()}

        def with_base(path: Any, spec: Any, w: Any) -> Any:
            if not is_adapted(spec):
                return w
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            empty = jax.tree.map(lambda _: None, spec.replace(base=None))
            return empty.replace(base=w, scale=np.asarray(scales[name], np.float32))

        kept = jax.tree_util.tree_map_with_path(with_base, self.specs, params, is_leaf=is_adapted)
        return combine(self.read(ema=ema), kept)


def adapter_params(ref: str | Path, config: ModelConfig) -> Params:
    """An adapter in `peft`'s format as `Engine.add_adapter` takes it: a plain tree like this model's, of whose leaves
    only those with `LoRA` hold arrays. ValueError for one of another model, or that holds more than low ranks."""
    found = read_adapter(resolve(ref))
    if found.whole:
        raise ValueError(f"{ref} holds {next(iter(found.whole))} whole, which cannot be one of several; merge it")
    return attach(model_spec(config), config, found, where=ref)


def merged_on(mesh: Mesh, params: Params, cfg: ModelConfig) -> tuple[Params, ModelConfig]:
    """The model that a plain tree with adapters is as one, placed on the mesh, and its config."""
    merged = untied(cfg) if cfg.tie_embeddings and is_adapted(params["embed"]) else cfg
    places = param_shardings(model_spec(merged), mesh)
    return jax.jit(lambda p: merged_model(p, cfg)[0], out_shardings=places)(params), merged


def saved_adapter(run: Path, step: int, meta: Mapping[str, Any], cfg: ModelConfig) -> FoundAdapter:
    """The adapter in a run's checkpoint."""
    config, freeze = LoRAConfig(**meta["config"]["lora"]), meta["config"]["train"].get("freeze", ())
    config = config.model_copy(update={"base": "float32", "dropout": 0.0})
    plan = make_adapter(config, cfg, freeze=freeze)
    with Checkpointer(run) as checkpoints:
        stored = checkpoints.stored(step)
    return FoundAdapter(SavedAdapter(plan, stored, adapted_spec(cfg, plan), "rslora" in config.variants), cfg)


def save_adapter(found: FoundModel, directory: str | Path, *, ema: bool = False) -> str:
    """Writes the adapter of a model as a directory that `peft` opens; what it holds, in words. ValueError for a model
    without one, or for an adapter that `peft` has no form for."""
    if found.adapter is None or found.base is None:
        raise ValueError(f"{found.path} has no adapter")
    base = found.base
    adapter = replace(found.adapter.in_peft_form(ema=ema), base=found.base_ref, fingerprint=base.fingerprint)
    write_adapter(directory, adapter, base.config)
    if found.tokenizer is not None:
        found.tokenizer.save(Path(directory))
    count = sum(low.a.size + low.b.size for low in adapter.modules.values())
    return f"an adapter of {adapter.base}, {len(adapter.modules)} modules, {count:,} parameters"
