"""What `serve.tools` finds in an answer, in OpenAI's words: its text, its reasoning and its calls of tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxformers.serve.asking import Form, plain_tools
from jaxformers.serve.protocol import ChatBody, Tool
from jaxformers.serve.served import Served

# In templates of models whose answers are more than text even where there are no tools: they tell what they think.
_THINKING = ("<think>", "<|channel|>")


class Found(NamedTuple):
    """What is certain now. calls: OpenAI's `tool_calls` of a delta; only a call's first has its id and name."""

    content: str
    reasoning: str
    calls: list[dict[str, Any]]


class Reader:
    """One answer, read while it grows. marks: special tokens that must show in the text."""

    def __init__(self, parser: Any):
        self.marks: tuple[str, ...] = parser.marks
        self._parser = parser

    def read(self, text: str, *, last: bool) -> Found:
        from jaxformers.serve.tools import ArgumentsDelta, ReasoningDelta, TextDelta, ToolStart

        found = Found("", "", [])
        for delta in (*self._parser.feed(text), *(self._parser.finish() if last else ())):
            match delta:
                case TextDelta(piece):
                    found = found._replace(content=found.content + piece)
                case ReasoningDelta(piece):
                    found = found._replace(reasoning=found.reasoning + piece)
                case ToolStart(index, call_id, name):
                    function = {"name": name, "arguments": ""}
                    found.calls.append({"index": index, "id": call_id, "type": "function", "function": function})
                case ArgumentsDelta(index, piece):
                    _argue(found.calls, index, piece)
        return found


def _argue(calls: list[dict[str, Any]], index: int, piece: str) -> None:
    """Adds to the arguments of the call that was told last, if it is the same."""
    if calls and calls[-1]["index"] == index:
        calls[-1]["function"]["arguments"] += piece
    else:
        calls.append({"index": index, "function": {"arguments": piece}})


def reader_for(served: Served, *, tools: Sequence[Tool], prompt: str) -> Reader | None:
    """Who reads one answer to a rendered conversation; None where it can be nothing but text."""
    templates = served.tokenizer.chat_templates.values()
    if not tools and not any(mark in template for template in templates for mark in _THINKING):
        return None
    from jaxformers.serve.tools import parser_for

    return Reader(parser_for(served.tokenizer, tools=plain_tools(tools), prompt=prompt))


def forced_call(body: ChatBody, served: Served, prompt: str) -> Form | None:
    """What the text must be where `tool_choice` says that a call must come. ValueError for parameters that cannot be
    obeyed."""
    from jaxformers.serve.tool_choice import constraint_for

    choice = body.tool_choice if isinstance(body.tool_choice, str) else body.tool_choice.model_dump()
    spec = constraint_for(
        served.tokenizer, plain_tools(body.tools), choice, prompt=prompt, parallel=body.parallel_tool_calls
    )
    return None if spec is None else Form(spec.kind, spec.value)
