"""Records to conversations: the forms that chat data has, brought to one list of messages as chat templates take it.

A record is of the form that a config declares, or of the first form all of whose fields it has. What is no
conversation, or nothing to learn from, is refused with the reason. Knows no file, template or token.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxformers.data.config import CHAT_FIELDS, ChatConfig
from jaxformers.data.records import is_unicode

ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"}
_CALL = "function_call"  # ShareGPT's role for a turn of the assistant that calls a function
_MUST_SAY = ("user", "assistant")  # an empty system prompt, or a tool that returns nothing, says what it says


class ConversationError(ValueError):
    """A record that is no conversation to learn from; one line that says why."""


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them, from the first turn to the last.

    Attributes:
        messages: mappings with `role` (one of ROLES), mostly `content` (a text), and what else the record has in them.
        tools: JSON Schemas of the functions that may be called, or None.
        given: indices of assistant turns that are not to be learned: those of a prompt, and those of `weight` 0.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    given: frozenset[int] = frozenset()

    @property
    def answers(self) -> tuple[int, ...]:
        """The indices of the assistant's turns."""
        return tuple(n for n, message in enumerate(self.messages) if message["role"] == "assistant")

    @property
    def hash(self) -> int:
        """64 bits of what is said, whatever form and order of fields it was said in."""
        content = json.dumps([self.messages, self.tools, sorted(self.given)], sort_keys=True)
        return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")

    @property
    def turns(self) -> tuple[int, ...]:
        """How many messages there are of each of ROLES."""
        return tuple(sum(message["role"] == role for message in self.messages) for role in ROLES)


def wanted_fields(config: ChatConfig) -> tuple[str, ...]:
    """The names of all fields of a record that may belong to a conversation."""
    return tuple(dict.fromkeys(config.fields.get(name, name) for name in CHAT_FIELDS))


def conversation_of(record: Any, config: ChatConfig) -> Conversation | str:
    """The conversation that a record holds, or the raw text.

    record: its fields by name, a list of messages, or a text. JSON within a text counts where a list is wanted, as in
    CSV.

    Raises:
        ConversationError: a record of no form, an unknown role, an empty turn, no turn of the assistant to learn.
    """
    fields = _Fields(_named(record, config), config)
    form = _form_of(fields, config.format)
    if form == "text":
        text = fields.get("text")
        if not isinstance(text, str) or not is_unicode(text):
            raise ConversationError(f"field {fields.name('text')!r} is not a text")
        return text
    conversation = _checked(_FORMS[form](fields), _tools(fields))
    if not set(conversation.answers) - conversation.given:
        raise ConversationError("no turn of the assistant to learn")
    return conversation


def said_in(record: Any, config: ChatConfig) -> str:
    """All that is said in a record's conversation, one turn after the other; "" where there is none."""
    try:
        found = conversation_of(record, config)
    except ConversationError:
        return ""
    return found if isinstance(found, str) else "\n".join(message["content"] for message in found.messages)


class _Fields:
    """A record whose fields have their usual names, whatever the config calls them."""

    def __init__(self, record: Mapping[str, Any], config: ChatConfig):
        self._record, self._names = record, config.fields
        self._roles = config.roles

    def name(self, field: str) -> str:
        return self._names.get(field, field)

    def has(self, field: str) -> bool:
        return self._record.get(self.name(field)) is not None

    def get(self, field: str) -> Any:
        return self._record.get(self.name(field))

    def text(self, field: str) -> str:
        """The text of a field; "" where there is none."""
        value = self.get(field)
        if value is not None and not isinstance(value, str):
            raise ConversationError(f"field {self.name(field)!r} is of type {type(value).__name__}, not a text")
        return value or ""

    def listed(self, field: str) -> list[Any]:
        """The list of a field, also where it is written as JSON; empty where there is none."""
        value = _parsed(self.get(field))
        if value is not None and not isinstance(value, list | tuple):
            raise ConversationError(f"field {self.name(field)!r} is of type {type(value).__name__}, not a list")
        return list(value or ())

    def messages(self, field: str) -> list[dict[str, Any]]:
        return [self._message(n, item) for n, item in enumerate(self.listed(field), start=1)]

    def _message(self, number: int, item: Any) -> dict[str, Any]:
        """OpenAI's and ShareGPT's messages, told apart one by one."""
        if not isinstance(item, Mapping):
            raise ConversationError(
                f"turn {number} is of type {type(item).__name__}, not a mapping with role and content"
            )
        message = {key: value for key, value in item.items() if value is not None}
        role = message.pop(self.name("role"), None) or message.pop(self.name("from"), None)
        content = message.pop(self.name("content"), None)
        if content is None:
            content = message.pop(self.name("value"), None)
        known = {**{name: name for name in ROLES}, **_OTHER_ROLES, _CALL: _CALL, **self._roles}
        if not isinstance(role, str) or role not in known:
            raise ConversationError(f"turn {number} has the unknown role {role!r}; known are {', '.join(known)}")
        if known[role] == _CALL:
            return {"role": "assistant", "tool_calls": [_call(number, {"function": _parsed(content)})]}
        return {"role": known[role], **({} if content is None else {"content": content}), **message}


def _named(record: Any, config: ChatConfig) -> Mapping[str, Any]:
    if isinstance(record, str):
        return {config.fields.get("text", "text"): record}
    if isinstance(record, list | tuple):
        return {config.fields.get("messages", "messages"): record}
    if not isinstance(record, Mapping):
        raise ConversationError(f"a record of type {type(record).__name__}, not of fields")
    return record


def _form_of(fields: _Fields, declared: str) -> str:
    needed = {declared: _NEEDED[declared]} if declared != "auto" else _NEEDED
    for form, names in needed.items():
        if all(map(fields.has, names)):
            return form
    wanted = " or ".join(" and ".join(repr(fields.name(name)) for name in names) for names in needed.values())
    raise ConversationError(f"no fields {wanted}")


def _messages(fields: _Fields) -> list[dict[str, Any]]:
    return _with_system(fields, fields.messages("messages"))


def _sharegpt(fields: _Fields) -> list[dict[str, Any]]:
    return _with_system(fields, fields.messages("conversations"))


def _alpaca(fields: _Fields) -> list[dict[str, Any]]:
    """The input, if there is one, follows the instruction behind an empty line; `history` holds pairs from before."""
    said = []
    for pair in fields.listed("history"):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ConversationError(f"field {fields.name('history')!r} is not a list of pairs")
        said += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = "\n\n".join(part for part in (fields.text("instruction"), fields.text("input")) if part)
    said += [{"role": "user", "content": asked}, {"role": "assistant", "content": fields.text("output")}]
    return _with_system(fields, said)


def _prompt_completion(fields: _Fields) -> list[dict[str, Any]]:
    """Two texts, or lists of messages; what the assistant says in a prompt is not to be learned."""
    prompt = _side(fields, "prompt", "user")
    for message in prompt:
        if message["role"] == "assistant":
            message["weight"] = 0
    return _with_system(fields, prompt + _side(fields, "completion", "assistant"))


def _side(fields: _Fields, field: str, role: str) -> list[dict[str, Any]]:
    if isinstance(fields.get(field), str):
        return [{"role": role, "content": fields.text(field)}]
    return fields.messages(field)


def _with_system(fields: _Fields, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages behind the system prompt of a field of its own, where there is one and none among them."""
    prompt = fields.text("system")
    if not prompt or (messages and messages[0]["role"] in ("system", "developer")):
        return messages
    return [{"role": "system", "content": prompt}, *messages]


# Forms in the order in which a record's fields are looked at, each with the fields that make it one.
_NEEDED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
_FORMS: dict[str, Callable[[_Fields], list[dict[str, Any]]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
}


def _tools(fields: _Fields) -> tuple[Mapping[str, Any], ...] | None:
    tools = fields.listed("tools")
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise ConversationError(f"field {fields.name('tools')!r} is not a list of JSON Schemas")
    return tuple(tools) or None


def _checked(messages: Sequence[dict[str, Any]], tools: tuple[Mapping[str, Any], ...] | None) -> Conversation:
    if not messages:
        raise ConversationError("no turns at all")
    given, made = set(), []
    for number, message in enumerate(messages, start=1):
        weight = message.pop("weight", 1)
        if weight not in (0, 1):
            raise ConversationError(f"turn {number} has weight {weight!r}; a turn's weight is 0 or 1")
        if not weight and message["role"] == "assistant":
            given.add(number - 1)
        made.append(_whole_message(number, message))
    if not _is_json(made) or not _is_json(tools):
        raise ConversationError("something that is not Unicode text or plain JSON data")
    return Conversation(tuple(made), tools, frozenset(given))


def _whole_message(number: int, message: dict[str, Any]) -> dict[str, Any]:
    made = {**message, "content": _content(number, message.get("content"))}
    calls = _parsed(made.pop("tool_calls", None)) or []
    if not isinstance(calls, list | tuple):
        raise ConversationError(f"turn {number} has tool_calls of type {type(calls).__name__}, not a list")
    if calls:
        made["tool_calls"] = [_call(number, call) for call in calls]
    elif made["role"] in _MUST_SAY and not made["content"].strip():
        raise ConversationError(f"turn {number} ({made['role']}) is empty")
    return made


def _content(number: int, content: Any) -> str:
    """The text of a message, also where it is a list of parts that are all text; templates differ in what they take."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ConversationError(f"turn {number} has content of type {type(content).__name__}, not a text")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ConversationError(f"turn {number} has a part that is no text ({kind})")
        texts.append(part["text"])
    return "".join(texts)


def _call(number: int, call: Any) -> dict[str, Any]:
    """A call of a function whose arguments are an object: OpenAI writes them as JSON, which templates would quote."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConversationError(f"turn {number} calls a function without a name")
    arguments = _parsed(function.get("arguments"))
    made = {**function, "arguments": {} if arguments is None else arguments}
    return {**({} if function is call else call), "type": "function", "function": made}


def _parsed(value: Any) -> Any:
    """What a text of JSON stands for; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _is_json(value: Any) -> bool:
    try:
        return is_unicode(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError):
        return False
