"""A conversation with a model: its turns so far, the next answer as it grows, and a terminal to hold it in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from jaxformers.api import Model
from jaxformers.generation import Settings, stream

DEFAULT_NEW_TOKENS = 512  # of an answer
PROMPT = "> "
COMMANDS = {
    "/reset": "forget the conversation and begin anew",
    "/help": "list these commands",
    "/exit": "leave; so does the end of the input",
}


class Conversation:
    """Turns of a user and a model, by the model's chat template.

    `settings` are those of `generation.Settings`. `messages` is the conversation so far, in the form that templates
    read. ValueError for a model without a chat template or tokenizer, and for settings that are not allowed.
    """

    def __init__(self, model: Model, *, system: str | None = None, **settings: Any):
        if model.tokenizer is None:
            raise ValueError("this model has no tokenizer, so it cannot hold a conversation")
        if model.tokenizer.chat_template is None:
            raise ValueError("this model has no chat template, so it does not say how a conversation reads")
        self._settings = Settings(**settings)
        self._model = model
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forgets every turn; the system prompt stays."""
        self.messages = list(self._start)

    def answer(self, text: str) -> Iterator[str]:
        """The model's answer to the user's next turn, in pieces as it grows.

        What is read of an answer is what the model remembers. ValueError, and the conversation as it was, where it no
        longer fits in the model's context or the template refuses it.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._encode(messages)
        settings = vars(self._settings) | {"max_new_tokens": self._room(len(prompt))}
        pieces = stream(self._model, [prompt], **settings)
        answer = {"role": "assistant", "content": ""}
        self.messages = [*messages, answer]
        return self._remembered(pieces, answer)

    def _remembered(self, pieces: Iterator[Any], answer: dict[str, str]) -> Iterator[str]:
        for piece in pieces:
            answer["content"] += piece.text
            yield piece.text

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        tokenizer = self._model.tokenizer
        text = tokenizer.render_chat(messages, add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False)

    def _room(self, prompt: int) -> int:
        """Tokens that an answer may have."""
        own, wanted = self._model.generation.get("max_new_tokens"), self._settings.max_new_tokens
        if wanted is None:
            wanted = own or DEFAULT_NEW_TOKENS
        room = self._model.config.context_length - prompt
        if room < 1:
            raise ValueError(
                f"the conversation has grown to {prompt} tokens, which leaves no room for an answer in the model's "
                f"context of {self._model.config.context_length}; /reset begins a new one"
            )
        return min(wanted, room)


def converse(conversation: Conversation) -> None:
    """Holds the conversation on standard input and output, a turn a line, until the input ends.

    At a terminal, what goes wrong with one turn is told and the conversation goes on, and Ctrl-C cuts an answer short.
    Elsewhere the first error ends it.
    """
    at_terminal = sys.stdin.isatty()
    for line in _lines(at_terminal):
        try:
            if line in COMMANDS or _looks_like_command(line):
                if not _obey(line, conversation):
                    return
            elif line:
                _speak(conversation, line)
        except ValueError as error:
            if not at_terminal:
                raise
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            print()


def _lines(at_terminal: bool) -> Iterator[str]:
    if not at_terminal:
        yield from (line.strip() for line in sys.stdin)
        return
    import readline  # noqa: F401  gives input() a history and editing

    while True:
        try:
            yield input(PROMPT).strip()
        except EOFError:
            print()
            return


def _looks_like_command(line: str) -> bool:
    return line.startswith("/") and line[1:].isalpha()


def _obey(command: str, conversation: Conversation) -> bool:
    """Carries out a command; False where it ends the conversation."""
    match command:
        case "/exit":
            return False
        case "/reset":
            conversation.reset()
        case "/help":
            for name, meaning in COMMANDS.items():
                print(f"{name:8s} {meaning}")
        case _:
            raise ValueError(f"{command} is no command; there are {', '.join(COMMANDS)}")
    return True


def _speak(conversation: Conversation, line: str) -> None:
    for piece in conversation.answer(line):
        print(piece, end="", flush=True)
    print()
