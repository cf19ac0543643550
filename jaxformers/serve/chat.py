"""`/v1/chat/completions`: conversations by the model's own template, with tools and forms that a text must have."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxformers.infer.request import Event
from jaxformers.serve.asking import (
    Asked,
    Form,
    check_tools_are_told,
    compile_constraints,
    off_loop,
    render_messages,
    wanted_form,
)
from jaxformers.serve.calls import Reader, forced_call, reader_for
from jaxformers.serve.driver import Driver
from jaxformers.serve.errors import ApiError
from jaxformers.serve.protocol import ChatBody
from jaxformers.serve.respond import respond
from jaxformers.serve.served import Served
from jaxformers.serve.texts import Piece, Placed, chat_logprobs
from jaxformers.serve.usage import usage


async def converse(http: HttpRequest, body: ChatBody, served: Served, driver: Driver, *, seconds: float) -> Response:
    """The next turn of a conversation."""
    served.adapter(body.model)
    tools = [] if body.tool_choice == "none" else body.tools
    if tools and body.tool_choice in (None, "auto"):
        check_tools_are_told(served.tokenizer)
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    prompt = await off_loop(
        render_messages,
        served,
        body.messages,
        tools=tools,
        add_generation_prompt=body.add_generation_prompt,
        variables=body.chat_template_kwargs | effort,
    )
    if not prompt.ids:
        raise ApiError("the chat template makes an empty text of these messages", param="messages")
    asked = Asked(served, body, [prompt.ids], max_new_tokens=body.new_tokens)
    form = await _form(body, served, prompt.text)
    stop_ids = asked.stop_ids
    constraints = await off_loop(compile_constraints, form, served, asked.count, stop_ids=stop_ids) if form else ()
    told = (body.top_logprobs or 0) if body.logprobs else None
    requests = asked.requests(logprobs=told, constraints=constraints)
    readers = [reader_for(served, tools=tools, prompt=prompt.text) for _ in range(asked.count)]
    answer = ChatAnswer(body, asked, served, readers)
    return await respond(http, driver, requests, answer, stream=body.stream, seconds=seconds)


async def _form(body: ChatBody, served: Served, prompt: str) -> Form | None:
    """What the text must be: the call that must come, or what the body says."""
    form = wanted_form(body)
    if body.tool_choice in (None, "none", "auto"):
        return form
    if form is not None:
        raise ApiError("tool_choice and response_format both say what the text must be; give one", param="tool_choice")
    return await off_loop(forced_call, body, served, prompt)


class _Turn:
    """One choice: its text, thoughts and calls so far. reader: tells them apart; None: all is text."""

    def __init__(self, reader: Reader | None):
        self.calls: dict[int, dict[str, Any]] = {}
        self.entries: list[Placed] = []
        self._reader = reader
        self._content = self._reasoning = ""

    def read(self, piece: Piece, *, parallel: bool) -> dict[str, Any]:
        """OpenAI's delta of a piece of the text; without `parallel`, calls behind the first are left out."""
        if self._reader is None:
            self._content += piece.text
            return {"content": piece.text} if piece.text else {}
        found = self._reader.read(piece.text, last=piece.finish is not None)
        calls = [call for call in found.calls if parallel or call["index"] == 0]
        self._content += found.content
        self._reasoning += found.reasoning
        for call in calls:
            self._add(call)
        told = {"content": found.content, "reasoning_content": found.reasoning, "tool_calls": calls}
        return {name: value for name, value in told.items() if value}

    def _add(self, delta: dict[str, Any]) -> None:
        if "id" in delta:
            self.calls[delta["index"]] = {"id": delta["id"], "type": "function", "function": dict(delta["function"])}
        else:
            self.calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._content, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = self._reasoning
        if self.calls:
            message["content"] = self._content or None
            message["tool_calls"] = [self.calls[index] for index in sorted(self.calls)]
        return message


class ChatAnswer:
    """A turn as it grows; see `respond.Answer`."""

    def __init__(self, body: ChatBody, asked: Asked, served: Served, readers: Sequence[Reader | None]):
        self._body, self._asked, self._served = body, asked, served
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": body.model or served.name,
        }
        self._turns = [_Turn(reader) for reader in readers]
        # Marks of calls are special tokens in some families, and have to reach the reader.
        self._continued = asked.texts(keep=readers[0].marks if readers[0] else ())

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, delta) for index in range(self._asked.count)]

    def take(self, index: int, event: Event) -> list[dict[str, Any]]:
        piece = self._continued[index].take(event)
        turn = self._turns[index]
        delta = turn.read(piece, parallel=self._body.parallel_tool_calls)
        if not self._body.stream:
            turn.entries += piece.logprobs
            return []
        chunks = [self._chunk(index, delta, piece.logprobs)] if delta or piece.logprobs else []
        if piece.finish:
            chunks.append(self._chunk(index, {}, finish=self._reason(index)))
        return chunks

    def finish(self, index: int) -> str | None:
        return self._continued[index].finish

    def closing(self) -> list[dict[str, Any]]:
        return [{**self._head, "choices": [], "usage": self._usage()}] if self._body.usage_at_end else []

    def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": turn.message(),
                "logprobs": self._logprobs(turn.entries),
                "finish_reason": self._reason(index),
            }
            for index, turn in enumerate(self._turns)
        ]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def summary(self) -> dict[str, Any]:
        return {**self._usage(), "finish": [text.finish for text in self._continued]}

    def _reason(self, index: int) -> str | None:
        finish = self.finish(index)
        return "tool_calls" if finish == "stop" and self._turns[index].calls else finish

    def _logprobs(self, entries: list[Placed]) -> dict[str, Any] | None:
        return chat_logprobs(self._served.tokenizer, entries) if self._body.logprobs else None

    def _chunk(
        self, index: int, delta: dict[str, Any], entries: list[Placed] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(entries) if entries else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**self._head, "choices": [choice]}
        if self._body.stream_options is not None:
            chunk["usage"] = self._usage() if self._body.usage_always else None
        return chunk

    def _usage(self) -> dict[str, Any]:
        return usage(self._asked.prompts, self._continued, n=self._body.n)
