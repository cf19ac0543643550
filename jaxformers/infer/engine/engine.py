"""What runs next: requests come from a queue into slots, prompts are read piece by piece between decoding steps, and
every slot makes its tokens in one batch.

A request's tokens depend on its prompt, its settings and its seed alone. All slots always compute, whether they have a
request or not; a prompt is always cut at the same places; what follows it is always decoded, never prefilled; and only
what was prefilled is ever found by others. So no number depends on who else runs, in which slot, or on what was cached.

Token ids only. `step` belongs to one thread; requests may come and be cancelled in any.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from jaxformers.infer.engine import programs
from jaxformers.infer.engine.adapters import Adapters, salt_of
from jaxformers.infer.engine.checks import check_request, pages_needed
from jaxformers.infer.engine.compilations import compilations
from jaxformers.infer.engine.drafting import make_drafter
from jaxformers.infer.engine.pages import Pages, piece_digests
from jaxformers.infer.engine.placement import mesh_of, paged_runtime
from jaxformers.infer.engine.queue import Queue, Waiting
from jaxformers.infer.engine.recent import Held, Recent
from jaxformers.infer.engine.running import Running, told
from jaxformers.infer.engine.sizes import Sizes, tokens_at_once
from jaxformers.infer.engine.state import init_state, new_row
from jaxformers.infer.generate import Prepared, prepare_model
from jaxformers.infer.request import EngineConfig, EngineStats, Event, Finish, Request
from jaxformers.models.config import DynamicScaling, LongRopeScaling, ModelConfig
from jaxformers.models.params import Params
from jaxformers.parallel.mesh import replicated

SEEDS = 2**32


class Loaded(Protocol):
    """A model as `jaxformers.load` returns it, as far as an engine looks."""

    config: ModelConfig
    params: Params
    mesh: Mesh
    dtype: Any


class Engine:
    """Answers requests with one model; see `infer.request.Driven` for how it is driven.

    A request is taken from the queue once there is a slot and room for all its tokens, so nothing that runs is ever put
    back. While a request with a constraint runs, every slot makes one token a step. `draft` is the smaller model that
    guesses tokens where `config.speculate` is "draft". ValueError for sizes, or models, that do not fit together.
    """

    def __init__(
        self,
        model: Loaded | Prepared,
        config: EngineConfig = EngineConfig(),
        *,
        draft: Loaded | Prepared | None = None,
    ):
        model, draft = _prepared(model), None if draft is None else _prepared(draft)
        self.config, self._cfg = config, model.config
        self._sizes = sizes = Sizes.of(config, model.config)
        self._mesh = mesh_of(model.params)
        self._model = {"cfg": model.config, "runtime": paged_runtime(model, sizes, self._mesh)}
        with jax.set_mesh(self._mesh):
            self._state = init_state(**self._model, sizes=sizes)
        self._adapters = Adapters(model, config, replicated(self._mesh))
        self._params = self._adapters.params
        self._drafter = make_drafter(config, model, sizes, draft, self._mesh)
        self._ahead = 0 if self._drafter is None else self._drafter.ahead
        self._most = tokens_at_once(config)
        self.pages = Pages(sizes.pages)
        self._piece_pages = config.prefill_piece // config.page_size
        self.recent = _recent(sizes, config)
        self._running: dict[int, Running] = {}  # by slot
        self._lock = threading.Lock()  # for what other threads touch: adapters, and the next four
        self._queue = Queue(config.queue_requests, config.queue_tokens)
        self._numbers = 0
        self._unwanted: set[int] = set()  # cancelled, but not looked for yet
        self._left: list[int] = []  # cancelled while they waited, but not told yet
        self._ready = False
        self._sums = dict.fromkeys(
            (
                "prompt_tokens",
                "cached_prompt_tokens",
                "new_tokens",
                "finished",
                "cancelled",
                "compilations",
                "drafted_tokens",
                "accepted_tokens",
            ),
            0,
        )

    @property
    def vocab_size(self) -> int:
        """How many ids the model has."""
        return self._cfg.vocab_size

    def submit(self, request: Request) -> int:
        """The number of the request, which waits from now on. ValueError in one line for one that this engine could
        never answer; QueueFull where too much waits."""
        check_request(request, self._cfg, self.config, self._sizes)
        request = dataclasses.replace(request, prompt=tuple(map(int, request.prompt)))
        seed = int(np.random.default_rng().integers(SEEDS)) if request.seed is None else int(request.seed)
        with self._lock:
            adapter = self._adapters.find(request.adapter)
            self._queue.put(Waiting(request.priority, self._numbers, request, seed, adapter))
            self._numbers += 1
            return self._numbers - 1

    def cancel(self, request: int) -> None:
        """Ends a request, wherever it is; one last event tells so. A number that is over is no mistake."""
        with self._lock:
            if self._queue.remove(request):
                self._left.append(request)
            else:
                self._unwanted.add(request)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that requests may ask for."""
        return self._adapters.names

    def add_adapter(self, name: str, params: Params) -> None:
        """Lets requests ask for an adapter: the `LoRA` leaves of a plain tree, whose other leaves do not matter. At any
        time, by any thread. ValueError for one that does not fit into the room that the config has declared."""
        factors = self._adapters.factors(params)
        with self._lock:
            used = [run.waited.adapter for run in list(self._running.values())] + [w.adapter for w in self._queue]
            self._adapters.add(name, factors, used=[adapter for adapter in used if adapter is not None])

    def remove_adapter(self, name: str) -> None:
        """From now on no request may ask for it; those that did end with it. ValueError for a name that none has."""
        with self._lock:
            self._adapters.remove(name)

    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(len(self._queue) or self._running or self._left)

    def step(self) -> list[Event]:
        """Takes requests into free slots, reads some of their prompts, and makes a few tokens in every slot that is
        ready to."""
        before = compilations()
        with jax.set_mesh(self._mesh):  # whatever the caller's is: it is part of what a program is compiled for
            events = self._end_unwanted()
            self._admit()
            events += self._read_prompts()
            events += self._decode()
        if self._ready:
            self._sums["compilations"] += compilations() - before
        return events

    def warm_up(self) -> None:
        """Compiles, or loads from the compilation cache, all that will ever be run. Not while requests run."""
        assert not self._running, "an engine is warmed up before it has requests"
        with jax.set_mesh(self._mesh):
            for _ in range(2):  # the second time with a state that has been through every program, as later ones have
                self._run_every_program()
        jax.block_until_ready(self._state)
        self._ready = True

    def stats(self) -> EngineStats:
        """Counts at this moment, and sums since the start."""
        with self._lock:
            waiting, waiting_tokens = len(self._queue), self._queue.tokens
        sums = dict(self._sums)
        return EngineStats(
            running=len(self._running),
            waiting=waiting,
            waiting_tokens=waiting_tokens,
            pages_total=self.pages.total,
            pages_used=self.pages.used,
            pages_cached=self.pages.cached,
            pages_free=self.pages.free,
            compilations_after_ready=sums.pop("compilations"),
            **sums,
        )

    def _run_every_program(self) -> None:
        self._adapters.rehearse()
        self._params = self._adapters.params
        slot, piece, vocab_size = np.int32(0), self.config.prefill_piece, self._cfg.vocab_size
        nothing = np.zeros(piece, np.int32)
        row = new_row(Request(prompt=(0,)), 0, vocab_size)
        tables = self._tables([], {})
        self._state = programs.admit(self._state, slot, tables, row)
        if self.recent is not None:
            self._state = programs.turn(self._state, slot, tables)
        self._state, x = programs.prefill_chunk(
            self._params, self._state, slot, nothing, np.int32(0), np.int32(0), np.int32(0), **self._model
        )
        programs.score(self._params, x, nothing, **self._model)
        programs.pool(self._params, x, np.zeros(piece, np.float32), **self._model)
        self._state = programs.start(self._state, slot, np.int32(0), np.int32(0))
        self._state = programs.allow(self._state, slot, np.ones(vocab_size, bool))
        if self._drafter is not None:
            further = np.zeros(piece + self._ahead, np.int32)
            self._drafter.read(self._state, slot, further, np.int32(0), np.int32(1), x)
        self._make_tokens([], 1)
        self._state = programs.release(self._state, slot)

    # Coming and going

    def _end_unwanted(self) -> list[Event]:
        """Ends what was cancelled since the last step."""
        with self._lock:
            left, self._left = self._left, []
            unwanted, self._unwanted = self._unwanted, set()
        self._sums["cancelled"] += len(left)
        events = [Event(number, finish="cancelled") for number in left]
        for run in [run for run in self._running.values() if run.number in unwanted]:
            events.append(run.event(finish="cancelled"))
            self._end(run, "cancelled")
        return events

    def _admit(self) -> None:
        """Gives free slots to those whose turn it is, as long as there is room for all their tokens."""
        while len(self._running) < self.config.slots:
            with self._lock:
                if self._adapters.settle():  # before any request that asks for one of them
                    self._params = self._adapters.params
                waiting = self._queue.first()
                run = waiting and self._place(waiting)
                if run is None:
                    return
                self._queue.remove(run.number)
                self._running[run.slot] = run
            self._give_slot(run)
            self._sums["prompt_tokens"] += len(run.request.prompt)
            self._sums["cached_prompt_tokens"] += run.cached

    def _place(self, waiting: Waiting) -> Running | None:
        """A slot and pages for a request, those of its prompt's beginning shared where they are known; None where
        there is no room."""
        request, piece = waiting.request, self.config.prefill_piece
        digests = self._digests(waiting)
        shared = [] if request.asks_of_prompt else self._find(digests)
        needed = pages_needed(request, self.config.page_size)
        pages = self.pages.take(shared, needed - len(shared))
        if pages is None:
            return None
        slot = min(set(range(self.config.slots)) - self._running.keys())
        read = len(shared) * self.config.page_size
        assert read % piece == 0, (read, piece)
        run = Running(waiting, slot, pages, digests, read, read)
        if self.recent is not None:
            self.recent.share(run.recent, digests, read // piece)
        return run

    def _find(self, digests: list[bytes]) -> list[int]:
        """The pages of the longest known beginning of a prompt behind which it can go on."""
        found = self.pages.find(digests)
        if self.recent is None:
            return found
        return found[: self.recent.reach(digests, len(found) // self._piece_pages) * self._piece_pages]

    def _digests(self, waiting: Waiting) -> list[bytes]:
        """Of the pieces of its prompt that can be shared: whole ones, before the last token, which is decoded."""
        if not self.config.prefix_cache:
            return []
        prompt = np.asarray(waiting.request.prompt, np.int32)
        salt = salt_of(waiting.adapter) + _circumstances(self._cfg, len(prompt))
        return piece_digests(prompt[:-1], self.config.prefill_piece, salt=salt, ahead=self._ahead)

    def _give_slot(self, run: Running) -> None:
        """Tells the device whose slot it is, and with which pages."""
        adapter = run.waited.adapter
        number = 0 if adapter is None else adapter.number
        row = new_row(run.request, run.waited.seed, self._cfg.vocab_size, adapter=number)
        self._state = programs.admit(self._state, np.int32(run.slot), self._tables(run.pages, run.recent), row)

    def _end(self, run: Running, finish: Finish) -> None:
        """Takes a request's slot and pages from it: the only place where that is done."""
        self._state = programs.release(self._state, np.int32(run.slot))
        del self._running[run.slot]
        self.pages.give_back(run.pages)
        if self.recent is not None:
            self.recent.end(run.recent)
        self._sums["cancelled" if finish == "cancelled" else "finished"] += 1

    def _tables(self, pages: list[int], recent: Held) -> tuple[np.ndarray, ...]:
        """A slot's row of each table."""
        row = np.zeros(self._sizes.width, np.int32)
        row[: len(pages)] = pages
        return (row,) if self.recent is None else (row, self.recent.row(recent, self._sizes.width))

    def _move(self, run: Running, start: int, end: int) -> None:
        """Layers that look back only so far keep what is seen from positions `start` to `end`, and have room there."""
        if self.recent is not None and self.recent.move(run.recent, start, end):
            self._state = programs.turn(self._state, np.int32(run.slot), self._tables(run.pages, run.recent))

    # Prompts

    def _read_prompts(self) -> list[Event]:
        """Reads as much of the prompts as may be read between two decoding steps."""
        events = self._start_read()
        for _ in range(self.config.prefill_chunk // self.config.prefill_piece):
            unread = [run for run in self._running.values() if not run.is_read]
            if not unread:
                break
            self._read_piece(min(unread, key=lambda run: run.waited))
            events += self._start_read()
        return events

    def _read_piece(self, run: Running) -> None:
        """Reads one piece of a prompt, or finds it and more where somebody has read it since."""
        if self._adopt(run):
            return
        size, length = self.config.prefill_piece, len(run.request.prompt)
        tokens = run.piece(size + max(1, self._ahead))
        self._move(run, run.read, min(run.read + size, run.end))
        position, slot = np.int32(run.read), np.int32(run.slot)
        end, last = np.int32(run.end), np.int32(length - 1)
        self._state, x = programs.prefill_chunk(
            self._params, self._state, slot, tokens[:size], position, end, last, **self._model
        )
        if run.request.pooling is not None:
            run.pooled += jax.device_get(programs.pool(self._params, x, run.pooling_weights(size), **self._model))
        if self._drafter is not None:
            self._drafter.read(self._state, slot, tokens[: size + self._ahead], position, np.int32(length), x)
        if run.request.prompt_logprobs is not None:
            count = min(size, length - 1 - run.read)
            logprobs = jax.device_get(programs.score(self._params, x, tokens[1 : size + 1], **self._model))
            run.scored += told(tokens[1 : count + 1], logprobs, run.request.prompt_logprobs)
        number = run.read // size
        if number < len(run.digests):
            self.pages.remember(
                run.digests[number], run.pages[run.read // self.config.page_size :][: self._piece_pages]
            )
            if self.recent is not None:
                self.recent.remember(run.recent, run.digests[number], number)
        run.read += size

    def _adopt(self, run: Running) -> bool:
        """Whether others have read what a request would read next: its own pages for that go, and theirs come."""
        if run.request.asks_of_prompt:
            return False
        known, have = self._find(run.digests), run.read // self.config.page_size
        if len(known) <= have:
            return False
        own, new = run.pages[have : len(known)], known[have:]
        taken = self.pages.take(new, 0)
        assert taken == new
        self.pages.give_back(own)
        run.pages[have : len(known)] = new
        if self.recent is not None:
            self.recent.share(run.recent, run.digests, len(known) // self._piece_pages)
        self._give_slot(run)
        run.read = len(known) * self.config.page_size
        run.cached += len(new) * self.config.page_size
        self._sums["cached_prompt_tokens"] += len(new) * self.config.page_size
        return True

    def _start_read(self) -> list[Event]:
        """Lets those whose prompts are in the cache make tokens; those that want none are over."""
        events = []
        for run in [run for run in self._running.values() if run.is_read and not run.started]:
            run.started = True
            if run.request.max_new_tokens == 0:
                events.append(run.event(finish="length"))
                self._end(run, "length")
                continue
            token, position = run.request.prompt[-1], len(run.request.prompt) - 1
            self._state = programs.start(self._state, np.int32(run.slot), np.int32(token), np.int32(position))
        return events

    # Tokens

    def _decode(self) -> list[Event]:
        """A few tokens in every slot that has started; one where a constraint must be asked before the next, and while
        most slots are still to be read: they cost as much as those that make tokens."""
        constrained = [run for run in self._running.values() if run.started and run.request.constraint is not None]
        events = [event for run in constrained for event in self._constrain(run)]
        started = [run for run in self._running.values() if run.started]
        if not started:
            return events
        single = constrained or 2 * len(started) < len(self._running)
        count = 1 if single and self._drafter is None else self._most  # as many as are guessed may come at any time
        for run in started:
            end = len(run.request.prompt) + run.request.max_new_tokens - 1
            self._move(run, run.position, min(run.position + count, end))
        made = self._make_tokens(started, count)
        return events + [self._take(run, made) for run in started]

    def _make_tokens(self, started: list[Running], count: int) -> programs.Decoded:
        """What one call of the decoder made, on the host: up to `count` tokens, or as many as were guessed right."""
        if self._drafter is not None:
            return self._verify([run for run in started if run.request.constraint is None])
        self._state, made = programs.decode(
            self._params, self._state, np.int32(count), most=self.config.decode_steps, **self._model
        )
        return jax.device_get(made)

    def _verify(self, free: list[Running]) -> programs.Decoded:
        """What came of guesses for those whose next tokens may be any."""
        assert self._drafter is not None
        guesses = self._drafter.guess(self._state, free)
        self._state, made, x = programs.verify(self._params, self._state, guesses, **self._model)
        self._drafter.follow(made.tokens, x)
        guesses, made = jax.device_get((guesses, made))
        self._sums["drafted_tokens"] += int((guesses != programs.NO_TOKEN).sum())
        right = (guesses != programs.NO_TOKEN) & (guesses == made.tokens[:, :-1])
        self._sums["accepted_tokens"] += int(right.sum())
        return made

    def _take(self, run: Running, made: programs.Decoded) -> Event:
        """What a call made for one request, which ends with it if it is over."""
        count = int((made.tokens[run.slot] != programs.NO_TOKEN).sum())
        tokens, finish = run.finish_of(made.tokens[run.slot, :count])
        logprobs = None
        if run.request.logprobs is not None:
            logprobs = told(tokens, jax.tree.map(lambda values: values[run.slot], made.logprobs), run.request.logprobs)
        error = self._advance(run, tokens)
        if error is not None:
            tokens, finish, logprobs = [], "error", None
        run.made += len(tokens)
        if self._drafter is not None:
            self._drafter.note(run, tokens)
        self._sums["new_tokens"] += len(tokens)
        event = run.event(tokens, finish, logprobs=logprobs, error=error)
        if finish is not None:
            self._end(run, finish)
        return event

    def _constrain(self, run: Running) -> list[Event]:
        """Asks a request's constraint what may come next. One that fails, or leaves nothing, ends its request."""
        request = run.request
        assert request.constraint is not None
        try:
            allowed = checked_mask(request.constraint.allowed(), self._cfg.vocab_size)
            if run.made < request.min_new_tokens:
                allowed[list(request.stop_ids)] = False
            if not allowed.any():
                raise ValueError("the constraint leaves no token that may come next")
        except Exception as error:  # of code that is not ours: it must not end the others
            event = run.event(finish="error", error=one_line(error))
            self._end(run, "error")
            return [event]
        self._state = programs.allow(self._state, np.int32(run.slot), allowed)
        return []

    def _advance(self, run: Running, tokens: list[int]) -> str | None:
        """Tells a request's constraint what came; the line that says what went wrong there, if something did."""
        if run.request.constraint is None:
            return None
        try:
            for token in tokens:
                run.request.constraint.advance(token)
        except Exception as error:  # as above
            return one_line(error)
        return None


def _prepared(model: Loaded | Prepared) -> Prepared:
    if isinstance(model, Prepared):
        return model
    return prepare_model(model.params, model.config, model.mesh, dtype=model.dtype)


def checked_mask(mask: np.ndarray, vocab_size: int) -> np.ndarray:
    """A constraint's mask bool [V], as a copy. ValueError for anything else."""
    mask = np.array(mask)
    if mask.shape != (vocab_size,) or mask.dtype != bool:
        raise ValueError(f"the constraint allows {mask.dtype} {mask.shape}; it must be bool ({vocab_size},)")
    return mask


def one_line(error: Exception) -> str:
    """What went wrong in a constraint."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _recent(sizes: Sizes, config: EngineConfig) -> Recent | None:
    """The pages of layers that look back only so far, where these have pages of their own."""
    if sizes.recent_pages is None:
        return None
    assert sizes.window is not None
    pages = config.prefill_piece // config.page_size
    return Recent(sizes.recent_pages, window=sizes.window, piece=config.prefill_piece, piece_pages=pages)


def _circumstances(cfg: ModelConfig, length: int) -> bytes:
    """What besides the tokens before it the cache of a prompt's token depends on: where positions are scaled by the
    length of the prompt, on that."""
    scalings = [kind.rope.scaling for kind in cfg.layers if kind.rope is not None]
    if any(isinstance(s, DynamicScaling) and length > s.original_positions for s in scalings):
        return f"length {length}".encode()
    is_long = any(isinstance(s, LongRopeScaling) and length > s.original_positions for s in scalings)
    return b"long" if is_long else b""
