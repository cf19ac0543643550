"""Where a growing text ends: stop strings, found however the text is cut into tokens and pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxformers.data.tokenizer import TextStream, Tokenizer

CONTEXT_IDS = 8  # prompt tokens before a continuation that tell how its first token reads


class StoppableText:
    """The text of one growing continuation, up to the first stop string that completes.

    min_tokens: stop strings count once so many tokens have come. keep: special tokens that show in the text. seen:
    characters that have come, of which those after a stop string or in the middle of one were never returned.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        *,
        prompt: Sequence[int],
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        keep: Sequence[str] = (),
    ):
        self.finish: str | None = None
        self.seen = 0
        self._stops = stops
        self._tokens_to_go = min_tokens
        self._held = ""  # may be the start of a stop string
        self._stream = TextStream(tokenizer, skip_special_tokens=skip_special_tokens, keep=keep)
        for token in prompt[-CONTEXT_IDS:]:
            self._stream.push(token)
        self._stream.flush()

    def push(self, tokens: Sequence[int], finish: str | None) -> str:
        """The text that is certain now. `finish` is why no more tokens will come, if so."""
        out = ""
        for token in tokens:
            self._tokens_to_go -= 1
            out += self._release(self._stream.push(token))
            if self.finish:
                return out
        if finish:
            out += self._release(self._stream.flush())
            if self.finish is None:
                out, self.finish = out + self._held, finish
        return out

    def _release(self, text: str) -> str:
        """`text` after what is held, without what has to be held on to or comes after a stop."""
        self.seen += len(text)
        text = self._held + text
        if self._tokens_to_go > 0:
            return text
        found = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stops if stop in text]
        if found:  # the first to end, however the text was cut into pieces; of those, the one that began first
            end, length = min(found)
            self.finish = "stop"
            return text[: end + length]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the first of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Stops(NamedTuple):
    """Stop strings by how they are found: as one special token, which never shows in the text, or in the text."""

    ids: list[int]
    texts: list[str]


def split_stops(stops: Sequence[str], tokenizer: Tokenizer) -> Stops:
    """Tells the stop strings that are special tokens from the others."""
    special = {tokenizer.token(i): i for i in tokenizer.special_ids} if stops else {}
    return Stops([special[stop] for stop in stops if stop in special], [stop for stop in stops if stop not in special])
