"""Several continuations of each prompt, of which the best are kept: beams, or draws by their mean log-probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from jaxformers.data.stops import StoppableText
from jaxformers.generation import Prompt, Settings, encode, new_tokens, prepared, sampling_params, stops_of
from jaxformers.infer.beam import BeamSettings, beam_search
from jaxformers.infer.generate import Generation
from jaxformers.infer.sampling import SamplingParams

if TYPE_CHECKING:
    from jaxformers.api import Model


@dataclass(frozen=True, kw_only=True)
class Search:
    """How many continuations to try, and how many to keep, the best first.

    num_beams: above 1, beam search in place of draws; length_penalty and early_stopping are those of
    `infer.beam.BeamSettings`. best_of: draws a prompt, of which those with the highest mean log-probability a token, by
    the model's own distribution, are kept; None: as many as are kept.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1
    best_of: int | None = None

    def __post_init__(self) -> None:
        assert self.beams.num_beams == self.num_beams  # made once, to be checked
        kept, tried = self.num_return_sequences, self.tried
        if kept < 1:
            raise ValueError(f"num_return_sequences is {kept}; it must be at least 1")
        if self.best_of is not None and self.num_beams > 1:
            told = f"best_of is {self.best_of} and num_beams {self.num_beams}"
            raise ValueError(f"{told}; there are draws or beams, not both")
        if kept > tried:
            name = "num_beams" if self.num_beams > 1 else "best_of"
            raise ValueError(f"num_return_sequences is {kept}, but {name} is {tried}; it must be at least as large")
        if self.num_beams == 1 and (self.length_penalty, self.early_stopping) != (1.0, False):
            raise ValueError("length_penalty and early_stopping are for beams, but num_beams is 1")

    @property
    def beams(self) -> BeamSettings:
        return BeamSettings(
            num_beams=self.num_beams, length_penalty=self.length_penalty, early_stopping=self.early_stopping
        )

    @property
    def tried(self) -> int:
        """Continuations of a prompt."""
        if self.num_beams > 1:
            return self.num_beams
        return self.num_return_sequences if self.best_of is None else self.best_of

    @property
    def is_plain(self) -> bool:
        """Whether each prompt has one continuation and no more."""
        return self.tried == 1


def search(model: Model, prompts: Sequence[Prompt], chosen: Search, settings: Settings) -> list[list[str]]:
    """The `num_return_sequences` best texts of each prompt. ValueError for settings that do not go together."""
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer; infer.beam continues token ids")
    rows = [encode(model, prompt) for prompt in prompts]
    find = _beams if chosen.num_beams > 1 else _draws
    size = max(1, settings.batch_size // chosen.tried)
    found = [texts for start in range(0, len(rows), size) for texts in find(model, rows, start, size, chosen, settings)]
    return [texts[: chosen.num_return_sequences] for texts in found]


def _beams(
    model: Model, rows: Sequence[Sequence[int]], start: int, size: int, chosen: Search, settings: Settings
) -> list[list[str]]:
    """All beams of prompts `start` to `start + size`."""
    stops = stops_of(model, settings)
    sampling = sampling_params(settings, model.generation, 1)
    if settings.temperature or sampling.plan().penalties:
        raise ValueError("num_beams goes with neither a temperature nor penalties, which other beams would be found by")
    if stops.texts:
        raise ValueError(f"stop is {settings.stop!r}; beams end at special tokens and stop_ids alone")
    some = rows[start : start + size]
    found = beam_search(
        prepared(model), some, chosen.beams, max_new_tokens=new_tokens(settings, model), stop_ids=stops.ids
    )

    def text(prompt: Sequence[int], tokens: list[int]) -> str:
        return StoppableText(model.tokenizer, (), prompt=prompt).push(tokens, "length")

    return [[text(prompt, beam.tokens) for beam in beams] for prompt, beams in zip(some, found, strict=True)]


@dataclass
class _Draw:
    """One draw as it grows; tokens behind a stop string do not count."""

    text: StoppableText
    written: str = ""
    logprobs: list[float] = field(default_factory=list)

    def take(self, tokens: Sequence[int], logprobs: Sequence[float], finish: str | None) -> None:
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.text.finish is None:
                self.written += self.text.push([token], None)
                self.logprobs.append(logprob)
        if self.text.finish is None:
            self.written += self.text.push([], finish)

    @property
    def worth(self) -> float:
        """Mean log-probability of a token; an empty text is worth nothing."""
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else float("-inf")


def _draws(
    model: Model, rows: Sequence[Sequence[int]], start: int, size: int, chosen: Search, settings: Settings
) -> list[list[str]]:
    """All draws of prompts `start` to `start + size`, the best first."""
    stops = stops_of(model, settings)
    some = [row for row in rows[start : start + size] for _ in range(chosen.tried)]
    sampling = sampling_params(settings, model.generation, len(some), start * chosen.tried)
    if sampling.plan().greedy_only:
        raise ValueError(f"{chosen.tried} draws of a prompt need a temperature above 0, or they are all the same")
    generation = _generation(model, some, sampling, settings)
    draws = [_Draw(StoppableText(model.tokenizer, stops.texts, prompt=row)) for row in some]
    for step in generation:
        for i, draw in enumerate(draws):
            draw.take(step.tokens[i], step.logprobs[i], step.finish[i])
            if draw.text.finish:
                generation.end(i)
    groups = [draws[i : i + chosen.tried] for i in range(0, len(draws), chosen.tried)]
    return [[draw.written for draw in sorted(group, key=lambda draw: -draw.worth)] for group in groups]


def _generation(
    model: Model, rows: Sequence[Sequence[int]], sampling: SamplingParams, settings: Settings
) -> Generation:
    return Generation(
        prepared(model),
        rows,
        max_new_tokens=new_tokens(settings, model),
        sampling=sampling,
        stop_ids=stops_of(model, settings).ids,
        logprobs=True,
    )
