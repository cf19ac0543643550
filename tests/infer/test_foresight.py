"""What a model's own modules guess is what training teaches them to say of the same text, whoever else is there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from infer.engines import answers, tokens_of
from infer.foreseeing import DEEPSEEK, foreseeing_params

from jaxformers.families import read_config
from jaxformers.infer.engine import Engine
from jaxformers.infer.generate import prepare_model
from jaxformers.infer.request import EngineConfig, Request
from jaxformers.models.decoder import embed, hidden_states, make_context, unembed
from jaxformers.models.layers import named_norm, norm
from jaxformers.models.mtp import run_module
from jaxformers.models.runtime import Runtime
from jaxformers.parallel.mesh import single_device_mesh

VOCAB, LENGTH = 40, 96
CONFIG = EngineConfig(slots=3, page_size=4, prefill_chunk=16, prefill_piece=8, speculate="mtp", draft_tokens=3)
UNLIKE = 1.0  # so much doubt that modules know nothing of what comes: guesses depend on all that they read

pytestmark = pytest.mark.usefixtures("small_key_blocks")


@functools.cache
def model(modules, doubt):
    """A model with so many modules: its config and plain parameters."""
    cfg = read_config(DEEPSEEK | {"num_nextn_predict_layers": modules})
    return cfg, jax.device_put(foreseeing_params(cfg, doubt=doubt))


class Watched:
    """An engine whose guesses are kept."""

    def __init__(self, modules, doubt, **changes):
        cfg, params = model(modules, doubt)
        config = dataclasses.replace(CONFIG, **changes)
        self.engine = Engine(prepare_model(params, cfg, single_device_mesh()), config)
        drafter = self.engine._drafter
        self._guess, drafter.guess = drafter.guess, self._kept
        self._guesses = {}

    def _kept(self, state, runs):
        found = self._guess(state, runs)
        for run in runs:
            guesses = self._guesses.setdefault(tuple(run.request.prompt), {})
            guesses[run.position] = np.asarray(found)[run.slot].tolist()
        return found

    def guesses(self, *requests):
        """For each of these requests, its whole text, and what was guessed by the position of its newest token."""
        self._guesses = {}
        found = answers(self.engine, requests)
        texts = [[*request.prompt, *answer.tokens] for request, answer in zip(requests, found, strict=True)]
        return [(text, self._guesses[tuple(r.prompt)]) for r, text in zip(requests, texts, strict=True)]


class Whole:
    """What modules say of a text in whole passes over it, without a cache."""

    def __init__(self, modules, doubt):
        self.cfg, self.params = cfg, params = model(modules, doubt)
        self.runtime = Runtime()
        self.decode = jax.jit(lambda text: named_norm(params, "final_norm", hidden_states(params, cfg, text).x, cfg))
        self.run = jax.jit(self._run)

    def _run(self, p, states, tokens, last):
        positions = jnp.arange(LENGTH)[None]
        token = embed(self.params, self.cfg, tokens, positions, self.runtime)
        ctx = make_context(self.cfg, self.runtime, positions, None)
        x = run_module(p, states, token, ctx, self.cfg)[0]
        logits = unembed(self.params | {"final_norm": p["norm"]}, self.cfg, x[0, last], self.runtime)
        return norm(p["norm"], x, self.cfg), logits.argmax()

    def guesses(self, text, count):
        """The likeliest tokens behind a text: each module reads what the one before it made, and behind the text the
        last one reads what it made itself."""
        states, tokens, size = self.decode(padded(text[:-1])), list(text[1:]), len(text) - 1
        found = []
        for i in range(count):
            module = self.params["mtp"][min(i, self.cfg.mtp_modules - 1)]
            made, guess = self.run(module, states, padded(tokens), size - 1)
            found.append(int(guess))
            if i + 1 < self.cfg.mtp_modules:
                states, tokens = made, [*tokens[1:], found[-1]]
            else:
                states, tokens, size = states.at[0, size].set(made[0, size - 1]), [*tokens, found[-1]], size + 1
        return found


def padded(tokens):
    """int32 [1, LENGTH]; what stands behind a text changes nothing in it."""
    return jnp.asarray([[*tokens, *[0] * (LENGTH - len(tokens))]], jnp.int32)


@functools.cache
def watched(modules, doubt):
    return Watched(modules, doubt)


def ids(length, seed=0):
    return np.random.default_rng([length, seed]).integers(3, VOCAB, length).tolist()


def greedy(prompt, new=16):
    return Request(prompt=prompt, max_new_tokens=new, temperature=0.0)


def requests():
    """More than there are slots for: prompts of less than a piece, and some that begin alike, or are a beginning."""
    long = ids(33)
    prompts = [ids(1), ids(6), long, [*long[:16], *ids(9)], long[:25], [*long[:8], *ids(3)]]
    return [greedy(prompt) for prompt in prompts]


@pytest.mark.parametrize("modules", [1, 2])
def test_guesses_are_what_modules_say_of_the_whole_text(modules):
    whole = Whole(modules, UNLIKE)
    for text, guesses in watched(modules, UNLIKE).guesses(*requests()):
        for position, found in list(guesses.items())[::2]:
            if position == 0:
                assert found == [-1] * 3, "nothing is before a text's first token"
            else:
                room = len(text) - 1 - position
                assert found[:room] == whole.guesses(text[: position + 1], min(room, 3)), (position, text)


@pytest.mark.parametrize("modules", [1, 2])
def test_guesses_are_the_same_alone_in_company_cold_and_warm(modules):
    engine = watched(modules, UNLIKE)
    together = engine.guesses(*requests())
    before = engine.engine.stats().cached_prompt_tokens
    assert engine.guesses(*requests()[::-1])[::-1] == together
    assert engine.engine.stats().cached_prompt_tokens > before
    assert [engine.guesses(request)[0] for request in requests()] == together
    cold = Watched(modules, UNLIKE, prefix_cache=False)
    assert cold.guesses(*requests()) == together
    assert cold.engine.stats().cached_prompt_tokens == 0


def test_a_module_that_has_learnt_the_text_guesses_nearly_all_of_it():
    engine, steps = watched(1, 0.0).engine, []
    in_order = [(7 + i) % VOCAB for i in range(20)]
    (answer,) = answers(engine, [greedy(in_order, 40)], after_step=lambda step, numbers: steps.append(step))
    assert answer.tokens == [(27 + i) % VOCAB for i in range(40)]
    stats = engine.stats()
    assert stats.accepted_tokens >= 0.95 * stats.drafted_tokens > 0
    assert len(steps) <= 2 + 40 / 4


def test_one_that_knows_nothing_changes_no_token():
    guessing, config = watched(1, UNLIKE).engine, dataclasses.replace(CONFIG, speculate=None)
    cfg, params = model(1, UNLIKE)
    plain = Engine(prepare_model(params, cfg, single_device_mesh()), config)
    before = guessing.stats()
    assert tokens_of(guessing, *requests()) == tokens_of(plain, *requests())
    after = guessing.stats()
    assert after.accepted_tokens - before.accepted_tokens < 0.2 * (after.drafted_tokens - before.drafted_tokens)
