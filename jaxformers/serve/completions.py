"""`/v1/completions`: prompts as texts or ids, continued; what log-likelihood harnesses ask with echo and logprobs."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxformers.infer.request import Event
from jaxformers.serve.asking import Asked, compile_constraints, encode_prompts, off_loop, wanted_form
from jaxformers.serve.driver import Driver
from jaxformers.serve.errors import ApiError
from jaxformers.serve.protocol import MAX_CHOICES, CompletionBody
from jaxformers.serve.respond import respond
from jaxformers.serve.served import Served
from jaxformers.serve.texts import Echo, Placed, completion_logprobs, echo
from jaxformers.serve.usage import usage

DEFAULT_NEW_TOKENS = 16  # OpenAI's


async def complete(
    http: HttpRequest, body: CompletionBody, served: Served, driver: Driver, *, seconds: float
) -> Response:
    """The continuations of each prompt."""
    served.adapter(body.model)
    if len(body.prompt) * body.n > MAX_CHOICES:
        message = f"{len(body.prompt)} prompts with n {body.n} are more than {MAX_CHOICES} continuations"
        raise ApiError(message, param="prompt")
    prompts = await off_loop(encode_prompts, served, body.prompt, add_special_tokens=body.add_special_tokens)
    wanted = DEFAULT_NEW_TOKENS if body.max_tokens is None else body.max_tokens
    asked = Asked(served, body, prompts, max_new_tokens=wanted)
    form = wanted_form(body)
    stop_ids = asked.stop_ids
    constraints = await off_loop(compile_constraints, form, served, asked.count, stop_ids=stop_ids) if form else ()
    told_of_prompt = body.logprobs if body.echo else None
    if body.max_tokens == 0 and told_of_prompt is None:
        told_of_prompt = 0  # an engine that makes nothing tells of the prompt, wanted or not
    requests = asked.requests(logprobs=body.logprobs, prompt_logprobs=told_of_prompt, constraints=constraints)
    return await respond(
        http, driver, requests, CompletionAnswer(body, asked, served), stream=body.stream, seconds=seconds
    )


class CompletionAnswer:
    """A completion as it grows; see `respond.Answer`."""

    def __init__(self, body: CompletionBody, asked: Asked, served: Served):
        self._body, self._asked, self._served = body, asked, served
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or served.name,
        }
        self._continued = asked.texts()
        self._echoed: dict[int, int] = {}  # characters of the prompt before each continuation
        self._texts = [""] * asked.count
        self._entries: list[list[Placed]] = [[] for _ in self._continued]

    def opening(self) -> list[dict[str, Any]]:
        return []

    def take(self, index: int, event: Event) -> list[dict[str, Any]]:
        prompt = self._echo(index, event)
        piece = self._continued[index].take(event)
        before = self._echoed[index]
        text = prompt.text + piece.text
        entries = [*prompt.logprobs, *(Placed(before + start, of) for start, of in piece.logprobs)]
        if not self._body.stream:
            self._texts[index] += text
            self._entries[index] += entries
            return []
        if not (text or entries or piece.finish):
            return []
        return [self._chunk([self._choice(index, text, entries)])]

    def finish(self, index: int) -> str | None:
        return self._continued[index].finish

    def closing(self) -> list[dict[str, Any]]:
        return [{**self._head, "choices": [], "usage": self._usage()}] if self._body.usage_at_end else []

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(i, self._texts[i], self._entries[i]) for i in range(self._asked.count)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def summary(self) -> dict[str, Any]:
        return {**self._usage(), "finish": [text.finish for text in self._continued]}

    def _echo(self, index: int, event: Event) -> Echo:
        """The prompt, which comes before the first news where it is to be echoed."""
        told = Echo("", [])
        if index not in self._echoed:
            if self._body.echo:
                prompt, skip = self._asked.prompt_of(index), self._body.skip_special_tokens
                entries = () if self._body.logprobs is None else event.prompt_logprobs or ()
                told = echo(self._served.tokenizer, prompt, entries, skip_special=skip)
            self._echoed[index] = len(told.text)
        return told

    def _choice(self, index: int, text: str, entries: Sequence[Placed]) -> dict[str, Any]:
        top, told = self._body.logprobs, None
        if top is not None:
            told = completion_logprobs(self._served.tokenizer, entries, top=top)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": self.finish(index)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head, "choices": choices}
        if self._body.stream_options is not None:
            chunk["usage"] = self._usage() if self._body.usage_always else None
        return chunk

    def _usage(self) -> dict[str, Any]:
        return usage(self._asked.prompts, self._continued, n=self._body.n)
