"""What an engine refuses, each in one line that names the value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from jaxformers.infer.engine.choosing import TOP
from jaxformers.infer.engine.sizes import Sizes
from jaxformers.infer.engine.state import KNOBS
from jaxformers.infer.request import POOLINGS, EngineConfig, Request
from jaxformers.infer.sampling import SamplingParams
from jaxformers.models.config import ModelConfig

MOST_BIAS = 1e9  # either way: far more than any logit, and no sum of such numbers overflows float32


def check_request(request: Request, cfg: ModelConfig, config: EngineConfig, sizes: Sizes) -> None:
    """ValueError for a request that this engine could never answer."""
    _check_ids("prompt", request.prompt, cfg.vocab_size)
    if not len(request.prompt):
        raise ValueError("the prompt has no tokens; a model continues at least one, such as its BOS token")
    _check_budget(request, config, sizes)
    for name in KNOBS:
        if not _is_number(value := getattr(request, name)):
            raise ValueError(f"{name} is {value!r}; it must be a number")
    SamplingParams.create(1, **{name: getattr(request, name) for name in KNOBS})
    if not isinstance(request.priority, Integral):
        raise ValueError(f"priority is {request.priority!r}; it must be an integer")
    if request.seed is not None and not (isinstance(request.seed, Integral) and 0 <= request.seed < 2**32):
        raise ValueError(f"seed is {request.seed!r}; it must be an integer from 0 to 2**32 - 1")
    _check_ids("logit_bias", list(request.logit_bias), cfg.vocab_size)
    for token, value in request.logit_bias.items():
        if not (_is_number(value) and -MOST_BIAS <= value <= MOST_BIAS):
            raise ValueError(f"logit_bias of {token} is {value}; it must be a number from -1e9 to 1e9")
    _check_ids("stop_ids", request.stop_ids, cfg.vocab_size)
    if request.min_new_tokens and len({*request.stop_ids}) == cfg.vocab_size:
        told = "but stop_ids are all ids that the model has"
        raise ValueError(f"min_new_tokens is {request.min_new_tokens}, {told}, so that none can come before them")
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(request, name)
        if value is not None and not (isinstance(value, Integral) and 0 <= value <= TOP):
            raise ValueError(f"{name} is {value!r}; it must be an integer from 0 to {TOP}")


def _check_budget(request: Request, config: EngineConfig, sizes: Sizes) -> None:
    length, new = len(request.prompt), request.max_new_tokens
    for name in ("max_new_tokens", "min_new_tokens"):
        if not isinstance(getattr(request, name), Integral):
            raise ValueError(f"{name} is {getattr(request, name)!r}; it must be an integer")
    if request.pooling is not None and request.pooling not in POOLINGS:
        raise ValueError(f"pooling is {request.pooling!r}; it must be one of {', '.join(POOLINGS)}")
    if request.pooling is not None and (new or request.prompt_logprobs is not None):
        raise ValueError(f"max_new_tokens is {new}; with pooling it must be 0, and nothing else can be asked for")
    if new < 0 or (new == 0 and not request.asks_of_prompt):
        wanted = "prompt_logprobs or pooling are wanted"
        raise ValueError(f"max_new_tokens is {new}; it must be at least 1, or 0 where {wanted}")
    if not 0 <= request.min_new_tokens <= new:
        raise ValueError(f"min_new_tokens is {request.min_new_tokens}; it must be from 0 to max_new_tokens, {new}")
    if length + new > sizes.max_length:
        told = f"a prompt of {length} tokens and {new} new ones are {length + new} together"
        raise ValueError(f"{told}; this engine's max_length is {sizes.max_length}")
    if (needed := pages_needed(request, config.page_size)) > sizes.pages:
        raise ValueError(f"a prompt of {length} tokens and {new} new ones need {needed} pages of {sizes.pages}")


def pages_needed(request: Request, page_size: int) -> int:
    """Pages that hold a request to its end: all its tokens but the last, which nothing is computed from unless its
    state is wanted."""
    last = request.pooling is None
    return -(-max(len(request.prompt) + request.max_new_tokens - last, 1) // page_size)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_ids(what: str, ids: Sequence[int], vocab_size: int) -> None:
    array = np.asarray(ids)
    if array.size and not (array.ndim == 1 and np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{what} must be token ids, integers from 0 to {vocab_size - 1}")
    for foreign in array[(array < 0) | (array >= vocab_size)][:1] if array.size else ():
        raise ValueError(f"{what} has the id {foreign}, but the model's ids are 0 to {vocab_size - 1}")
