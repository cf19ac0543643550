from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformers.data.packing import PackingPlan, best_fit, first_fit, one_a_row, permutation

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40)
PLANS = st.fixed_dictionaries(
    {
        "sequence_length": st.integers(1, 16),
        "packing": st.sampled_from(["first_fit", "best_fit", "concat", "none"]),
        "window": st.integers(1, 12),
        "seed": st.integers(0, 2**63 - 1),
        "shuffle": st.booleans(),
    }
)


def _plan(lengths, **changed) -> PackingPlan:
    usual = {"sequence_length": 8, "packing": "first_fit", "window": 4, "seed": 0, "shuffle": True}
    return PackingPlan(np.array(lengths), **(usual | changed))


def _row(plan: PackingPlan, n: int) -> list[tuple[int, int, int]]:
    pieces = plan.pieces(n)
    return [tuple(map(int, piece)) for piece in zip(pieces.document, pieces.start, pieces.length, strict=True)]


def _epoch(plan: PackingPlan, epoch: int = 0) -> list[list[tuple[int, int, int]]]:
    return [_row(plan, epoch * plan.rows_per_epoch + n) for n in range(plan.rows_per_epoch)]


def _slow_fit(
    lengths: list[int], capacity: int, window: int, *, order: Callable, choose: Callable
) -> list[list[tuple[int, int, int]]]:
    """Full rows first; then each rest, in an order, goes to a row that is chosen among (room, row), or to a new one."""
    rows = []
    for first in range(0, len(lengths), window):
        full, rests = [], []
        for document in range(first, min(first + window, len(lengths))):
            start, length = 0, lengths[document]
            while length - start >= capacity:
                full.append([(document, start, capacity)])
                start += capacity
            if start < length:
                rests.append((document, start, length - start))
        mixed = []
        for piece in order(rests):
            rooms = [(capacity - sum(part[2] for part in row), n) for n, row in enumerate(mixed)]
            row = choose([(room, n) for room, n in rooms if room >= piece[2]])
            if row is None:
                mixed.append([piece])
            else:
                mixed[row].append(piece)
        rows += full + [sorted(row) for row in mixed]  # in a row, documents keep their order
    return rows


def _slow_first_fit(lengths, capacity, window):
    return _slow_fit(
        lengths, capacity, window, order=list, choose=lambda rooms: min(n for _, n in rooms) if rooms else None
    )


def _slow_best_fit(lengths, capacity, window):
    return _slow_fit(
        lengths,
        capacity,
        window,
        order=lambda rests: sorted(rests, key=lambda piece: -piece[2]),
        choose=lambda rooms: min(rooms)[1] if rooms else None,
    )


def _slow_none(lengths, capacity, window):
    return _slow_fit(lengths, capacity, window, order=list, choose=lambda rooms: None)


def _slow_concat(lengths: list[int], capacity: int, window: int) -> list[list[tuple[int, int, int]]]:
    """Concatenation token by token: a new row at every `capacity` tokens, a new piece where the document changes."""
    rows = []
    for first in range(0, len(lengths), window):
        documents = range(first, min(first + window, len(lengths)))
        tokens = [(document, token) for document in documents for token in range(lengths[document])]
        for cut in range(0, len(tokens), capacity):
            pieces = {}
            for document, token in tokens[cut : cut + capacity]:
                start, length = pieces.get(document, (token, 0))
                pieces[document] = (start, length + 1)
            rows.append([(document, *piece) for document, piece in pieces.items()])
    return rows


SLOW = {"first_fit": _slow_first_fit, "best_fit": _slow_best_fit, "concat": _slow_concat, "none": _slow_none}


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, capacity=st.integers(1, 16), window=st.integers(1, 12), packing=st.sampled_from(sorted(SLOW)))
def test_rows_in_file_order_are_those_of_the_obvious_packer(lengths, capacity, window, packing):
    plan = _plan(lengths, sequence_length=capacity, packing=packing, window=window, shuffle=False)
    assert _epoch(plan) == SLOW[packing](lengths, capacity, window)


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, options=PLANS, epoch=st.integers(0, 10**9))
def test_every_token_lies_in_exactly_one_row_of_each_epoch(lengths, options, epoch):
    plan = PackingPlan(np.array(lengths), **options)
    rows = _epoch(plan, epoch)
    assert all(0 < sum(piece[2] for piece in row) <= options["sequence_length"] for row in rows)
    seen = Counter((document, start + i) for row in rows for document, start, length in row for i in range(length))
    assert seen == Counter((document, token) for document, length in enumerate(lengths) for token in range(length))


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, options=PLANS, data=st.data())
def test_a_row_asked_for_alone_is_the_row_that_comes_in_its_turn(lengths, options, data):
    plan = PackingPlan(np.array(lengths), **options)
    in_turn = [_row(plan, n) for n in range(2 * plan.rows_per_epoch)]
    n = data.draw(st.integers(0, len(in_turn) - 1))
    assert _row(PackingPlan(np.array(lengths), **options), n) == in_turn[n]


def test_first_fit_cuts_no_document_that_fits_in_a_row():
    lengths = [5, 8, 3, 7, 1, 2]
    rows = _epoch(_plan(lengths))
    assert all(start == 0 and length == lengths[document] for row in rows for document, start, length in row)


def test_an_epoch_has_the_same_rows_as_another_in_another_order():
    plan = _plan(list(range(1, 60)))
    first, second = _epoch(plan, 0), _epoch(plan, 1)
    assert first != second
    assert sorted(first) == sorted(second)


def test_seeds_give_different_orders_and_file_order_ignores_them():
    lengths = list(range(1, 60))
    assert _epoch(_plan(lengths, seed=0)) != _epoch(_plan(lengths, seed=1))
    assert _epoch(_plan(lengths, seed=0, shuffle=False)) == _epoch(_plan(lengths, seed=1, shuffle=False), 5)


def test_efficiency_is_the_share_of_positions_with_a_token():
    assert _plan([4, 4, 7], shuffle=False).efficiency == pytest.approx(15 / 16)
    assert _plan([4, 4, 7], shuffle=False, packing="concat").efficiency == pytest.approx(15 / 16)
    assert _plan([5, 5, 5], shuffle=False).efficiency == pytest.approx(15 / 24)


def test_a_thousand_documents_a_window_waste_little():
    lengths = np.random.default_rng(0).lognormal(5.5, 1.0, 4096).astype(int) + 1
    for packing, least in (("first_fit", 0.97), ("best_fit", 0.99), ("concat", 0.998)):
        assert _plan(lengths, sequence_length=1024, packing=packing, window=1024).efficiency > least


def test_no_document_is_no_row():
    assert _plan(np.empty(0, np.int64)).rows_per_epoch == 0


@pytest.mark.parametrize("fit", [first_fit, best_fit, one_a_row])
def test_windows_are_packed_together_as_if_each_were_alone(fit):
    lengths = np.random.default_rng(0).integers(0, 9, (50, 20))
    alone = [fit(row[None, :], 8)[0] for row in lengths]
    np.testing.assert_array_equal(fit(lengths, 8), alone)


def _written_out_permutation(count: int, *key: int) -> list[int]:
    """The order in Python's own integers, from the published splitmix64."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    state = 0
    for word in key:
        state = mix(state ^ word)
    return sorted(range(count), key=lambda i: mix(((i + 1) * 0x9E3779B97F4A7C15 + state) % 2**64))


@pytest.mark.parametrize("key", [(0, 0), (2**63 - 1, 2, 7), ()])
def test_permutations_follow_the_published_hash(key):
    assert permutation(1000, *key).tolist() == _written_out_permutation(1000, *key)


def test_permutations_never_change():
    """A run that resumes under another version of anything must find the same rows."""
    assert permutation(10, 0, 0).tolist() == [6, 7, 1, 4, 8, 3, 9, 5, 2, 0]
