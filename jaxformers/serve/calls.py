"""Calls of tools in an answer: read from the model's own format, or from JSON that it was made to write.

A model that may call writes its family's format, which `serve.tools` reads. A model that must call (`tool_choice`
"required" or a named function) is held to a JSON Schema, whatever its family.
"""

from __future__ import annotations

import secrets
from typing import Any, Protocol

from pydantic_core import from_json

from jaxformers.serve.asking import Form
from jaxformers.serve.protocol import ChatBody, NamedTool, Tool
from jaxformers.serve.served import Served

Deltas = list[dict[str, Any]]


class ToolReader(Protocol):
    """What stands between a text and its calls. sees_special: whether special tokens must show in the text."""

    sees_special: bool

    def read(self, text: str, *, last: bool) -> tuple[str, Deltas]:
        """The text that is no call, and OpenAI's `tool_calls` deltas, as far as they are certain."""
        ...


def forced_form(body: ChatBody) -> Form | None:
    """What the text must be where a call must come: the arguments alone of a named function, or one call of any."""
    if isinstance(body.tool_choice, NamedTool):
        return Form("json_schema", _arguments(_named(body, body.tool_choice)))
    if body.tool_choice == "required":
        return Form("json_schema", {"anyOf": [_call_schema(tool) for tool in body.tools]})
    return None


def _named(body: ChatBody, choice: NamedTool) -> Tool:
    return next(tool for tool in body.tools if tool.function.name == choice.function.name)


def _arguments(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object"}


def _call_schema(tool: Tool) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": _arguments(tool)},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def reader_for(body: ChatBody, served: Served) -> ToolReader | None:
    """Who reads one continuation's calls; None where there can be none."""
    if not body.tools or body.tool_choice == "none":
        return None
    if isinstance(body.tool_choice, NamedTool):
        return NamedCall(body.tool_choice.function.name)
    if body.tool_choice == "required":
        return AnyCall()
    return FamilyCalls(served)


def _delta(index: int, *, name: str | None = None, arguments: str = "", call_id: str | None = None) -> dict[str, Any]:
    if name is None:
        return {"index": index, "function": {"arguments": arguments}}
    call_id = call_id or f"call_{secrets.token_hex(12)}"
    return {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


class NamedCall:
    """The whole text is the arguments of one function."""

    sees_special = False

    def __init__(self, name: str):
        self._name: str | None = name

    def read(self, text: str, *, last: bool) -> tuple[str, Deltas]:
        if not text and self._name is None:
            return "", []
        name, self._name = self._name, None
        return "", [_delta(0, name=name, arguments=text)]


class AnyCall:
    """The whole text is one call as an object; it is told once complete, since its arguments lie within."""

    sees_special = False

    def __init__(self) -> None:
        self._text = ""

    def read(self, text: str, *, last: bool) -> tuple[str, Deltas]:
        self._text += text
        if not last:
            return "", []
        try:
            call = from_json(self._text)
        except ValueError:  # cut off by its length
            return self._text, []
        return "", [_delta(0, name=call["name"], arguments=_compact(call["arguments"]))]


def _compact(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


class FamilyCalls:
    """Calls as the model's family writes them, read by `serve.tools`."""

    sees_special = True

    def __init__(self, served: Served):
        from jaxformers.serve.tools import parser_for

        self._parser = parser_for(served.tokenizer, served.family)

    def read(self, text: str, *, last: bool) -> tuple[str, Deltas]:
        found = [*self._parser.feed(text), *(self._parser.finish() if last else ())]
        said = "".join(item for item in found if isinstance(item, str))
        calls = [item for item in found if not isinstance(item, str)]
        return said, [_delta(c.index, name=c.name, arguments=c.arguments or "", call_id=c.id) for c in calls]
