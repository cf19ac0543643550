"""Beam search finds the tokens and scores that `transformers` finds."""

import functools

import numpy as np
import pytest
import torch
from families.checkpoints import tokens
from infer.references import EOS, checkpoint, prepared

from jaxformers.infer.beam import BeamSettings, beam_search
from jaxformers.infer.generate import Generation

NEW = 10
STOPS = list(range(3, 67, 8))  # so many that some beams end early


pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def prompts():
    return [tokens(length, seed=length).tolist() for length in (9, 5, 14)]


@torch.no_grad()
def reference(name, prompt, *, stops, **settings):
    """Tokens, without the one that ends them and what pads them, and scores of one unpadded prompt's beams."""
    torch.set_num_threads(1)
    ids = torch.tensor([prompt])
    made = checkpoint(name).model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=stops,
        pad_token_id=0,
        num_return_sequences=settings["num_beams"],
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    rows = [row[len(prompt) :].tolist() for row in made.sequences]
    lengths = [int((indices >= 0).sum()) for indices in made.beam_indices]
    cut = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    return [row[:-1] if row[-1] in stops else row for row in cut], made.sequences_scores.numpy()


def assert_found(name, stops, **settings):
    found = beam_search(prepared(name), prompts(), BeamSettings(**settings), max_new_tokens=NEW, stop_ids=stops)
    finishes = set()
    for prompt, results in zip(prompts(), found, strict=True):
        rows, scores = reference(name, prompt, stops=stops, **settings)
        assert [result.tokens for result in results] == rows
        np.testing.assert_allclose([result.score for result in results], scores, atol=1e-5)
        finishes |= {result.finish for result in results}
    return finishes


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "deepseek_v3-lite"])
def test_beams_are_the_references(name):
    assert_found(name, [EOS], num_beams=3)
    assert "stop" in assert_found(name, STOPS, num_beams=3)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.6, 2.0])
def test_penalties_and_when_to_end_are_the_references(early_stopping, length_penalty):
    assert_found("llama", STOPS, num_beams=3, early_stopping=early_stopping, length_penalty=length_penalty)


def test_one_beam_is_the_likeliest_token_each_time():
    found = beam_search(prepared("llama"), prompts(), BeamSettings(num_beams=1), max_new_tokens=NEW, stop_ids=[EOS])
    made = [[] for _ in prompts()]
    for step in Generation(prepared("llama"), prompts(), max_new_tokens=NEW, stop_ids=[EOS]):
        for row, some in zip(made, step.tokens, strict=True):
            row += some
    assert [results[0].tokens for results in found] == made
    assert [len(results) for results in found] == [1, 1, 1]


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"num_beams": 0}, "num_beams is 0; it must be at least 1"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty is nan; it must be from -5 to 5"),
        ({"num_beams": 2, "length_penalty": 400.0}, "length_penalty is 400.0; it must be from -5 to 5"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping is 'soon'; it must be True, False or 'never'"),
        ({"num_beams": 34}, "num_beams is 34, which takes 68 continuations with 1 stop ids; this model has 67 tokens"),
    ],
)
def test_what_cannot_be_searched_is_refused(settings, line):
    with pytest.raises(ValueError, match=line):
        beam_search(prepared("llama"), prompts(), BeamSettings(**settings), max_new_tokens=NEW, stop_ids=[EOS])
