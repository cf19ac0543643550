"""What a run's config asks for in place of training every weight, as the trainer is told of it."""

from __future__ import annotations

from collections.abc import Sequence

from jaxformers.hub.targets import Wish, plan_adapter
from jaxformers.models.adapters import Adapter
from jaxformers.models.config import ModelConfig
from jaxformers.train.config import LoRAConfig


def make_adapter(config: LoRAConfig, cfg: ModelConfig, *, freeze: Sequence[str] = ()) -> Adapter:
    """The adapters that a config means; modules that `freeze` means get none. ValueError for a config that cannot
    be."""
    wish = Wish(
        targets=config.targets,
        exclude=freeze,
        rank=config.rank,
        alpha=config.alpha,
        ranks=config.ranks,
        alphas=config.alphas,
        rslora="rslora" in config.variants,
        dora="dora" in config.variants,
        dropout=config.dropout,
        bias=config.bias,
        base=None if config.base == "float32" else config.base,
    )
    return plan_adapter(cfg, wish)
