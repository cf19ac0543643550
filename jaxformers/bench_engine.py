"""How an engine answers under load: requests that arrive at random, or as soon as others are over.

Weights and tokens are random: speed does not depend on them. Times are in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxformers.infer.engine import Engine
from jaxformers.infer.request import Event, Request


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of an engine. Lengths are in tokens.

    rate: requests a second that arrive on average, at random moments whatever became of earlier ones (a Poisson
    process: an open loop). None: `concurrency` requests at any time, a new one as soon as one is over (a closed loop).
    spread: by which part of itself a length varies, both ways. shared: tokens that all prompts begin with.
    """

    requests: int = 64
    rate: float | None = None
    concurrency: int = 8
    prompt_tokens: int = 128
    new_tokens: int = 64
    spread: float = 0.5
    shared: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("requests", "concurrency", "prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"rate is {self.rate}; it must be above 0 requests a second")
        if not 0 <= self.spread < 1:
            raise ValueError(f"spread is {self.spread}; it must be from 0 to below 1")
        if not 0 <= self.shared < self.prompt_tokens:
            raise ValueError(f"shared is {self.shared}; it must be from 0 to below prompt_tokens, {self.prompt_tokens}")

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and continuation that may come."""
        return int(self.prompt_tokens * (1 + self.spread)) + int(self.new_tokens * (1 + self.spread)) + 2

    def draw(self, vocab_size: int) -> Iterator[tuple[float, Request]]:
        """When each request arrives (0 in a closed loop), and what it asks for."""
        draw, at = np.random.default_rng(self.seed), 0.0
        shared = draw.integers(vocab_size, size=self.shared).tolist()
        for _ in range(self.requests):
            at += 0.0 if self.rate is None else draw.exponential(1 / self.rate)
            factors = draw.uniform(1 - self.spread, 1 + self.spread, size=2)
            length, new = (max(1, round(n)) for n in factors * (self.prompt_tokens, self.new_tokens))
            own = draw.integers(vocab_size, size=max(1, length - self.shared)).tolist()
            yield at, Request(prompt=shared + own, max_new_tokens=new, temperature=0.0)


@dataclass(frozen=True)
class Quantiles:
    """Seconds, over all requests or tokens."""

    median: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        return cls(*np.quantile(values, (0.5, 0.9, 0.99)).tolist()) if values else cls(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class EngineReport:
    """What came of a load. first_token and whole: from a request's arrival on. between_tokens: the time between two
    pieces of a continuation, over the tokens of the later one. hit_rate: the part of all prompts' tokens that was found
    in the prefix cache. drafted_tokens were guessed, of which accepted_tokens came."""

    requests: int
    seconds: float
    new_tokens: int
    tokens_per_second: float
    prompt_tokens_per_second: float
    first_token: Quantiles
    between_tokens: Quantiles
    whole: Quantiles
    hit_rate: float
    compilations: int
    warm_up: float
    drafted_tokens: int
    accepted_tokens: int


@dataclass
class _Watched:
    """A request under way: when it arrived and was last heard of."""

    arrived: float
    heard: float | None = None


@dataclass
class _Times:
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    def take(self, event: Event, watched: _Watched, now: float) -> None:
        if event.tokens and watched.heard is None:
            self.first.append(now - watched.arrived)
        elif event.tokens and watched.heard is not None:
            self.between += [(now - watched.heard) / len(event.tokens)] * len(event.tokens)
        if event.tokens:
            watched.heard = now
        if event.finish:
            self.whole.append(now - watched.arrived)


def bench_engine(engine: Engine, load: Load) -> EngineReport:
    """Puts a load on an engine that nobody else uses, after it was warmed up."""
    start = time.perf_counter()
    engine.warm_up()
    warm_up, before = time.perf_counter() - start, engine.stats()
    times, watched = _Times(), dict[int, _Watched]()
    coming = list(load.draw(engine.vocab_size))[::-1]
    start = time.perf_counter()
    while coming or watched:
        now = time.perf_counter() - start
        while coming and (coming[-1][0] <= now if load.rate else len(watched) < load.concurrency):
            at, request = coming.pop()
            watched[engine.submit(request)] = _Watched(at if load.rate else now)
        if not watched:
            time.sleep(max(0.0, coming[-1][0] - now))
            continue
        events, now = engine.step(), time.perf_counter() - start
        for event in events:
            times.take(event, watched[event.request], now)
            if event.finish:
                del watched[event.request]
    seconds, after = time.perf_counter() - start, engine.stats()
    new, read = after.new_tokens - before.new_tokens, after.prompt_tokens - before.prompt_tokens
    return EngineReport(
        requests=load.requests,
        seconds=seconds,
        new_tokens=new,
        tokens_per_second=new / seconds,
        prompt_tokens_per_second=read / seconds,
        first_token=Quantiles.of(times.first),
        between_tokens=Quantiles.of(times.between),
        whole=Quantiles.of(times.whole),
        hit_rate=(after.cached_prompt_tokens - before.cached_prompt_tokens) / read,
        compilations=after.compilations_after_ready,
        warm_up=warm_up,
        drafted_tokens=after.drafted_tokens - before.drafted_tokens,
        accepted_tokens=after.accepted_tokens - before.accepted_tokens,
    )
