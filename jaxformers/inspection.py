"""What a reference holds, told without loading its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxformers.api import TOKENIZER_FOLDER, find_model
from jaxformers.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from jaxformers.families import read_config
from jaxformers.hub.gguf import open_gguf
from jaxformers.hub.peft import read_adapter
from jaxformers.hub.resolve import classify, resolve
from jaxformers.hub.safetensors import open_tensors
from jaxformers.models.config import LayerKind, ModelConfig, plan_stacks
from jaxformers.models.params import count_params
from jaxformers.starting import saved_model
from jaxformers.train.checkpoint import FOLDER, Checkpointer
from jaxformers.train.monitor import METRICS_FILE
from jaxformers.train.restore import groups_of


def describe(ref: str | Path) -> dict[str, str]:
    """Names and values for people. ValueError as `load` raises it."""
    path = resolve(ref).absolute()
    kind = classify(path)
    found = {"path": str(path), "kind": kind}
    if kind == "safetensors":
        return found | _weights(path)
    if kind == "gguf":
        return found | _gguf(path)
    if kind == "adapter":
        return found | _adapter(path)
    if kind == "huggingface":
        return found | _model(read_config(path)) | _tokenizer(path) | _weights(path)
    run = path if kind == "run" else path.parent.parent
    with Checkpointer(run) as checkpoints:
        step = checkpoints.latest_step if kind == "run" else int(path.name)
        if step is None:
            return found | {"checkpoints": "none yet"}
        meta, groups, steps = checkpoints.meta(step), groups_of(checkpoints.stored(step)), checkpoints.steps
    found |= _model(saved_model(meta, run / FOLDER / str(step))) | _tokenizer(run / TOKENIZER_FOLDER)
    mesh = ", ".join(f"{axis}={size}" for axis, size in meta["mesh"].items() if size > 1) or "one device"
    found |= {"step": str(step), "checkpoints": ", ".join(map(str, steps)), "trained on": mesh}
    return found | {"saved": ", ".join(groups)} | _provenance(meta) | _metrics(run)


def _adapter(path: Path) -> dict[str, str]:
    adapter = read_adapter(path)
    ranks = sorted({low.a.shape[0] for low in adapter.modules.values()})
    count = sum(low.a.size + low.b.size for low in adapter.modules.values())
    kinds = sorted({name.rpartition(".")[2] for name in adapter.modules})
    return {
        "base": adapter.base or "unknown",
        "adapter": f"{len(adapter.modules)} modules ({', '.join(kinds)}), rank {', '.join(map(str, ranks))}",
        "parameters": f"{count:,}",
    }


def _provenance(meta: Mapping[str, Any]) -> dict[str, str]:
    """What a checkpoint says of the tokenizer it was trained with and the libraries that wrote it."""
    source = f" ({meta['tokenizer_from']})" if "tokenizer_from" in meta else ""
    versions = ", ".join(f"{name} {version}" for name, version in meta.get("versions", {}).items())
    return {"tokenizer hash": meta["tokenizer"] + source, "written with": versions or "unknown versions"}


def _model(cfg: ModelConfig) -> dict[str, str]:
    total, active = count_params(cfg), count_params(cfg, active=True)
    return {
        "model type": cfg.family,
        "parameters": f"{total:,}" + (f" ({active:,} active)" if active != total else ""),
        "vocabulary": f"{cfg.vocab_size:,}" + (", tied" if cfg.tie_embeddings else ""),
        "width": f"{cfg.d_model}, {cfg.num_heads} heads ({cfg.num_kv_heads} of keys and values) of {cfg.head_dim}",
        "context": f"{cfg.context_length:,}",
        "layers": " + ".join(
            f"{stack.repeats} x ({', '.join(map(_kind, stack.pattern))})" for stack in plan_stacks(cfg.layers)
        ),
    }


def _kind(kind: LayerKind) -> str:
    window = f" window {kind.window}" if kind.window else ""
    return f"{kind.mixer}{window} {kind.ffn}"


def _tokenizer(path: Path) -> dict[str, str]:
    return _described(load_tokenizer(path) if has_tokenizer(path) else None)


def _described(tokenizer: Tokenizer | None) -> dict[str, str]:
    if tokenizer is None:
        return {"tokenizer": "none"}
    return {"tokenizer": f"{tokenizer.vocab_size:,} ids, end of text {tokenizer.eos_id}"}


def _gguf(path: Path) -> dict[str, str]:
    file, found = open_gguf(path), find_model(path)
    types = ", ".join(f"{count} {name}" for name, count in file.stored.items())
    weights = {"weights": f"{len(file.tensors)} tensors, {file.nbytes / 1e9:.2f} GB: {types}"}
    return _model(found.config) | _described(found.tokenizer) | weights


def _weights(path: Path) -> dict[str, str]:
    tensors = open_tensors(path)
    dtypes = ", ".join(sorted({str(t.dtype) for t in tensors.values()}))
    return {"weights": f"{len(tensors)} tensors, {sum(t.nbytes for t in tensors.values()) / 1e9:.2f} GB of {dtypes}"}


def _metrics(run: Path) -> dict[str, str]:
    """The last loss and validation loss that the run wrote."""
    path = run / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    last: dict[str, str] = {}
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue  # a line cut short by a kill
        last |= {
            name.replace("_", " "): f"{values[name]:.4f}" for name in ("loss", "validation_loss") if values.get(name)
        }
    return last
