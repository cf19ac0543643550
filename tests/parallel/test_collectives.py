"""What devices say to each other in a compiled training step: no more than the textbook has them say.

XLA:CPU has no reduce-scatter of its own making: where other backends scatter a sum, it sums and slices. A scanned layer
is in the program once forward and once backward, however many layers there are.
"""

import functools
import math
import re
from collections import Counter

import jax
import pytest
from runs import LENGTH, ROWS, Case, batches, compiled, place, placed_state, trainer_of

TP2 = {"tp": 2}
APART = Case("dense", TP2, chunk=8, sequence_parallel=True)
ACTIVATION = (ROWS, LENGTH, 32)
COLLECTIVE = re.compile(r" = ([^\n]*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(")
# So that all-reduces stay apart that would be combined into one.
APART_PASSES = {
    "xla_backend_optimization_level": "0",
    "xla_disable_hlo_passes": "all-reduce-combiner,cpu-all-reduce-combiner",
}


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


# The table: kind, type and shape (without dims of 1) of every collective of 32 numbers or more, and how often it is in
# the program. Shapes are what a device holds afterwards, so they are the bytes as well.
D, F, H, K, N, V = 32, 48, 8, 2, 8, 64
Q, O, KV, UP, DOWN, HEAD, EMBED = (D, H, N), (H, N, D), (D, K, N), (D, F), (F, D), (D, V), (V, D)
LAYER, OUTSIDE, NORMS = [Q, O, KV, KV, UP, UP, DOWN], [HEAD, EMBED], [(D,)] * 3
CHUNK = 8
Table = Counter[tuple[str, str, tuple[int, ...]]]


def table(kind: str, *shapes: tuple[int, ...], dtype: str = "f32", times: int = 1) -> Table:
    found: Table = Counter()
    for shape in shapes:
        found[kind, dtype, tuple(size for size in shape if size > 1)] += times
    return found


def halved(shape: tuple[int, ...], *, dim: int) -> tuple[int, ...]:
    return tuple(size // 2 if i == dim else size for i, size in enumerate(shape))


def sums_of_gradients(*, times: int = 1) -> Table:
    """Of every weight once."""
    return table("all-reduce", *LAYER, *OUTSIDE, times=times) + table("all-reduce", *NORMS)


def gathers_of_weights() -> Table:
    """Of a layer's weights forward and backward, of those outside once."""
    return table("all-gather", *LAYER, times=2) + table("all-gather", *OUTSIDE)


def ring(rows: int, tokens: int, kv_heads: int) -> Table:
    """Keys and values forward, backward, their gradients in the loop and once more to get home; twice where the keys
    stand, their positions and segments, which travel together only in number."""
    keys = table("collective-permute", (rows, kv_heads, tokens, N), times=2 * 4)
    return keys + table("collective-permute", (rows, tokens), dtype="s32", times=2)


def tensor(rows: int, tokens: int, chunk: int) -> Table:
    """Activations are summed after both blocks and the embedding, and backwards of each of the five projections of a
    block's input, which backends with a pass for it add up before; the head sums its input's gradient, and of the
    tokens' logits the maximum, the sum of exponentials and the target's, and compares the likeliest of each part."""
    return (
        table("all-reduce", (rows, tokens, D), times=3 + 5)
        + table("all-reduce", (rows, chunk, D))
        + table("all-reduce", (rows, chunk), times=3)
        + table("all-gather", (rows, chunk, 2))
        + table("all-gather", (rows, chunk, 2), dtype="s32")
    )


M = ROWS * LENGTH  # tokens
DENSE_PART = [Q, O, KV, KV, HEAD, EMBED, (4, D)]  # of the sparse model: all but experts
TABLES = {
    # Replicas sum each weight's gradient.
    Case("dense", {"dp": 2}, chunk=CHUNK): sums_of_gradients(),
    Case("dense", {"dp": 2}, chunk=CHUNK, accumulation=4): sums_of_gradients(),
    # Weights come together for use, and gradients are summed (elsewhere: scattered).
    Case("dense", {"fsdp": 2}, chunk=CHUNK): sums_of_gradients() + gathers_of_weights(),
    Case("dense", {"fsdp": 2}, chunk=CHUNK, accumulation=4): sums_of_gradients() + gathers_of_weights(),
    # Replicas add nothing: the same sums over more devices.
    Case("dense", {"dp": 2, "fsdp": 2}, chunk=CHUNK): sums_of_gradients() + gathers_of_weights(),
    # Updated parameters come together once, of all layers at a time.
    Case("dense", {"dp": 2}, chunk=CHUNK, zero=1): sums_of_gradients()
    + table("all-gather", *[(2, *shape) for shape in LAYER], *OUTSIDE),
    Case("dense", TP2, chunk=CHUNK): tensor(ROWS, LENGTH, CHUNK),
    Case("dense", {"cp": 2}, chunk=CHUNK): sums_of_gradients() + ring(ROWS, LENGTH // 2, K),
    # Queries and outputs are traded, keys and values too, each in both directions; every device sees whole rows.
    Case("dense", {"cp": 2}, chunk=CHUNK, context="ulysses"): sums_of_gradients()
    + table("all-to-all", *[(ROWS, LENGTH // 2, H // 2, N)] * 2, *[(ROWS, LENGTH // 2, K // 2, N)] * 2, times=4)
    + table("all-gather", (ROWS, LENGTH), dtype="s32", times=2),
    # Tokens, their weights and visits come to the experts, outputs go back, gradients of all but visits the other way.
    Case("moe", {"ep": 2}, chunk=CHUNK): table("all-reduce", *DENSE_PART, *NORMS)
    + table("all-gather", (M, D), times=2)
    + table("all-gather", (M, 2))
    + table("all-gather", (M, 2), dtype="s32")
    + table("reduce-scatter", (M // 2, D), times=2)
    + table("reduce-scatter", (M // 2, 2)),
    # A microbatch travels; all stages get the last one's outputs, and the sum of the first one's gradients.
    Case("deep", {"pp": 2}, chunk=CHUNK): table("collective-permute", (ROWS // 4, LENGTH, 16), times=2)
    + table("all-reduce", (4, ROWS // 4, LENGTH, 16), times=2),
    # Gradients are summed over rows and over tokens; with tp each device has the half of all of these.
    Case("dense", {"fsdp": 2, "cp": 2, "tp": 2}, chunk=CHUNK): tensor(ROWS // 2, LENGTH // 2, CHUNK // 2)
    + ring(ROWS // 2, LENGTH // 2, K // 2)
    + table("all-reduce", *NORMS, times=2)
    + sum(
        (
            table("all-gather", halved(w, dim=dim), times=gathers) + table("all-reduce", halved(w, dim=dim), times=2)
            for w, dim, gathers in (
                *zip(LAYER, (1, 0, 1, 1, 1, 1, 0), [2] * 7, strict=True),
                (HEAD, 1, 1),
                (EMBED, 0, 1),
            )
        ),
        start=Counter(),
    ),
}


@functools.cache
def partitioned(case: Case) -> str:
    trainer = trainer_of(case)
    with jax.set_mesh(trainer.mesh):
        lowered = trainer.program.step.lower(placed_state(trainer), place(batches()[0], trainer))
        return lowered.compile(compiler_options=APART_PASSES).as_text()


def found_in(text: str) -> Table:
    found: Table = Counter()
    for result, kind in COLLECTIVE.findall(text):
        for dtype, dims in re.findall(r"(f32|s32)\[([\d,]*)\]", result):
            shape = tuple(int(size) for size in dims.split(",") if size)
            if math.prod(shape) >= D:
                found += table(kind, shape, dtype=dtype)
    return found


@pytest.mark.parametrize("case", TABLES, ids=str)
def test_collectives_of_a_step_are_those_of_the_textbook(case, capfd):
    """No activation is gathered that should not be, weights are not gathered twice for one use, and splitting
    microbatches moves nothing."""
    found = found_in(partitioned(case))
    assert found == TABLES[case], {"too many": found - TABLES[case], "too few": TABLES[case] - found}
    assert "nvoluntary full rematerialization" not in capfd.readouterr().err


def test_fsdp_keeps_no_layers_whole_weights_for_the_backward_pass():
    """They are gathered anew: what is kept of scanned layers, [layers, ...], is smaller than all of one weight's."""

    def kept(case: Case) -> set[tuple[int, ...]]:
        return {shape for shape in shapes(partitioned(case)) if shape in [(2, *w) for w in LAYER]}

    assert kept(Case("dense", {"dp": 2}, chunk=CHUNK)), "replicas hold them, so they would be seen"
    assert not kept(Case("dense", {"fsdp": 2}, chunk=CHUNK))


def test_zero_gathers_each_updated_parameter_once_and_no_moment():
    case = Case("dense", {"dp": 4}, zero=1)
    gathered = Counter(math.prod(shape) for kind, results in collectives(case) for shape in results if "gather" in kind)
    layers, d, f, heads, kv = 2, 32, 48, 64, 16
    weights = [layers * d * heads] * 2 + [layers * d * kv] * 2 + [layers * d * f] * 3 + [64 * d] * 2
    assert gathered == Counter(weights)
