"""What a client is told when its request is not answered: OpenAI's error bodies and status codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

RETRY_SECONDS = 1  # what a client is asked to wait; a place in the queue frees within seconds
SHOWN = 300  # characters of a message, which may quote what the client sent


class ApiError(Exception):
    """An answer that is an error. `kind` is OpenAI's `type`; `param` is the field of the body at fault."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message = " ".join(message.split())
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        message = self.message if len(self.message) <= SHOWN else f"{self.message[:SHOWN]}..."
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def _retry_later(message: str, status: int, *, kind: str, code: str) -> ApiError:
    return ApiError(message, status=status, kind=kind, code=code, headers={"Retry-After": str(RETRY_SECONDS)})


def overloaded() -> ApiError:
    """The queue is full."""
    message = "the server has as many requests as it may hold; try again later"
    return _retry_later(message, 429, kind="rate_limit_error", code="rate_limit_exceeded")


def unavailable(why: str) -> ApiError:
    """The server is warming up, draining or broken."""
    return _retry_later(why, 503, kind="server_error", code="service_unavailable")


def timed_out(seconds: float) -> ApiError:
    """A request took longer than the server allows."""
    message = f"the request took longer than {seconds:g} seconds and was given up"
    return ApiError(message, status=504, kind="server_error", code="timeout")


def failed(why: str) -> ApiError:
    """A fault of ours."""
    return ApiError(why, status=500, kind="server_error", code="internal_error")


def too_long(*, prompt: int, wanted: int, max_length: int) -> ApiError:
    """A prompt and its continuation have more tokens than the server holds of one request."""
    message = (
        f"This model's maximum context length is {max_length} tokens. However, you requested {prompt + wanted} tokens "
        f"({prompt} in the prompt, {wanted} in the completion). Please reduce the length of the prompt or completion."
    )
    param = "prompt" if prompt >= max_length else "max_tokens"
    return ApiError(message, param=param, code="context_length_exceeded")
