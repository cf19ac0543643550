"""Guessing tokens makes them come faster and changes none, drawn ones neither."""

import functools

import jax
import numpy as np
import pytest
from infer.engines import answers, tokens_of
from infer.foreseeing import DEEPSEEK, foreseeing_params
from scipy import special
from tiny import LLAMA, random_params

from jaxformers.families import read_config
from jaxformers.infer.engine import Engine
from jaxformers.infer.engine.drafting import Text
from jaxformers.infer.generate import prepare_model
from jaxformers.infer.request import EngineConfig, Request
from jaxformers.models.decoder import forward
from jaxformers.parallel.mesh import single_device_mesh

VOCAB, LENGTH = 40, 96
CONFIG = EngineConfig(slots=3, page_size=4, prefill_chunk=16, prefill_piece=8, draft_tokens=3)


pytestmark = pytest.mark.usefixtures("small_key_blocks")


@functools.cache
def model(seed=0, **changes):
    cfg = read_config(LLAMA | {"vocab_size": VOCAB, "max_position_embeddings": LENGTH} | changes)
    return prepare_model(jax.device_put(random_params(cfg, seed=seed)), cfg, single_device_mesh())


@functools.cache
def drafting_model():
    """A model that mostly agrees with the other: the same one, a little off, with one layer less in effect."""
    cfg = model().config
    params = random_params(cfg)
    noise = random_params(cfg, seed=1)
    near = jax.tree.map(lambda a, b: a + 0.08 * b, params, noise)
    return prepare_model(jax.device_put(near), cfg, single_device_mesh())


@functools.cache
def foreseeing_model():
    """A model whose module is right about every second time."""
    cfg = read_config(DEEPSEEK | {"vocab_size": VOCAB, "max_position_embeddings": LENGTH})
    return prepare_model(jax.device_put(foreseeing_params(cfg, doubt=0.06)), cfg, single_device_mesh())


def guessed_for(speculate):
    """The model that this kind of guesses is of."""
    return foreseeing_model() if speculate == "mtp" else model()


def make(speculate):
    config = EngineConfig(**(vars(CONFIG) | {"speculate": speculate}))
    return Engine(guessed_for(speculate), config, draft=drafting_model() if speculate == "draft" else None)


def plain(speculate):
    """An engine of the same model that does not guess."""
    return Engine(guessed_for(speculate), CONFIG)


@functools.cache
def warm(speculate):
    engine = make(speculate)
    engine.warm_up()
    return engine


def ids(length, seed=0):
    return np.random.default_rng([length, seed]).integers(3, VOCAB, length).tolist()


def requests():
    """All kinds: greedy and drawn, filtered and penalised, stopped and told of; more than there are slots for."""
    greedy, drawn = {"temperature": 0.0}, {"temperature": 0.7, "seed": 7}
    again = ids(7) * 5
    return [
        Request(prompt=again, max_new_tokens=40, **greedy),
        Request(prompt=ids(1), max_new_tokens=1, **greedy),
        Request(prompt=ids(2), max_new_tokens=2, **drawn),
        Request(prompt=again + ids(4), max_new_tokens=30, **drawn, logprobs=2),
        Request(prompt=ids(33), max_new_tokens=30, **greedy, stop_ids=ids(4), min_new_tokens=9),
        Request(prompt=ids(17), max_new_tokens=30, **drawn, top_k=9, top_p=0.9, frequency_penalty=0.3),
        Request(prompt=ids(18), max_new_tokens=30, **greedy, repetition_penalty=1.2, presence_penalty=0.4),
        Request(prompt=again, max_new_tokens=LENGTH - 35, temperature=0.3, seed=1, logit_bias={5: 2.0}),
    ]


KINDS = ("ngram", "draft", "mtp")
FEW, BIAS = [5, 11, 17, 23], 40.0  # tokens that are made the only likely ones


@pytest.mark.parametrize("speculate", KINDS)
def test_tokens_are_those_that_come_without_guesses(speculate):
    alone, guessing = plain(speculate), warm(speculate)
    before = guessing.stats()
    expected, found = answers(alone, requests()), answers(guessing, requests())
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    assert [answer.finish for answer in found] == [answer.finish for answer in expected]
    for told, truth in zip(found[3].logprobs, expected[3].logprobs, strict=True):
        assert told.logprob == pytest.approx(truth.logprob, abs=1e-5)
    stats = guessing.stats()
    accepted, drafted = stats.accepted_tokens - before.accepted_tokens, stats.drafted_tokens - before.drafted_tokens
    assert 0.1 * drafted < accepted < drafted
    assert alone.stats().drafted_tokens == 0
    assert stats.compilations_after_ready == 0
    assert stats.pages_used == 0


@pytest.mark.parametrize("speculate", KINDS)
def test_tokens_are_the_same_alone_in_company_cold_and_warm_to_the_last_bit(speculate):
    engine = warm(speculate)
    told = [Request(**(vars(request) | {"logprobs": 2})) for request in requests()]
    together = [answer.logprobs for answer in answers(engine, told)]
    assert [answer.logprobs for answer in answers(engine, told[::-1])][::-1] == together
    assert [answers(engine, [request])[0].logprobs for request in told] == together
    assert [answer.logprobs for answer in answers(make(speculate), told)] == together
    assert engine.stats().cached_prompt_tokens


def test_a_good_draft_makes_several_tokens_a_step():
    engine, steps = warm("draft"), []
    (answer,) = answers(engine, requests()[:1], after_step=lambda step, numbers: steps.append(step))
    assert len(answer.tokens) == 40
    assert len(steps) < 30


@pytest.mark.parametrize("speculate", KINDS)
def test_draws_have_the_distribution_that_plain_draws_have(speculate):
    """Three tokens after a prompt, which are guessed, over many seeds: against their exact chances."""
    prompt, seeds = FEW * 4, 600
    engine = warm(speculate)
    settings = {"max_new_tokens": 3, "temperature": 0.8, "logit_bias": dict.fromkeys(FEW, BIAS)}
    before = engine.stats().accepted_tokens
    made = []
    for start in range(0, seeds, 200):
        some = [Request(prompt=prompt, seed=seed, **settings) for seed in range(start, start + 200)]
        made += tokens_of(engine, *some)
    assert engine.stats().accepted_tokens > before
    chances = continuations(prompt, speculate)
    assert {tuple(row) for row in made} <= chances.keys()
    expected = np.array([seeds * chances[row] for row in chances])
    counts = np.array([sum(tuple(row) == wanted for row in made) for wanted in chances])
    rare = expected < 5  # too few for the test: one cell of them all
    expected = np.append(expected[~rare], expected[rare].sum())
    counts = np.append(counts[~rare], counts[rare].sum())
    chi_square = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    assert chi_square < special.chdtri((expected > 0).sum() - 1, 0.001)


@functools.cache
def _next_chances(text, speculate):
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(text)] = text
    logits = np.asarray(_forward(padded, speculate))[0, len(text) - 1].astype(np.float64)
    return special.softmax((logits + BIAS * np.isin(np.arange(VOCAB), FEW)) / 0.8)


@functools.partial(jax.jit, static_argnames="speculate")
def _forward(text, speculate):
    return forward(guessed_for(speculate).params, guessed_for(speculate).config, text)


def continuations(prompt, speculate):
    """The chance of each continuation by three tokens of the few each time, by whole forward passes."""
    chances = {(): 1.0}
    for _ in range(3):
        chances = {
            (*so_far, int(token)): chance * _next_chances((*prompt, *so_far), speculate)[token]
            for so_far, chance in chances.items()
            for token in FEW
        }
    return chances


class Even:
    """Allows even ids only."""

    def __init__(self):
        self.taken = []

    def allowed(self):
        return np.arange(VOCAB) % 2 == 0

    def advance(self, token):
        self.taken.append(token)


@pytest.mark.parametrize("speculate", KINDS)
def test_a_constraint_is_asked_before_each_token_while_others_guess(speculate):
    free = requests()[0]
    bound = Request(prompt=ids(9), max_new_tokens=12, temperature=0.0, constraint=Even())
    alone = tokens_of(plain(speculate), Request(**(vars(bound) | {"constraint": Even()})))[0]
    found = tokens_of(warm(speculate), free, bound)
    assert found == [tokens_of(plain(speculate), free)[0], alone]
    assert bound.constraint.taken == alone


@pytest.mark.parametrize("speculate", KINDS)
def test_a_request_is_cancelled_while_its_tokens_are_guessed(speculate):
    engine, kept = warm(speculate), requests()[0]
    truth = tokens_of(engine, kept)[0]
    found = answers(
        engine, [kept, requests()[7]], after_step=lambda step, numbers: engine.cancel(numbers[1]) if step == 4 else None
    )
    assert (found[0].tokens, found[1].finish) == (truth, "cancelled")
    assert engine.stats().pages_used == 0


def test_text_is_guessed_to_go_on_as_it_did():
    assert Text([]).guess(3) == []
    assert Text([1, 2, 3]).guess(3) == []
    assert Text([1, 2, 3, 1, 2]).guess(4) == [3, 1, 2, 3]
    assert Text([5, 5, 5]).guess(2) == [5, 5]
    text = Text([1, 2, 3, 4, 9, 2, 3, 7, 8])
    assert text.guess(2) == []
    text.extend([2, 3])
    assert text.guess(2) == [7, 8], "the latest place counts"
    text.extend([4, 1, 2, 3])
    assert text.guess(1) == [4], "three tokens tell more than two"


@pytest.mark.parametrize(
    "config, draft, line",
    [
        ({"speculate": "luck"}, None, "speculate is 'luck'; it must be one of"),
        ({"speculate": "draft"}, None, "speculate is 'draft', which names a draft model, but none is given"),
        ({"speculate": "mtp"}, None, "speculate is 'mtp', but this llama model was loaded without modules"),
        ({"speculate": "mtp"}, {}, "speculate is 'mtp', which leaves a draft model without work"),
        ({"speculate": "ngram"}, {}, "speculate is 'ngram', which leaves a draft model without work"),
        ({}, {}, "speculate is None, which leaves a draft model without work"),
        ({"speculate": "ngram", "draft_tokens": 0}, None, "draft_tokens is 0; it must be at least 1"),
        ({"speculate": "draft"}, {"vocab_size": 41}, "the draft model has 41 tokens, and the model 40"),
    ],
)
def test_what_does_not_go_together_is_refused(config, draft, line):
    with pytest.raises(ValueError, match=line):
        Engine(model(), EngineConfig(**(vars(CONFIG) | config)), draft=None if draft is None else model(**draft))


def test_models_whose_positions_turn_by_length_are_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0}
    with pytest.raises(ValueError, match="turn by the length of the text, so that tokens must come one by one"):
        Engine(model.__wrapped__(rope_parameters=rope), EngineConfig(speculate="ngram"))
