"""What devices say to each other in a compiled training step: no more than the textbook has them say.

XLA:CPU has no reduce-scatter of its own making: where other backends scatter a sum, it sums and slices.
"""

import functools
import math
import re
from collections import Counter

import pytest
from runs import LENGTH, ROWS, Case, compiled

TP2 = {"tp": 2}
APART = Case("dense", TP2, chunk=8, sequence_parallel=True)
ACTIVATION = (ROWS, LENGTH, 32)
COLLECTIVE = re.compile(r" = ([^\n]*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(")


@functools.cache
def program(case: Case) -> str:
    return compiled(case).as_text()


def shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(int(size) for size in dims.split(",") if size) for dims in re.findall(r"f32\[([\d,]*)\]", text)]


def collectives(case: Case) -> list[tuple[str, list[tuple[int, ...]]]]:
    """Kind and float32 results of each."""
    return [(kind, shapes(result)) for result, kind in COLLECTIVE.findall(program(case))]


def test_sequence_parallel_gathers_activations_before_blocks_and_scatters_after_them_and_nothing_else_of_their_size():
    """A scanned layer gathers twice (attention, feed-forward), the head once, and as often backwards; as many sums are
    taken: after blocks and the embedding, and backwards of each projection of a block's input and of the head."""
    big = Counter(
        (kind, shape) for kind, results in collectives(APART) for shape in results if math.prod(shape) > ROWS * LENGTH
    )
    of_head = (ROWS, 8, 32)  # a chunk's
    assert big == {
        ("all-gather", ACTIVATION): 3 + 3,
        ("all-reduce", ACTIVATION): 3 + 5,
        ("all-reduce", of_head): 1,
    }


@pytest.mark.parametrize("case", [APART, Case("dense", TP2, chunk=8)], ids=str)
def test_logits_are_never_whole_on_a_device_that_holds_a_part_of_the_vocabulary(case):
    def whole_logits(case: Case) -> set[tuple[int, ...]]:
        return {shape for shape in shapes(program(case)) if 64 in shape and math.prod(shape) == ROWS * 8 * 64}

    assert whole_logits(Case("dense", {}, chunk=8)), "one device has them, so they would be seen"
    assert not whole_logits(case)


def test_zero_gathers_each_updated_parameter_once_and_no_moment():
    case = Case("dense", {"dp": 4}, zero=1)
    gathered = Counter(math.prod(shape) for kind, results in collectives(case) for shape in results if "gather" in kind)
    layers, d, f, heads, kv = 2, 32, 48, 64, 16
    weights = [layers * d * heads] * 2 + [layers * d * kv] * 2 + [layers * d * f] * 3 + [64 * d] * 2
    assert gathered == Counter(weights)
