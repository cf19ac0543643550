"""Conversations as texts, and which characters of them the model is to learn: what it writes itself, to the end of its
turns.

A template with `{% generation %}` marks says what the model writes. Of another, each answer begins where the prompt for
it ends and goes on to where the next turn begins; both are found by rendering parts of the conversation, and believed
only where the whole conversation reads the same there. Knows no ids and no file.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jaxformers.data.chat import ChatTemplateError, MarkedText, has_marks, render_chat, render_marked
from jaxformers.data.config import ChatConfig
from jaxformers.data.conversations import Conversation, ConversationError
from jaxformers.data.tokenizer import Tokenizer

_PROBE = "\ufdd2"  # an answer like no other: a code point that Unicode keeps free for uses such as this one

Range = tuple[int, int]  # characters [start, stop)


@dataclass(frozen=True)
class Written:
    """A conversation as one text, and the ranges of its characters to learn, in order."""

    text: str
    learned: tuple[Range, ...]


class Writer:
    """Writes conversations out as a tokenizer's chat template has them."""

    def __init__(self, tokenizer: Tokenizer, config: ChatConfig):
        self._tokenizer, self._config = tokenizer, config
        tokens = sorted({*tokenizer.special_tokens, *tokenizer.named_tokens.values()}, key=len, reverse=True)
        special = "|".join(map(re.escape, tokens)) or "(?!)"
        self._to_end_of_turn = re.compile(rf"\s*(?:{special})")
        self._after_end_of_turn = re.compile(rf"(?:{special})(\s+)\Z")

    def write(self, conversation: Conversation) -> Written:
        """The text and what to learn of it, as `chat.learn` says.

        Raises:
            ValueError: a template that refuses the conversation, or does not show what in it is the model's.
        """
        try:
            return self._write(conversation)
        except ChatTemplateError:
            # Some templates quote the arguments of calls themselves, others only join them to their text.
            joining = _with_arguments_as_texts(conversation)
            if joining == conversation:
                raise
        return self._write(joining)

    def _write(self, conversation: Conversation) -> Written:
        template = self._tokenizer.chat_template_for(tools=conversation.tools is not None)
        text = _Text(template, conversation, {**self._tokenizer.named_tokens, **self._config.variables})
        if self._config.learn == "all":
            return Written(text.whole(), ((0, len(text.whole())),))
        if has_marks(template):
            marked = text.marked()
            return Written(marked.text, _chosen(marked.written, conversation, self._config.learn))
        wanted = [n for n in conversation.answers if n not in conversation.given]
        if self._config.learn == "last":
            wanted = wanted[-1:]
        return Written(text.whole(), tuple(self._span(text, text.whole(), n) for n in wanted))

    def _span(self, text: "_Text", whole: str, turn: int) -> tuple[int, int]:
        """The characters of one answer and of the token that ends it."""
        prompt, until = text.before(turn), text.until(turn)
        if prompt is not None and whole.startswith(prompt) and until is not None and whole.startswith(until):
            start, end = len(prompt), len(until)
            if behind := self._after_end_of_turn.search(whole[start:end]):
                end -= len(behind[1])
        else:
            # An earlier turn may read otherwise once others follow, and a text that ends here have another end.
            start, end = self._around(text, whole, turn)
            if prompt is not None and whole.startswith(prompt):
                start = len(prompt)
        if start >= end:
            raise ConversationError(
                f"the chat template rewrites turn {turn + 1}, so which tokens are the model's cannot be told"
            )
        return start, end

    def _around(self, text: "_Text", whole: str, turn: int) -> tuple[int, int]:
        """The characters of one answer as those that change with it, and the end-of-turn token behind; (0, 0) if what
        is around them changes too."""
        head, tail = text.around(turn)
        if head is None or not whole.startswith(head) or not whole.endswith(tail):
            return 0, 0
        ending = self._to_end_of_turn.match(tail)
        return len(head), len(whole) - len(tail) + (ending.end() if ending else 0)


class _Text:
    """A conversation under a template, whole and in parts. A part that the template refuses is None."""

    def __init__(self, template: str, conversation: Conversation, variables: dict[str, Any]):
        self._template, self._messages = template, list(conversation.messages)
        self._options = {**variables, "tools": None if conversation.tools is None else list(conversation.tools)}
        self.whole = functools.cache(partial(render_chat, template, self._messages, **self._options))

    def marked(self) -> MarkedText:
        return render_marked(self._template, self._messages, **self._options)

    def before(self, turn: int) -> str | None:
        """What the model reads before it writes the turn."""
        return self._part(self._messages[:turn], prompt=True)

    def until(self, turn: int) -> str | None:
        """The conversation if it ended behind the turn."""
        return self.whole() if turn == len(self._messages) - 1 else self._part(self._messages[: turn + 1])

    def around(self, turn: int) -> tuple[str, str] | tuple[None, None]:
        """What stands before and behind the turn's words if they are others."""
        answer = {"role": "assistant", "content": _PROBE}
        text = self._part([*self._messages[:turn], answer, *self._messages[turn + 1 :]])
        if text is None or text.count(_PROBE) != 1:
            return None, None
        head, _, tail = text.partition(_PROBE)
        return head, tail

    def _part(self, messages: list[Any], *, prompt: bool = False) -> str | None:
        try:
            return render_chat(self._template, messages, add_generation_prompt=prompt, **self._options)
        except ChatTemplateError:
            return None


def _with_arguments_as_texts(conversation: Conversation) -> Conversation:
    """The conversation with the arguments of every call as JSON."""

    def call(call: Mapping[str, Any]) -> dict[str, Any]:
        written = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": written}}

    messages = [
        {**message, "tool_calls": list(map(call, message["tool_calls"]))} if "tool_calls" in message else message
        for message in conversation.messages
    ]
    return replace(conversation, messages=tuple(messages))


def _chosen(marks: Sequence[Range], conversation: Conversation, learn: str) -> tuple[Range, ...]:
    """The marks around the answers to learn."""
    marks = _joined(marks)
    if not marks:
        raise ConversationError("the chat template marks nothing of it as written by the model")
    answers, given = conversation.answers, conversation.given
    if not given and learn != "last":
        return marks
    if len(marks) != len(answers):
        raise ConversationError(
            f"the chat template marks {len(marks)} texts for {len(answers)} turns of the assistant, so which to learn "
            "cannot be told"
        )
    wanted = tuple(mark for mark, turn in zip(marks, answers, strict=True) if turn not in given)
    return wanted[-1:] if learn == "last" else wanted


def _joined(marks: Sequence[Range]) -> tuple[Range, ...]:
    """Marks side by side, which some templates set for one answer, as one; those around nothing as none."""
    joined: list[Range] = []
    for start, stop in marks:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif start < stop:
            joined.append((start, stop))
    return tuple(joined)
