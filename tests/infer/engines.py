"""Driving an engine to its end, and what came of each request, for tests of several modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxformers.infer.engine import Engine
from jaxformers.infer.request import Event, Finish, Request, TokenLogprobs


@dataclass
class Answer:
    """All events of one request joined."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    finish: Finish | None = None
    error: str | None = None
    cached_tokens: int = 0

    def take(self, event: Event) -> None:
        assert self.finish is None, "a request that is over tells no more"
        self.tokens += event.tokens
        self.logprobs += event.logprobs or ()
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
        self.cached_tokens += event.cached_tokens
        self.finish, self.error = event.finish, event.error


def answers(
    engine: Engine, requests: Sequence[Request], *, after_step: Callable[[int, list[int]], None] | None = None
) -> list[Answer]:
    """What comes of requests that all come at once. The engine's pages are audited after each step, and then
    `after_step(number of the step, numbers of the requests)` is called."""
    numbers = [engine.submit(request) for request in requests]
    found = {number: Answer() for number in numbers}
    steps = 0
    while engine.has_work():
        for event in engine.step():
            found[event.request].take(event)
        engine.pages.audit()
        steps += 1
        if after_step is not None:
            after_step(steps, numbers)
    return [found[number] for number in numbers]


def tokens_of(engine: Engine, *requests: Request) -> list[list[int]]:
    """The tokens of requests that all come at once."""
    return [answer.tokens for answer in answers(engine, requests)]
