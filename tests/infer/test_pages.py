"""Pages are free, used or cached, whatever is taken, shared, remembered and given back in whatever order."""

import numpy as np
import pytest

from jaxformers.infer.engine.pages import Pages, piece_digests


def ids(length, *, seed=0):
    return np.random.default_rng(seed).integers(0, 100, length, dtype=np.int32)


def test_digests_are_equal_up_to_the_first_difference():
    one = ids(20)
    other = one.copy()
    other[9] += 1
    first, second = piece_digests(one, 4), piece_digests(other, 4)
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, True, False, False, False]
    assert piece_digests(one[4:8], 4) != first[1:2]  # the same tokens behind another beginning
    assert not set(piece_digests(one, 4, salt=b"long")) & set(first)
    assert piece_digests(one[:19], 4) == first[:4]


def test_a_piece_whose_cache_depends_on_tokens_behind_it_is_found_before_the_same_ones_only():
    one, other = ids(17), ids(17)
    other[9] += 1
    first, second = piece_digests(one, 4, ahead=2), piece_digests(other, 4, ahead=2)
    assert (len(first), len(piece_digests(one, 4, ahead=1))) == (3, 4)
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, False]
    assert not set(first) & set(piece_digests(one, 4))


def test_what_is_remembered_is_found_after_its_holder_has_gone():
    pages, (a, b) = Pages(8), piece_digests(ids(8), 4)
    held = pages.take([], 5)
    pages.remember(a, held[:2])
    pages.remember(b, held[2:4])
    pages.give_back(held)
    assert (pages.used, pages.cached, pages.free) == (0, 4, 4)
    assert pages.find([a, b]) == held[:4]
    assert pages.find([b"unknown", b]) == []
    again = pages.take(pages.find([a]), 1)
    assert (pages.used, pages.cached, pages.free) == (3, 2, 3)
    pages.give_back(again)
    pages.audit()


def test_room_is_made_by_forgetting_what_was_longest_unused_and_the_ends_of_prefixes_first():
    pages, (a, b), (c,) = Pages(6), piece_digests(ids(8), 4), piece_digests(ids(4, seed=1), 4)
    first = pages.take([], 4)
    pages.remember(a, first[:2])
    pages.remember(b, first[2:])
    pages.give_back(first)
    second = pages.take([], 2)
    pages.remember(c, second)
    pages.give_back(second)
    held = pages.take([], 2)
    assert (pages.find([a, b]), pages.find([c])) == (first[:2], second)
    pages.take([], 2)
    assert (pages.find([a, b]), pages.find([c])) == ([], second)
    pages.give_back(held)
    pages.audit()


def test_pages_that_two_hold_stay_used_until_both_gave_them_back():
    pages, (a,) = Pages(4), piece_digests(ids(4), 4)
    one = pages.take([], 2)
    pages.remember(a, one)
    other = pages.take(pages.find([a]), 1)
    pages.give_back(one)
    assert (pages.used, pages.cached, pages.free) == (3, 0, 1)
    pages.give_back(other)
    assert (pages.used, pages.cached, pages.free) == (0, 2, 2)


def test_nothing_is_taken_where_there_is_no_room_for_all_of_it():
    pages, (a,) = Pages(4), piece_digests(ids(4), 4)
    held = pages.take([], 2)
    pages.remember(a, held)
    pages.give_back(held)
    assert pages.take(pages.find([a]), 3) is None  # the cached pages are those that would be shared
    assert (pages.used, pages.cached, pages.free) == (0, 2, 2)
    assert len(pages.take(pages.find([a]), 2)) == 4


def test_giving_back_twice_is_a_bug():
    pages = Pages(2)
    held = pages.take([], 1)
    pages.give_back(held)
    with pytest.raises(AssertionError, match="does not hold it"):
        pages.give_back(held)


def test_a_thousand_random_steps_keep_the_invariant():
    draw, pages, holders = np.random.default_rng(3), Pages(40), []
    for _ in range(1000):
        if holders and draw.random() < 0.5:
            pages.give_back(holders.pop(draw.integers(len(holders))))
        else:
            digests = piece_digests(ids(16, seed=draw.integers(6)), 4)  # a few prompts that come again and again
            shared = pages.find(digests)
            held = pages.take(shared, 8 - len(shared) + int(draw.integers(3)))
            if held is not None:
                for n in range(len(shared) // 2, int(draw.integers(5))):
                    pages.remember(digests[n], held[2 * n : 2 * n + 2])
                holders.append(held)
        pages.audit()
    for held in holders:
        pages.give_back(held)
    assert pages.used == 0
    pages.audit()
