"""An engine makes the tokens that `transformers` makes, for every kind of cache and of position, cold and warm."""

import dataclasses
import functools

import pytest
import torch
from families.checkpoints import ROWS, checkpoint, tokens
from infer.engines import tokens_of

from jaxformers.infer.engine import Engine
from jaxformers.infer.generate import prepare_model
from jaxformers.infer.request import EngineConfig, Request
from jaxformers.parallel.mesh import single_device_mesh

EOS = 2  # of every checkpoint here
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


pytestmark = pytest.mark.usefixtures("small_key_blocks")
KEY_BLOCK = 16


@functools.cache
def prompts():
    """Two short ones, and two longer ones of which one begins as the other does."""
    first, second, longest = (tokens(length, seed=length).tolist() for length in (9, 5, 34))
    return [first, second, longest, longest[:26]]


@torch.no_grad()
def reference(name, prompt):
    """What `generate` adds to one unpadded prompt, without the token that ends it."""
    torch.set_num_threads(1)
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": NEW, "attention_mask": torch.ones_like(ids)}
    made = checkpoint(name).model.generate(ids, **settings)[0, len(prompt) :].tolist()
    return made[:-1] if made[-1] == EOS else made


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in ROWS])
def test_engine_tokens_are_the_references_cold_and_warm(name):
    c = checkpoint(name)
    # Where a text outgrows the short factors of LongRoPE, the reference reads it anew; others keep what they read.
    rows = prompts()[2:] if name == "phi3-long" else prompts()
    engine = Engine(prepare_model(c.ours.params, c.ours.config, single_device_mesh()), CONFIG)
    requests = [Request(prompt=prompt, max_new_tokens=NEW, temperature=0.0, stop_ids=[EOS]) for prompt in rows]
    truth = [reference(name, prompt) for prompt in rows]
    assert tokens_of(engine, *requests) == truth
    assert tokens_of(engine, *requests[::-1]) == truth[::-1]
    assert engine.stats().cached_prompt_tokens


GUESSED = ("gemma3_text", "deepseek_v3-lite", "gpt_oss")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in GUESSED else pytest.mark.slow) for name in KINDS[:-1]]
)
def test_tokens_that_were_guessed_are_the_references(name):
    c = checkpoint(name)
    config = dataclasses.replace(CONFIG, speculate="ngram", draft_tokens=3)
    engine = Engine(prepare_model(c.ours.params, c.ours.config, single_device_mesh()), config)
    rows = [row * 2 for row in prompts()[:2]]  # so that there is something to guess by
    requests = [Request(prompt=row, max_new_tokens=NEW, temperature=0.0, stop_ids=[EOS]) for row in rows]
    assert tokens_of(engine, *requests) == [reference(name, row) for row in rows]
    assert engine.stats().drafted_tokens
