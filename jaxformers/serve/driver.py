"""The engine in a thread of its own, and the event loop that its clients are served from.

The thread does nothing but step the engine; each step's events cross to the loop in one call. There they wait, merged,
until the client's own task takes them: a reader that is slow holds back neither the engine nor another reader, and
what waits for it is bounded by what it asked for. Knows nothing of HTTP or text.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from jaxformers.infer.request import Driven, Event, QueueFull, Request
from jaxformers.serve.errors import ApiError, failed, overloaded, unavailable

_log = logging.getLogger(__name__)
AT_ONCE = 32  # events of a continuation that a reader takes in one turn: a few milliseconds of work
IDLE_SECONDS = 1.0  # a sleeping thread looks around this often, should a wake-up ever be lost


@dataclass
class Trace:
    """When one continuation came along, in seconds of `time.perf_counter`, and how much of it there is."""

    submitted: float
    prompt_tokens: int
    first: float | None = None
    last: float | None = None
    tokens: int = 0


class Observer(Protocol):
    """Who is told of every continuation, for metrics."""

    def progressed(self, trace: Trace, new_tokens: int, at: float) -> None:
        """`new_tokens` came at a moment; the trace is as it was before them."""
        ...

    def ended(self, trace: Trace, reason: str, at: float) -> None: ...

    def refused(self) -> None:
        """The queue was full."""
        ...


class Closed(Exception):
    """A call was closed, by its client's leaving or by the server; `error` is what the client is told, if it is there
    to hear."""

    def __init__(self, error: ApiError | None):
        super().__init__()
        self.error = error


class Call:
    """The continuations that one HTTP request asked for, and what came of them that was not taken yet.

    For the event loop's thread alone.
    """

    def __init__(self, driver: Driver, requests: Sequence[Request]):
        now = time.perf_counter()
        self.requests = requests
        self.traces = [Trace(now, len(request.prompt)) for request in requests]
        self.numbers: list[int] = []
        self._driver = driver
        self._waiting: dict[int, list[Event]] = {}
        self._news = asyncio.Event()
        self._closed: Closed | None = None

    async def news(self) -> dict[int, Event]:
        """What came of each continuation, by its index, since the last time; waits until there is something.

        Raises `Closed` once the call is closed. A reader far behind catches up in parts, between which others have
        their turn.
        """
        if self._behind:
            await asyncio.sleep(0)
        await self._news.wait()
        if self._closed is not None:
            raise self._closed
        self._news.clear()
        waiting = self._waiting
        self._waiting = {index: events[AT_ONCE:] for index, events in waiting.items() if len(events) > AT_ONCE}
        if self._behind:
            self._news.set()
        return {index: merged(events[:AT_ONCE]) for index, events in waiting.items()}

    @property
    def _behind(self) -> bool:
        return bool(self._waiting)

    def end(self, index: int, reason: str) -> None:
        """Ends one continuation, which its reader has enough of."""
        self._driver.end(self.numbers[index], reason)

    def close(self, error: ApiError | None = None) -> None:
        """Ends whatever goes on; from then on there is no more news."""
        if self._closed is None:
            self._closed = Closed(error)
        for number in self.numbers:
            self._driver.end(number, "abort")
        self._news.set()

    def receive(self, index: int, event: Event) -> None:
        self._waiting.setdefault(index, []).append(event)
        self._news.set()


def merged(events: Sequence[Event]) -> Event:
    """The events of one request, in order, as one."""
    if len(events) == 1:
        return events[0]
    logprobs = [entry for event in events for entry in event.logprobs or ()]
    return replace(
        events[-1],
        tokens=tuple(token for event in events for token in event.tokens),
        logprobs=tuple(logprobs) if any(event.logprobs is not None for event in events) else None,
        prompt_logprobs=next((event.prompt_logprobs for event in events if event.prompt_logprobs is not None), None),
        cached_tokens=max(event.cached_tokens for event in events),
    )


class Driver:
    """Steps an engine as long as there is work, and brings each event to the call it belongs to.

    `start` and everything after it belong to the event loop's thread. The engine's numbers of requests are told to no
    one else.
    """

    def __init__(self, engine: Driven, observer: Observer):
        self.engine = engine
        self.ready = asyncio.Event()
        self.broken = asyncio.Event()
        self.failure: BaseException | None = None
        self._observer = observer
        self._open: dict[int, tuple[Call, int]] = {}
        self._draining = False
        self._stopped = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def refusal(self) -> str | None:
        """Why no request is taken now, if so."""
        if self.failure is not None:
            return "the engine has failed"
        if self._draining:
            return "the server is shutting down"
        return None if self.ready.is_set() else "the model is warming up"

    def submit(self, requests: Sequence[Request]) -> Call:
        """All of the requests, or none, wait from now on.

        ApiError: 400 for one that the engine cannot answer, 429 where its queue is full, 503 where it takes none.
        """
        if self.refusal:
            raise unavailable(self.refusal)
        call = Call(self, requests)
        try:
            for index, request in enumerate(requests):
                number = self.engine.submit(request)
                call.numbers.append(number)
                self._open[number] = call, index
        except (ValueError, QueueFull) as error:
            call.close()
            if isinstance(error, QueueFull):
                self._observer.refused()
                raise overloaded() from None
            raise ApiError(str(error)) from None
        self._wake.set()
        return call

    def end(self, number: int, reason: str) -> None:
        """Ends a request that goes on; one that is over is no mistake."""
        if (entry := self._open.pop(number, None)) is not None:
            call, index = entry
            self.engine.cancel(number)
            self._wake.set()
            self._observer.ended(call.traces[index], reason, time.perf_counter())

    def drain(self, seconds: float) -> None:
        """Takes no more requests, and ends after `seconds` what still goes on."""
        if not self._draining:
            self._draining = True
            asyncio.get_running_loop().call_later(seconds, self._close_all, unavailable("the server is shutting down"))

    def stop(self) -> None:
        """Ends everything, and waits for the step that is under way."""
        self._close_all(unavailable("the server is shutting down"))
        self._stopped = True
        self._wake.set()
        self._thread.join(timeout=10)

    def _close_all(self, error: ApiError) -> None:
        for call in {id(call): call for call, _ in self._open.values()}.values():
            call.close(error)

    def _run(self) -> None:
        """The engine's thread."""
        try:
            self.engine.warm_up()
            self._tell(self.ready.set)
            while not self._stopped:
                self._wake.clear()
                if not self.engine.has_work():
                    self._wake.wait(IDLE_SECONDS)
                elif events := self.engine.step():
                    self._tell(self._deliver, events, time.perf_counter())
        except BaseException as error:  # whatever it is, those who wait must hear of it
            _log.exception("the engine has failed")
            self._tell(self._fail, error)

    def _tell(self, *callback_and_arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(*callback_and_arguments)
        except RuntimeError:  # the loop is closed: nobody listens
            self._stopped = True

    def _deliver(self, events: Sequence[Event], at: float) -> None:
        for event in events:
            if (entry := self._open.get(event.request)) is None:
                continue  # its reader has enough of it
            call, index = entry
            self._note(call.traces[index], event, at)
            if event.finish is not None:
                del self._open[event.request]
            call.receive(index, event)

    def _note(self, trace: Trace, event: Event, at: float) -> None:
        if event.tokens:
            self._observer.progressed(trace, len(event.tokens), at)
            trace.first = at if trace.first is None else trace.first
            trace.last = at
            trace.tokens += len(event.tokens)
        if event.finish is not None:
            self._observer.ended(trace, event.finish, at)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self.broken.set()
        self._close_all(failed("the engine has failed"))
