"""Prompts as vectors, made by the engine's own programs: those of the whole model's states, pooled."""

import dataclasses

import jax
import numpy as np
import pytest
from engines import answers
from tiny import LLAMA, random_params

from jaxformers.families import read_config
from jaxformers.infer.engine import Engine
from jaxformers.infer.generate import prepare_model
from jaxformers.infer.request import EngineConfig, Request
from jaxformers.models.decoder import hidden_states
from jaxformers.models.layers import named_norm
from jaxformers.parallel.mesh import replicated, single_device_mesh

PIECE, LONGEST = 16, 48
CFG = read_config(LLAMA)


@pytest.fixture(scope="module")
def params():
    return jax.device_put(random_params(CFG), replicated(single_device_mesh()))


@pytest.fixture(scope="module")
def engine(params, quick_compilation):
    sizes = EngineConfig(slots=3, max_length=LONGEST, prefill_piece=PIECE, prefill_chunk=PIECE)
    made = Engine(prepare_model(params, CFG, single_device_mesh()), sizes)
    made.warm_up()
    return made


def prompt_of(length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(length).integers(0, CFG.vocab_size, length).tolist())


def vectors(engine: Engine, *requests: Request) -> list[np.ndarray | None]:
    """The vectors that come of requests that come at once."""
    numbers = {engine.submit(request): i for i, request in enumerate(requests)}
    found = [None] * len(requests)
    while engine.has_work():
        for event in engine.step():
            found[numbers[event.request]] = event.vector
        engine.pages.audit()
    return found


def test_they_are_the_pooled_states_of_the_whole_model(engine, params):
    lengths = (1, PIECE - 1, PIECE, PIECE + 1, LONGEST)  # shorter than a piece, as long, longer, and all there is
    pooled = {
        pooling: vectors(engine, *(Request(prompt=prompt_of(n), max_new_tokens=0, pooling=pooling) for n in lengths))
        for pooling in ("mean", "last")
    }
    run = jax.jit(lambda params, tokens: hidden_states(params, CFG, tokens).x)
    padded = np.zeros((len(lengths), LONGEST), np.int32)
    for row, length in zip(padded, lengths, strict=True):
        row[:length] = prompt_of(length)
    states = np.asarray(named_norm(params, "final_norm", run(params, padded), CFG))
    for i, length in enumerate(lengths):
        for pooling, vector in (("mean", states[i, :length].mean(axis=0)), ("last", states[i, length - 1])):
            np.testing.assert_allclose(pooled[pooling][i], vector / np.linalg.norm(vector), atol=1e-5)
    assert engine.stats().compilations_after_ready == 0


def test_they_do_not_depend_on_who_else_runs_nor_on_what_was_read_before(engine):
    prompt = prompt_of(40)
    one = Request(prompt=prompt, max_new_tokens=0, pooling="mean")
    (alone,) = vectors(engine, one)
    continued = Request(prompt=prompt, max_new_tokens=8, temperature=0.0)
    before = answers(engine, [continued])
    among = vectors(engine, continued, one, dataclasses.replace(one, pooling="last"), continued)
    assert among[0] is among[3] is None
    np.testing.assert_array_equal(among[1], alone)
    assert answers(engine, [continued])[0].tokens == before[0].tokens


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        ({"pooling": "max", "max_new_tokens": 0}, "pooling is 'max'; it must be one of mean, last"),
        ({"pooling": "mean", "max_new_tokens": 1}, "max_new_tokens is 1; with pooling it must be 0"),
        ({"pooling": "mean", "max_new_tokens": 0, "prompt_logprobs": 1}, "nothing else can be asked for"),
    ],
)
def test_what_cannot_be_pooled_is_refused(engine, asked, refused):
    with pytest.raises(ValueError, match=refused):
        engine.submit(Request(prompt=(1, 2), **asked))
