"""An engine makes the tokens that `transformers` makes, for every kind of cache and of position, cold and warm."""

import dataclasses
import functools

import jax
import pytest
from families.checkpoints import ROWS, tokens
from families.foreign import TWINS
from infer.engines import tokens_of
from infer.references import EOS, checkpoint, continuation

from jaxformers.infer.engine import Engine
from jaxformers.infer.generate import Prepared, prepare_model
from jaxformers.infer.request import EngineConfig, Request
from jaxformers.models.params import model_spec
from jaxformers.parallel.mesh import MeshConfig, make_mesh, param_shardings

CONFIG = EngineConfig(slots=3, max_length=64, page_size=4, prefill_chunk=16, prefill_piece=8)
NEW = 12
# One of each kind: windows, learned positions, linear biases, latents and experts, sinks, positions that are scaled by
# the length of the text.
KINDS = (
    "gemma3_text",
    "gpt2",
    "bloom",
    "deepseek_v3-lite",
    "gpt_oss",
    "llama-dynamic",
)


pytestmark = pytest.mark.usefixtures("small_key_blocks", "programs_go_with_their_model")
KEY_BLOCK = 16


# Where a text outgrows the short factors of LongRoPE, the reference reads it anew; others keep what they read. So these
# texts stay behind that place or before it, which is where the reference has the right factors for Phi 3.5's experts.
LENGTHS = {"phi3-long": (34, 26), "phimoe": (9, 5, 18, 12)}


def prompts(name: str) -> list[list[int]]:
    """Short ones and longer ones; the last begins as the one before it does."""
    *lengths, shorter = LENGTHS.get(name, (9, 5, 34, 26))
    rows = [tokens(length, seed=length).tolist() for length in lengths]
    return [*rows, rows[-1][:shorter]]


@functools.cache
def truth(name: str) -> list[list[int]]:
    return [continuation(name, prompt, new=NEW) for prompt in prompts(name)]


def model(name: str, tp: int = 1) -> Prepared:
    """A row's model on so many devices."""
    (cfg, params, _), mesh = checkpoint(name).ours, make_mesh(MeshConfig(fsdp=1, tp=tp), devices=jax.devices()[:tp])
    return prepare_model(jax.device_put(params, param_shardings(model_spec(cfg), mesh)), cfg, mesh)


def greedy(prompt: list[int]) -> Request:
    return Request(prompt=prompt, max_new_tokens=NEW, temperature=0.0, stop_ids=[EOS])


# By the number of devices; most rows have fewer kv heads than four, and some have heads that four do not divide.
QUICK = {1: KINDS, 4: ("gemma3_text", "deepseek_v3-lite")}
CASES = [
    pytest.param(name, tp, marks=() if name in QUICK[tp] else pytest.mark.slow)
    for name in [*ROWS, *TWINS]
    for tp in QUICK
]


@pytest.mark.parametrize("name, tp", CASES)
def test_engine_tokens_are_the_references_cold_and_warm_on_one_device_and_on_four(name, tp):
    engine = Engine(model(name, tp), CONFIG)
    requests = [greedy(prompt) for prompt in prompts(name)]
    assert tokens_of(engine, *requests) == truth(name)
    assert tokens_of(engine, *requests[::-1]) == truth(name)[::-1]
    assert engine.stats().cached_prompt_tokens


GUESSED = ("gemma3_text", "deepseek_v3-lite", "gpt_oss")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in GUESSED else pytest.mark.slow) for name in KINDS[:-1]]
)
def test_tokens_that_were_guessed_are_the_references(name):
    engine = Engine(model(name), dataclasses.replace(CONFIG, speculate="ngram", draft_tokens=3))
    rows = [row * 2 for row in prompts(name)[:2]]  # so that there is something to guess by
    assert tokens_of(engine, *map(greedy, rows)) == [continuation(name, row, new=NEW) for row in rows]
    assert engine.stats().drafted_tokens
