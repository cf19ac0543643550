"""Every moment of a run counts for one purpose."""

import pytest

from jaxformers.train import goodput as module
from jaxformers.train.goodput import Goodput


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]

    def pass_time(seconds):
        now[0] += seconds

    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return pass_time


def test_time_goes_to_the_innermost_purpose_and_sums_to_the_whole(clock):
    spent = Goodput(started=97.0)
    clock(1)
    spent.turn_to("compile")
    clock(10)
    spent.turn_to("productive")
    clock(20)
    with spent.on("evaluate"):
        clock(5)
        with spent.on("data"):
            clock(2)
        clock(1)
    clock(30)
    spent.repeat(8)
    measured = spent.measured()
    assert measured.pop("goodput") == pytest.approx(50 / 80)
    assert {name: value for name, value in measured.items() if value} == {
        "seconds/restart": 12.0,
        "seconds/compile": 10.0,
        "seconds/productive": 50.0,
        "seconds/evaluate": 6.0,
        "seconds/data": 2.0,
    }
    assert str(spent) == (
        "62.5% taking steps, 15.0% starting, and repeating steps, 12.5% compiling, 7.5% evaluating, "
        "2.5% waiting for data"
    )
