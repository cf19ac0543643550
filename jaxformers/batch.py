"""Many prompts from a file through the engine, their answers into another, so that a killed run can go on.

Answers are written as they are finished, so their order is none; `index` says which prompt each is for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from jaxformers.batch_lines import Line, Task, parse, read_lines, resume
from jaxformers.data.stops import StoppableText
from jaxformers.generation import Settings, encode, new_tokens, prepared, sampling_params, stops_of
from jaxformers.infer.engine import Engine
from jaxformers.infer.engine.state import KNOBS
from jaxformers.infer.request import EngineConfig, Event, Request

if TYPE_CHECKING:
    from jaxformers.api import Model

LONGEST = 8192  # tokens of a prompt and its answer unless more are asked for: a whole long context takes a vast cache
READ_AT_ONCE = 2048  # tokens of prompts before others get on: nobody waits for single tokens, so slots are filled first


@dataclass
class Summary:
    """total: prompts; earlier: answered by runs before; errors: the first line that says what went wrong, and how
    many there are."""

    total: int
    earlier: int
    answered: int = 0
    errors: int = 0
    first_error: str = ""


def generate_file(
    model: Model,
    source: str | Path,
    target: str | Path,
    *,
    slots: int = 16,
    max_length: int | None = None,
    on_progress: Callable[[Summary], None] = lambda summary: None,
    **settings: Any,
) -> Summary:
    """Continues each prompt of a file, `slots` at a time, and writes a line of JSON for each as it is finished.

    A line of `source` is a JSON string, or an object with `prompt` (a text or token ids) or `messages`, an `id` if it
    has one, and settings of its own. `settings` are those of `generation.Settings`; prompt i draws with seed + i,
    unless it has a seed. Lines of `target`: index, id, text, finish_reason ("stop" or "length"), tokens, prompt_tokens,
    request (a digest of the line and the settings); or finish_reason "error" and the error. One prompt's error ends no
    other. Where `target` has answers to these prompts already, only the others are continued.

    ValueError for settings that are not allowed, for a model without a tokenizer, and for a `target` that is not the
    beginning of such answers.
    """
    chosen = Settings(**settings)
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer, so it cannot continue texts")
    sampling_params(chosen, model.generation, 1)  # refuses what no prompt could be continued with
    source, target = Path(source), Path(target)
    progress = resume(source, target, chosen)
    summary = Summary(progress.total, len(progress.done))
    on_progress(summary)
    if not target.exists():
        target.touch()  # no prompts have no answers, which is a result
    if len(progress.done) < progress.total:
        engine = _engine(model, slots, max_length)
        # Half a surrogate pair, which JSON can spell and UTF-8 cannot, is escaped again.
        with target.open("a", encoding="utf-8", errors="backslashreplace") as file:
            lines = (line for line in read_lines(source) if line.index not in progress.done)
            _Batch(model, engine, chosen, file, summary, on_progress).run(lines, at_a_time=2 * slots)
    return summary


def _engine(model: Model, slots: int, max_length: int | None) -> Engine:
    longest = min(model.config.context_length, LONGEST) if max_length is None else max_length
    waiting = {"queue_requests": 2 * slots, "queue_tokens": 2 * slots * longest}
    config = EngineConfig(slots=slots, max_length=longest, prefill_chunk=READ_AT_ONCE, **waiting)
    engine = Engine(prepared(model), config)
    engine.warm_up()
    return engine


@dataclass
class _Answer:
    """What has come for one prompt."""

    line: Line
    text: StoppableText
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    written: str = ""

    def take(self, event: Event) -> bool:
        """Whether it is over with this; tokens behind a stop string are not part of it."""
        for token in event.tokens:
            self.written += self.text.push([token], None)
            self.tokens.append(token)
            if self.text.finish:
                return True
        self.written += self.text.push([], event.finish)
        return self.text.finish is not None


class _Batch:
    """Prompts on their way through an engine."""

    def __init__(
        self,
        model: Model,
        engine: Engine,
        settings: Settings,
        file: TextIO,
        summary: Summary,
        on_progress: Callable[[Summary], None],
    ):
        self._model, self._engine, self._settings, self._file = model, engine, settings, file
        self._summary, self._on_progress = summary, on_progress
        self._answers: dict[int, _Answer] = {}  # by the engine's number

    def run(self, lines: Iterator[Line], *, at_a_time: int) -> None:
        """Keeps `at_a_time` prompts in the engine until all lines are answered."""
        more = True
        while more or self._engine.has_work():
            while more and len(self._answers) < at_a_time:
                line = next(lines, None)
                more = line is not None
                if line is not None:
                    self._submit(line)
            for event in self._engine.step():
                self._take(event)

    def _submit(self, line: Line) -> None:
        try:
            request, stop_texts = self._request(parse(line))
            number = self._engine.submit(request)
        except (ValueError, TypeError) as error:
            self._fail(line, " ".join(str(error).split()))
            return
        text = StoppableText(self._model.tokenizer, stop_texts, prompt=request.prompt)
        self._answers[number] = _Answer(line, text, len(request.prompt))

    def _request(self, task: Task) -> tuple[Request, Sequence[str]]:
        """What the engine is asked for, and the texts that end what comes of it."""
        model, settings = self._model, replace(self._settings, **task.settings)
        prompt = list(encode(model, task.prompt)) if task.messages is None else self._conversation(task.messages)
        knobs = sampling_params(settings, model.generation, 1, 0 if "seed" in task.settings else task.index)
        stops = stops_of(model, settings)
        request = Request(
            prompt=prompt,
            max_new_tokens=new_tokens(settings, model),
            seed=int(knobs.seed[0]),
            stop_ids=stops.ids,
            **{name: getattr(knobs, name)[0].item() for name in KNOBS},
        )
        return request, stops.texts

    def _conversation(self, messages: list[dict[str, Any]]) -> list[int]:
        tokenizer = self._model.tokenizer
        if tokenizer.chat_template is None:
            raise ValueError("it has messages, but this model has no chat template")
        return tokenizer.encode(tokenizer.render_chat(messages, add_generation_prompt=True), add_special_tokens=False)

    def _take(self, event: Event) -> None:
        answer = self._answers.get(event.request)
        if answer is None:
            return  # it was over at a stop string, of which the engine knows nothing
        if event.error is not None:
            del self._answers[event.request]
            self._fail(answer.line, event.error)
        elif answer.take(event):
            del self._answers[event.request]
            if event.finish is None:
                self._engine.cancel(event.request)
            self._summary.answered += 1
            self._write(
                answer.line,
                text=answer.written,
                finish_reason=answer.text.finish,
                tokens=answer.tokens,
                prompt_tokens=answer.prompt_tokens,
            )

    def _fail(self, line: Line, error: str) -> None:
        self._summary.errors += 1
        self._summary.first_error = self._summary.first_error or f"line {line.number}: {error}"
        self._write(line, finish_reason="error", error=error)

    def _write(self, line: Line, **answer: Any) -> None:
        value = {"index": line.index, "id": line.id} | answer | {"request": line.digest(self._settings)}
        self._file.write(json.dumps(value, ensure_ascii=False) + "\n")
        self._file.flush()  # what is written is kept, whatever ends this process
        self._on_progress(self._summary)
