"""What an engine is asked for and what it answers: the types between it and whoever drives it.

Token ids only. A request's tokens depend on its prompt, its settings and its seed, and on no other request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np

Finish = Literal["stop", "length", "cancelled", "error"]
Pooling = Literal["mean", "last"]
POOLINGS: tuple[str, ...] = get_args(Pooling)


class Constraint(Protocol):
    """Which tokens may come next, as a grammar or a schema says. One object follows one request."""

    def allowed(self) -> np.ndarray:
        """bool [V]: the tokens that may come next."""
        ...

    def advance(self, token: int) -> None:
        """Takes note of the token that came."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to be continued, or to be made a vector of.

    prompt: ids, at least one. max_new_tokens: at least 1, or 0 where only `prompt_logprobs` are wanted, or a vector:
    `pooling` says whether it is the mean of the states after the final norm, or the last token's. Sampling settings are
    those of `infer.sampling`; seed None draws one. logit_bias: added to the logits of these ids. stop_ids end the
    continuation and are not part of it, but not before min_new_tokens. logprobs: how many of the likeliest tokens are
    told with each new token's own log-probability (0: its own alone); None: nothing is told. prompt_logprobs: the same
    for the tokens of the prompt. priority: the lower, the earlier. adapter: the name of a loaded one; None: the base
    model.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop_ids: Sequence[int] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    pooling: Pooling | None = None
    constraint: Constraint | None = None
    priority: int = 0
    adapter: str | None = None

    @property
    def asks_of_prompt(self) -> bool:
        """Whether what the layers make of the prompt is wanted itself, so that all of it must be read."""
        return self.prompt_logprobs is not None or self.pooling is not None


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities before penalties, temperature and filters: of the token itself (None for the
    first of a prompt), and of the likeliest ones, the best first."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Event:
    """What came of one request in one step of the engine. `finish` is None while it goes on; `error` says in one line
    what went wrong with this request alone. `cached_tokens` of its prompt were found in the prefix cache, told with
    its first event. `vector` float32 [D], of length 1, comes with the last event of a request with `pooling`."""

    request: int
    tokens: tuple[int, ...] = ()
    finish: Finish | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    cached_tokens: int = 0
    error: str | None = None
    vector: np.ndarray | None = None


class QueueFull(RuntimeError):
    """The engine holds as many waiting requests, or tokens of theirs, as it may; the request was not taken."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How large an engine is. What it allocates, and every program it compiles, follows from this alone.

    slots: requests decoded at a time. max_length: tokens of a prompt and its continuation at most; None: the model's
    context length. cache_tokens: what the paged cache holds of all requests and of the prefixes kept for later; None:
    slots * max_length. page_size: tokens of a page. prefill_chunk: tokens of a prompt that are read between two
    decoding steps, in pieces of prefill_piece, which stand at multiples of their size; a prefix is found in whole
    pieces. A larger chunk fills free slots sooner, and holds up longer those that make tokens. decode_steps: tokens of
    each request between two looks at the host. queue_requests, queue_tokens: what may wait. prefix_cache: whether
    prompts find what others have read. cache_dtype: None keeps keys and values as the model computes; int8, each
    token's of a head with a scale of their own, takes a quarter of float32 and half of bfloat16. adapters: how many may
    be loaded at a time, each of a rank up to adapter_rank. speculate: by what the next draft_tokens tokens are guessed,
    to be verified in one pass: by what followed the same tokens earlier in the text, by a draft model, or by the
    model's own modules for multi-token prediction; it changes no token, and takes the place of decode_steps.
    """

    slots: int = 8
    max_length: int | None = None
    cache_tokens: int | None = None
    page_size: int = 16
    prefill_chunk: int = 128
    prefill_piece: int = 64
    decode_steps: int = 4
    queue_requests: int = 256
    queue_tokens: int = 1_000_000
    prefix_cache: bool = True
    cache_dtype: Literal["int8"] | None = None
    adapters: int = 0
    adapter_rank: int = 16
    speculate: Literal["ngram", "draft", "mtp"] | None = None
    draft_tokens: int = 4


@dataclass(frozen=True)
class EngineStats:
    """Counts at this moment, and sums since the start. Pages: used + cached + free = total."""

    running: int
    waiting: int
    waiting_tokens: int
    pages_total: int
    pages_used: int
    pages_cached: int
    pages_free: int
    prompt_tokens: int
    cached_prompt_tokens: int
    new_tokens: int
    finished: int
    cancelled: int
    compilations_after_ready: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Driven(Protocol):
    """What drives an engine sees of it. `step` is called by one thread; the others may be called by any."""

    @property
    def adapters(self) -> Sequence[str]:
        """Names of the loaded adapters, which requests may ask for; they may come and go."""
        ...

    def submit(self, request: Request) -> int:
        """The number of the request, which waits from now on. ValueError for one that cannot be answered; QueueFull."""
        ...

    def cancel(self, request: int) -> None:
        """Ends a request, wherever it is; one last event tells so. A number that is over is no mistake."""
        ...

    def step(self) -> list[Event]:
        """Does a piece of work, if there is any; what came of it."""
        ...

    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        ...

    def stats(self) -> EngineStats: ...

    def warm_up(self) -> None:
        """Compiles, or loads from the compilation cache, all that will ever be run."""
        ...
