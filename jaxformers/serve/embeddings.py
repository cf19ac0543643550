"""`/v1/embeddings`: texts or ids, each as one vector of length 1, by the engine that answers all else.

So they wait in the same queue, are cancelled in the same way, and compile nothing of their own.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from jaxformers.infer.request import Event, Request
from jaxformers.serve.asking import encode_prompts, off_loop
from jaxformers.serve.driver import Driver
from jaxformers.serve.errors import ApiError, too_long
from jaxformers.serve.protocol import EmbeddingBody
from jaxformers.serve.respond import CLIENT_LEFT, is_answered
from jaxformers.serve.served import Served

AT_A_TIME = 64  # texts of one body in the engine's queue, which clients send more of than a queue may hold


async def embed(http: HttpRequest, body: EmbeddingBody, served: Served, driver: Driver, *, seconds: float) -> Response:
    """The vectors of a body's texts, or of its rows of ids."""
    adapter = served.adapter(body.model)
    if served.pooling is None:
        raise ApiError("this server makes no embeddings", status=404, code="model_not_found")
    prompts = await off_loop(encode_prompts, served, body.input)
    for prompt in prompts:
        if len(prompt) > served.max_length:
            raise too_long(prompt=len(prompt), wanted=0, max_length=served.max_length)
    requests = [Request(prompt=p, max_new_tokens=0, pooling=served.pooling, adapter=adapter) for p in prompts]
    loop, vectors = asyncio.get_running_loop(), []
    deadline = loop.time() + seconds
    for start in range(0, len(requests), AT_A_TIME):
        part = Vectors(requests[start : start + AT_A_TIME])
        if not await is_answered(http, driver.submit(part.requests), part, seconds=deadline - loop.time()):
            return Response(status_code=CLIENT_LEFT)
        vectors += part.found
        if body.dimensions not in (None, len(vectors[0])):
            message = f"dimensions is {body.dimensions}; this model's embeddings have {len(vectors[0])}"
            raise ApiError(message, param="dimensions")
    read = sum(map(len, prompts))
    usage = http.state.summary = {"prompt_tokens": read, "total_tokens": read}
    data = [{"object": "embedding", "index": i, "embedding": _spelled(v, body)} for i, v in enumerate(vectors)]
    return JSONResponse({"object": "list", "data": data, "model": body.model or served.name, "usage": usage})


def _spelled(vector: np.ndarray, body: EmbeddingBody) -> Any:
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


class Vectors:
    """Some of the vectors as they come; see `respond.Answer`, of which no stream is made."""

    def __init__(self, requests: Sequence[Request]):
        self.requests = requests
        self._vectors: list[np.ndarray | None] = [None] * len(requests)

    @property
    def found(self) -> list[np.ndarray]:
        assert all(vector is not None for vector in self._vectors)
        return self._vectors

    def take(self, index: int, event: Event) -> list[dict[str, Any]]:
        self._vectors[index] = event.vector
        return []

    def finish(self, index: int) -> str | None:
        return None if self._vectors[index] is None else "length"
