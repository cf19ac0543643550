"""An engine's cache holds no more than it must: windows where layers see no further, and fewer bits where wanted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from infer.engines import answers
from tiny import random_params

from jaxformers.families import read_config
from jaxformers.infer.engine import Engine
from jaxformers.infer.engine.pages import piece_digests
from jaxformers.infer.engine.recent import Recent
from jaxformers.infer.generate import Generation, prepare_model
from jaxformers.infer.request import EngineConfig, Request
from jaxformers.models.paged import Pool
from jaxformers.parallel.mesh import single_device_mesh

LENGTH, VOCAB, NEW = 256, 300, 10
GEMMA = {
    "model_type": "gemma3_text",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": LENGTH,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 16,
}
CONFIG = EngineConfig(slots=3, page_size=4, prefill_chunk=16, prefill_piece=8, decode_steps=3)


pytestmark = pytest.mark.usefixtures("small_key_blocks")


@functools.cache
def model():
    cfg = read_config(GEMMA)
    return prepare_model(jax.device_put(random_params(cfg)), cfg, single_device_mesh())


def engine(**changes):
    return Engine(model(), EngineConfig(**(vars(CONFIG) | changes)))


def ids(length, seed=0):
    return np.random.default_rng([length, seed]).integers(3, VOCAB, length).tolist()


def greedy(prompt):
    return Request(prompt=prompt, max_new_tokens=NEW, temperature=0.0, logprobs=0)


def prompts():
    long = ids(150)
    return [long, ids(1), ids(33), long[:100] + ids(9), ids(80), long[:50]]


@functools.cache
def truth():
    """What generation with every key in the cache makes of each prompt."""
    steps = list(Generation(model(), prompts(), max_new_tokens=NEW))
    return [[token for step in steps for token in step.tokens[row]] for row in range(len(prompts()))]


def cache_bytes(engine):
    return sum(pool.nbytes for pool in jax.tree.leaves(engine._state.pools))


def test_layers_with_windows_keep_their_windows_alone_and_make_the_same_tokens():
    small = engine()
    small.warm_up()

    def audit(_step, _numbers):
        small.recent.pages.audit()

    requests = [greedy(prompt) for prompt in prompts()]
    assert [answer.tokens for answer in answers(small, requests, after_step=audit)] == truth()
    assert small.stats().cached_prompt_tokens > 0
    assert (small.recent.pages.used, small.pages.used) == (0, 0)
    assert small.stats().compilations_after_ready == 0
    # A window of 12, and 3 new tokens, touch 3 pieces of 8 tokens; twice that for 3 slots are 144 of 768 tokens.
    token = 2 * 2 * 16 * 4  # keys and values of 2 heads of 16 numbers
    page = CONFIG.page_size * token
    assert cache_bytes(small) == (3 * LENGTH + 2 * 144) * token + 3 * page


@pytest.mark.parametrize("seed", [0, 1])
def test_guesses_that_come_while_most_slots_are_still_read_find_room_in_windows(seed):
    """They are verified whatever the others do, and several may come at a time."""
    going_on = Request(prompt=ids(20, seed), max_new_tokens=80, temperature=0.0)
    read = [greedy(ids(150, seed=other)) for other in (50, 51)]
    guessing = engine(speculate="ngram", draft_tokens=4)
    made = [answer.tokens for answer in answers(guessing, [going_on, *read])]
    assert made == [answer.tokens for answer in answers(engine(), [going_on, *read])]
    assert guessing.stats().accepted_tokens > 40


def test_what_windows_leave_behind_is_found_by_those_that_come_later_to_the_last_bit():
    warm = engine()
    first, _, _, other, _, beginning = prompts()
    answers(warm, [greedy(first)])
    for prompt in (first, other, beginning):
        (alone,), (again,) = answers(engine(), [greedy(prompt)]), answers(warm, [greedy(prompt)])
        assert (again.tokens, again.logprobs) == (alone.tokens, alone.logprobs)
        assert (alone.cached_tokens, again.cached_tokens > 0) == (0, True)


def test_cancelled_requests_leave_nothing_behind():
    one = engine()
    numbers = [one.submit(greedy(prompt)) for prompt in prompts()]
    for step in range(40):
        one.step()
        one.cancel(numbers[step % len(numbers)])
        one.recent.pages.audit()
        one.pages.audit()
    assert not one.has_work()
    assert (one.recent.pages.used, one.pages.used) == (0, 0)


def test_a_prompt_goes_on_only_where_all_that_is_still_seen_is_known():
    recent, digests = Recent(8, window=5, piece=4, piece_pages=2), piece_digests(np.arange(24, dtype=np.int32), 4)
    held = {}
    for number, digest in enumerate(digests[:3]):
        recent.move(held, 4 * number, 4 * number + 4)
        recent.remember(held, digest, number)
    assert sorted(held) == [1, 2]  # a query at 8 sees 4 to 8
    recent.end(held)
    assert (recent.reach(digests, 3), recent.reach(digests, 2), recent.pages.cached) == (3, 2, 6)
    other = {}
    recent.move(other, 20, 28)  # takes the last free piece, and the room of the one that was longest unused
    assert recent.reach(digests, 3) == 3
    assert recent.reach(digests, 1) == 0
    recent.share(held, digests, 3)
    assert sorted(held) == [2]
    recent.pages.audit()


def test_int8_takes_a_quarter_of_the_memory_and_changes_little():
    exact, small = engine(), engine(cache_dtype="int8")
    numbers, scale = 16, 4
    assert cache_bytes(small) / cache_bytes(exact) == (numbers + scale) / (4 * numbers)
    request = Request(prompt=ids(120), max_new_tokens=0, prompt_logprobs=0)
    (truth,), (ours,) = answers(exact, [request]), answers(small, [request])
    error = [a.logprob - b.logprob for a, b in zip(ours.prompt_logprobs[1:], truth.prompt_logprobs[1:], strict=True)]
    assert 0 < np.abs(error).mean() < 0.01


def test_int8_makes_the_same_bits_cold_and_warm_and_in_any_company():
    one = engine(cache_dtype="int8")
    requests = [greedy(prompt) for prompt in prompts()]
    together, again = answers(one, requests), answers(one, requests[::-1])[::-1]
    assert [(a.tokens, a.logprobs) for a in together] == [(a.tokens, a.logprobs) for a in again]


def test_each_token_of_a_head_has_a_scale_of_its_own():
    pool = Pool(jnp.zeros((3, 2, 4, 16), jnp.int8), jnp.zeros((3, 2, 4)))
    sizes_ = np.asarray([1, 1e3, 0], np.float32)[:, None, None]
    value = np.random.default_rng(0).standard_normal((1, 3, 2, 16), np.float32) * sizes_
    page, place = jnp.asarray([[2, 2, 1]]), jnp.asarray([[0, 3, 1]])
    written = pool.write(page, place, jnp.asarray(value))
    for i, (p, s) in enumerate([(2, 0), (2, 3), (1, 1)]):
        read = np.asarray(written.read(jnp.asarray([p]), jnp.float32))[0, :, s]
        largest = np.abs(value[0, i]).max(-1, keepdims=True)
        assert (np.abs(read - value[0, i]) <= largest / 254 * 1.001).all()


def test_another_cache_dtype_is_refused():
    with pytest.raises(ValueError, match=r"^cache_dtype is 'int4'; it must be int8, or None for the model's own$"):
        engine(cache_dtype="int4")
