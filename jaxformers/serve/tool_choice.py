"""Grammars under which a model can write nothing but a call of a tool, in its lineage's own format.

For `tool_choice` "required" or a named function. The model may think first, where its template lets it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxformers.data.tokenizer import Tokenizer
from jaxformers.serve import tools as marks
from jaxformers.serve.constrain import ConstraintSpec, grammar_of
from jaxformers.serve.tools import format_of, functions_of, opens_thought, thinks, tools_template

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_WITHOUT_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY = "/(?s:.*)/"

Function = Mapping[str, Any]


def constraint_for(
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]],
    choice: str | Mapping[str, Any] | None,
    *,
    prompt: str = "",
    parallel: bool = True,
) -> ConstraintSpec | None:
    """What an answer must be for a request's `tool_choice`; None where it is free ("none", "auto" or no choice).

    prompt: the rendered conversation, which may have opened the model's thought. parallel: whether there may be
    several calls, where the format has that. Raises ValueError for a choice that is none of the tools, and for
    parameters whose schema cannot be obeyed.
    """
    if choice in (None, "none", "auto"):
        return None
    functions = list(functions_of(tools).values())
    if isinstance(choice, Mapping):
        name = choice["function"]["name"]
        functions = [function for function in functions if function["name"] == name]
        if not functions:
            raise ValueError(f"tool_choice names {name!r}, which is none of the tools")
    elif choice != "required":
        raise ValueError(f"tool_choice must be none, auto, required or a function, not {choice!r}")
    if not functions:
        raise ValueError("tool_choice is required, but there are no tools")
    for function in functions:
        grammar_of(ConstraintSpec("json_schema", _schema(function)))
    return ConstraintSpec("grammar", _Grammar(tokenizer, prompt, parallel).of(functions))


def _schema(function: Function) -> Mapping[str, Any]:
    """What the arguments must be: those that the function names and no others, unless it says that there may be."""
    schema = function.get("parameters") or NO_ARGUMENTS
    alone = schema.keys() <= {"$defs", "$schema", "description", "properties", "required", "title", "type"}
    return {**schema, "additionalProperties": False} if alone else schema


class _Grammar:
    """A Lark grammar in the making."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, parallel: bool):
        self._tokenizer = tokenizer
        self._template = tools_template(tokenizer.chat_templates) or ""
        self._prompt = prompt
        self._parallel = parallel
        self._rules: list[str] = []

    def of(self, functions: Sequence[Function]) -> str:
        """The whole grammar."""
        form = format_of(self._template)
        writers: dict[str, Callable[[Function], str]] = {
            "hermes": self._hermes,
            "glm": self._glm,
            "xml": self._xml,
            "mistral": self._mistral,
            "deepseek": self._deepseek,
            "harmony": self._harmony,
            "json": self._json,
        }
        call = self._rule("call", " | ".join(self._rule("one", writers[form](function)) for function in functions))
        before, between, after = self._around(form)
        more = f"({between} {call})*" if self._parallel and between else ""
        return "\n".join([f"start: {self._thought(form)} {before} {call} {more} {after}", *self._rules])

    def _around(self, form: str) -> tuple[str, str, str]:
        """What stands before the first call, between two, and after the last. No between: one call is all there is."""
        if form == "deepseek":
            return self._mark(marks.CALLS_BEGIN), _literal("\n"), self._mark(marks.CALLS_ENDS)
        if form == "mistral" and marks.ARGS not in self._template:
            return f"{self._mark(marks.TOOL_CALLS)} {_literal(' [')}", _literal(", "), _literal("]")
        return "", {"harmony": "", "json": "", "mistral": '""'}.get(form, _literal("\n")), ""

    def _thought(self, form: str) -> str:
        if form == "harmony":
            said = f"{self._mark(marks.CHANNEL)} {_literal('analysis')} {self._mark(marks.MESSAGE)}"
            return f"({said} {self._until(marks.END)} {self._mark(marks.START)} {_literal('assistant')})?"
        if not thinks(self._template):
            return ""
        rest = f"{self._until(marks.THINK_END)} {_literal(chr(10) * 2)}"
        return rest if opens_thought(self._prompt) else f"({self._mark(marks.THINK)} {rest})?"

    # Formats: one call of one function

    def _hermes(self, function: Function) -> str:
        call, line = self._object(function, "arguments"), _literal("\n")
        return f"{self._mark(marks.CALL)} {line} {call} {line} {self._end()}"

    def _json(self, function: Function) -> str:
        return self._object(function, "parameters")

    def _mistral(self, function: Function) -> str:
        if marks.ARGS in self._template:
            name = _literal(function["name"])
            return f"{self._mark(marks.TOOL_CALLS)} {name} {self._mark(marks.ARGS)} {self._arguments(function)}"
        begin, end = _literal(', "id": "'), _literal('"')
        call_id = f"({begin} /[a-zA-Z0-9]{{9}}/ {end})?"
        return self._object(function, "arguments", call_id)

    def _deepseek(self, function: Function) -> str:
        begin, separator, end = map(self._mark, (marks.CALL_BEGIN, marks.SEPARATOR, marks.CALL_ENDS))
        name, arguments = _literal(function["name"]), self._arguments(function)
        if marks.FENCE.strip() not in self._template:
            return f"{begin} {name} {separator} {arguments} {end}"
        fence, fence_end = _literal(f"\n{marks.FENCE}"), _literal(f"\n{marks.FENCE_END}")
        return f"{begin} {_literal('function')} {separator} {name} {fence} {arguments} {fence_end} {end}"

    def _harmony(self, function: Function) -> str:
        head = _literal(f"commentary to=functions.{function['name']} ")
        kind = f"{self._mark(marks.CONSTRAIN)} {_literal('json')} {self._mark(marks.MESSAGE)}"
        return f"{self._mark(marks.CHANNEL)} {head} {kind} {self._arguments(function)}"

    def _glm(self, function: Function) -> str:
        def argument(key: str) -> str:
            name = f"{self._mark('<arg_key>')} {_literal(key)} {self._mark('</arg_key>')} {_literal(chr(10))}"
            return (
                f"{name} {self._mark('<arg_value>')} {self._value(function, key, '</arg_value>')} {_literal(chr(10))}"
            )

        name, arguments = _literal(f"{function['name']}\n"), " ".join(self._each(function, argument))
        return f"{self._mark(marks.CALL)} {name} {arguments} {self._end()}"

    def _xml(self, function: Function) -> str:
        def argument(key: str) -> str:
            head = _literal(f"<parameter={key}>\n")
            return f"{head} {self._value(function, key, chr(10) + '</parameter>')} {_literal(chr(10))}"

        head, end = _literal(f"\n<function={function['name']}>\n"), _literal("</function>\n")
        return f"{self._mark(marks.CALL)} {head} {' '.join(self._each(function, argument))} {end} {self._end()}"

    # Parts

    def _object(self, function: Function, key: str, more: str = "") -> str:
        head = _literal(f'{{"name": {json.dumps(function["name"])}, "{key}": ')
        return f"{head} {self._arguments(function)} {more} {_literal('}')}"

    def _arguments(self, function: Function) -> str:
        """The function's parameters as JSON, spaced as templates write it."""
        return f"%json {json.dumps({**_schema(function), 'x-guidance': _WITHOUT_SPACES})}"

    def _each(self, function: Function, argument: Callable[[str], str]) -> list[str]:
        """The arguments that are written one by one, in the schema's order; those not required may be left out."""
        schema = _schema(function)
        keys, required = schema.get("properties", {}), schema.get("required", ())
        return [argument(key) if key in required else f"({argument(key)})?" for key in keys]

    def _value(self, function: Function, key: str, end: str) -> str:
        """One argument and what ends it: a text as it is, anything else as JSON."""
        schema = _schema(function)["properties"][key]
        if not isinstance(schema, Mapping) or schema.get("type") != "string":
            return f"%json {json.dumps(schema)} {self._mark(end)}"
        if "enum" in schema:
            texts = " | ".join(_literal(value) for value in schema["enum"] if isinstance(value, str))
            return f"({texts}) {self._mark(end)}"
        return self._until(end)

    def _until(self, mark: str) -> str:
        """Any text, and the first of the mark behind it."""
        if (special := self._special(mark)) is not None:
            return f"{_ANY} {special}"
        return self._rule("until", f"/(?s:.*){_escaped(mark)}/", "[lazy]")

    def _mark(self, spelling: str) -> str:
        return self._special(spelling) or _literal(spelling)

    def _special(self, spelling: str) -> str | None:
        """A token that text cannot spell, by its id."""
        token = self._tokenizer.token_id(spelling)
        return f"<[{token}]>" if token in self._tokenizer.special_ids else None

    def _rule(self, name: str, body: str, options: str = "") -> str:
        name = f"{name}_{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def _end(self) -> str:
        return self._mark(marks.CALL_END)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", r"\/").replace("\\\n", r"\n")
