"""An engine answers each request as if it were alone, whatever else comes, goes, fails or was there before."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from infer.engines import Answer, answers, tokens_of
from scipy import special
from tiny import LLAMA, random_params

from jaxformers.families import read_config
from jaxformers.infer.engine import Engine
from jaxformers.infer.generate import prepare_model
from jaxformers.infer.request import EngineConfig, QueueFull, Request
from jaxformers.models.decoder import forward
from jaxformers.parallel.mesh import single_device_mesh

VOCAB, LENGTH = 300, 128
CONFIG = EngineConfig(slots=3, page_size=4, prefill_chunk=16, prefill_piece=8, decode_steps=3, queue_requests=12)


pytestmark = pytest.mark.usefixtures("small_key_blocks")


@functools.cache
def model():
    cfg = read_config(LLAMA | {"vocab_size": VOCAB, "max_position_embeddings": LENGTH})
    return prepare_model(jax.device_put(random_params(cfg)), cfg, single_device_mesh())


@pytest.fixture(scope="module")
def ready(small_key_blocks):
    """One engine for all tests that need no other: what an earlier test left behind must not matter to a later one."""
    engine = Engine(model(), CONFIG)
    engine.warm_up()
    return engine


def another(**changes):
    """An engine that shares the compiled programs, with other bounds."""
    return Engine(model(), EngineConfig(**(vars(CONFIG) | changes)))


def ids(length, seed=0):
    return np.random.default_rng([length, seed]).integers(3, VOCAB, length).tolist()


def greedy(prompt, new=10, **settings):
    return Request(prompt=prompt, max_new_tokens=new, **{"temperature": 0.0} | settings)


def drawn(prompt, new=10, **settings):
    return Request(prompt=prompt, max_new_tokens=new, **{"temperature": 1.3, "seed": 7} | settings)


# Lengths around the edges of pages, pieces and blocks of keys.
EDGES = (1, 2, 8, 9, 10, 31, 32, 33, 64, 100)


def mixture():
    """Requests of all kinds, more than there are slots for."""
    return [
        *(greedy(ids(length)) for length in EDGES[:4]),
        drawn(ids(10), logprobs=3),
        drawn(ids(31), top_k=20, top_p=0.8, priority=-1),
        drawn(ids(32), new=17, min_p=0.02, frequency_penalty=0.8, repetition_penalty=1.2),
        greedy(ids(33), logit_bias={5: 3.0, 6: -100.0}, prompt_logprobs=2),
        drawn(ids(64), new=3, stop_ids=ids(150), min_new_tokens=2),
        greedy(ids(100), new=28, presence_penalty=1.0),
    ]


@functools.cache
def logits_of(text):
    """Of one text, float32 [T, V], by one pass over all of it; padded, so that few lengths compile."""
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(text)] = text
    return np.asarray(_forward(np.asarray(padded)))[0, : len(text)]


@jax.jit
def _forward(text):
    m = model()
    return forward(m.params, m.config, text)


def next_logits(prompt, new):
    """The logits [new tokens, V] from which each new token came."""
    return logits_of(tuple(prompt + new))[len(prompt) - 1 : -1]


def test_greedy_tokens_are_the_likeliest_of_the_forward_pass(ready):
    requests = [greedy(ids(length)) for length in EDGES]
    for request, answer in zip(requests, answers(ready, requests), strict=True):
        assert answer.tokens == next_logits(request.prompt, answer.tokens).argmax(-1).tolist()
        assert (answer.finish, len(answer.tokens)) == ("length", 10)


def test_tokens_are_the_same_alone_and_in_any_company_and_slot(ready):
    alone = [tokens_of(ready, request)[0] for request in mixture()]
    assert tokens_of(ready, *mixture()) == alone
    assert tokens_of(ready, *mixture()[::-1]) == alone[::-1]
    assert tokens_of(another(prefix_cache=False), *mixture()) == alone
    assert tokens_of(another(), *mixture(), *mixture()[:2]) == alone + alone[:2]  # cold, in a new engine


def test_log_probabilities_are_the_same_to_the_last_bit(ready):
    requests = [greedy(ids(length), logprobs=4) for length in EDGES]
    together = [answer.logprobs for answer in answers(ready, requests)]
    assert [answers(ready, [request])[0].logprobs for request in requests] == together
    assert [answer.logprobs for answer in answers(another(), requests[::-1])][::-1] == together


def test_what_pages_held_before_is_never_seen(ready):
    engine = another()
    pools = jax.tree.map(lambda pool: jnp.full_like(pool, jnp.nan), engine._state.pools)
    engine._state = engine._state.replace(pools=pools)
    assert tokens_of(engine, *mixture()) == tokens_of(ready, *mixture())


def test_nothing_compiles_once_an_engine_is_ready(ready):
    engine = another()
    engine.warm_up()
    answers(engine, mixture(), after_step=lambda step, numbers: engine.cancel(numbers[0]))
    answers(engine, mixture())
    assert engine.stats().compilations_after_ready == 0
    assert ready.stats().compilations_after_ready == 0


def test_compilations_are_counted():
    engine = another()
    engine._ready = True
    engine._cfg = engine._cfg.replace(norm_eps=1e-7)  # another program than was compiled
    engine._model = engine._model | {"cfg": engine._cfg}
    answers(engine, [greedy([5], new=1)])
    assert engine.stats().compilations_after_ready > 0


def test_different_seeds_draw_differently_and_no_seed_draws_anew(ready):
    one, same, other = tokens_of(ready, *(drawn(ids(9), new=20, seed=seed) for seed in (1, 1, 2)))
    assert one == same != other
    first, second = tokens_of(ready, *(drawn(ids(9), new=20, seed=None) for _ in range(2)))
    assert first != second


def test_draws_are_those_of_the_distribution(ready):
    """The first token's frequencies over many seeds, against its probabilities after top-k."""
    counts = np.zeros(VOCAB)
    for start in range(0, 240, 12):
        requests = [drawn([5, 6], new=1, seed=seed, temperature=0.7, top_k=4) for seed in range(start, start + 12)]
        np.add.at(counts, np.concatenate(tokens_of(ready, *requests)), 1)
    logits = next_logits([5, 6], [0])[0] / 0.7
    chances = np.where(logits >= np.sort(logits)[-4], special.softmax(logits), 0.0)
    expected = 240 * chances / chances.sum()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < 16.3  # chi-square of 3 degrees, one in a thousand


def test_log_probabilities_are_those_of_the_forward_pass(ready):
    prompt = ids(21)
    settings = {"logprobs": 3, "prompt_logprobs": 2, "logit_bias": {7: 50.0}}
    (answer,) = answers(ready, [greedy(prompt, new=5, **settings)])
    truth = special.log_softmax(logits_of(tuple(prompt + answer.tokens)), axis=-1)
    assert answer.tokens == [7] * 5
    assert [told.token for told in answer.prompt_logprobs] == prompt
    assert (answer.prompt_logprobs[0].logprob, answer.prompt_logprobs[0].top) == (None, ())
    told = [*answer.prompt_logprobs[1:], *answer.logprobs]
    for row, (token, logprob, top) in zip(truth[:-1], told, strict=True):
        assert logprob == pytest.approx(row[token], abs=2e-5)
        assert [token for token, _ in top] == np.argsort(-row)[: len(top)].tolist()
        np.testing.assert_allclose([value for _, value in top], np.sort(row)[::-1][: len(top)], atol=2e-5)
    assert [len(told.top) for told in answer.logprobs] == [3] * 5
    assert {len(told.top) for told in answer.prompt_logprobs[1:]} == {2}


def test_a_prompt_alone_can_be_scored(ready):
    for length in (1, 30):
        (answer,) = answers(ready, [greedy(ids(length), new=0, prompt_logprobs=0)])
        assert (answer.tokens, answer.finish, len(answer.prompt_logprobs)) == ([], "length", length)


def test_penalties_count_what_was_generated(ready):
    prompt = ids(12)
    knobs = {"presence_penalty": 0.5, "frequency_penalty": 0.7, "repetition_penalty": 1.3}
    (new,) = tokens_of(ready, greedy(prompt, new=30, **knobs))
    for n, logits in enumerate(next_logits(prompt, new)):
        counts = np.bincount(new[:n], minlength=VOCAB)
        seen = np.isin(np.arange(VOCAB), prompt) | (counts > 0)
        logits = np.where(seen, np.where(logits > 0, logits / 1.3, logits * 1.3), logits)
        assert new[n] == np.argmax(logits - 0.5 * (counts > 0) - 0.7 * counts)


def test_a_stop_id_ends_its_request_but_not_too_early(ready):
    prompt = ids(9)
    (free,) = tokens_of(ready, greedy(prompt))
    stop = free[4]
    (answer,) = answers(ready, [greedy(prompt, stop_ids=[stop], logprobs=0)])
    assert (answer.tokens, answer.finish) == (free[: free.index(stop)], "stop")
    assert len(answer.logprobs) == len(answer.tokens)
    (answer,) = answers(ready, [greedy(prompt, stop_ids=[stop], min_new_tokens=8)])
    assert stop not in answer.tokens
    assert len(answer.tokens) >= 8


class Alternating:
    """Even ids and odd ids by turns; `fails` at a step."""

    def __init__(self, fails=None, mask=None):
        self.taken, self.fails, self.mask = [], fails, mask

    def allowed(self):
        if self.mask is not None:
            return self.mask
        return np.arange(VOCAB) % 2 == len(self.taken) % 2

    def advance(self, token):
        if len(self.taken) == self.fails:
            raise RuntimeError("no such\nstate")
        self.taken.append(token)


def test_a_constraint_says_what_may_come_and_leaves_the_others_alone(ready):
    free, constraint, prompt = greedy(ids(9), new=20), Alternating(), ids(13)
    alone = tokens_of(ready, free)[0]
    other, bound = tokens_of(ready, free, greedy(prompt, constraint=constraint))
    assert other == alone
    assert bound == constraint.taken
    for n, logits in enumerate(next_logits(prompt, bound)):
        assert bound[n] == np.argmax(np.where(np.arange(VOCAB) % 2 == n % 2, logits, -np.inf))
    assert tokens_of(ready, free, free, free) == [alone] * 3  # in the slot that the constraint was in, too


@pytest.mark.parametrize(
    "constraint, line",
    [
        (Alternating(fails=2), "RuntimeError: no such state"),
        (Alternating(mask=np.zeros(VOCAB, bool)), "ValueError: the constraint leaves no token"),
        (Alternating(mask=np.ones(VOCAB + 1, bool)), r"ValueError: the constraint allows bool \(301,\)"),
        (Alternating(mask=np.ones(VOCAB)), "ValueError: the constraint allows float64"),
        (Alternating(mask=None, fails=0), "RuntimeError"),
    ],
)
def test_a_constraint_that_fails_ends_its_own_request_alone(ready, constraint, line):
    free = greedy(ids(9), new=20)
    other, bound = answers(ready, [free, greedy(ids(13), constraint=constraint)])
    assert other.tokens == tokens_of(ready, free)[0]
    assert bound.finish == "error"
    assert re.match(line, bound.error)


def test_a_prefix_is_found_in_whole_pieces_by_those_that_come_later():
    engine, prefix = another(), ids(40)
    requests = [greedy(prefix + ids(length)) for length in (3, 9, 1)]
    cold = answers(engine, requests[:1])
    warm = answers(engine, requests)
    assert [answer.cached_tokens for answer in (*cold, *warm)] == [0, 40, 40, 40]
    assert (warm[0].tokens, engine.stats().cached_prompt_tokens) == (cold[0].tokens, 120)
    assert [answer.tokens for answer in warm] == tokens_of(another(prefix_cache=False), *requests)


def test_requests_that_come_together_read_a_common_prefix_once():
    engine, prefix = another(), ids(64)
    found = answers(engine, [greedy(prefix + ids(length)) for length in (3, 5, 7)])
    assert sum(answer.cached_tokens for answer in found) == engine.stats().cached_prompt_tokens == 128
    assert engine.stats().pages_used == 0


def test_requests_wait_until_there_is_room_for_all_their_tokens():
    engine = another(cache_tokens=240)  # one such request at a time
    requests = [greedy(ids(98, seed), new=30) for seed in range(3)]
    running = []
    found = answers(engine, requests, after_step=lambda *_: running.append(engine.stats().running))
    assert max(running) == 1
    assert [answer.tokens for answer in found] == tokens_of(another(), *requests)


def test_lower_priorities_come_first_and_then_the_order_of_arrival(ready):
    order = []
    first, *_ = [ready.submit(greedy(ids(4), new=2, priority=priority)) for priority in (0, 1, -1, 1, 0, -1, 0, 1)]
    while ready.has_work():
        order += [event.request - first for event in ready.step() if event.finish]
    assert [set(order[:3]), set(order[3:6]), set(order[6:])] == [{2, 5, 0}, {4, 6, 1}, {3, 7}]


def test_a_full_queue_refuses_one_request_and_takes_the_next_when_there_is_room():
    engine = another(queue_requests=2, queue_tokens=20)
    kept = [engine.submit(greedy(ids(9))), engine.submit(greedy(ids(10)))]
    with pytest.raises(QueueFull, match="2 requests wait"):
        engine.submit(greedy([5]))
    engine.cancel(kept[0])
    with pytest.raises(QueueFull, match="10 tokens wait already; with 11 more"):
        engine.submit(greedy(ids(11)))
    engine.submit(greedy(ids(10)))
    assert (engine.stats().waiting, engine.stats().waiting_tokens) == (2, 20)
    while engine.has_work():
        engine.step()
    assert (engine.stats().finished, engine.stats().cancelled, engine.stats().waiting_tokens) == (2, 1, 0)


@pytest.mark.parametrize("when", ["waiting", "unread", "reading", "decoding", "over"])
def test_a_request_can_be_cancelled_at_any_moment(ready, when):
    others, long = [greedy(ids(9), new=30), greedy(ids(50), new=30)], greedy(ids(90), new=20)
    truth = tokens_of(ready, *others)
    engine = another()
    if when == "waiting":
        number = engine.submit(long)
        engine.cancel(number)
        assert [(event.request, event.finish) for event in engine.step()] == [(number, "cancelled")]
        assert not engine.has_work()
        return
    seen = {
        "unread": lambda run: run.read == 0,
        "reading": lambda run: run.read > 0 and not run.is_read,
        "decoding": lambda run: run.made > 0,
        "over": lambda run: False,
    }[when]

    def cancel(step, numbers):
        runs = {run.number: run for run in engine._running.values()}
        if numbers[2] not in runs or seen(runs[numbers[2]]):
            engine.cancel(numbers[2])

    found = answers(engine, [*others, long], after_step=cancel)
    assert [answer.tokens for answer in found[:2]] == truth
    assert found[2].finish == ("length" if when == "over" else "cancelled")
    assert bool(found[2].tokens) == (when in ("decoding", "over"))
    engine.cancel(12345)
    assert engine.step() == []
    assert engine.stats().pages_used == 0


@pytest.mark.parametrize(
    "request_, line",
    [
        (greedy([]), "the prompt has no tokens"),
        (greedy([5, VOCAB]), "prompt has the id 300, but the model's ids are 0 to 299"),
        (greedy([-1]), "prompt has the id -1"),
        (greedy([0.5]), "prompt must be token ids"),
        (greedy(["a"]), "prompt must be token ids"),
        (greedy([[5], [6]]), "prompt must be token ids"),
        (
            greedy([5], new=0),
            "max_new_tokens is 0; it must be at least 1, or 0 where prompt_logprobs or pooling are wanted",
        ),
        (greedy([5], new=-1, prompt_logprobs=1), "max_new_tokens is -1"),
        (greedy([5], new=2.5), "max_new_tokens is 2.5; it must be an integer"),
        (greedy([5], new=4, min_new_tokens=5), "min_new_tokens is 5; it must be from 0 to max_new_tokens, 4"),
        (greedy(ids(120), new=9), "129 together; this engine's max_length is 128"),
        (greedy(ids(120), new=8), "need 32 pages of 30"),
        (greedy([5], temperature=-1.0), "temperature is -1"),
        (greedy([5], top_p=0.0), "top_p is 0"),
        (greedy([5], top_k=1.5), "top_k is 1.5"),
        (greedy([5], temperature=float("nan")), "temperature is nan"),
        (greedy([5], seed=2**32), "seed is 4294967296"),
        (greedy([5], seed=-1), "seed is -1"),
        (greedy([5], logit_bias={VOCAB: 1.0}), "logit_bias has the id 300"),
        (greedy([5], logit_bias={5: float("inf")}), "logit_bias of 5 is inf"),
        (greedy([5], stop_ids=[VOCAB]), "stop_ids has the id 300"),
        (greedy([5], logit_bias={5: 1e39}), r"logit_bias of 5 is 1e\+39; it must be a number from -1e9 to 1e9"),
        (greedy([5], logit_bias={5: "much"}), "logit_bias of 5 is much"),
        (greedy([5], temperature=[0.5]), r"temperature is \[0.5\]; it must be a number"),
        (greedy([5], temperature=10**400), "temperature is 1000"),
        (greedy([5], repetition_penalty=1e-38), "repetition_penalty is 1e-38, but must be from 0.01 to 100"),
        (greedy([5], stop_ids=range(VOCAB), min_new_tokens=1), "min_new_tokens is 1, but stop_ids are all ids"),
        (greedy([5], priority=None), "priority is None; it must be an integer"),
        (greedy([5], priority="high"), "priority is 'high'"),
        (greedy([5], logprobs=21), "logprobs is 21; it must be an integer from 0 to 20"),
        (greedy([5], logprobs=1.5), "logprobs is 1.5"),
        (greedy([5], prompt_logprobs=0.5), "prompt_logprobs is 0.5"),
        (greedy([5], prompt_logprobs=-1), "prompt_logprobs is -1"),
        (greedy([5], adapter="mine"), "there is no adapter 'mine'"),
    ],
)
def test_what_cannot_be_answered_is_refused_and_nothing_else_changes(ready, request_, line):
    engine = another(cache_tokens=120)
    with pytest.raises(ValueError, match=line):
        engine.submit(request_)
    assert not engine.has_work()
    assert engine.stats().pages_free == 30


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"slots": 0}, "slots is 0; it must be at least 1"),
        ({"page_size": 3}, "prefill_piece is 8, which is no multiple of page_size, 3"),
        ({"prefill_chunk": 12}, "prefill_chunk is 12, which is no multiple of prefill_piece, 8"),
        ({"cache_tokens": 3}, "cache_tokens is 3; it must hold a page of 4 tokens"),
        ({"max_length": 0}, "max_length is 0"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(changes, line):
    with pytest.raises(ValueError, match=line):
        another(**changes)


def soak(engine, *, steps, seed=0):
    """Random arrivals, lengths, kinds and cancellations; every survivor's tokens are those of a quiet engine."""
    draw, found, kinds, cancelled = np.random.default_rng(seed), {}, {}, set()
    requests = mixture()
    truth = [tokens_of(engine, request)[0] for request in requests]
    for step in range(steps):
        while draw.random() < 0.4:
            kind = int(draw.integers(len(requests)))
            try:
                number = engine.submit(requests[kind])
            except QueueFull:
                break
            found[number], kinds[number] = Answer(), kind
        if found and draw.random() < 0.2:
            number = int(draw.choice(list(found)))
            engine.cancel(number)
            cancelled.add(number)
        for event in engine.step():
            found[event.request].take(event)
        engine.pages.audit()
        if step % 50 == 0:
            over = [number for number, answer in found.items() if answer.finish]
            for number in over:
                answer = found.pop(number)
                assert answer.finish != "cancelled" or number in cancelled
                assert answer.tokens == truth[kinds[number]][: len(answer.tokens)]
                assert answer.finish == "cancelled" or answer.tokens == truth[kinds[number]]
    while engine.has_work():
        engine.step()
    stats = engine.stats()
    assert (stats.pages_used, stats.running, stats.waiting, stats.waiting_tokens) == (0, 0, 0, 0)
    assert stats.compilations_after_ready == 0
    assert stats.cancelled
    assert stats.cached_prompt_tokens


def test_random_arrivals_and_cancellations_change_no_survivor():
    engine = another(cache_tokens=240)
    engine.warm_up()
    soak(engine, steps=300)


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_steps():
    engine = another(cache_tokens=240)
    engine.warm_up()
    soak(engine, steps=2000)
    before = len(jax.live_arrays()), sum(array.nbytes for array in jax.live_arrays())
    soak(engine, steps=10_000, seed=1)
    assert (len(jax.live_arrays()), sum(array.nbytes for array in jax.live_arrays())) == before
