"""A run that stands still is noticed, written down with where its threads are, and ended where that is asked for."""

import re
import subprocess
import sys
import time

import pytest

from jaxformers.train.config import WatchdogConfig
from jaxformers.train.watchdog import Watchdog

QUICK = WatchdogConfig(factor=3.0, least_seconds=0.3)


def stand_still_here(seconds):
    time.sleep(seconds)


def take_steps(watchdog, count=5, seconds=0.01):
    for _ in range(count):
        watchdog.beat()
        time.sleep(seconds)


def test_a_step_that_takes_too_long_is_written_down_once_with_every_thread(tmp_path, capsys):
    with Watchdog(QUICK, tmp_path) as watchdog:
        take_steps(watchdog)
        stand_still_here(1.0)
    written = (tmp_path / "stalls.log").read_text()
    assert len(re.findall(r"^\d{4}-\d\d-\d\d .*a step has taken 0 seconds, of 0 it may take", written, re.M)) == 1
    assert "in stand_still_here" in written
    assert re.search(r"^jaxformers: a step has taken 0 seconds \(see .*stalls.log\)\n$", capsys.readouterr().err)


@pytest.mark.parametrize("config", [QUICK, WatchdogConfig(factor=None)])
def test_steps_of_usual_length_and_what_is_no_step_are_left_alone(tmp_path, config, capsys):
    with Watchdog(config, tmp_path) as watchdog:
        stand_still_here(0.5)  # the first step compiles
        take_steps(watchdog)
        with watchdog.at_ease():
            stand_still_here(0.6)
        take_steps(watchdog)
    assert not (tmp_path / "stalls.log").exists()
    assert capsys.readouterr().err == ""


def test_the_limit_is_a_multiple_of_the_median_step_and_at_least_so_much(tmp_path):
    watchdog = Watchdog(WatchdogConfig(factor=10.0, least_seconds=0.2), tmp_path)
    assert watchdog.limit is None
    take_steps(watchdog, seconds=0.001)
    assert watchdog.limit == 0.2
    take_steps(watchdog, count=20, seconds=0.1)
    assert 1.0 <= watchdog.limit < 2.0


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
