"""A conversation as the text that a model was trained to continue, by the model's own Jinja template.

Templates come with checkpoints, which come from strangers. They run in Jinja's sandbox, which keeps them from Python's
internals, and within bounds on steps, seconds and sizes, which keep them from running forever or filling the memory.
What templates may use, and what they find there, is what `transformers` gives them.

This module knows nothing of tokens.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

Message = Mapping[str, Any]

MAX_STEPS = 300_000  # rounds of loops, and calls
MAX_SECONDS = 10.0
MAX_SIZE = 16_000_000  # characters of a text, items of a list
MAX_WIDTH = 1_000  # characters to pad or indent by
REASONING = ("reasoning_content", "thinking", "reasoning")  # names that templates read a message's reasoning under
# Filters that look at no more of a value than its first level.
_SHALLOW = frozenset("length count first last list map select reject selectattr rejectattr default d items abs".split())
# Filters and methods that make a text, or a list, as wide as they are told to.
_WIDE = frozenset("center ljust rjust zfill expandtabs indent tojson batch slice round".split())
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\d{4}|\*)|\{[^}]*(:[^}]*\d{4}|\{)")


_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Around what is marked while marks are looked for: code points that Unicode keeps free for uses such as this one.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_ENDS = re.compile(f"[{_BEGIN}{_END}]")


class ChatTemplateError(ValueError):
    """A template that is broken, refuses the conversation, or was refused; one line that says which."""


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """The conversation as one text, equal to what `transformers.apply_chat_template` renders.

    messages: mappings with `role` and `content`, the latest last. tools: JSON Schemas of functions the model may call.
    add_generation_prompt: end with what begins the model's answer. variables: more that the template may read, such as
    `bos_token`, `documents` or `enable_thinking`.

    ChatTemplateError (a ValueError) for an empty conversation, one that the template refuses, and for a template that
    is malformed, runs past its bounds or reaches for what it may not.
    """
    if not messages:
        raise ChatTemplateError("there is no message to render; a conversation has at least one")
    data = _plain({"documents": None, **variables, "messages": [_message(m) for m in messages], "tools": tools})
    compiled = _compiled(template)
    token = _BUDGET.set(_Budget())
    try:
        return "".join(_bounded(compiled.generate(**data, add_generation_prompt=add_generation_prompt)))
    except ChatTemplateError:
        raise
    except SecurityError as error:
        raise ChatTemplateError(f"the chat template was refused: {_line(error)}") from None
    except RecursionError:
        raise ChatTemplateError("the chat template was refused: it calls itself without end") from None
    except TemplateError as error:
        raise ChatTemplateError(f"the chat template does not take this conversation: {_line(error)}") from None
    except Exception as error:  # whatever an expression in it may raise
        fault = f"{type(error).__name__}: {_line(error)}"
        raise ChatTemplateError(f"the chat template fails on this conversation ({fault})") from None
    finally:
        _BUDGET.reset(token)


@dataclass(frozen=True)
class MarkedText:
    """A conversation as one text; `written` are the ranges of characters that `{% generation %}` marks, in order."""

    text: str
    written: tuple[tuple[int, int], ...]


def has_marks(template: str) -> bool:
    """Whether a template marks what the model writes."""
    return _MARK.search(template) is not None


def render_marked(template: str, messages: Sequence[Message], **options: Any) -> MarkedText:
    """The conversation and what in it the model has written, as the marks of the template say; see `render_chat`.

    ChatTemplateError, besides, for a template that works on a text after marking it, such as by trimming it.
    """
    text = render_chat(template, messages, **options)
    token = _MARKING.set(True)
    try:
        pieces = _ENDS.split(render_chat(template, messages, **options))
    finally:
        _MARKING.reset(token)
    if "".join(pieces) != text:
        raise ChatTemplateError("the chat template changes what is between its generation marks after they are set")
    ends = list(itertools.accumulate(map(len, pieces)))[:-1]
    return MarkedText(text, tuple(zip(ends[::2], ends[1::2], strict=True)))


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > MAX_SIZE:
            raise _too_much(f"it writes more than {MAX_SIZE} characters")
        yield piece


def _message(message: Message) -> dict[str, Any]:
    """Without empty entries, and with its reasoning under every name that templates read it under."""
    if not isinstance(message, Mapping):
        raise ChatTemplateError(f"a message must be a mapping with role and content, not {type(message).__name__}")
    present = {key: value for key, value in message.items() if value is not None}
    reasoning = next((present[name] for name in REASONING if name in present), None)
    return present if reasoning is None else {"thinking": reasoning, **present, "reasoning_content": reasoning}


def _plain(data: Any) -> Any:
    """A copy made of JSON's types alone, whose methods are known to be harmless."""
    try:
        return json.loads(json.dumps(data))
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatTemplateError(f"a conversation must be plain JSON data: {_line(error)}") from None


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."


class _Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self.steps = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def spend(self, steps: int = 1) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise _too_much(f"it takes more than {MAX_STEPS} steps")
        if time.monotonic() > self.deadline:
            raise _too_much(f"it takes more than {MAX_SECONDS:g} seconds")


_BUDGET: ContextVar[_Budget | None] = ContextVar("budget", default=None)
_MARKING: ContextVar[bool] = ContextVar("marking", default=False)


def _too_much(why: str) -> ChatTemplateError:
    return ChatTemplateError(f"the chat template was refused: {why}")


def _sized(value: Any) -> Any:
    """The value, unless it is larger than a conversation has need of."""
    if isinstance(value, str | list | tuple | dict) and len(value) > MAX_SIZE:
        raise _too_much(f"it makes a value of more than {MAX_SIZE} characters or items")
    return value


def _weighed(value: Any) -> Any:
    """The value, unless writing it out would take forever: lists of lists of the same lists grow without bound."""
    budget, left = _BUDGET.get(), [value]
    seen = characters = 0
    while left:
        item = left.pop()
        if isinstance(item, str):
            characters += len(item)
            if characters > MAX_SIZE:
                raise _too_much(f"it writes more than {MAX_SIZE} characters")
            continue
        if isinstance(item, Mapping):
            left += item.values()
        elif isinstance(item, list | tuple):
            left += item
        else:
            continue
        seen += 1
        if budget and not seen % 1000:
            budget.spend(1000)
    return value


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the model writes; rendered, it is its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

    def body(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}" if _MARKING.get() else caller()


class _Bounds(NodeTransformer):
    """Puts a step of the budget into every loop, and a look at the size to where texts grow."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("step", [])).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concatenated", node.nodes).set_lineno(node.lineno)

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = nodes.Filter(node.filter, "sized", [], [], None, None).set_lineno(node.lineno)
        return node


def _call(method: str, arguments: list[nodes.Expr]) -> nodes.Call:
    """A call of one of the environment's own methods, which no template can redefine."""
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        bounded = _Bounds().visit(source)
        bounded.set_environment(self)
        return super()._generate(bounded, *args, **kwargs)

    def step(self) -> None:
        """One round of a loop; the call itself has been counted."""

    def concatenated(self, *values: Any) -> str:
        return "".join(str(_weighed(value)) for value in values)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _spend()
        method = getattr(__obj, "__wrapped__", __obj)  # str.format comes wrapped
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _check_growth(method.__name__, owner, [*args, *kwargs.values()])
        return _sized(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not abs(left) ** min(abs(right), 64) < 2**64:
            raise _too_much(f"it computes {left} ** {right}")
        if operator == "*":
            times, value = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(value, str | list | tuple) and len(value) * times > MAX_SIZE:
                raise _too_much(f"it repeats a value {times} times")
        if operator == "%" and isinstance(left, str):
            _check_growth("format", left, [right])
        return _sized(super().call_binop(context, operator, left, right))


def _spend() -> None:
    if budget := _BUDGET.get():  # none while constants are folded
        budget.spend()


def _check_growth(name: str, text: str, values: Sequence[Any]) -> None:
    """Refuses a method of `text`, or a filter, with the arguments `values` that would make far more text than that."""
    _weighed(values)
    grown = 0
    if name in _WIDE and any(isinstance(value, int) and value > MAX_WIDTH for value in values):
        raise _too_much(f"it asks for a width of more than {MAX_WIDTH}")
    if name in ("format", "format_map"):
        if _WIDE_FORMAT.search(text):
            raise _too_much(f"it asks for a width of more than {MAX_WIDTH}")
        grown = len(text) * sum(len(value) for value in values if isinstance(value, str))
    elif name == "replace" and len(values) > 1:
        grown = text.count(str(values[0])) * len(str(values[1]))
    elif name == "join" and values and hasattr(values[0], "__len__"):
        grown = len(values[0]) * len(text)
    if grown > MAX_SIZE:
        raise _too_much(f"it makes a text of more than {MAX_SIZE} characters")


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter within the budget. Markers of what a filter wants to be passed are attributes, which are kept."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # behind the context that Jinja passes

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _spend()
        subject, values = args[first], [*args[first + 1 :], *kwargs.values()]
        if name not in _SHALLOW:
            _weighed(subject)
            if name == "join":  # the items come first, and what stands between them after
                _check_growth(name, str(values[0]) if values else "", [subject])
            else:
                _check_growth(name, subject if isinstance(subject, str) else "", values)
        return _sized(function(*args, **kwargs))

    return guarded


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as a model reads it; Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@functools.cache
def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_weighed
    )
    environment.filters["tojson"] = _tojson
    environment.filters = {name: _guarded(name, function) for name, function in environment.filters.items()}
    environment.filters["sized"] = _sized
    environment.globals.pop("lipsum")  # writes as much as it is asked for, and no conversation needs it
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> Any:
    try:
        return _environment().from_string(template)
    except TemplateSyntaxError as error:
        raise ChatTemplateError(f"the chat template is malformed: line {error.lineno}: {_line(error)}") from None
    except (RecursionError, MemoryError):
        raise ChatTemplateError("the chat template is malformed: it is nested too deeply") from None
