"""Sampling equals Hugging Face's processors and the written-out formulas, and a row never depends on its batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from transformers.generation import logits_process as reference

from jaxformers.infer.sampling import Plan, SamplingParams, TokenCounts, filter_logits, penalise, sample

V = 67
EVERYTHING = Plan(greedy_only=False, filters=True, penalties=True)
sample_jit = jax.jit(sample, static_argnames=("plan", "logprobs"))
filter_jit = jax.jit(filter_logits, static_argnames="search")


def random_logits(rows, seed=0, scale=4.0, vocab_size=V):
    return np.random.default_rng(seed).normal(size=(rows, vocab_size)).astype(np.float32) * scale


def reference_filters(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """One row through Hugging Face's warpers, in the order its generate applies them."""
    scores = reference.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits)[None])
    if top_k:
        scores = reference.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = reference.TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = reference.MinPLogitsWarper(min_p)(None, scores)
    return scores[0].numpy()


def assert_same_distribution(ours, theirs):
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_allclose(jax.nn.softmax(ours), jax.nn.softmax(theirs), rtol=1e-5, atol=1e-8)


def tokens_of(logits, params, positions=None, counts=None, plan=None):
    positions = np.zeros(len(logits), np.int32) if positions is None else positions
    plan = plan or params.plan()
    return np.asarray(sample_jit(jnp.asarray(logits), params, positions, plan=plan, counts=counts).tokens)


# Filters against Hugging Face

ROWS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": V},
    {"top_k": 1000},
    {"top_p": 0.9},
    {"top_p": 0.2},
    {"top_p": 1e-4},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"min_p": 0.8},
    {"min_p": 1.0},
    {"top_k": 10, "top_p": 0.7},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 1.8, "top_k": 50, "top_p": 0.99, "min_p": 0.001},
]


def params_of(rows, **common):
    names = ("temperature", "top_k", "top_p", "min_p")
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    columns = {name: [row.get(name, off[name]) for row in rows] for name in names}
    return SamplingParams.create(len(rows), **columns | common)


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0, 20.0])
def test_each_row_of_a_batch_is_filtered_as_hugging_face_filters_it_alone(scale):
    for seed in range(5):
        logits = random_logits(len(ROWS), seed, scale)
        ours = np.asarray(filter_jit(logits, params_of(ROWS)))
        for row, knobs in enumerate(ROWS):
            assert_same_distribution(ours[row], reference_filters(logits[row], **knobs))


def test_tokens_the_model_rules_out_stay_out_under_every_filter():
    logits = random_logits(len(ROWS), scale=1.0)
    logits[:, 3:] = np.where(np.random.default_rng(1).random((len(ROWS), V - 3)) < 0.7, -np.inf, logits[:, 3:])
    ours = np.asarray(filter_jit(logits, params_of(ROWS)))
    for row, knobs in enumerate(ROWS):
        assert_same_distribution(ours[row], reference_filters(logits[row], **knobs))
    drawn = tokens_of(logits, params_of(ROWS, seed=range(len(ROWS))))
    assert np.isfinite(logits[np.arange(len(ROWS)), drawn]).all()


def test_ties_at_the_edge_of_a_filter_are_all_kept():
    logits = np.log(np.array([[0.1, 0.3, 0.1, 0.3, 0.1, 0.1]] * 4, np.float32))
    params = params_of([{"top_k": 1}, {"top_k": 3}, {"top_p": 0.5}, {"top_p": 0.61}])
    kept = np.isfinite(filter_jit(logits, params)).sum(axis=-1)
    assert kept.tolist() == [2, 6, 2, 6]


def test_the_nucleus_is_taken_of_what_top_k_left():
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))  # of the best two: 0.571, 0.429
    kept = np.isfinite(filter_jit(logits, params_of([{"top_k": 2, "top_p": 0.5}])))
    assert kept.tolist() == [[True, False, False, False]]
    kept = np.isfinite(filter_jit(logits, params_of([{"top_p": 0.5}])))
    assert kept.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("temperature", [1e-6, 1.2e-38])
def test_a_tiny_temperature_is_the_argmax_and_never_not_a_number(temperature):
    logits = random_logits(8)
    ours = np.asarray(filter_jit(logits, SamplingParams.create(8, temperature=temperature, top_p=0.9)))
    assert not np.isnan(ours).any()
    drawn = tokens_of(logits, SamplingParams.create(8, temperature=temperature, top_p=0.9, seed=range(8)))
    np.testing.assert_array_equal(drawn, logits.argmax(axis=-1))


# Penalties

TOKENS = np.array([[5, 9, 5, 0], [1, 2, 60, 0], [7, 7, 7, 7]])
VALID = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
GENERATED = [[3, 9, 3], [0, 66, 66], [8, 8, 8]]


def counts_of(tokens=TOKENS, valid=VALID, generated=GENERATED):
    counts = TokenCounts.from_prompts(jnp.asarray(tokens), jnp.asarray(valid), vocab_size=V)
    for step in np.transpose(generated):
        counts = jax.jit(TokenCounts.add)(counts, jnp.asarray(step))
    return counts


def test_counts_hold_the_prompt_without_its_padding_and_every_generated_token():
    counts = counts_of()
    for row in range(3):
        assert set(np.flatnonzero(counts.prompt[row])) == set(TOKENS[row][VALID[row]])
        np.testing.assert_array_equal(counts.generated[row], np.bincount(GENERATED[row], minlength=V))


def test_a_row_that_is_not_active_counts_nothing():
    counts = counts_of().add(jnp.array([1, 2, 3]), jnp.array([True, False, True]))
    expected = [[*GENERATED[0], 1], GENERATED[1], [*GENERATED[2], 3]]
    for row in range(3):
        np.testing.assert_array_equal(counts.generated[row], np.bincount(expected[row], minlength=V))


@pytest.mark.parametrize("penalty", [1.3, 0.8, 5.0])
def test_repetition_penalty_is_hugging_faces_over_prompt_and_generated_tokens(penalty):
    logits = random_logits(3)
    ours = penalise(jnp.asarray(logits), SamplingParams.create(3, repetition_penalty=penalty), counts_of())
    for row in range(3):
        seen = torch.tensor([[*TOKENS[row][VALID[row]], *GENERATED[row]]])
        theirs = reference.RepetitionPenaltyLogitsProcessor(penalty)(seen, torch.tensor(logits[row])[None])[0]
        np.testing.assert_allclose(ours[row], theirs, rtol=1e-6)


def test_presence_and_frequency_penalties_are_openais_over_generated_tokens_alone():
    logits = random_logits(3)
    presence, frequency = [0.5, 1.5, -1.0], [0.25, -0.5, 2.0]
    params = SamplingParams.create(3, presence_penalty=presence, frequency_penalty=frequency)
    ours = penalise(jnp.asarray(logits), params, counts_of())
    expected = logits.copy()
    for row in range(3):
        for token in range(V):
            count = GENERATED[row].count(token)
            # mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence
            expected[row, token] -= count * frequency[row] + float(count > 0) * presence[row]
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


def test_repetition_comes_before_presence():
    counts = counts_of([[0]], np.array([[True]]), [[2]])
    logits = np.full((1, V), 3.0, np.float32)
    params = SamplingParams.create(1, repetition_penalty=2.0, presence_penalty=1.0)
    penalised = penalise(jnp.asarray(logits), params, counts)[0]
    assert penalised[:3].tolist() == [1.5, 3.0, 0.5]  # prompt, unseen, generated: 3 / 2 - 1


def test_penalties_leave_ruled_out_tokens_out():
    logits = np.full((1, V), -np.inf, np.float32)
    logits[0, 4] = -1.0
    params = SamplingParams.create(1, repetition_penalty=1.5, presence_penalty=-2.0, frequency_penalty=-2.0)
    penalised = np.asarray(penalise(jnp.asarray(logits), params, counts_of([[0]], np.array([[True]]), [[2]])))
    np.testing.assert_array_equal(penalised, logits)


def test_greedy_decoding_follows_the_penalties():
    logits = np.zeros((1, V), np.float32)
    logits[0, :4] = [1.0, 0.9, 0.8, 0.7]
    params = SamplingParams.create(1, temperature=0.0, presence_penalty=0.15, frequency_penalty=0.1)
    counts = counts_of([[0]], np.array([[True]]), np.zeros((1, 0), int))
    chosen = []
    for _ in range(6):
        token = tokens_of(logits, params, counts=counts)
        counts = counts.add(jnp.asarray(token))
        chosen.append(int(token[0]))
    scores, expected = logits[0].astype(np.float64), []
    for _ in range(6):
        penalties = [0.15 * (token in expected) + 0.1 * expected.count(token) for token in range(V)]
        expected.append(int(np.argmax(scores - penalties)))
    assert chosen == expected
    assert len(set(chosen)) > 2


# Draws


def test_temperature_zero_is_the_argmax_whatever_the_other_rows_and_knobs_are():
    logits = random_logits(6)
    logits[2, [10, 20]] = 50.0  # a tie goes to the first
    greedy = np.array([True, False, True, True, False, True])
    params = SamplingParams.create(6, temperature=np.where(greedy, 0.0, 1.5), top_k=40, top_p=0.9, seed=range(6))
    np.testing.assert_array_equal(tokens_of(logits, params)[greedy], logits.argmax(axis=-1)[greedy])
    assert tokens_of(logits, params)[2] == 10
    all_greedy = SamplingParams.create(6, temperature=0.0, top_k=3, seed=range(6))
    assert all_greedy.plan() == Plan(greedy_only=True, filters=False, penalties=False)
    np.testing.assert_array_equal(tokens_of(logits, all_greedy), logits.argmax(axis=-1))


@pytest.mark.parametrize("knobs", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_a_filter_that_leaves_one_token_draws_it(knobs):
    logits = random_logits(32, scale=0.1)
    drawn = tokens_of(logits, SamplingParams.create(32, temperature=3.0, seed=range(32), **knobs))
    np.testing.assert_array_equal(drawn, logits.argmax(axis=-1))


DRAWS = 20_000


def chi_square_bound(drawn, probabilities):
    """Pearson's statistic of the draws, and the value it exceeds once in a million under the right distribution."""
    possible = probabilities > 0
    seen = np.bincount(drawn, minlength=len(probabilities))
    assert not seen[~possible].any()
    expected = probabilities[possible] * len(drawn)
    statistic = float(np.sum((seen[possible] - expected) ** 2 / expected))
    return statistic, stats.chi2.ppf(1 - 1e-6, possible.sum() - 1)


@pytest.mark.parametrize(
    "knobs", [{}, {"temperature": 0.5}, {"top_k": 6}, {"top_p": 0.8}, {"temperature": 1.7, "top_k": 9, "min_p": 0.1}]
)
@pytest.mark.parametrize("varies", ["seed", "position"])
def test_draws_have_the_filtered_distribution_over_seeds_and_over_positions(knobs, varies):
    logits = random_logits(1, seed=3, scale=1.0, vocab_size=12)
    seeds = np.arange(DRAWS) if varies == "seed" else 12345
    positions = np.arange(DRAWS, dtype=np.int32) if varies == "position" else np.full(DRAWS, 7, np.int32)
    params = SamplingParams.create(DRAWS, seed=seeds, **knobs)
    drawn = tokens_of(np.repeat(logits, DRAWS, axis=0), params, positions)
    theirs = reference_filters(logits[0], **knobs)
    probabilities = np.exp(theirs - theirs.max()) / np.exp(theirs - theirs.max()).sum()
    statistic, bound = chi_square_bound(drawn, probabilities)
    assert statistic < bound
    wrong, bound = chi_square_bound(
        drawn[probabilities[drawn] > 0], np.where(probabilities > 0, 1, 0) / np.sum(probabilities > 0)
    )
    assert wrong > bound  # the test can tell


def test_draws_of_neighbouring_seeds_and_positions_are_independent():
    logits = np.zeros((DRAWS, 4), np.float32)
    positions = np.arange(DRAWS, dtype=np.int32)
    a = tokens_of(logits, SamplingParams.create(DRAWS, seed=1), positions)
    b = tokens_of(logits, SamplingParams.create(DRAWS, seed=2), positions)
    for pairs in (a * 4 + b, a[:-1] * 4 + a[1:], a[:-1] * 4 + b[1:]):
        statistic, bound = chi_square_bound(pairs, np.full(16, 1 / 16))
        assert statistic < bound


MIXED = [
    {"temperature": 0.8, "top_k": 12},
    {"temperature": 0.0},
    {"temperature": 1.3, "top_p": 0.9},
    {"min_p": 0.03},
    {"temperature": 1.0},
]


def row_params(row, seed):
    return params_of([MIXED[row]], seed=seed, repetition_penalty=1.1 if row == 2 else 1.0)


def stack(params):
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *params)


def decode(rows, steps=12):
    """Tokens [rows, steps] of a made-up model whose logits depend on the row and its last token only."""
    table = np.stack([random_logits(V, seed=row, scale=2.0) for row in range(len(MIXED))])
    params = stack([row_params(row, seed=100 + row) for row in rows])
    prompt = jnp.asarray(rows)[:, None]
    counts = TokenCounts.from_prompts(prompt, jnp.ones_like(prompt, bool), vocab_size=V)
    last, out = np.array(rows), []
    for step in range(steps):
        positions = np.full(len(rows), step, np.int32)
        last = tokens_of(table[rows, last], params, positions, counts, plan=EVERYTHING)
        counts = counts.add(jnp.asarray(last))
        out.append(last)
    return np.stack(out, axis=1)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 2, 0]])
def test_a_row_draws_the_same_tokens_alone_and_in_any_slot_of_any_batch(rows):
    together = decode(rows)
    for slot, row in enumerate(rows):
        np.testing.assert_array_equal(together[slot], decode([row])[0])


def test_seeds_and_positions_change_the_draw():
    logits = np.zeros((64, V), np.float32)
    same = tokens_of(logits, SamplingParams.create(64, seed=5))
    assert len(set(same)) == 1
    assert len(set(tokens_of(logits, SamplingParams.create(64, seed=range(64))))) > 20
    assert len(set(tokens_of(logits, SamplingParams.create(64, seed=5), np.arange(64, dtype=np.int32)))) > 20
    assert len(set(tokens_of(logits, SamplingParams.create(64, seed=range(2**32 - 64, 2**32))))) > 20


def test_tokens_do_not_change_with_the_default_generator():
    logits, params, positions = jnp.asarray(random_logits(16, scale=1.0)), SamplingParams.create(16), np.arange(16)
    with jax.default_prng_impl("rbg"):
        drawn = sample(logits, params, positions, plan=params.plan()).tokens
    np.testing.assert_array_equal(drawn, sample(logits, params, positions, plan=params.plan()).tokens)


def test_logprobs_are_the_models_own_before_penalties_temperature_and_filters():
    logits = random_logits(3)
    params = SamplingParams.create(3, temperature=[0.0, 0.5, 2.0], top_k=4, repetition_penalty=1.7, seed=range(3))
    sampled = sample_jit(jnp.asarray(logits), params, np.arange(3), plan=EVERYTHING, counts=counts_of(), logprobs=True)
    expected = torch.tensor(logits).log_softmax(-1).numpy()[np.arange(3), sampled.tokens]
    np.testing.assert_allclose(sampled.logprobs, expected, rtol=1e-5)
    assert (sampled.tokens.dtype, sampled.logprobs.dtype) == (jnp.int32, jnp.float32)


# Plans and compilation


@pytest.mark.parametrize(
    "knobs, plan",
    [
        ({"temperature": 0.0}, Plan(True, False, False)),
        ({"temperature": 1e-45}, Plan(True, False, False)),
        ({"temperature": [0.0, 0.0], "top_k": 5, "repetition_penalty": 1.2}, Plan(True, False, True)),
        ({"temperature": [0.0, 1.0]}, Plan(False, False, False)),
        ({"min_p": 0.1}, Plan(False, False, False)),
        ({"top_k": [0, 3]}, Plan(False, True, False)),
        ({"temperature": [1.0, 0.0], "top_k": [0, 3]}, Plan(False, False, False)),
        ({"top_p": [1.0, 0.9]}, Plan(False, True, False)),
        ({"presence_penalty": [0.0, 0.1]}, Plan(False, False, True)),
        ({"frequency_penalty": -0.1}, Plan(False, False, True)),
        ({"repetition_penalty": 0.9}, Plan(False, False, True)),
    ],
)
def test_a_plan_asks_for_exactly_what_some_row_needs(knobs, plan):
    assert SamplingParams.create(2, **knobs).plan() == plan
    assert hash(plan) == hash(SamplingParams.create(2, **knobs).plan())


def test_a_plan_that_does_more_than_needed_changes_no_token():
    logits = random_logits(32, scale=1.0)
    params = SamplingParams.create(32, temperature=np.linspace(0, 2, 32), min_p=0.01, seed=range(32))
    prompt = jnp.zeros((32, 1), jnp.int32)
    counts = TokenCounts.from_prompts(prompt, jnp.ones_like(prompt, bool), vocab_size=V).add(prompt[:, 0])
    assert params.plan() == Plan(greedy_only=False, filters=False, penalties=False)
    np.testing.assert_array_equal(tokens_of(logits, params), tokens_of(logits, params, counts=counts, plan=EVERYTHING))


def test_a_greedy_plan_makes_no_noise_and_only_a_filter_plan_searches():
    logits, params = jnp.zeros((2, V)), SamplingParams.create(2)

    def program(plan):
        return str(jax.make_jaxpr(functools.partial(sample, plan=plan))(logits, params, jnp.zeros(2, jnp.int32)))

    greedy, plain, filtered = (
        program(Plan(*plan, penalties=False)) for plan in ((True, False), (False, False), (False, True))
    )
    assert ("random" in greedy, "random" in plain, "random" in filtered) == (False, True, True)
    assert ("scan" in plain or "while" in plain, "scan" in filtered or "while" in filtered) == (False, True)
    assert "sort" not in filtered


def test_new_values_do_not_compile_again():
    traces = 0

    @functools.partial(jax.jit, static_argnames="plan")
    def counted(*args, plan):
        nonlocal traces
        traces += 1
        return sample(*args, plan=plan)

    for value in (1, 2, 3):
        params = SamplingParams.create(4, temperature=value / 2, top_k=value, top_p=value / 4, min_p=0.0, seed=value)
        counted(jnp.zeros((4, V)), params, np.full(4, value, np.int32), plan=params.plan())
    assert traces == 1


# Values refused

REFUSED = [
    ("temperature", -0.1, "temperature is -0.1, but must be finite and at least 0"),
    ("temperature", float("nan"), "temperature is nan"),
    ("temperature", float("inf"), "temperature is inf"),
    ("temperature", 1e39, "temperature is 1e.39"),
    ("temperature", "hot", "temperature is 'hot', but must be a number"),
    ("temperature", None, "temperature"),
    ("temperature", [1.0, -2.0], "temperature is -2"),
    ("temperature", [1.0, 1.0, 1.0], r"temperature has shape \(3,\), but must be one number or one for each of 2 rows"),
    ("temperature", [[1.0, 1.0]], "temperature has shape"),
    ("top_k", -1, "top_k is -1, but must be an integer of at least 0"),
    ("top_k", 2.5, "top_k is 2.5"),
    ("top_k", 2**31, "top_k is 2147483648"),
    ("top_k", float("nan"), "top_k is nan"),
    ("top_p", 0, "top_p is 0, but must be above 0 and at most 1"),
    ("top_p", 1.01, "top_p is 1.01"),
    ("top_p", 1e-60, "top_p is 1e-60"),
    ("min_p", -0.01, "min_p is -0.01, but must be from 0 to 1"),
    ("min_p", 1.5, "min_p is 1.5"),
    ("repetition_penalty", 0, "repetition_penalty is 0, but must be from 0.01 to 100"),
    ("repetition_penalty", -1.2, "repetition_penalty is -1.2"),
    ("presence_penalty", 2.1, "presence_penalty is 2.1, but must be from -2 to 2"),
    ("frequency_penalty", float("nan"), "frequency_penalty is nan, but must be from -2 to 2"),
    ("seed", -1, r"seed is -1, but must be an integer from 0 to 2\*\*32 - 1"),
    ("seed", 2**32, "seed is 4294967296"),
    ("seed", 0.5, "seed is 0.5"),
]


@pytest.mark.parametrize("name, value, said", REFUSED)
def test_a_value_out_of_range_is_refused_with_one_line(name, value, said):
    with pytest.raises(ValueError, match=f"^{said}") as refusal:
        SamplingParams.create(2, **{name: value})
    assert "\n" not in str(refusal.value)


def test_parameters_have_their_dtypes_and_one_value_per_row():
    params = SamplingParams.create(3, top_k=np.array([1, 2, 3]), seed=2**32 - 1)
    dtypes = {name: (leaf.dtype.name, leaf.shape) for name, leaf in vars(params).items()}
    integers = {"top_k": ("int32", (3,)), "seed": ("uint32", (3,))}
    assert dtypes == dict.fromkeys(dtypes, ("float32", (3,))) | integers
    assert params.seed.tolist() == [2**32 - 1] * 3
