"""Tokens of one continuation as text, with what is told of each token once its text is certain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxformers.data.stops import StoppableText
from jaxformers.data.tokenizer import TextStream, Tokenizer
from jaxformers.infer.request import Event, TokenLogprobs

LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's own number for a token that cannot come


class Placed(NamedTuple):
    """What is told of a token, and the character of the text at which it begins."""

    start: int
    of: TokenLogprobs


@dataclass(frozen=True)
class Piece:
    """More of a continuation. logprobs: of the tokens whose text began in what was told so far."""

    text: str
    logprobs: list[Placed]
    finish: str | None


class ContinuationText:
    """One continuation as it grows. `tokens` counts what came of it; `error` is why it ended early."""

    def __init__(self, text: StoppableText):
        self.tokens = 0
        self.cached_tokens = 0
        self.error: str | None = None
        self._text = text
        self._told = 0  # characters
        self._untold: list[Placed] = []

    @property
    def finish(self) -> str | None:
        return self._text.finish

    def take(self, event: Event) -> Piece:
        """The text that is certain now."""
        self.cached_tokens = event.cached_tokens or self.cached_tokens
        self.error = event.error
        out = ""
        for place, token in enumerate(event.tokens):
            self.tokens += 1
            if event.logprobs is not None:
                self._untold.append(Placed(self._text.seen, event.logprobs[place]))
            out += self._text.push((token,), None)
            if self.finish:
                break
        if event.finish is not None and self.finish is None:
            out += self._text.push((), event.finish)
            self._told += len(out)
            told, self._untold = self._untold, []  # the last tokens may have no text
            return Piece(out, told, self.finish)
        self._told += len(out)
        return Piece(out, self._certain(), self.finish)

    def _certain(self) -> list[Placed]:
        count = next((i for i, entry in enumerate(self._untold) if entry.start >= self._told), len(self._untold))
        told, self._untold = self._untold[:count], self._untold[count:]
        return told


class Echo(NamedTuple):
    """A prompt as text, and what is told of its tokens."""

    text: str
    logprobs: list[Placed]


def echo(tokenizer: Tokenizer, prompt: Sequence[int], entries: Iterable[TokenLogprobs], *, skip_special: bool) -> Echo:
    """The prompt as it is told before its continuation; `entries` are of its tokens, in order, or there are none."""
    stream, text, starts = TextStream(tokenizer, skip_special_tokens=skip_special), "", []
    for token in prompt:
        starts.append(len(text))
        text += stream.push(token)
    return Echo(text + stream.flush(), [Placed(start, of) for start, of in zip(starts, entries, strict=False)])


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as a text; one that is no whole character is spelled by its bytes, as OpenAI does."""
    content = tokenizer.token_bytes(token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def bounded_logprob(value: float) -> float:
    return max(value, LEAST_LOGPROB)


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[Placed]) -> dict[str, Any]:
    """OpenAI's `logprobs` of a chat's choice."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        content = tokenizer.token_bytes(token)
        return {"token": token_text(tokenizer, token), "logprob": bounded_logprob(logprob), "bytes": list(content)}

    told = [{**one(of.token, of.logprob or 0.0), "top_logprobs": [one(*pair) for pair in of.top]} for _, of in entries]
    return {"content": told, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, entries: Sequence[Placed], *, top: int) -> dict[str, Any]:
    """OpenAI's `logprobs` of a completion's choice, whose offsets count characters from the start of its text."""
    return {
        "tokens": [token_text(tokenizer, of.token) for _, of in entries],
        "token_logprobs": [None if of.logprob is None else bounded_logprob(of.logprob) for _, of in entries],
        "top_logprobs": [_likeliest(tokenizer, of) for _, of in entries] if top else None,
        "text_offset": [start for start, _ in entries],
    }


def _likeliest(tokenizer: Tokenizer, of: TokenLogprobs) -> dict[str, float] | None:
    """By text, the best first, the token itself among them, as OpenAI has it. Of tokens that read alike, the likeliest
    is told."""
    if of.logprob is None:
        return None
    likeliest: dict[str, float] = {}
    for token, logprob in (*of.top, (of.token, of.logprob)):
        likeliest.setdefault(token_text(tokenizer, token), bounded_logprob(logprob))
    return likeliest
