"""An engine that needs no model: what it says is a function of the prompt and the seed, as an engine's is.

A prompt that ends in "say TEXT" is continued by TEXT and the end; any other by letters without end.
"""

import threading
import time
import zlib
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jaxformers.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from jaxformers.infer.request import EngineStats, Event, QueueFull, Request, TokenLogprobs
from jaxformers.serve.served import Served

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if tools %}tools: {{ tools | length }}\n{% endif %}"
    "{% if add_generation_prompt %}{{ messages[-1].content }}{% endif %}"
)
LETTERS = b"abcdefghijklmnopqrstuvwxyz "
MAX_LENGTH = 512


def talkative_tokenizer(folder: Path) -> Tokenizer:
    """Bytes, with a chat template whose text ends in the last message."""
    byte_tokenizer(["<|mark|>"]).save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return load_tokenizer(folder)


@dataclass
class Running:
    number: int
    request: Request
    script: deque[int] | None
    made: int = 0
    told_prompt: bool = False
    letters: int = 0

    def next_token(self) -> int | None:
        if self.script is not None:
            return self.script.popleft() if self.script else None
        self.letters = zlib.crc32(b"%d" % self.letters)
        return LETTERS[self.letters % len(LETTERS)]


@dataclass
class Talker:
    """Implements `infer.request.Driven`. pause: seconds of a step. broken: what a step raises."""

    slots: int = 4
    queue_requests: int = 16
    max_length: int = MAX_LENGTH
    vocab_size: int = 300
    eos: int = 257
    tokens_a_step: int = 4
    pause: float = 0.0
    broken: Exception | None = None
    adapters: tuple[str, ...] = ("tuned",)
    seen: list[Request] = field(default_factory=list)
    steps: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    warm: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self):
        self._lock = threading.Lock()
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        self._cancelled: list[int] = []
        self._next = 0
        self.finished = self.cancelled = self.new_tokens = self.prompt_tokens = 0
        self.gate.set()
        self.warm.set()

    def submit(self, request: Request) -> int:
        if len(request.prompt) + request.max_new_tokens > self.max_length:
            raise ValueError("too long")
        if any(not 0 <= token < self.vocab_size for token in request.prompt):
            raise ValueError("a foreign id")
        with self._lock:
            if len(self._waiting) >= self.queue_requests:
                raise QueueFull
            self._next += 1
            self.seen.append(request)
            self._waiting.append(Running(self._next, request, *self._script(request)))
            return self._next

    def _script(self, request: Request):
        text = bytes(token for token in request.prompt if token < 256)
        _, said, script = text.rpartition(b"say ")
        seed = zlib.crc32(text + b"%d" % (request.seed or 0))
        return (deque([*script]) if said else None, 0, False, seed)

    def cancel(self, request: int) -> None:
        with self._lock:
            self._cancelled.append(request)

    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._cancelled)

    def step(self) -> list[Event]:
        self.gate.wait(30)
        if self.broken is not None:
            raise self.broken
        time.sleep(self.pause)
        with self._lock:
            self.steps += 1
            events = self._end_cancelled()
            while self._waiting and len(self._running) < self.slots:
                self._running.append(self._waiting.popleft())
            events += [self._advance(one) for one in self._running]
            over = {event.request for event in events if event.finish}
            self._running = [one for one in self._running if one.number not in over]
            self.finished += sum(event.finish in ("stop", "length") for event in events)
            return events

    def _end_cancelled(self) -> list[Event]:
        gone = set(self._cancelled)
        known = [one for one in (*self._waiting, *self._running) if one.number in gone]
        self._waiting = deque(one for one in self._waiting if one.number not in gone)
        self._running = [one for one in self._running if one.number not in gone]
        self._cancelled = []
        self.cancelled += len(known)
        return [Event(one.number, finish="cancelled") for one in known]

    def _advance(self, one: Running) -> Event:
        request, tokens, finish = one.request, [], None
        while len(tokens) < self.tokens_a_step and finish is None:
            if one.made == request.max_new_tokens:
                finish = "length"
                break
            token = one.next_token()
            token = self.eos if token is None else token
            if token in request.stop_ids and one.made >= request.min_new_tokens:
                finish = "stop"
                break
            tokens.append(token)
            one.made += 1
        if finish is None and one.made == request.max_new_tokens:
            finish = "length"
        self.new_tokens += len(tokens)
        told = None if request.logprobs is None else tuple(self._told(t, request.logprobs) for t in tokens)
        vector = None if request.pooling is None else counts_of(request.prompt)
        prompt, cached = self._of_prompt(one), 0 if one.told_prompt else 3
        event = Event(one.number, tuple(tokens), finish, told, prompt, cached, vector=vector)
        if not one.told_prompt:
            self.prompt_tokens += len(request.prompt)
        one.told_prompt = True
        return event

    def _of_prompt(self, one: Running):
        wanted = one.request.prompt_logprobs
        if wanted is None or one.told_prompt:
            return None
        first, *others = one.request.prompt
        return (TokenLogprobs(first, None, ()), *(self._told(token, wanted) for token in others))

    @staticmethod
    def _told(token: int, top: int) -> TokenLogprobs:
        likeliest = ((token, -0.5), *((other, -np.inf) for other in range(97, 96 + top)))
        return TokenLogprobs(token, -0.5, likeliest[:top])

    def stats(self) -> EngineStats:
        running, waiting = len(self._running), len(self._waiting)
        return EngineStats(
            running=running,
            waiting=waiting,
            waiting_tokens=sum(len(one.request.prompt) for one in self._waiting),
            pages_total=100,
            pages_used=running,
            pages_cached=10,
            pages_free=90 - running,
            prompt_tokens=self.prompt_tokens,
            cached_prompt_tokens=3 * self.finished,
            new_tokens=self.new_tokens,
            finished=self.finished,
            cancelled=self.cancelled,
            compilations_after_ready=0,
        )

    def warm_up(self) -> None:
        self.warm.wait(30)


def counts_of(prompt) -> np.ndarray:
    """How often each byte is in a prompt, as a vector of length 1."""
    counts = np.bincount(prompt, minlength=300)[:300].astype(np.float32)
    return counts / np.linalg.norm(counts)


def served_by(engine: Talker, **fields) -> Served:
    values = {
        "name": "standin",
        "engine": engine,
        "max_length": engine.max_length,
        "vocab_size": engine.vocab_size,
        "pooling": "mean",
        "version": "1.2.3",
    }
    return Served(**values | fields)
