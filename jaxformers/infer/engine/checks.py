"""What an engine refuses, each in one line that names the value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral

import numpy as np

from jaxformers.infer.engine.choosing import TOP
from jaxformers.infer.engine.state import KNOBS
from jaxformers.infer.request import EngineConfig, Request
from jaxformers.infer.sampling import SamplingParams
from jaxformers.models.config import ModelConfig

UNBOUNDED = ("prefix_cache", "speculate", "queue_requests", "queue_tokens")  # settings that may be anything here
KEY_BLOCK = 128  # keys that attention looks at together: more wastes time on short rows, fewer on the loop


@dataclass(frozen=True)
class Sizes:
    """What follows from an `EngineConfig` for one model. width: pages of a slot at most, whole blocks of keys; block:
    keys of a block; pages: in all; max_length: tokens of a prompt and its continuation at most."""

    max_length: int
    pages: int
    width: int
    block: int

    @classmethod
    def of(cls, config: EngineConfig, cfg: ModelConfig) -> Sizes:
        """ValueError for sizes that do not fit together, or the model."""
        for name in (field.name for field in fields(config)):
            value = getattr(config, name)
            if name not in UNBOUNDED and value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name, unit in (("prefill_piece", "page_size"), ("prefill_chunk", "prefill_piece")):
            if getattr(config, name) % getattr(config, unit):
                told = f"{name} is {getattr(config, name)}, which is no multiple of {unit}"
                raise ValueError(f"{told}, {getattr(config, unit)}")
        max_length = cfg.context_length if config.max_length is None else config.max_length
        if cfg.learned_positions and max_length > cfg.context_length:
            raise ValueError(f"max_length is {max_length}, but this model has positions up to {cfg.context_length}")
        size = config.page_size
        tokens = config.slots * _round_up(max_length, size) if config.cache_tokens is None else config.cache_tokens
        if tokens < size:
            raise ValueError(f"cache_tokens is {tokens}; it must hold a page of {size} tokens at least")
        block = min(max(size, KEY_BLOCK // size * size), _round_up(max_length, size))
        return cls(max_length, tokens // size, _round_up(max_length, block) // size, block)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def check_request(request: Request, cfg: ModelConfig, config: EngineConfig, sizes: Sizes) -> None:
    """ValueError for a request that this engine could never answer."""
    _check_ids("prompt", request.prompt, cfg.vocab_size)
    if not len(request.prompt):
        raise ValueError("the prompt has no tokens; a model continues at least one, such as its BOS token")
    _check_budget(request, config, sizes)
    SamplingParams.create(1, **{name: getattr(request, name) for name in KNOBS})
    if request.seed is not None and not (isinstance(request.seed, Integral) and 0 <= request.seed < 2**32):
        raise ValueError(f"seed is {request.seed!r}; it must be an integer from 0 to 2**32 - 1")
    _check_ids("logit_bias", list(request.logit_bias), cfg.vocab_size)
    for token, value in request.logit_bias.items():
        if not math.isfinite(value):
            raise ValueError(f"logit_bias of {token} is {value}; it must be finite")
    _check_ids("stop_ids", request.stop_ids, cfg.vocab_size)
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(request, name)
        if value is not None and not 0 <= value <= TOP:
            raise ValueError(f"{name} is {value}; it must be from 0 to {TOP}")
    if request.adapter is not None:
        raise ValueError(f"there is no adapter {request.adapter!r}; none is loaded")


def _check_budget(request: Request, config: EngineConfig, sizes: Sizes) -> None:
    length, new = len(request.prompt), request.max_new_tokens
    for name in ("max_new_tokens", "min_new_tokens"):
        if not isinstance(getattr(request, name), Integral):
            raise ValueError(f"{name} is {getattr(request, name)!r}; it must be an integer")
    if new < 0 or (new == 0 and request.prompt_logprobs is None):
        raise ValueError(f"max_new_tokens is {new}; it must be at least 1, or 0 where prompt_logprobs are wanted")
    if not 0 <= request.min_new_tokens <= new:
        raise ValueError(f"min_new_tokens is {request.min_new_tokens}; it must be from 0 to max_new_tokens, {new}")
    if length + new > sizes.max_length:
        told = f"a prompt of {length} tokens and {new} new ones are {length + new} together"
        raise ValueError(f"{told}; this engine's max_length is {sizes.max_length}")
    if (needed := pages_needed(request, config.page_size)) > sizes.pages:
        raise ValueError(f"a prompt of {length} tokens and {new} new ones need {needed} pages of {sizes.pages}")


def pages_needed(request: Request, page_size: int) -> int:
    """Pages that hold a request to its end: all its tokens but the last, which nothing is computed from."""
    return -(-max(len(request.prompt) + request.max_new_tokens - 1, 1) // page_size)


def _check_ids(what: str, ids: Sequence[int], vocab_size: int) -> None:
    array = np.asarray(ids)
    if array.size and not (array.ndim == 1 and np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{what} must be token ids, integers from 0 to {vocab_size - 1}")
    for foreign in array[(array < 0) | (array >= vocab_size)][:1] if array.size else ():
        raise ValueError(f"{what} has the id {foreign}, but the model's ids are 0 to {vocab_size - 1}")
