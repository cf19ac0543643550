"""A run that stands still is noticed, written down with where its threads are, and ended where that is asked for."""

import re
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from jaxformers.train import watchdog as module
from jaxformers.train.config import WatchdogConfig
from jaxformers.train.watchdog import Watchdog

CONFIG = WatchdogConfig(factor=3.0, least_seconds=5.0)
A_FEW_LOOKS = 0.5  # seconds, of which the watchdog looks ten times in one


@dataclass
class Clock:
    """What the watchdog reads the time from, so that a busy machine makes no step longer."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def strftime(self, form: str) -> str:
        return time.strftime(form)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    monkeypatch.setattr(module, "time", clock := Clock())
    return clock


def take_steps(watchdog, clock, count=5, seconds=0.01):
    for _ in range(count):
        watchdog.beat()
        clock.now += seconds


def stand_still_until(there):
    end = time.monotonic() + 30
    while not there():
        assert time.monotonic() < end, "a stall is not noticed"
        time.sleep(0.01)


def test_a_step_that_takes_too_long_is_written_down_once_with_every_thread(tmp_path, clock, capsys):
    stalls = tmp_path / "stalls.log"
    with Watchdog(CONFIG, tmp_path) as watchdog:
        take_steps(watchdog, clock)
        clock.now += 7
        stand_still_until(stalls.exists)
        time.sleep(A_FEW_LOOKS)
    written = stalls.read_text()
    assert len(re.findall(r"^\d{4}-\d\d-\d\d .*a step has taken 7 seconds, of 5 it may take", written, re.M)) == 1
    assert "in stand_still_until" in written
    assert re.search(r"^jaxformers: a step has taken 7 seconds \(see .*stalls.log\)\n$", capsys.readouterr().err)


@pytest.mark.parametrize("config", [CONFIG, WatchdogConfig(factor=None)])
def test_steps_of_usual_length_and_what_is_no_step_are_left_alone(tmp_path, config, clock, capsys):
    with Watchdog(config, tmp_path) as watchdog:
        clock.now += 600  # the first step compiles
        time.sleep(A_FEW_LOOKS)
        take_steps(watchdog, clock)
        with watchdog.at_ease():
            clock.now += 600
            time.sleep(A_FEW_LOOKS)
        take_steps(watchdog, clock)
        time.sleep(A_FEW_LOOKS)
    assert not (tmp_path / "stalls.log").exists()
    assert capsys.readouterr().err == ""


def test_the_limit_is_a_multiple_of_the_median_step_and_at_least_so_much(tmp_path, clock):
    watchdog = Watchdog(WatchdogConfig(factor=10.0, least_seconds=0.2), tmp_path)
    assert watchdog.limit is None
    take_steps(watchdog, clock, seconds=0.001)
    assert watchdog.limit == 0.2
    take_steps(watchdog, clock, count=20, seconds=0.1)
    assert watchdog.limit == pytest.approx(1.0)


def test_a_process_that_stands_still_ends_where_that_is_asked_for(tmp_path):
    code = (
        "import time, pathlib\n"
        "from jaxformers.train.config import WatchdogConfig\n"
        "from jaxformers.train.watchdog import Watchdog\n"
        "config = WatchdogConfig(factor=2, least_seconds=0.3, action='end')\n"
        f"with Watchdog(config, pathlib.Path({str(tmp_path)!r})) as w:\n"
        "    for _ in range(3): w.beat()\n"
        "    time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("stalls.log); the process ends")
    assert "most recent call first" in (tmp_path / "stalls.log").read_text()
