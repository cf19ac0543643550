"""Calls of tools, and reasoning, found in the text that a model writes, as it streams; and grammars that force a call.

Every lineage writes calls in a format of its own. Which one, the chat template says: the text that shows the model its
own earlier calls has the marks that it will write (`format_of`). Knows nothing of HTTP, tokens or engines.

What reads like a call but is none comes out as the text it is: nothing is lost but white space around calls. From the
moment that a call's name is known and its arguments begin, they are passed on as they come, whatever they are.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxformers.data.tokenizer import Tokenizer
from jaxformers.serve.reading import Reading, Source

Format = Literal["harmony", "glm", "xml", "hermes", "mistral", "deepseek", "json"]

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"
PYTHON = "<|python_tag|>"
TOOL_CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
CALLS_BEGIN, CALLS_ENDS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_ENDS, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
FENCE, FENCE_END = "```json\n", "```"
CHANNEL, MESSAGE, END, START = "<|channel|>", "<|message|>", "<|end|>", "<|start|>"
HARMONY_CALL, CONSTRAIN = "<|call|>", "<|constrain|>"

# The marks that tell a format, looked for in a template in this order: those that others have too come last.
_TOLD_BY: dict[Format, str] = {
    "harmony": CHANNEL,
    "glm": "<arg_key>",
    "xml": "<function=",
    "hermes": CALL,
    "mistral": TOOL_CALLS,
    "deepseek": "tool▁call▁begin",
}
_MARKS: dict[Format, tuple[str, ...]] = {
    "harmony": (CHANNEL, MESSAGE, END, START, HARMONY_CALL, CONSTRAIN),
    "glm": (CALL, CALL_END, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    "xml": (CALL, CALL_END),
    "hermes": (CALL, CALL_END),
    "mistral": (TOOL_CALLS, ARGS, CALL_ID),
    "deepseek": (CALLS_BEGIN, CALLS_ENDS, CALL_BEGIN, CALL_ENDS, SEPARATOR),
    "json": (PYTHON,),
}


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer itself."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """A piece of what the model thought before its answer."""

    text: str


@dataclass(frozen=True)
class ToolStart:
    """A call begins: the index counts the calls of one answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """A piece of a call's arguments: all of them together are JSON, if the model wrote JSON."""

    index: int
    text: str


Delta = TextDelta | ReasoningDelta | ToolStart | ArgumentsDelta


def format_of(template: str | None) -> Format:
    """The format in which a model with this chat template calls tools: the first whose mark the template has, in the
    order of this module's table; "json" where it has none, as Llama 3's, which show calls as {"name", "parameters"}."""
    told = template or ""
    return next((name for name, mark in _TOLD_BY.items() if mark in told), "json")


def tools_template(templates: Mapping[str, str]) -> str | None:
    """The template that renders a conversation with tools: that named "tool_use", or the default one."""
    return templates.get("tool_use", templates.get("default"))


class ToolParser:
    """What one answer is made of, told while it streams; however the text is cut, the pieces add up to the same.

    marks: spellings of tokens that must reach the parser even if the tokenizer calls them special.
    """

    def __init__(
        self,
        form: Format | None,
        *,
        thinks: bool = False,
        inside_thought: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        new_id: Callable[[], str] | None = None,
    ):
        """form: None finds no calls. thinks: reasoning between <think> and </think> is told apart; inside_thought: the
        prompt has opened it. tools: as in a request, to know which arguments are texts. new_id: makes ids of calls."""
        self.marks = (*_MARKS.get(form, ()), *((THINK, THINK_END) if thinks else ()))
        self._thinks, self._inside = thinks, inside_thought
        self._properties = {name: _properties(function) for name, function in functions_of(tools).items()}
        self._new_id = new_id or (_nine_characters if form == "mistral" else _call_id)
        self._form = form
        self._source = Source()
        self._deltas: list[Delta] = []
        self._space = ""  # held back: it is dropped around calls
        self._calls = 0
        self._steps = self._read()

    def feed(self, text: str) -> list[Delta]:
        """What is certain now that this text has come."""
        self._source.push(text)
        next(self._steps, None)
        return self._take()

    def finish(self) -> list[Delta]:
        """The rest, now that the text has ended."""
        self._source.ended = True
        next(self._steps, None)
        assert not self._source.rest, "all text is read"
        return self._take()

    def _take(self) -> list[Delta]:
        taken, self._deltas = self._deltas, []
        return taken

    # The whole answer

    def _read(self) -> Reading:
        if self._thinks:
            yield from self._thought()
        if self._form == "json":
            yield from self._bare_calls()
        if self._form == "harmony":
            yield from self._harmony_start()
        readers = {
            "harmony": ((CHANNEL, START), self._harmony_message),
            "glm": ((CALL,), self._glm_call),
            "xml": ((CALL,), self._xml_call),
            "hermes": ((CALL,), self._hermes_call),
            "mistral": ((TOOL_CALLS,), self._mistral_calls),
            "deepseek": ((CALLS_BEGIN, CALL_BEGIN), self._deepseek_calls),
        }
        marks, reader = readers.get(self._form, ((), None))
        while (mark := (yield from self._source.pass_until(marks, self._say))) is not None:
            self._source.at += len(mark)
            self._source.pin()
            read = yield from reader(mark)
            if not read and self._source.back():  # no call after all: what follows the mark is looked at anew
                self._say(mark)
                continue
            self._source.release()
            self._space = ""
            yield from self._source.skip_space()
        self._flush_space()

    def _thought(self) -> Reading:
        if not self._inside:
            self._source.pin()
            if not (yield from self._source.take(THINK)):
                self._source.back()
                return
            self._source.release()
        yield from self._source.skip_space()
        end = yield from self._source.pass_until((THINK_END,), self._think)
        self._source.at += len(end or "")
        self._space = ""
        yield from self._source.skip_space()

    # Formats

    def _hermes_call(self, _: str) -> Reading:
        """{"name": ..., "arguments": {...}}</tool_call>"""
        if not (yield from self._call_object()):
            return False
        yield from self._source.take(CALL_END)
        return True

    def _glm_call(self, _: str) -> Reading:
        """name, then <arg_key>k</arg_key> <arg_value>v</arg_value> for each argument, then </tool_call>"""
        name = yield from self._source.up_to(("<arg_key>", CALL_END))
        if not _is_name(name.strip()):
            return False
        arguments: dict[str, Any] = {}
        while (yield from self._source.take("<arg_key>")):
            key = yield from self._source.up_to(("</arg_key>",))
            yield from self._source.take("</arg_key>")
            if not (yield from self._source.take("<arg_value>")):
                return False
            value = yield from self._source.up_to(("</arg_value>",))
            yield from self._source.take("</arg_value>")
            arguments[key.strip()] = self._typed(name.strip(), key.strip(), value)
        if not (yield from self._source.take(CALL_END)):
            return False
        self._whole_call(name.strip(), arguments)
        return True

    def _xml_call(self, _: str) -> Reading:
        """<function=name> <parameter=k>\\nv\\n</parameter> ... </function></tool_call>"""
        if not (yield from self._source.take("<function=")):
            return False
        name = yield from self._source.up_to((">",))
        arguments: dict[str, Any] = {}
        if not _is_name(name) or not (yield from self._source.take(">")):
            return False
        while (yield from self._source.take("<parameter=")):
            key = yield from self._source.up_to((">",))
            yield from self._source.take(">")
            yield from self._source.more()
            end = "</parameter>"
            if self._source.rest.startswith("\n"):
                self._source.at += 1
                end = "\n</parameter>"
            value = yield from self._source.up_to((end,))
            if not (yield from self._source.take("</parameter>")):
                return False
            arguments[key] = self._typed(name, key, value)
        if not (yield from self._source.take("</function>")):
            return False
        yield from self._source.take(CALL_END)
        self._whole_call(name, arguments)
        return True

    def _mistral_calls(self, _: str) -> Reading:
        """[{"name": ..., "arguments": {...}}, ...], or since 2025 name[ARGS]{...}"""
        if (yield from self._source.take("[")):
            while (yield from self._call_object()):
                if not (yield from self._source.take(",")):
                    return (yield from self._source.take("]"))
            return False
        head = yield from self._source.up_to((ARGS, CALL_ID, "{", TOOL_CALLS))
        if (yield from self._source.take(CALL_ID)):
            yield from self._source.up_to((ARGS, "{"))
        yield from self._source.take(ARGS)
        return (yield from self._named_call(head.strip()))

    def _deepseek_calls(self, mark: str) -> Reading:
        """Calls between marks: function, sep, name and fenced arguments; since V3.1: name, sep and arguments."""
        inside = mark == CALL_BEGIN or (yield from self._source.take(CALL_BEGIN))
        while inside:
            name = yield from self._source.up_to((SEPARATOR, CALL_ENDS))
            if not (yield from self._source.take(SEPARATOR)):
                return False
            if name == "function":
                name = yield from self._source.up_to(("\n", CALL_ENDS))
            yield from self._source.take(FENCE.strip())
            if not (yield from self._named_call(name.strip())):
                return False
            yield from self._source.take(FENCE_END)
            yield from self._source.take(CALL_ENDS)
            inside = yield from self._source.take(CALL_BEGIN)
        return (yield from self._source.take(CALLS_ENDS))

    def _harmony_message(self, mark: str) -> Reading:
        """<|channel|>commentary to=functions.name <|constrain|>json<|message|>{...}<|call|>, and other channels."""
        head = yield from self._source.up_to((MESSAGE,))
        if not (yield from self._source.take(MESSAGE)):
            return False
        _, called, name = head.partition("to=functions.")
        name = name.replace("<", " ").split(maxsplit=1)[0] if name.strip() else ""
        if called and (yield from self._named_call(name)):
            yield from self._source.take(HARMONY_CALL)
            return True
        if called:
            return False
        tell = self._think if "analysis" in (head if mark == CHANNEL else head.partition(CHANNEL)[2]) else self._say
        self._source.release()
        end = yield from self._source.pass_until((END, HARMONY_CALL), tell)
        self._source.at += len(end or "")
        return True

    def _harmony_start(self) -> Reading:
        """The prompt has begun the first message, so that its recipient may come at once."""
        self._source.pin()
        if (yield from self._source.take("to=")):
            self._source.back()
            self._source.pin()
            if not (yield from self._harmony_message(START)):
                self._source.back()
            self._source.release()
            self._space = ""
        else:
            self._source.back()

    def _bare_calls(self) -> Reading:
        """{"name": ..., "parameters": {...}} as the whole of an answer, behind Llama's tag or in a fence of Markdown;
        several with a semicolon between them."""
        self._source.pin()
        tagged = yield from self._source.take(PYTHON)
        fenced = yield from self._source.take(FENCE.strip())
        known = None if tagged else self._properties.keys()
        while (yield from self._call_object(known)) and (yield from self._source.take(";")):
            self._source.pin()
        if not self._source.back() and fenced:
            yield from self._source.take(FENCE_END)

    # Calls

    def _call_object(self, known: Collection[str] | None = None) -> Reading:
        """{"name": ..., "arguments": {...}}, the keys in any order. False, and nothing told, where it is none; known:
        the names that calls may have, None for any."""
        name, early, begun = None, None, False
        if not (yield from self._source.take("{")):
            return False
        while True:
            key = yield from self._source.json_string()
            if key is None or not (yield from self._source.take(":")):
                return begun
            if key in ("arguments", "parameters"):
                yield from self._source.skip_space()
                if (yield from self._source.peek()) != "{" or begun:
                    return begun
                begun = name is not None
                if begun:
                    self._start(name)
                    yield from self._source.json_value(self._argue)
                else:
                    pieces: list[str] = []
                    yield from self._source.json_value(pieces.append)
                    early = "".join(pieces)
            elif key == "name":
                name = yield from self._source.json_string()
                if not _is_name(name) or (known is not None and name not in known):
                    return begun
            elif key in ("id", "type"):
                yield from self._source.json_string()
            else:
                return begun
            if not (yield from self._source.take(",")):
                break
        closed = yield from self._source.take("}")
        if begun or not closed or name is None:
            return begun
        self._start(name)
        self._argue(early or "{}")
        return True

    def _named_call(self, name: str) -> Reading:
        """The arguments of a call whose name is known. False where there are none or the name is none."""
        yield from self._source.skip_space()
        if not _is_name(name) or (yield from self._source.peek()) != "{":
            return False
        self._start(name)
        yield from self._source.json_value(self._argue)
        return True

    def _whole_call(self, name: str, arguments: Mapping[str, Any]) -> None:
        self._start(name)
        self._argue(json.dumps(arguments, ensure_ascii=False))

    def _typed(self, name: str, key: str, value: str) -> Any:
        """An argument written as bare text: itself where the tool takes a text, JSON where it is JSON."""
        if self._properties.get(name, {}).get(key, {}).get("type") == "string":
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value

    # What is told

    def _start(self, name: str) -> None:
        self._source.release()
        self._space = ""
        self._deltas.append(ToolStart(self._calls, self._new_id(), name))
        self._calls += 1

    def _argue(self, text: str) -> None:
        self._deltas.append(ArgumentsDelta(self._calls - 1, text))

    def _say(self, text: str) -> None:
        self._tell(TextDelta, text)

    def _think(self, text: str) -> None:
        self._tell(ReasoningDelta, text)

    def _tell(self, kind: Callable[[str], Delta], text: str) -> None:
        """All but white space at the end, which waits for what it stands before."""
        kept = text.rstrip()
        if kept:
            self._deltas.append(kind(self._space + kept))
            self._space = ""
        self._space += text[len(kept) :]

    def _flush_space(self) -> None:
        if self._space and not self._calls:
            self._deltas.append(TextDelta(self._space))
        self._space = ""


def parser_for(tokenizer: Tokenizer, *, tools: Sequence[Mapping[str, Any]] = (), prompt: str = "") -> ToolParser:
    """The parser of one answer by a model with this tokenizer's chat template.

    tools: as in a chat request; without any, no call is looked for. prompt: the rendered conversation, which may have
    opened the model's thought. Decode with `TextStream(tokenizer, keep=parser.marks)`.
    """
    template = tools_template(tokenizer.chat_templates)
    return ToolParser(
        format_of(template) if tools or format_of(template) == "harmony" else None,
        thinks=thinks(template),
        inside_thought=opens_thought(prompt),
        tools=tools,
    )


def thinks(template: str | None) -> bool:
    """Whether a model with this chat template writes its reasoning between <think> and </think>."""
    return THINK in (template or "") and format_of(template) != "harmony"


def opens_thought(prompt: str) -> bool:
    """Whether the prompt ends inside a thought."""
    return prompt.rstrip().endswith(THINK)


def functions_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The functions of a request's tools, by name."""
    return {tool["function"]["name"]: tool["function"] for tool in tools}


def _properties(function: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = (function.get("parameters") or {}).get("properties")
    kept = properties if isinstance(properties, Mapping) else {}
    return {key: schema for key, schema in kept.items() if isinstance(schema, Mapping)}


def _is_name(name: str | None) -> bool:
    return bool(name) and not any(character.isspace() or character in '<>{}[]"' for character in name)


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _nine_characters() -> str:
    """As Mistral's templates demand."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
