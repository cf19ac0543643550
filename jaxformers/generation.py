"""Text from text: prompts are encoded, continued in batches, decoded as they grow, and cut at stop strings.

The tokens themselves come from `infer.generate`; this module adds the tokenizer, the model's own generation settings
and stop strings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from jaxformers.data.stops import StoppableText, Stops, split_stops
from jaxformers.infer.generate import Finish, Generation, Prepared, prepare_model
from jaxformers.infer.sampling import SamplingParams

if TYPE_CHECKING:
    from jaxformers.api import Model

Prompt = str | Sequence[int]

DEFAULT_NEW_TOKENS = 128
SEEDS = 2**32
_FROM_MODEL = ("top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to continue prompts. None is what the model's generation_config.json says, and off where that is silent.

    max_new_tokens: at most so many tokens a prompt; the model's own number, else 128.
    temperature: 0 takes the likeliest token each time; the model's own where it has `do_sample`, else 0.
    top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: see `infer.sampling`.
    stop: texts that end a continuation and are not part of it; a special token may be among them.
    stop_ids: token ids that do, besides those that the model and the tokenizer name.
    seed: prompt i draws with seed + i, whatever the batch; None draws anew each time.
    batch_size: prompts continued at a time.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: str | Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    seed: int | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "temperature", *_FROM_MODEL, "presence_penalty", "frequency_penalty", "seed"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
                raise ValueError(f"{name} is {value!r}; it must be a number")
        if not isinstance(self.stop, Sequence) or not all(isinstance(text, str) and text for text in self.stop_texts):
            raise ValueError(f"stop is {self.stop!r}; it must be a text, or several, none of them empty")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.seed is not None and not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to 2**32 - 1")

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class Piece(NamedTuple):
    """More text of one prompt's continuation. `finish` is None until its last piece, which may have no text."""

    row: int
    text: str
    finish: Finish | None


def generate(
    model: Model,
    prompts: str | Sequence[Prompt],
    *,
    on_text: Callable[[int, str], None] | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    num_return_sequences: int = 1,
    best_of: int | None = None,
    **settings: Any,
) -> str | list[str] | list[list[str]]:
    """The continuation of one prompt, or of each in a list: its text without the prompt and without a stop string.

    A prompt is a text, or the ids of one. `settings` are those of `Settings`. `on_text(row, text)` is told each piece
    of text as it comes. The others are those of `candidates.Search`: with num_return_sequences above 1, each prompt has
    a list of texts, the best first. ValueError, in one line, for a setting that is not allowed and a prompt that cannot
    be continued.
    """
    from jaxformers.candidates import Search, search

    chosen = Search(
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        num_return_sequences=num_return_sequences,
        best_of=best_of,
    )
    if not chosen.is_plain:
        if on_text is not None:
            raise ValueError("on_text hears of one continuation as it grows; here are several, of which some are kept")
        found = search(model, [prompts] if isinstance(prompts, str) else prompts, chosen, Settings(**settings))
        kept = found if num_return_sequences > 1 else [best for (best,) in found]
        return kept[0] if isinstance(prompts, str) else kept
    texts = [""] * (1 if isinstance(prompts, str) else len(prompts))
    for piece in stream(model, prompts, **settings):
        texts[piece.row] += piece.text
        if on_text and piece.text:
            on_text(piece.row, piece.text)
    return texts[0] if isinstance(prompts, str) else texts


def stream(model: Model, prompts: str | Sequence[Prompt], **settings: Any) -> Iterator[Piece]:
    """The pieces of `generate`'s texts as they come. What may be the start of a stop string is held back."""
    chosen = Settings(**settings)
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer; infer.generate continues token ids")
    rows = [encode(model, prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
    batches = {
        start: _start(model, rows[start : start + chosen.batch_size], chosen, start)
        for start in range(0, len(rows), chosen.batch_size)
    }
    return (piece for start, batch in batches.items() for piece in _pieces(batch, start))


_PREPARED: WeakKeyDictionary[Model, Prepared] = WeakKeyDictionary()


def prepared(model: Model) -> Prepared:
    """The model in the layout that decoding runs from, made once and kept as long as the model is."""
    if model not in _PREPARED:
        _PREPARED[model] = prepare_model(model.params, model.config, model.mesh, dtype=model.dtype)
    return _PREPARED[model]


class _Batch(NamedTuple):
    generation: Generation
    texts: list[StoppableText]


def _start(model: Model, rows: Sequence[Sequence[int]], settings: Settings, first_row: int) -> _Batch:
    """A batch that is checked and ready; nothing is computed before it is iterated over."""
    stops = stops_of(model, settings)
    generation = Generation(
        prepared(model),
        rows,
        max_new_tokens=new_tokens(settings, model),
        sampling=sampling_params(settings, model.generation, len(rows), first_row),
        stop_ids=stops.ids,
    )
    return _Batch(generation, [StoppableText(model.tokenizer, stops.texts, prompt=row) for row in rows])


def new_tokens(settings: Settings, model: Model) -> int:
    """How many tokens a continuation has at most."""
    return _first_given(settings.max_new_tokens, model.generation.get("max_new_tokens"), DEFAULT_NEW_TOKENS)


def stops_of(model: Model, settings: Settings) -> Stops:
    """All that ends a continuation: what the settings, the tokenizer and the model's own settings name."""
    special, plain = split_stops(settings.stop_texts, model.tokenizer)
    own = _as_list(model.generation.get("eos_token_id"))
    return Stops([*settings.stop_ids, *special, *model.tokenizer.stop_ids, *own], plain)


def _pieces(batch: _Batch, first_row: int) -> Iterator[Piece]:
    for step in batch.generation:
        for row, text in enumerate(batch.texts):
            if text.finish:
                continue
            piece = text.push(step.tokens[row], step.finish[row])
            if text.finish:
                batch.generation.end(row)
            if piece or text.finish:
                yield Piece(first_row + row, piece, text.finish)


def sampling_params(settings: Settings, generation: Mapping[str, Any], rows: int, first_row: int = 0) -> SamplingParams:
    """The settings of a batch whose first prompt is number `first_row`, over those of a generation_config.json."""
    own_temperature = _first_given(generation.get("temperature"), 1.0) if generation.get("do_sample") else 0.0
    knobs = {name: _first_given(getattr(settings, name), generation.get(name)) for name in _FROM_MODEL}
    seed = int(np.random.default_rng().integers(SEEDS)) if settings.seed is None else settings.seed
    return SamplingParams.create(
        rows,
        temperature=_first_given(settings.temperature, own_temperature),
        presence_penalty=settings.presence_penalty,
        frequency_penalty=settings.frequency_penalty,
        seed=[(seed + first_row + row) % SEEDS for row in range(rows)],
        **{name: value for name, value in knobs.items() if value is not None},
    )


def encode(model: Model, prompt: Prompt) -> Sequence[int]:
    """The ids of a prompt; of an empty one, the token that begins a text."""
    tokenizer = model.tokenizer
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    if ids:
        return ids
    bos = _first_given(tokenizer.bos_id, *_as_list(model.generation.get("bos_token_id")))
    if bos is None:
        raise ValueError("a prompt is empty, and this model has no token that begins a text")
    return [bos]


def _first_given(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
