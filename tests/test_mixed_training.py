"""Runs over mixtures, with batches that grow: what they report, and that a stop in the middle changes nothing."""

import json
import os
import signal
from pathlib import Path

import jax
import pytest
from tiny import assert_bit_equal, run_config, write_corpus

import jaxformers as jf
from jaxformers.train.monitor import MetricsFile

STEPS = 8
RAMP = {3: 16}


def mixed_config(folder: Path, **sections) -> dict:
    """Two sources, one rearranged for fill-in-the-middle and dropped on the way, whose weights change at a step."""
    for seed, name in enumerate(("prose", "code")):
        write_corpus(folder / f"{name}.jsonl", documents=60, seed=seed)
    config = run_config(folder, **sections)
    del config["data"]["paths"]
    config["data"] |= {
        "packing": "best_fit",
        "sources": {
            "prose": {"paths": str(folder / "prose.jsonl")},
            "code": {"paths": str(folder / "code.jsonl"), "epochs": 1, "fim": {"rate": 0.5}},
        },
        "weights_at_step": {4: {"code": 3.0}},
        "when_exhausted": "drop",
    }
    config["tokenizer"] = {"kind": "bytes", "special_tokens": ["<fim_prefix>", "<fim_middle>", "<fim_suffix>"]}
    config["train"] |= {"batch_ramp": RAMP}
    return config


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_of(run: Path) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines_of(run) if "loss" in line]


def stop_after(monkeypatch, step: int) -> None:
    """Asks the run to stop when the metrics of a step are written, which is while the next step is computed."""
    log = MetricsFile.log

    def logging(self, logged, metrics):
        log(self, logged, metrics)
        if logged == step and "loss" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsFile, "log", logging)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    config = mixed_config(tmp_path_factory.mktemp("mixed"))
    return config, jf.fit(config)


def again(config: dict, folder: Path) -> dict:
    return config | {"run_dir": str(folder / "run")}


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_over_a_mixture_goes_on_as_if_it_had_not_been_stopped(whole, tmp_path, monkeypatch, stop):
    config = again(whole[0], tmp_path)
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        assert jf.fit(config).step in (stop, stop + 1)
    config["data"] = config["data"] | {"sources": dict(reversed(config["data"]["sources"].items()))}
    result = jf.fit(config)  # the order of keys says nothing
    assert steps_of(result.run_dir) == steps_of(whole[1].run_dir), "bit-equal"
    assert result.validation == whole[1].validation
    assert_bit_equal(jax.device_get(result.model.params), jax.device_get(whole[1].model.params))


def test_tokens_are_counted_through_the_ramp(whole):
    counted = [line["tokens"] for line in lines_of(whole[1].run_dir) if "loss" in line]
    rows = [8, 8, 8, 16, 16, 16, 16, 16]
    assert counted == [32 * sum(rows[: step + 1]) for step in range(STEPS)]


def test_the_validation_loss_is_told_by_source(whole):
    last = [line for line in lines_of(whole[1].run_dir) if "validation_loss" in line][-1]
    assert last.keys() == {"step", "validation_loss", "validation_loss/prose", "validation_loss/code"}
    parts = sorted([last["validation_loss/prose"], last["validation_loss/code"]])
    assert parts[0] < last["validation_loss"] < parts[1]
    assert whole[1].validation == {name: value for name, value in last.items() if name != "step"}


def test_weights_yet_to_come_may_change_at_a_resume_and_those_before_may_not(whole, tmp_path, monkeypatch):
    config = again(whole[0], tmp_path)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        jf.fit(config)
    config["data"] = config["data"] | {"weights_at_step": {2: {"code": 9.0}}}
    refused = r"the checkpoint's position is in other data: .* the names or weights of sources have changed since"
    with pytest.raises(ValueError, match=refused):
        jf.fit(config)
    config["data"] = config["data"] | {"weights_at_step": {5: {"code": 9.0}}}
    result = jf.fit(config)
    assert steps_of(result.run_dir)[:4] == steps_of(whole[1].run_dir)[:4]
    assert steps_of(result.run_dir)[6:] != steps_of(whole[1].run_dir)[6:]


def test_a_batch_size_changed_at_a_resume_goes_on_at_the_next_row(tmp_path, monkeypatch):
    config = run_config(tmp_path)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        stopped = jf.fit(config).step
    jf.fit(config, ["train.batch_size=16", f"train.steps={stopped + 1}"])
    ramped = again(config, tmp_path / "ramped")
    jf.fit(ramped, [f"train.batch_ramp={{{stopped}: 16}}", f"train.steps={stopped + 1}"])
    (*_, ours), (*_, theirs) = steps_of(Path(config["run_dir"])), steps_of(Path(ramped["run_dir"]))
    assert ours[0] == theirs[0] == stopped + 1
    assert ours[1] == pytest.approx(theirs[1], rel=1e-6), "the same rows under the same parameters"


@pytest.mark.parametrize(
    "train, said",
    [
        ({"batch_ramp": {2: 12}}, r"a microbatch of 12 rows \(batch_size 12 / accumulation 1\) cannot be split over 8"),
        ({"batch_ramp": {2: 15}, "batch_size": 16, "accumulation": 2}, "batch_ramp.2 15 is not a multiple of accumul"),
        ({"batch_ramp": {0: 16}}, "batch_ramp has step 0; steps are at least 1, a run begins with batch_size"),
    ],
)
def test_a_ramp_that_cannot_run_is_refused_before_anything_is_written(tmp_path, train, said):
    with pytest.raises(ValueError, match=said):
        jf.fit(run_config(tmp_path, train=train))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_sentinels_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match=r"^data.sources.code: fim.rate is 0.5, but the tokenizer has no") as caught:
        jf.fit(mixed_config(tmp_path) | {"tokenizer": {"kind": "bytes"}})
    assert "\n" not in str(caught.value)
