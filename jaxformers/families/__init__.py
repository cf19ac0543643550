"""What a checkpoint means: `config.json` -> `ModelConfig`, tensor names -> leaves. Data, no arrays.

A family is a few lines of table in a module of its lineage; this one finds it by `model_type`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from jaxformers.families.catalog import published_config
from jaxformers.families.common import Family, Names
from jaxformers.families.keys import Keys
from jaxformers.families.quantization import block_size
from jaxformers.models.config import ModelConfig

# The modules of this package that hold families, one for each lineage.
LINEAGES = """
    llama arcee seed mistral mixtral qwen qwen_moe gemma gemma3 phi phi3 deepseek gpt_oss glm olmo granite cohere
    ernie hunyuan exaone dots minimax apertus smollm helium internlm3 nemotron stablelm starcoder bigcode falcon
    bloom mpt opt neox gptj gpt2 nanochat baichuan internlm qwen1 chatglm telechat telechat3 pangu
"""
FAMILIES: dict[str, Family] = {}
for lineage in LINEAGES.split():
    FAMILIES |= import_module(f"{__name__}.{lineage}").FAMILIES


def read_config(source: str | Path | Mapping[str, Any]) -> ModelConfig:
    """The architecture that a Hugging Face `config.json` describes: a directory holding one, the file, or its content.
    The name of a published size (`"qwen3-0.6b"`) stands for its file.

    ValueError names an unknown `model_type` (with those known), a missing or mistyped key, a value that is not
    implemented, and every key that would change the model but is not understood.
    """
    values = source if isinstance(source, Mapping) else _read_named(source)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not known; known are {', '.join(sorted(FAMILIES))}")
    block_size(values)
    # Weights are plain numbers once they are read, and are written as such.
    values = {key: value for key, value in values.items() if key != "quantization_config"}
    keys = Keys(values)
    cfg = FAMILIES[model_type].read(keys)
    keys.finish()
    return dataclasses.replace(cfg, source=values)


def scale_blocks(directory: str | Path) -> tuple[int, int] | None:
    """`quantization.block_size` of the checkpoint in a directory."""
    return block_size(_read_file(Path(directory)))


def names_of(cfg: ModelConfig) -> Names:
    """Where each weight of this architecture lives in its family's checkpoints."""
    return FAMILIES[cfg.family].names(cfg)


def _read_named(source: str | Path) -> dict[str, Any]:
    """The file at a path, or, for a bare name of nothing on disk, the config of that published size."""
    path = Path(source)
    is_name = isinstance(source, str) and path.name == source and path.suffix != ".json" and not path.exists()
    return published_config(source) if is_name else _read_file(path)


def _read_file(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not the mapping of a config.json")
    return values
