"""`/v1/chat/completions`: conversations by the model's own template, with tools and forms that a text must have."""

from __future__ import annotations

import secrets
import time
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxformers.infer.request import Event
from jaxformers.serve.asking import Asked, Form, compile_constraints, off_loop, render_messages, wanted_form
from jaxformers.serve.calls import ToolReader, forced_form, reader_for
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
    form = _form(body)
    tools = () if body.tool_choice == "none" else body.tools
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    prompt = await off_loop(
        render_messages,
        served,
        body.messages,
        tools=tools,
        add_generation_prompt=body.add_generation_prompt,
        variables=body.chat_template_kwargs | effort,
    )
    if not prompt:
        raise ApiError("the chat template makes an empty text of these messages", param="messages")
    asked = Asked(served, body, [prompt], max_new_tokens=body.new_tokens)
    stop_ids = asked.stop_ids
    constraints = await off_loop(compile_constraints, form, served, asked.count, stop_ids=stop_ids) if form else ()
    told = (body.top_logprobs or 0) if body.logprobs else None
    requests = asked.requests(logprobs=told, constraints=constraints)
    return await respond(http, driver, requests, ChatAnswer(body, asked, served), stream=body.stream, seconds=seconds)


def _form(body: ChatBody) -> Form | None:
    """What the text must be: of a call that must come, or what the body says."""
    form, forced = wanted_form(body), forced_form(body)
    if form and forced:
        raise ApiError("tool_choice and response_format both say what the text must be; give one", param="tool_choice")
    return form or forced


class _Turn:
    """One choice: its text and its calls so far."""

    def __init__(self, reader: ToolReader | None):
        self.reader = reader
        self.content = ""
        self.calls: dict[int, dict[str, Any]] = {}
        self.entries: list[Placed] = []

    def add(self, text: str, deltas: list[dict[str, Any]]) -> None:
        self.content += text
        for delta in deltas:
            call = self.calls.setdefault(
                delta["index"], {"id": None, "type": "function", "function": {"name": "", "arguments": ""}}
            )
            call["id"] = delta.get("id") or call["id"]
            call["function"]["name"] += delta["function"].get("name") or ""
            call["function"]["arguments"] += delta["function"].get("arguments") or ""

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.calls:
            message["content"] = self.content or None
            message["tool_calls"] = [self.calls[index] for index in sorted(self.calls)]
        return message


class ChatAnswer:
    """A turn as it grows; see `respond.Answer`."""

    def __init__(self, body: ChatBody, asked: Asked, served: Served):
        self._body, self._asked, self._served = body, asked, served
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": body.model or served.name,
        }
        readers = [reader_for(body, served) for _ in range(asked.count)]
        self._turns = [_Turn(reader) for reader in readers]
        # Marks of tool calls are special tokens in some families, so their reader has to see them.
        self._continued = asked.texts(skip_special_tokens=False if readers[0] and readers[0].sees_special else None)

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, delta) for index in range(self._asked.count)]

    def take(self, index: int, event: Event) -> list[dict[str, Any]]:
        piece = self._continued[index].take(event)
        turn = self._turns[index]
        text, deltas = self._read(turn, piece)
        turn.add(text, deltas)
        if not self._body.stream:
            turn.entries += piece.logprobs
            return []
        chunks = []
        delta = ({"content": text} if text else {}) | ({"tool_calls": deltas} if deltas else {})
        if delta or piece.logprobs:
            chunks.append(self._chunk(index, delta, piece.logprobs))
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

    def _read(self, turn: _Turn, piece: Piece) -> tuple[str, list[dict[str, Any]]]:
        """The piece as text and as parts of calls."""
        if turn.reader is None:
            return piece.text, []
        read = turn.reader.read(piece.text, last=piece.finish is not None)
        return read if self._body.parallel_tool_calls else (read[0], [d for d in read[1] if d["index"] == 0])

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
