"""The routes, and what stands around each of them: limits, errors, keys, log.

A POST answers a body of one kind; whatever goes wrong on the way is told in OpenAI's error bodies.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from jaxformers.serve.asking import check_ids, encode_text, off_loop, render_messages
from jaxformers.serve.chat import converse
from jaxformers.serve.completions import complete
from jaxformers.serve.driver import Driver
from jaxformers.serve.embeddings import embed
from jaxformers.serve.errors import ApiError, failed, unavailable
from jaxformers.serve.log import AccessLog
from jaxformers.serve.metrics import Metrics
from jaxformers.serve.protocol import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    TokenizeBody,
    parse_body,
)
from jaxformers.serve.respond import CLIENT_LEFT, read_body
from jaxformers.serve.security import Guard
from jaxformers.serve.served import Served, Settings


class Server:
    """What all routes share."""

    def __init__(self, served: Served, settings: Settings):
        self.served, self.settings = served, settings
        self.metrics = Metrics(served.engine.stats, model=served.name, names=settings.metrics_names)
        self.driver = Driver(served.engine, self.metrics)

    async def complete(self, http: HttpRequest, body: CompletionBody) -> Response:
        seconds = self.settings.limits.request_seconds
        return await complete(http, body, self.served, self.driver, seconds=seconds)

    async def chat(self, http: HttpRequest, body: ChatBody) -> Response:
        seconds = self.settings.limits.request_seconds
        return await converse(http, body, self.served, self.driver, seconds=seconds)

    async def embed(self, http: HttpRequest, body: EmbeddingBody) -> Response:
        seconds = self.settings.limits.request_seconds
        return await embed(http, body, self.served, self.driver, seconds=seconds)

    async def tokenize(self, http: HttpRequest, body: TokenizeBody) -> Response:
        self.served.adapter(body.model)
        if body.messages is None:
            assert body.prompt is not None
            add = body.add_special_tokens
            ids = await off_loop(encode_text, self.served, body.prompt, add_special_tokens=add)
        else:
            effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
            rendered = await off_loop(
                render_messages,
                self.served,
                body.messages,
                tools=body.tools,
                add_generation_prompt=body.add_generation_prompt,
                variables=body.chat_template_kwargs | effort,
            )
            ids = rendered.ids
        return JSONResponse({"count": len(ids), "max_model_len": self.served.max_length, "tokens": ids})

    async def detokenize(self, http: HttpRequest, body: DetokenizeBody) -> Response:
        self.served.adapter(body.model)
        ids = check_ids(self.served, body.tokens, param="tokens")
        text = await off_loop(self.served.tokenizer.decode, ids, skip_special_tokens=False)
        return JSONResponse({"prompt": text})

    async def models(self, http: HttpRequest) -> Response:
        cards = [self._card(name) for name in (self.served.name, *self.served.adapters)]
        return JSONResponse({"object": "list", "data": cards})

    async def model(self, http: HttpRequest) -> Response:
        name = http.path_params["name"]
        self.served.adapter(name)
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.served.created,
            "owned_by": "jaxformers",
            "root": self.served.name,
            "max_model_len": self.served.max_length,
        }

    async def health(self, http: HttpRequest) -> Response:
        """Whether the process is of any use; a model that warms up is."""
        if self.driver.failure is not None:
            raise unavailable("the engine has failed")
        return JSONResponse({"status": "ok"})

    async def ready(self, http: HttpRequest) -> Response:
        """Whether a request would be taken now."""
        if self.driver.refusal:
            raise unavailable(self.driver.refusal)
        return JSONResponse({"status": "ready"})

    async def read_metrics(self, http: HttpRequest) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self, http: HttpRequest) -> Response:
        return JSONResponse({"version": self.served.version})

    async def page(self, http: HttpRequest) -> Response:
        from jaxformers.serve.page import content_security_policy, page

        return HTMLResponse(page(), headers={"Content-Security-Policy": content_security_policy()})

    def routes(self) -> list[Route]:
        """Every route there is."""
        posts: list[tuple[str, type[Body], Callable[[HttpRequest, Any], Awaitable[Response]]]] = [
            ("/v1/completions", CompletionBody, self.complete),
            ("/v1/chat/completions", ChatBody, self.chat),
            ("/v1/embeddings", EmbeddingBody, self.embed),
            ("/tokenize", TokenizeBody, self.tokenize),
            ("/detokenize", DetokenizeBody, self.detokenize),
        ]
        gets = [
            ("/", self.page),
            ("/v1/models", self.models),
            ("/v1/models/{name:path}", self.model),
            ("/health", self.health),
            ("/ready", self.ready),
            ("/metrics", self.read_metrics),
            ("/version", self.version),
        ]
        return [
            *(Route(path, self._reading(kind, answer), methods=["POST"]) for path, kind, answer in posts),
            *(Route(path, answer, methods=["GET"]) for path, answer in gets),
        ]

    def _reading(self, kind: type[Body], answer: Callable[[HttpRequest, Any], Awaitable[Response]]) -> Any:
        """An endpoint that reads a body of this kind first."""

        async def endpoint(http: HttpRequest) -> Response:
            limits = self.settings.limits
            content = await read_body(http, max_bytes=limits.max_body_bytes, seconds=limits.body_seconds)
            large = len(content) > 100_000
            body = await off_loop(parse_body, content, kind) if large else parse_body(content, kind)
            return await answer(http, body)

        return endpoint


async def _api_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: f"there is no {http.url.path}", 405: f"{http.url.path} does not take {http.method}"}
    message = said.get(error.status_code, error.detail)
    return ApiError(message, status=error.status_code, headers=error.headers).response()


async def _left(http: HttpRequest, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _fault(http: HttpRequest, error: Exception) -> Response:
    return failed("an error in the server, which its log tells of").response()


def build_app(served: Served, settings: Settings | None = None) -> Starlette:
    """The ASGI application. Its engine warms up, in a thread, once the application starts; `app.state.server` is the
    `Server` behind the routes."""
    server = Server(served, settings or Settings())
    access = server.settings.access

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        server.driver.start()
        try:
            yield
        finally:
            server.driver.stop()

    cors = Middleware(
        CORSMiddleware, allow_origins=list(access.origins), allow_methods=["GET", "POST"], allow_headers=["*"]
    )
    app = Starlette(
        routes=server.routes(),
        lifespan=lifespan,
        middleware=[Middleware(AccessLog), *([cors] if access.origins else []), Middleware(Guard, access=access)],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _left,
            Exception: _fault,
        },
    )
    app.router.redirect_slashes = False
    app.state.server = server
    return app
