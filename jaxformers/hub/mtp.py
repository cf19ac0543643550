"""Modules for multi-token prediction in a checkpoint: whether they are there and wanted.

Only training uses them, and an engine that guesses by them, so all others leave them in the file. A `config.json` may
speak of modules that its checkpoint has not: `transformers` writes a model without them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

from jaxformers.families.common import LAYER, without_mtp
from jaxformers.hub.safetensors import ArrayLike
from jaxformers.models.config import ModelConfig

log = logging.getLogger(__name__)


class Chosen(NamedTuple):
    """What of a checkpoint is to be imported."""

    config: ModelConfig
    tensors: Mapping[str, ArrayLike]


def choose_modules(cfg: ModelConfig, tensors: Mapping[str, ArrayLike], *, mtp: bool) -> Chosen:
    """A checkpoint with its modules for multi-token prediction where `mtp` asks for them and it has some; else the
    model and the tensors without them. It is logged where they were asked for in vain; the `config.json` then still
    says what it did, to be written back as it was."""
    if not cfg.mtp_modules:
        return Chosen(cfg, tensors)
    layers = [LAYER.replace("{l}", str(cfg.num_layers + m)) for m in range(cfg.mtp_modules)]
    # Checkpoints of a bare base model leave out its name.
    prefixes = (*layers, *(layer.removeprefix("model.") for layer in layers))
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}
    if len(others) < len(tensors):
        return Chosen(cfg, tensors) if mtp else Chosen(without_mtp(cfg), others)
    if mtp:
        log.warning(
            "the checkpoint lacks the weights of its %d module(s) for multi-token prediction; it is used without them",
            cfg.mtp_modules,
        )
    return Chosen(cfg.replace(mtp_modules=0, source=cfg.source), tensors)
