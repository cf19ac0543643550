"""What a server serves, and within which limits."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxformers.data.tokenizer import Tokenizer
from jaxformers.infer.request import Driven, Pooling
from jaxformers.serve.errors import ApiError
from jaxformers.serve.metrics import Names


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model behind an engine.

    name: what clients call it. max_length: tokens of a prompt and its continuation at most. family: whose format of
    tool calls it writes. generation: its generation_config.json. pooling: how a text becomes one vector; None: it does
    not. version: of this software.
    """

    name: str
    tokenizer: Tokenizer
    engine: Driven
    max_length: int
    vocab_size: int
    family: str = ""
    generation: Mapping[str, Any] = field(default_factory=dict)
    pooling: Pooling | None = None
    version: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def adapters(self) -> tuple[str, ...]:
        """What the engine has loaded, which clients ask for as models."""
        return tuple(self.engine.adapters)

    def adapter(self, model: str | None) -> str | None:
        """The adapter that a body's `model` asks for. ApiError 404 for a model that is not served."""
        if model in (None, self.name):
            return None
        if model in self.adapters:
            return model
        message = f"The model '{model[:100]}' does not exist; this server has {', '.join((self.name, *self.adapters))}."
        raise ApiError(message, status=404, param="model", code="model_not_found")

    @cached_property
    def max_characters(self) -> int:
        """A text with more characters has too many tokens, whatever it says; no tokenizer need look at it."""
        tokenizer = self.tokenizer
        longest = max((len(tokenizer.token(i) or "") for i in range(tokenizer.vocab_size)), default=1)
        return self.max_length * max(longest, 1)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What keeps one client from the others' share.

    max_body_bytes: of a request's body. body_seconds: for the body to arrive. request_seconds: from a request's arrival
    to its last token. header_seconds: for a request's head to arrive. write_seconds: for a client to take anything at
    all of what was written to it. drain_seconds: for requests under way once the server is told to end.
    """

    max_body_bytes: int = 16 * 2**20
    body_seconds: float = 30.0
    request_seconds: float = 600.0
    header_seconds: float = 10.0
    write_seconds: float = 30.0
    drain_seconds: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may ask. keys: none: everyone. hosts: the names that clients may call the server by; none: any. origins: of
    web pages that may ask; none: only the server's own."""

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server behaves beside what it serves."""

    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)
    metrics_names: Names = "jaxformers"
