"""A request that has a slot, and what its progress is told as."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxformers.infer.engine.choosing import Logprobs
from jaxformers.infer.engine.pages import Digest
from jaxformers.infer.engine.queue import Waiting
from jaxformers.infer.engine.recent import Held
from jaxformers.infer.request import Event, Finish, Request, TokenLogprobs


@dataclass(eq=False)
class Running:
    """pages: all that it will ever need. recent: those of layers that look back only so far. digests: of its prompt's
    whole pieces. read: how many tokens of its prompt are in the cache, of which `cached` were found there. started:
    whether its slot makes tokens. made: how many came."""

    waited: Waiting
    slot: int
    pages: list[int]
    digests: list[Digest]
    read: int
    cached: int
    recent: Held = field(default_factory=dict)
    started: bool = False
    made: int = 0
    scored: list[TokenLogprobs] = field(default_factory=list)
    pooled: np.ndarray | float = 0.0
    _silent: bool = True

    @property
    def request(self) -> Request:
        return self.waited.request

    @property
    def number(self) -> int:
        return self.waited.number

    @property
    def end(self) -> int:
        """The position up to which its prompt is read: before its last token, which decoding begins with, unless its
        states are wanted."""
        return len(self.request.prompt) - (self.request.pooling is None)

    @property
    def is_read(self) -> bool:
        """Whether all of its prompt is in the cache that is read into it."""
        return self.read >= self.end

    def pooling_weights(self, size: int) -> np.ndarray:
        """float32 [size]: how much each token of the next piece counts in its vector."""
        places, length = self.read + np.arange(size), len(self.request.prompt)
        counts = places == length - 1 if self.request.pooling == "last" else (places < length) / length
        return counts.astype(np.float32)

    @property
    def position(self) -> int:
        """Where its newest token stands, once it makes some."""
        return len(self.request.prompt) - 1 + self.made

    def piece(self, size: int) -> np.ndarray:
        """The next so many tokens of its prompt that are not read yet: int32 [size], zeros behind the prompt's end."""
        tokens = np.zeros(size, np.int32)
        found = self.request.prompt[self.read : self.read + size]
        tokens[: len(found)] = found
        return tokens

    def finish_of(self, tokens: Sequence[int]) -> tuple[list[int], Finish | None]:
        """What of new tokens is told, and why the request is over with them, if it is."""
        stops, told = set(self.request.stop_ids), []
        for token in tokens:
            if token in stops:
                return told, "stop"
            told.append(int(token))
        return told, "length" if self.made + len(told) == self.request.max_new_tokens else None

    def event(
        self,
        tokens: Sequence[int] = (),
        finish: Finish | None = None,
        *,
        logprobs: tuple[TokenLogprobs, ...] | None = None,
        error: str | None = None,
    ) -> Event:
        """What came of it in this step; its first event tells of its prompt too."""
        first, self._silent = self._silent, False
        scored = None
        if first and self.is_read and self.request.prompt_logprobs is not None:
            scored = (TokenLogprobs(self.request.prompt[0], None, ()), *self.scored)
        cached = self.cached if first else 0
        vector = None
        if finish == "length" and self.request.pooling is not None:
            vector = np.asarray(self.pooled / max(np.linalg.norm(self.pooled), 1e-12), np.float32)
        return Event(self.number, tuple(tokens), finish, logprobs, scored, cached, error, vector)


def slots_of(runs: Iterable[Running], count: int) -> np.ndarray:
    """bool [count]: which of so many slots these have."""
    found = np.zeros(count, bool)
    found[[run.slot for run in runs]] = True
    return found


def told(tokens: Sequence[int], logprobs: Logprobs, top: int) -> tuple[TokenLogprobs, ...]:
    """Log-probabilities of tokens, of which `logprobs` are NumPy arrays [tokens, ...], with `top` likeliest ones."""
    rows = zip(tokens, logprobs.chosen, logprobs.top_ids, logprobs.top, strict=False)
    return tuple(
        TokenLogprobs(int(token), float(chosen), tuple(zip(ids[:top].tolist(), values[:top].tolist(), strict=True)))
        for token, chosen, ids, values in rows
    )
