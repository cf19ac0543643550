"""Mixtures: which source gives row n, against a reference that goes through the rows one by one."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformers.data.mixture import MixedRows, floor_sum

GOLDEN = 0x9E3779B97F4A7C15


class CountedRows:
    """A source as a mixture sees it, whose row n says who it is."""

    sequence_length = 8

    def __init__(self, name: str, rows: int, *, epochs: int | None = None, tokens: int = 1, documents: int = 1):
        self.name, self.rows_per_epoch, self.epochs = name, rows, epochs
        self.tokens, self.documents = tokens, documents
        self.fingerprint = f"{name}{rows}"
        self.efficiency = tokens / (rows * 8)

    def __len__(self) -> int:
        return 2**63 - 1 if self.epochs is None else self.rows_per_epoch * self.epochs

    def write(self, batch, places, numbers) -> None:
        batch["tokens"][list(places), 0] = ord(self.name)
        batch["tokens"][list(places), 1] = numbers


def told_by(rows: MixedRows, numbers) -> list[tuple[str, int]]:
    return [(chr(row[0]), int(row[1])) for row in rows.batch(numbers)["tokens"]]


def mixture(sources, weights, **settings) -> MixedRows:
    return MixedRows({rows.name: rows for rows in sources}, weights, **{"weights_by": "rows", **settings})


def first_draw(rows: MixedRows) -> int:
    return rows._offset


def one_by_one(sources, weights, policy, offset, most):
    """The rows of a mixture, each from its draw and a count of the rows before it."""
    given, dropped, told = Counter(), set(), []
    for n in range(most):
        now = max(mark for mark in weights if mark <= n)
        finished = {s.name for s in sources if s.epochs is not None and given[s.name] >= len(s)}
        if policy == "stop" and finished:
            break
        if policy == "drop":
            dropped = finished
        later = {name for mark in weights if mark >= now for name, weight in weights[mark].items() if weight}
        if later <= finished:
            break
        share = {s.name: Fraction(weights[now][s.name]) for s in sources if s.name not in dropped}
        if not sum(share.values()):
            break
        draw, passed = (n * GOLDEN + offset) % 2**64, Fraction(0)
        for name, weight in share.items():
            passed += weight
            if draw < int(2**64 * passed / sum(share.values())):
                told.append((name, given[name]))
                given[name] += 1
                break
    return told


@settings(max_examples=200, deadline=None)
@given(n=st.integers(0, 40), a=st.integers(0, 60), b=st.integers(0, 60), m=st.integers(1, 60))
def test_sums_of_floors_are_what_adding_gives(n, a, b, m):
    assert floor_sum(n, a, b, m) == sum((a * i + b) // m for i in range(n))


WEIGHTS = st.fixed_dictionaries({name: st.sampled_from([0.0, 0.1, 1.0, 2.5, 7.0]) for name in "abc"})


@settings(max_examples=150, deadline=None)
@given(
    stages=st.dictionaries(st.integers(1, 150), WEIGHTS, max_size=3),
    first=WEIGHTS,
    epochs=st.tuples(*[st.sampled_from([None, 1, 2])] * 3),
    sizes=st.tuples(*[st.integers(1, 40)] * 3),
    policy=st.sampled_from(["repeat", "stop", "drop"]),
    seed=st.integers(0, 2**63 - 1),
)
def test_rows_are_those_of_a_mixture_made_one_by_one(stages, first, epochs, sizes, policy, seed):
    weights = {mark: named for mark, named in {0: first, **stages}.items() if any(named.values())}
    weights.setdefault(0, dict.fromkeys("abc", 1.0))
    sources = [CountedRows(*each, epochs=count) for *each, count in zip("abc", sizes, epochs, strict=True)]
    rows = mixture(sources, weights, when_exhausted=policy, seed=seed)
    truth = one_by_one(sources, weights, policy, first_draw(rows), most=400)
    assert min(len(rows), 400) == len(truth)
    assert told_by(rows, range(len(truth))) == truth
    if len(rows) < 400:
        with pytest.raises(IndexError):
            rows[len(rows)]
    for n in {0, 1, len(truth) // 2, len(truth)}:
        assert rows.rows_before(n) == {name: sum(t[0] == name for t in truth[:n]) for name in "abc"}


def test_a_row_asked_for_alone_is_the_row_that_comes_in_its_turn():
    sources = [CountedRows("a", 7), CountedRows("b", 5000, epochs=1), CountedRows("c", 9)]
    weights = {0: {"a": 1, "b": 5, "c": 0}, 5000: {"a": 1, "b": 5, "c": 3}}
    rows = mixture(sources, weights, when_exhausted="drop")
    in_turn = told_by(rows, range(12_000))
    for n in np.random.default_rng(0).integers(0, 12_000, 40).tolist():
        row = mixture(sources, weights, when_exhausted="drop")[n]["tokens"]
        assert (chr(row[0]), row[1]) == in_turn[n] == mixture(sources, weights, when_exhausted="drop").place(n)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.07, 0.03), (1, 2, 3, 5, 8, 13), (0.999, 0.001)])
def test_every_prefix_has_its_shares_to_within_a_few_rows(shares, seed):
    sources = [CountedRows("abcdef"[k], 10) for k in range(len(shares))]
    rows = mixture(sources, {0: dict(zip("abcdef", shares, strict=False))}, seed=seed)
    told = np.array(["abcdef".index(name) for name, _ in told_by(rows, range(20_000))])
    for k, share in enumerate(shares):
        expected = np.arange(1, 20_001) * share / sum(shares)
        assert np.abs(np.cumsum(told == k) - expected).max() < 4


def test_far_away_rows_still_have_their_shares_and_cost_no_more():
    sources = [CountedRows("a", 10), CountedRows("b", 10)]
    rows = mixture(sources, {0: {"a": 3, "b": 1}})
    before = rows.rows_before(10**15)
    assert before["a"] == pytest.approx(0.75 * 10**15, abs=20)
    name, number = rows.place(10**15)
    assert number == before[name]


def test_weights_are_of_tokens_documents_or_rows():
    """A row of a holds 6 tokens of 2 documents on average, a row of b 3 tokens of 1/2 document."""
    sources = [CountedRows("a", 10, tokens=60, documents=20), CountedRows("b", 10, tokens=30, documents=5)]
    for weights_by, ratio in (("tokens", 3 / 6), ("documents", 0.5 / 2), ("rows", 1)):
        rows = mixture(sources, {0: {"a": 1, "b": 1}}, weights_by=weights_by)
        given = rows.rows_before(10_000)
        assert given["a"] / given["b"] == pytest.approx(ratio, rel=2e-3)


def test_efficiency_is_the_one_of_the_rows_that_are_drawn():
    sources = [CountedRows("a", 10, tokens=80), CountedRows("b", 10, tokens=40)]
    assert mixture(sources, {0: {"a": 3, "b": 1}}).efficiency == pytest.approx(0.875)


def test_weights_that_change_later_leave_the_fingerprint_of_what_came_before():
    sources = [CountedRows("a", 10), CountedRows("b", 10)]
    even, more = {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 3.0}
    as_planned, changed = mixture(sources, {0: even}), mixture(sources, {0: even, 100: more})
    for n in (0, 1, 100):
        assert as_planned.fingerprint_before(n) == changed.fingerprint_before(n)
    assert as_planned.fingerprint_before(101) != changed.fingerprint_before(101)
    assert mixture(sources, {0: more}).fingerprint_before(0) != as_planned.fingerprint_before(0)
    assert mixture(sources, {0: even}, seed=1).fingerprint_before(0) != as_planned.fingerprint_before(0)


def test_a_source_that_joins_later_leaves_the_rows_before_as_they_were():
    a, b, c = (CountedRows(name, 10) for name in "abc")
    alone = mixture([a, b], {0: {"a": 1, "b": 1}})
    joined = mixture([a, c, b], {0: {"a": 1, "b": 1, "c": 0}, 50: {"a": 1, "b": 1, "c": 1}})
    assert told_by(joined, range(50)) == told_by(alone, range(50))
    assert joined.fingerprint_before(50) == alone.fingerprint_before(50)


def test_epochs_may_be_raised_at_a_resume_unless_they_have_dropped_a_source():
    def made(epochs, policy):
        sources = [CountedRows("a", 10, epochs=epochs), CountedRows("b", 10)]
        return mixture(sources, {0: {"a": 1, "b": 1}}, when_exhausted=policy)

    assert made(1, "repeat").fingerprint_before(100) == made(2, "repeat").fingerprint_before(100)
    assert made(1, "drop").fingerprint_before(100) != made(2, "drop").fingerprint_before(100)
    assert made(1, "drop").fingerprint_before(10) == made(2, "drop").fingerprint_before(10)
