"""Text that arrives in pieces, read as though it were whole. Knows nothing of what the text is.

What reads is a generator that stops, with a bare `yield`, wherever it needs more text; so the code that follows a
format is straight, and does the same however the text is cut.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from typing import Any

Reading = Generator[None, None, Any]  # what it returns is its result


class Source:
    """The text and how far it is read. `at` counts characters since the start."""

    def __init__(self) -> None:
        self.at = 0
        self.ended = False
        self._text = ""
        self._base = 0  # where _text begins
        self._pin: int | None = None

    def push(self, text: str) -> None:
        """More text has come."""
        keep = self.at if self._pin is None else self._pin
        self._text, self._base = self._text[keep - self._base :] + text, keep

    @property
    def rest(self) -> str:
        """What has come and is not read."""
        return self._text[self.at - self._base :]

    def pin(self) -> None:
        """Keeps what follows, to go back to here."""
        self._pin = self.at

    def release(self) -> None:
        """There is no going back any more."""
        self._pin = None

    def back(self) -> bool:
        """Goes back to the pin. False where it was released."""
        if self._pin is None:
            return False
        self.at, self._pin = self._pin, None
        return True

    def more(self, count: int = 1) -> Reading:
        """Waits for so many unread characters, or the end. Whether they are there."""
        while len(self._text) - (self.at - self._base) < count:
            if self.ended:
                return False
            yield
        return True

    def skip_space(self) -> Reading:
        """Reads white space, all there is."""
        while (yield from self.more()):
            rest = self.rest
            kept = rest.lstrip()
            self.at += len(rest) - len(kept)
            if kept:
                return

    def peek(self) -> Reading:
        """The next character that is no white space, "" at the end."""
        yield from self.skip_space()
        return self.rest[:1]

    def take(self, literal: str) -> Reading:
        """Reads a literal behind white space. False where something else is there."""
        yield from self.skip_space()
        while not self.rest.startswith(literal):
            if self.ended or not literal.startswith(self.rest):
                return False
            yield
        self.at += len(literal)
        return True

    def up_to(self, marks: Sequence[str]) -> Reading:
        """Reads and returns the text before the first of the marks, or to the end."""
        pieces: list[str] = []
        yield from self.pass_until(marks, pieces.append)
        return "".join(pieces)

    def pass_until(self, marks: Sequence[str], tell: Callable[[str], None]) -> Reading:
        """Hands on the text before the first of the marks as soon as it is certain. That mark, which is not read; None
        at the end."""
        while True:
            rest = self.rest
            found = [(place, mark) for mark in marks if (place := rest.find(mark)) >= 0]
            place, mark = min(found, default=(len(rest) if self.ended else _certain(rest, marks), None))
            self.at += place
            if place:
                tell(rest[:place])
            if mark is not None or self.ended:
                return mark
            yield

    def json_string(self) -> Reading:
        """Reads a JSON string behind white space and returns its value. None where there is none."""
        if (yield from self.peek()) != '"':
            return None
        size = 1
        while (yield from self.more(size + 1)):
            character = self.rest[size]
            size += 2 if character == "\\" else 1
            if character == '"':
                break
        literal = self.rest[:size]
        self.at += len(literal)
        try:
            return json.loads(literal)
        except ValueError:
            return None

    def json_value(self, tell: Callable[[str], None]) -> Reading:
        """Hands on a JSON object or array as it comes, to the bracket that closes its first one; what is between
        them is not checked."""
        depth, quoted, escaped = 0, False, False
        while (yield from self.more()):
            rest = self.rest
            for place, character in enumerate(rest, 1):
                if escaped:
                    escaped = False
                elif quoted:
                    quoted, escaped = character != '"', character == "\\"
                elif character == '"':
                    quoted = True
                else:
                    depth += (character in "{[") - (character in "}]")
                    if depth == 0:
                        self.at += place
                        tell(rest[:place])
                        return
            self.at += len(rest)
            tell(rest)


def _certain(text: str, marks: Sequence[str]) -> int:
    """How much of the text cannot be the beginning of a mark."""
    longest = max(map(len, marks), default=1) - 1
    starts = range(max(0, len(text) - longest), len(text))
    return next((i for i in starts if any(mark.startswith(text[i:]) for mark in marks)), len(text))
