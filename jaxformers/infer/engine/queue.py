"""Requests that wait: the most urgent first, then the oldest, and never more than there is room for."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from jaxformers.infer.engine.adapters import Adapter
from jaxformers.infer.request import QueueFull, Request


@dataclass(order=True)
class Waiting:
    """A request by its number; a lower priority, then a lower number, comes first."""

    priority: int
    number: int
    request: Request = field(compare=False)
    seed: int = field(compare=False)
    adapter: Adapter | None = field(compare=False, default=None)


class Queue:
    """At most `requests` requests, and at most `tokens` tokens of prompts in all."""

    def __init__(self, requests: int, tokens: int):
        self._most_requests, self._most_tokens = requests, tokens
        self._heap: list[Waiting] = []
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Waiting]:
        """All that wait, in no order."""
        return iter(self._heap)

    def put(self, waiting: Waiting) -> None:
        """QueueFull where there is no room for it."""
        length = len(waiting.request.prompt)
        if len(self._heap) >= self._most_requests:
            raise QueueFull(f"{len(self._heap)} requests wait already, as many as may")
        if self.tokens + length > self._most_tokens:
            raise QueueFull(
                f"{self.tokens} tokens wait already; with {length} more, it would be over {self._most_tokens}"
            )
        heapq.heappush(self._heap, waiting)
        self.tokens += length

    def first(self) -> Waiting | None:
        """Whose turn it is."""
        return self._heap[0] if self._heap else None

    def remove(self, number: int) -> bool:
        """Takes a request out; whether it was there."""
        for i, waiting in enumerate(self._heap):
            if waiting.number == number:
                self.tokens -= len(waiting.request.prompt)
                self._heap[i] = self._heap[-1]
                self._heap.pop()
                heapq.heapify(self._heap)
                return True
        return False
