"""What follows from an `EngineConfig` for one model: how large everything on the device is."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from jaxformers.infer.request import EngineConfig
from jaxformers.models.config import ModelConfig

# Keys of a slot that attention looks at together: more wastes time on short rows, fewer on the loop, which many slots
# make cheap.
KEY_BLOCK, KEY_BLOCK_OF_MANY = 64, 32
MANY_SLOTS = 16
FREE = (
    "prefix_cache",
    "queue_requests",
    "queue_tokens",
    "cache_dtype",
    "adapters",
    "speculate",
)  # fields that may be 0, or are no numbers
CACHE_DTYPES = (None, "int8")


@dataclass(frozen=True)
class Sizes:
    """pages: in all; width: pages of a slot at most, whole blocks of keys; block: keys of a block; max_length: tokens
    of a prompt and its continuation at most.

    window: how far those layers look back that do not look back all the way, the farthest-sighted of them.
    recent_pages: in all, for such layers; None where these would need no fewer than the others, and have the same.
    """

    slots: int
    page_size: int
    max_length: int
    pages: int
    width: int
    block: int
    window: int | None
    recent_pages: int | None
    cache_dtype: Literal["int8"] | None

    @classmethod
    def of(cls, config: EngineConfig, cfg: ModelConfig) -> Sizes:
        """ValueError for sizes that do not fit together, or the model."""
        _check(config)
        max_length = cfg.context_length if config.max_length is None else config.max_length
        if cfg.learned_positions and max_length > cfg.context_length:
            raise ValueError(f"max_length is {max_length}, but this model has positions up to {cfg.context_length}")
        size = config.page_size
        tokens = config.slots * _round_up(max_length, size) if config.cache_tokens is None else config.cache_tokens
        if tokens < size:
            raise ValueError(f"cache_tokens is {tokens}; it must hold a page of {size} tokens at least")
        keys = KEY_BLOCK if config.slots < MANY_SLOTS else KEY_BLOCK_OF_MANY
        block = min(max(size, keys // size * size), _round_up(max_length, size))
        window = max((kind.window for kind in cfg.layers if kind.window is not None), default=None)
        recent = None if window is None else _recent_tokens(config, window)
        return cls(
            slots=config.slots,
            page_size=size,
            max_length=max_length,
            pages=tokens // size,
            width=_round_up(max_length, block) // size,
            block=block,
            window=window,
            recent_pages=None if recent is None or recent >= tokens else recent // size,
            cache_dtype=config.cache_dtype,
        )

    def pool_dtype(self, dtype: Any) -> Any:
        """Of cached keys and values, where the model computes in `dtype`."""
        return dtype if self.cache_dtype is None else np.dtype(self.cache_dtype)


def _check(config: EngineConfig) -> None:
    for name in (field.name for field in fields(config) if field.name not in FREE):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    for name, unit in (("prefill_piece", "page_size"), ("prefill_chunk", "prefill_piece")):
        if getattr(config, name) % getattr(config, unit):
            told = f"{name} is {getattr(config, name)}, which is no multiple of {unit}"
            raise ValueError(f"{told}, {getattr(config, unit)}")
    if config.adapters < 0:
        raise ValueError(f"adapters is {config.adapters}; it must be at least 0")
    if config.cache_dtype not in CACHE_DTYPES:
        raise ValueError(f"cache_dtype is {config.cache_dtype!r}; it must be int8, or None for the model's own")


def _recent_tokens(config: EngineConfig, window: int) -> int:
    """Twice what all slots may look back at: a slot finds room whatever the others do, and what prompts have left
    behind can be found for a while."""
    piece = config.prefill_piece
    held = -(-(window - 1 + tokens_at_once(config)) // piece) + 1  # pieces at most that a slot's queries look at
    return 2 * config.slots * held * piece


def tokens_at_once(config: EngineConfig) -> int:
    """The tokens that a slot makes between two looks at the host, at most."""
    return config.decode_steps if config.speculate is None else config.draft_tokens + 1


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
