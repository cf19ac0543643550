"""One answer, whole or as server-sent events, to a client that may leave at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from jaxformers.infer.request import Event, Request
from jaxformers.serve.driver import Call, Closed, Driver
from jaxformers.serve.errors import ApiError, failed, timed_out

PING_SECONDS = 15.0  # a stream that is silent for so long says so, or proxies between would close it
CLIENT_LEFT = 499  # nginx's number, for the log alone
END = b"data: [DONE]\n\n"
_PING = b": still here\n\n"


class Answer(Protocol):
    """The form of one answer: it takes what the engine made, and says it in OpenAI's words."""

    def opening(self) -> list[dict[str, Any]]:
        """Chunks that begin a stream."""
        ...

    def take(self, index: int, event: Event) -> list[dict[str, Any]]:
        """What a stream is told of it."""
        ...

    def finish(self, index: int) -> str | None:
        """Why a continuation is over, if it is."""
        ...

    def closing(self) -> list[dict[str, Any]]:
        """Chunks that end a stream."""
        ...

    def whole(self) -> dict[str, Any]:
        """All of it in one body."""
        ...

    def summary(self) -> dict[str, Any]:
        """For the log."""
        ...


async def respond(
    http: HttpRequest, driver: Driver, requests: Sequence[Request], answer: Answer, *, stream: bool, seconds: float
) -> Response:
    """The answer to a body whose requests the engine takes now."""
    call = driver.submit(requests)
    if stream:
        return EventStream(call, answer, seconds)
    try:
        if not await is_answered(http, call, answer, seconds=seconds):
            return Response(status_code=CLIENT_LEFT)
    finally:
        http.state.summary = answer.summary()
    return JSONResponse(answer.whole())


async def is_answered(http: HttpRequest, call: Call, answer: Answer, *, seconds: float) -> bool:
    """Waits until the answer is whole; False where the client has left before. ApiError where it will not be."""
    try:
        async with while_connected(http.receive, call):
            async for _ in _chunks(call, answer, seconds):
                pass
    except Closed as closed:
        if closed.error is None:
            return False
        raise closed.error from None
    finally:
        call.close()
    return True


@contextlib.asynccontextmanager
async def while_connected(receive: Receive, call: Call) -> AsyncIterator[None]:
    """Closes the call at once when the client is gone."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        call.close()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


async def _chunks(call: Call, answer: Answer, seconds: float) -> AsyncIterator[list[dict[str, Any]]]:
    """Chunks of the answer as they come, none of them where nothing came for a while."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    going_on = set(range(len(call.requests)))
    while going_on:
        try:
            async with asyncio.timeout_at(min(deadline, loop.time() + PING_SECONDS)):
                news = await call.news()
        except TimeoutError:
            if loop.time() >= deadline:
                raise Closed(timed_out(seconds)) from None
            yield []
            continue
        chunks = []
        for index, event in news.items():
            if index in going_on:
                chunks += answer.take(index, event)
                _refuse_failure(event, call.requests[index])
                if reason := answer.finish(index):
                    call.end(index, reason)  # the engine may not know of stop strings
                    going_on.discard(index)
        if chunks:
            yield chunks


def _refuse_failure(event: Event, request: Request) -> None:
    """Raises `Closed` for a continuation that went wrong: by the form its client asked for, if it asked for one."""
    if event.finish in ("error", "cancelled"):
        why = event.error or "the engine gave this request up"
        raise Closed(failed(why) if request.constraint is None else ApiError(why, param="response_format"))


class EventStream(Response):
    """An answer as server-sent events; what the client has not taken yet is told in fewer, larger chunks."""

    media_type = "text/event-stream"

    def __init__(self, call: Call, answer: Answer, seconds: float):
        self._call, self._answer, self._seconds = call, answer, seconds
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with while_connected(receive, self._call):
                async for part in self._parts():
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        except Closed as closed:
            if closed.error is not None:
                await send({"type": "http.response.body", "body": _events([closed.error.body]), "more_body": True})
        finally:
            self._call.close()
            scope.setdefault("state", {})["summary"] = self._answer.summary()
        await send({"type": "http.response.body", "body": END})

    async def _parts(self) -> AsyncIterator[bytes]:
        yield _events(self._answer.opening())
        async for chunks in _chunks(self._call, self._answer, self._seconds):
            yield _events(chunks) or _PING
        yield _events(self._answer.closing())


def _events(chunks: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(b"data: " + _json(chunk) + b"\n\n" for chunk in chunks)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


async def read_body(http: HttpRequest, *, max_bytes: int, seconds: float) -> bytes:
    """The body of a request. ApiError: 415 where it is not called JSON, which keeps other sites' forms out; 413 where
    it is too large; 408 where it does not arrive in time."""
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError("Content-Type must be application/json", status=415)
    too_large = ApiError(f"the body is larger than {max_bytes} bytes", status=413, headers={"Connection": "close"})
    if http.headers.get("content-length", "0").isdigit() and int(http.headers.get("content-length", "0")) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in http.stream():
                body += part
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        message = f"the body did not arrive within {seconds:g} seconds"
        raise ApiError(message, status=408, headers={"Connection": "close"}) from None
    return bytes(body)
