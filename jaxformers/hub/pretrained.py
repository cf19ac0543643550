"""A model as a Hugging Face directory: `config.json`, `generation_config.json` and weights, in and out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from jaxformers.families import read_config
from jaxformers.families.common import without_mtp
from jaxformers.hub.convert import export_tensors, import_params
from jaxformers.hub.fp8 import open_weights
from jaxformers.hub.mtp import choose_modules
from jaxformers.hub.safetensors import Deferred, write_tensors
from jaxformers.models.config import ModelConfig
from jaxformers.models.params import Params

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Pretrained(NamedTuple):
    """A model read from a directory. `generation` is its generation_config.json, empty where there is none."""

    config: ModelConfig
    params: Params
    generation: dict[str, Any]


def read_pretrained(directory: str | Path, *, shardings: Any = None, dtype: Any = None) -> Pretrained:
    """Config and parameters of a Hugging Face directory. See `read_config` and `import_params` for arguments and
    errors.

    `shardings` may be a function of the config, for a caller that does not know it yet. Modules for multi-token
    prediction are read where the checkpoint has them.
    """
    directory = Path(directory)
    cfg, tensors = choose_modules(read_config(directory), open_weights(directory), mtp=True)
    places = shardings(cfg) if callable(shardings) else shardings
    params = import_params(cfg, tensors, shardings=places, dtype=dtype)
    return Pretrained(cfg, params, read_generation_config(directory))


def read_generation_config(directory: Path) -> dict[str, Any]:
    """generation_config.json, or the token ids of config.json where there is none."""
    path = directory / "generation_config.json"
    source = path if path.is_file() else directory / "config.json"
    try:
        values = json.loads(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{source} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source} holds {type(values).__name__}, not a mapping")
    return values if path.is_file() else {key: values[key] for key in TOKEN_IDS if values.get(key) is not None}


def write_pretrained(
    directory: str | Path,
    cfg: ModelConfig,
    params: Params,
    *,
    generation: Mapping[str, Any] | None = None,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory that `transformers` opens. The weights come first, so a directory with a config is complete.

    ValueError if the config was not read from a `config.json` (or was changed since), as there is then none to write
    back.
    """
    if cfg.source is None or not _is_from(cfg.source, cfg):
        raise ValueError("this ModelConfig has no config.json to export; make it with read_config({...})")
    directory = Path(directory)
    tensors = export_tensors(cfg, params, dtype=dtype)
    write_tensors(directory, tensors, max_shard_bytes=max_shard_bytes)
    values = {**cfg.source, "dtype": _main_dtype(tensors)}
    values.pop("torch_dtype", None)
    _write_json(directory / "config.json", values)
    if generation:
        _write_json(directory / "generation_config.json", generation)
    else:
        (directory / "generation_config.json").unlink(missing_ok=True)


def _is_from(source: Mapping[str, Any], cfg: ModelConfig) -> bool:
    """Whether a `config.json` means this model, or it and modules for multi-token prediction that its checkpoint
    lacked."""
    stated = read_config(source)
    return cfg in (stated, without_mtp(stated))


def _main_dtype(tensors: Mapping[str, Deferred]) -> str:
    """The dtype most weights have; a few may be kept in a wider one."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype.name] += prod(tensor.shape)
    return sizes.most_common(1)[0][0]


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
