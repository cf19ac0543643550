"""Whole runs that measure more: what their lines of metrics say and when, and the window that the profiler watches."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import run_config, write_corpus

from jaxformers.config import load_config
from jaxformers.train.config import ProfileConfig
from jaxformers.train.profile import Profiler
from jaxformers.training import prepare_run


def watched_run(folder: Path, **sections) -> dict:
    """A config of two sources in which much is measured."""
    values = {
        "train": {"steps": 4, "eval_batches": 0},
        "monitor": {"values": ["norms", "attention_logits", "sources"], "every": 2},
        "profile": {"start": 1, "steps": 2},
        "sample": {"prompts": ["alpha"], "max_new_tokens": 2},
    }
    config = run_config(folder, **values | sections)
    corpora = {name: write_corpus(folder / f"{name}.jsonl", seed=k) for k, name in enumerate(("first", "second"))}
    del config["data"]["paths"]
    config["data"]["sources"] = {name: {"paths": str(path)} for name, path in corpora.items()}
    return config


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


def traces(run: Path) -> list[Path]:
    return sorted((run / "profile").rglob("perfetto_trace.json.gz"))


def steps_in(trace: Path) -> list[int]:
    """The numbers of the steps that a trace names."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sorted({int(event["args"]["step_num"]) for event in events if event.get("name") == "train"})


def train(folder: Path, config: dict) -> None:
    """The command in a process of its own, on one device."""
    path = folder / "config.yaml"
    path.write_text(json.dumps(config | {"mesh": {"fsdp": 1, "dp": 1}}), encoding="utf-8")
    command = [sys.executable, "-m", "jaxformers", "train", str(path)]
    subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of four steps, and then of two more in what may as well be another process."""
    folder = tmp_path_factory.mktemp("watched")
    train(folder, watched_run(folder))
    return folder / "run"


def test_only_every_nth_line_has_what_is_measured(run):
    lines = lines_of(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        measures = line["step"] % 2 == 0
        assert ("grad_norm/layers.1.attn" in line) == measures
        assert ("max_attention_logit/layers.0" in line) == measures
    assert len(lines[1]["max_attention_logit/layers.0"]) == 4, "one of each head"
    assert "activation_rms/layers.0.stream" not in lines[1]


def test_every_line_has_the_loss_of_each_source(run):
    for line in lines_of(run):
        found = [line[name] for name in ("loss/first", "loss/second") if name in line]
        assert found
        assert min(found) <= line["loss"] * (1 + 1e-6)
        assert max(found) >= line["loss"] * (1 - 1e-6)
    assert any("loss/first" in line and "loss/second" in line for line in lines_of(run))


def test_the_trace_holds_the_steps_of_its_window_and_opens_as_json(run):
    (trace,) = traces(run)
    assert steps_in(trace) == [2, 3]
    assert list((run / "profile").rglob("*.xplane.pb")), "the form that XProf reads"


def test_a_run_says_what_it_is_and_how_it_goes_on_from_its_prompts(run):
    about = json.loads((run / "about.json").read_text())
    assert about["devices"] == "1 (one)"
    assert about["versions"].keys() >= {"jax", "jaxformers"}
    (sample,) = json.loads((run / "samples.json").read_text())
    assert sample["prompt"] == "alpha"


def test_a_resumed_runs_window_counts_its_own_steps(run):
    traces_before = traces(run)
    train(
        run.parent, watched_run(run.parent, train={"steps": 7, "eval_batches": 0}, sample={"prompts": []}, monitor={})
    )
    (new,) = set(traces(run)) - set(traces_before)
    assert steps_in(new) == [6, 7], "one after the first, which was step 5"


def test_the_report_shows_what_the_run_measured(run, command, tmp_path):
    outcome = command("report", run, "--output", tmp_path / "page.html")
    assert outcome.code == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for name in ("loss/first", "grad_norm", "max_attention_logit", "1 (one)"):
        assert f'"{name}"' in page


# -- the profiler alone


def test_a_window_that_the_runs_end_cuts_short_is_written(tmp_path):
    said = []
    profiler = Profiler(ProfileConfig(start=0, steps=5), run_dir=tmp_path, say=said.append)
    with profiler.running():
        for step in (8, 9):
            profiler.before(step)
            with profiler.named(step):
                pass
            profiler.after(step, None)
    assert said == [f"profile of steps 8 to the end: {tmp_path / 'profile'}"]
    assert steps_in(traces(tmp_path)[0]) == [8, 9]


def test_a_profiler_that_fails_is_named_and_the_steps_go_on(tmp_path, monkeypatch, caplog):
    def fail(*args, **settings):
        raise RuntimeError("another profiler is running")

    monkeypatch.setattr("jax.profiler.start_trace", fail)
    profiler = Profiler(ProfileConfig(start=0), run_dir=tmp_path, say=print)
    with profiler.running():
        for step in (1, 2):
            profiler.before(step)
            with profiler.named(step):
                pass
            profiler.after(step, None)
    assert caplog.messages == ["the profiler failed: another profiler is running"]


# -- what is refused before anything is read


@pytest.mark.parametrize(
    "sections, refusal",
    [
        (
            {"monitor": {"values": ["sources"]}},
            "monitor.values has sources, but the data is a single one (data.paths)",
        ),
        ({"monitor": {"values": ["experts"]}}, "monitor.values has experts, but llama has none"),
    ],
)
def test_a_config_that_asks_for_what_is_not_there_is_refused(tmp_path, sections, refusal):
    with pytest.raises(ValueError) as found:
        prepare_run(load_config(run_config(tmp_path, **sections)))
    assert str(found.value) == refusal


@pytest.mark.parametrize(
    "override, key",
    [
        ("monitor.values=[losses]", "monitor.values.0"),
        ("monitor.every=0", "monitor.every"),
        ("monitor.trackers=[comet]", "monitor.trackers.0"),
        ("profile.start=-1", "profile.start"),
        ("profile.steps=0", "profile.steps"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_in_one_line(tmp_path, override, key):
    with pytest.raises(ValueError) as found:
        load_config(run_config(tmp_path), [override])
    assert str(found.value).startswith(f"config: {key} is ")
    assert "\n" not in str(found.value)
