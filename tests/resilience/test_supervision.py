"""Runs that are watched: hardware that errs, a clock that runs out, a signal to save, time accounted for."""

import json
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from harms import flip_on_a_device
from tiny import assert_bit_equal, flip, run_config

import jaxformers as jf
from jaxformers.train import recheck
from jaxformers.train.monitor import MetricsFile
from jaxformers.train.watch import Diverged

STEPS = 8


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    config = run_config(tmp_path_factory.mktemp("clean")) | {"checkpoint": {"every_steps": 3}}
    return config, jf.fit(config)


@pytest.fixture
def config(clean, tmp_path):
    return clean[0] | {"run_dir": str(tmp_path / "run")}


def metrics_of(config):
    return [json.loads(line) for line in Path(config["run_dir"], "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def flip_once(monkeypatch):
    """One bit of one weight flips on one device, in the copy that a step is computed twice from."""
    copy, done = recheck._copy, []

    def flipped(state):
        state = copy(state)
        if done:
            return state
        done.append(True)
        embed = flip_on_a_device(state.params["embed"], shard=3, bit=22)
        return state.replace(params=state.params | {"embed": embed})

    monkeypatch.setattr(recheck, "_copy", flipped)


def test_a_step_computed_twice_alike_changes_nothing(clean, config, capsys):
    result = jf.fit(config, ["guard.recheck_every=2"])
    assert "twice" not in capsys.readouterr().err
    assert_bit_equal(jax.device_get(result.model.params), jax.device_get(clean[1].model.params))


def test_a_flipped_bit_is_caught_named_and_undone(clean, config, capsys, flip_once):
    result = jf.fit(config, ["guard.recheck_every=5"])
    said = capsys.readouterr().err
    named = re.search(r"step 5: computed twice with two results \((.*)\); going back to step 3\n", said)
    assert named
    assert re.search(r"process 0, cpu:3: params\.embed", named[1])
    assert_bit_equal(jax.device_get(result.model.params), jax.device_get(clean[1].model.params))
    assert all(line["step_seconds"] > 0 for line in metrics_of(config) if "loss" in line)
    lines = [(line["step"], line["loss"]) for line in metrics_of(config) if "loss" in line]
    assert lines == [(line["step"], line["loss"]) for line in metrics_of(clean[0]) if "loss" in line]


def test_a_damaged_checkpoint_on_the_way_back_is_set_aside_and_its_step_saved_again(
    clean, config, monkeypatch, capsys, flip_once
):
    copy, newest = recheck._copy, Path(config["run_dir"], "checkpoints", "6")

    def damage_and_copy(state):
        while not newest.exists():  # it is being written
            time.sleep(0.05)
        flip(max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))
        monkeypatch.setattr(recheck, "_copy", copy)
        return copy(state)

    monkeypatch.setattr(recheck, "_copy", damage_and_copy)
    result = jf.fit(config, ["guard.recheck_every=8"])
    assert "going back to step 3" in capsys.readouterr().err
    assert_bit_equal(jax.device_get(result.model.params), jax.device_get(clean[1].model.params))
    assert {"3", "6", "6.damaged", "8"} == set(os.listdir(f"{config['run_dir']}/checkpoints"))


def test_a_flipped_bit_before_the_first_checkpoint_ends_the_run(config, flip_once):
    with pytest.raises(Diverged, match=r"^step 2: computed twice .*and there is no checkpoint to go back to$"):
        jf.fit(config, ["guard.recheck_every=2"])


def at_line(monkeypatch, step, action):
    log = MetricsFile.log

    def acting(self, logged, metrics):
        log(self, logged, metrics)
        if logged == step and "loss" in metrics:
            action()

    monkeypatch.setattr(MetricsFile, "log", acting)


def test_sigusr1_saves_and_the_run_goes_on(clean, config, monkeypatch):
    at_line(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    result = jf.fit(config | {"checkpoint": {"every_steps": None}})
    assert (result.step, result.stopped) == (STEPS, None)
    saved = sorted(int(p) for p in os.listdir(f"{config['run_dir']}/checkpoints") if p.isdecimal())
    assert saved == [5, 8]
    assert_bit_equal(jax.device_get(result.model.params), jax.device_get(clean[1].model.params))


def test_a_run_saves_and_stops_before_its_time_limit(config, monkeypatch):
    def an_hour_passes():
        late = SimpleNamespace(perf_counter=lambda: time.perf_counter() + 3600)
        monkeypatch.setattr("jaxformers.train.requests.time", late)

    at_line(monkeypatch, 4, an_hour_passes)
    result = jf.fit(config, ["train.time_limit_minutes=60"])
    assert (result.step, result.stopped) == (5, "the time limit")
    assert "5" in os.listdir(f"{config['run_dir']}/checkpoints")


def test_time_is_accounted_for(clean, capsys):
    config, result = clean
    *_, last = metrics_of(config)
    spent = {name: seconds for name, seconds in last.items() if name.startswith("seconds/")}
    assert set(spent) == {
        f"seconds/{p}" for p in ("productive", "compile", "data", "evaluate", "checkpoint", "profile", "restart")
    }
    assert all(spent[f"seconds/{purpose}"] > 0 for purpose in ("productive", "compile", "evaluate", "checkpoint"))
    assert last["goodput"] == pytest.approx(spent["seconds/productive"] / sum(spent.values()))
    assert 0 < result.metrics["goodput"] < 1
