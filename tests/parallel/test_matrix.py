"""The matrix: whatever mesh and settings are drawn, a run either equals that of one device or is refused at once.

Two properties. Of settings drawn at large, exactly those are refused that a written-out table of rules calls illegal,
each in one line and before anything is compiled. Of settings that the table calls legal, every run gives the loss, the
gradient norm and the parameters of one device. To try more of them: `JAXFORMERS_MATRIX=500 pytest -m slow
tests/parallel/test_matrix.py`, with other draws under another `JAXFORMERS_MATRIX_SEED`.
"""

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, note, seed, settings
from hypothesis import strategies as st
from runs import LENGTH, MODELS, ROWS, SINKS, WINDOWS, Case, assert_equal_to_one_device, trainer_of

AXES = ("pp", "cp", "ep", "tp", "fsdp", "dp")
SELECTION_BIAS = ("mla", "mla, whole queries", "deep mla, dense first", "mtp", "deep mtp")
SPARSE = ("moe", "degenerate", SINKS, "deep moe", *SELECTION_BIAS)
# Repeats of the longest stack's pattern of layers, which a pipeline shares among its stages: models with two layers of
# two kinds have 1, others 2, and these more.
REPEATS = dict.fromkeys(("mla", "mla, whole queries", "mtp", WINDOWS, SINKS), 1)
REPEATS |= {"deep": 8, "deep moe": 8, "deep, tied": 8, "deep, mixed stacks": 4}
REPEATS |= {"deep mla, dense first": 4, "deep mtp": 4}
PIECES = 6
EXAMPLES = int(os.environ.get("JAXFORMERS_MATRIX", "60"))
SEED = int(os.environ.get("JAXFORMERS_MATRIX_SEED", "0"))

# No database, no shrinking and a fixed seed: the same runs each time, none of them twice.
DRAWN = settings(
    deadline=None,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


@st.composite
def cases(draw: Any, *, factors: tuple[int, ...] = (2,)) -> Case:
    """A run on up to eight devices; settings that are about a part of the system are drawn where there is that part.
    Axis sizes are products of `factors`."""
    mesh: dict[str, int] = {}
    for _ in range(draw(st.sampled_from((3, 3, 3, 2, 2, 1, 0)))):
        axis, size = draw(st.sampled_from(AXES)), draw(st.sampled_from(factors))
        if math.prod(mesh.values()) * size <= 8:
            mesh[axis] = mesh.get(axis, 1) * size
    fitting = [name for name in MODELS if ("ep" not in mesh or name in SPARSE) and ("pp" not in mesh or "deep" in name)]
    model = draw(st.sampled_from([*fitting * 4, *MODELS]))

    def one_of(*values: Any, when: bool = True) -> Any:
        return draw(st.sampled_from(values)) if when else values[0]

    sparse, experts, pp = model in SPARSE, mesh.get("ep", 1) > 1, mesh.get("pp", 1) > 1
    runtime = {
        "layers": one_of("scan", "scan", "unroll"),
        "remat": one_of("none", "none", "full", "dots", "projections"),
        "zero": one_of(0, 1, 2),
        "sequence_parallel": one_of(False, True),
        "attention": one_of("auto", "auto", "blockwise", "dot_product"),
        "context": one_of("auto", "ring", "ulysses", "hybrid", when="cp" in mesh),
        "pipeline": one_of("gpipe", "interleaved", "1f1b", when=pp),
        "microbatches": one_of(None, None, 2, 4, 1, 3, when=pp),
        "virtual_stages": one_of(2, 1, 4, when=pp),
        "stages": one_of(None, None, None, (3, 5), (1, 3), (2, 1, 3, 2), when=pp),
        "experts": one_of("auto", "alltoall", "allgather", when=experts),
        "capacity_factor": one_of(None, 8.0, when=experts),  # room for all tokens
    }
    loss = {
        "balance_over": one_of("row", "batch", when=sparse),
        "expert_bias_rate": one_of(0.0, 0.05, when=sparse),
    }
    default = {"context": "auto", "pipeline": "gpipe", "virtual_stages": 2, "experts": "auto", "attention": "auto"}
    return Case(
        model,
        mesh,
        accumulation=one_of(1, 4),
        chunk=one_of("none", 8),
        loss=tuple((name, value) for name, value in loss.items() if value not in ("row", 0.0)),
        packed=one_of(True, True, False),
        **{name: value for name, value in runtime.items() if value not in (None, False, default.get(name, 0))},
    )


def objections(case: Case) -> Iterator[str]:
    """What is wrong with a run, rule by rule; nothing of a legal one."""
    pp, cp, ep, tp, fsdp, dp = (case.mesh.get(axis, 1) for axis in AXES)
    asked, model, cfg = case.runtime.get, MODELS[case.model], trainer_of(case).cfg
    rows, shards = ROWS // case.accumulation, dp * fsdp * ep
    schedule = asked("pipeline", "gpipe")

    if rows % shards:
        yield "rows over the data axes"
    if asked("layers") == "unroll" and pp > 1:
        yield "unrolled layers have no stages"
    if asked("sequence_parallel") and LENGTH % (tp * cp):
        yield "tokens over tp x cp"
    if ep > 1 and (case.model not in SPARSE or cfg.moe.num_experts % ep):
        yield "experts over ep"
    if ep > 1 and asked("experts") == "alltoall" and not asked("capacity_factor"):
        yield "dropless all-to-all on CPU"
    if asked("experts") == "allgather" and asked("capacity_factor"):
        yield "room where nothing is dropped"
    if dict(case.loss).get("expert_bias_rate") and case.model not in SELECTION_BIAS:
        yield "a bias that the model has not"

    if cp > 1:
        heads = model["num_attention_heads"]
        here = heads // tp if heads % tp == 0 else heads
        context = asked("context", "ring")
        if asked("attention") == "dot_product":
            yield "whole rows that are split"
        if context == "ulysses" and here % cp:
            yield "heads over cp"
        if LENGTH % (cp if context == "ulysses" else 2 * cp):  # a hybrid may need less; see the strategy
            yield "tokens over cp"

    if pp > 1:
        chunks = pp * (asked("virtual_stages", 2) if schedule == "interleaved" else 1)
        repeats, shares = REPEATS.get(case.model, 2), asked("stages")
        microbatches = asked("microbatches", 2 * pp)
        if shares is None and repeats % chunks:
            yield "layers over stages"
        if shares is not None and (len(shares) != chunks or sum(shares) != repeats):
            yield "a list of stages that does not add up"
        if (rows // shards) % microbatches or (schedule == "interleaved" and microbatches % pp):
            yield "rows over microbatches"
        if schedule == "1f1b" and ("balance_over", "batch") in case.loss:
            yield "a loss over all rows before any gradient"
        if schedule == "1f1b" and cp > 1:
            yield "two-way exchanges that wait for each other"


def refusal(case: Case) -> str:
    """The line that refuses a run, empty for one that is not refused."""
    try:
        trainer_of(case).check()
    except ValueError as error:
        return str(error)
    return ""


def assert_trains_as_one_device_does(case: Case) -> None:
    assume(not list(objections(case)))
    note(str(case))
    assert_equal_to_one_device(case)


def test_what_is_refused_is_what_the_rules_call_illegal_and_takes_one_line():
    refused = set()

    @seed(SEED)
    @settings(DRAWN, max_examples=500)
    @given(cases(factors=(2, 2, 2, 3)))
    def holds(case: Case) -> None:
        reasons, line = list(objections(case)), refusal(case)
        assert bool(line) == bool(reasons), f"called illegal for {reasons}, refused with {line}"
        assert "\n" not in line
        refused.update(reasons)

    holds()
    assert len(refused) >= 15, "every rule was met"


def test_a_few_legal_runs_equal_those_of_one_device():
    seed(SEED)(settings(DRAWN, max_examples=6)(given(cases())(assert_trains_as_one_device_does)))()


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(1, PIECES + 1))
def test_many_legal_runs_equal_those_of_one_device(piece):
    count = math.ceil(EXAMPLES / PIECES)
    seed(SEED + piece)(settings(DRAWN, max_examples=count)(given(cases())(assert_trains_as_one_device_does)))()
