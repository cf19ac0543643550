"""The best checkpoints stay, by a number that each of them remembers."""

import json
from pathlib import Path

import pytest
from saving import save
from tiny import run_config
from whole_runs import metrics_of

import jaxformers as jf
from jaxformers.train.checkpoint import FOLDER, Checkpointer
from jaxformers.train.config import CheckpointConfig
from jaxformers.train.retention import Metric, to_remove

BEST = CheckpointConfig(every_steps=1, keep_last=1, keep_best=2)


def saved(run, values, config=BEST):
    """The steps that stay when steps 1, 2, ... are saved with these values."""
    with Checkpointer(run, config) as checkpoints:
        for step, value in enumerate(values, start=(checkpoints.latest_step or 0) + 1):
            save(checkpoints, step, metrics={} if value is None else {"validation_loss": value})
    return sorted(int(path.name) for path in (run / FOLDER).iterdir())


def test_the_best_checkpoints_stay_beside_the_newest(tmp_path):
    assert saved(tmp_path, [3.0, 1.0, 2.0, 5.0, 4.0]) == [2, 3, 5]


def test_what_was_best_is_known_to_the_process_that_goes_on(tmp_path):
    assert saved(tmp_path, [3.0, 1.0, 2.0]) == [2, 3]
    assert saved(tmp_path, [5.0, 1.5, 4.0]) == [2, 5, 6]


def test_the_largest_may_be_the_best(tmp_path):
    config = BEST.model_copy(update={"best_metric": "max validation_loss"})
    assert saved(tmp_path, [3.0, 1.0, 2.0, 5.0, 4.0], config) == [4, 5]


def test_of_equal_ones_the_newer_stays(tmp_path):
    assert saved(tmp_path, [1.0, 1.0, 1.0, 2.0]) == [2, 3, 4]


def test_a_checkpoint_without_a_value_stays_only_while_it_is_new(tmp_path):
    assert saved(tmp_path, [2.0, None, float("nan"), 3.0, 4.0]) == [1, 4, 5]


def test_newest_best_and_every_jth_stay_together():
    best = Metric().best({10: 0.5, 20: 0.4, 30: 0.9, 40: 0.8, 50: None}, 1)
    assert to_remove([10, 20, 30, 40, 50], keep_last=1, keep_every=30, best=best) == [10, 40]


def test_a_checkpoint_whose_value_cannot_be_read_is_not_removed_for_that(tmp_path, monkeypatch):
    saved(tmp_path, [1.0])

    def cannot(_path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("jaxformers.train.checkpoint.measured", cannot)
    said = []
    with Checkpointer(tmp_path, BEST, say=said.append) as checkpoints:
        for step in (2, 3, 4):
            save(checkpoints, step, metrics={"validation_loss": 2.0})
    assert checkpoints.steps == [1, 2, 3, 4]
    assert said == [f"cannot tell which checkpoints in {tmp_path / FOLDER} are the best: Input/output error"] * 3


# -- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that saves and evaluates at steps 2, 4, 6 and 8 and keeps the newest and the best; its config. It goes by
    the largest loss, as its best checkpoint would else be its newest."""
    config = run_config(
        tmp_path_factory.mktemp("best"),
        train={"eval_every": 2, "eval_batches": 1},
        checkpoint={"every_steps": 2, "keep_last": 1, "keep_best": 1, "best_metric": "max validation_loss"},
    )
    jf.fit(config)
    return config


def test_a_run_keeps_its_best_checkpoint_and_ls_marks_it(run, command):
    run_dir = run["run_dir"]
    losses = {line["step"]: line["validation_loss"] for line in metrics_of(Path(run_dir)) if "validation_loss" in line}
    best = max(losses, key=losses.get)
    assert best != 8
    listed = json.loads(command("checkpoint", "ls", run_dir, "--json").out)
    assert [entry["step"] for entry in listed] == sorted({best, 8})
    assert {entry["step"]: entry["value"] for entry in listed} == {step: losses[step] for step in {best, 8}}
    assert [entry["step"] for entry in listed if entry["best"]] == [best]
    shown = command("checkpoint", "ls", run_dir).out.splitlines()
    assert [line.endswith("whole, best") for line in shown] == [step == best for step in sorted({best, 8})]
    assert f"loss {losses[best]:.4f}" in command("checkpoint", "ls", run_dir).out


def test_rm_leaves_the_best_where_it_is_told_to(run, command):
    left = command("checkpoint", "rm", run["run_dir"], "--keep-last", "1", "--keep-best", "1", "--dry-run")
    assert (left.code, left.out) == (0, "")
    refused = command("checkpoint", "rm", run["run_dir"], "--keep-best", "1")
    assert refused.mistake == "--keep-best says which of the older checkpoints stay beside --keep-last; give both"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["train.eval_every=null"], "which this run does not measure; set train.eval_every and train.eval_batches"),
        (["train.eval_batches=0"], "which this run does not measure; set train.eval_every and train.eval_batches"),
        (["train.eval_every=3"], "checkpoint.every_steps 2 is no multiple of train.eval_every 3; nearest legal: 3"),
        (
            ["checkpoint.every_steps=null", "checkpoint.every_minutes=5"],
            "measured every 2 steps; set checkpoint.every_steps to a multiple of that",
        ),
        (["train.log_every=4", "checkpoint.best_metric=loss"], "checkpoint.every_steps 2 is no multiple of train.log"),
        (["data.validation_fraction=0"], "goes by validation_loss, but validation measures nothing"),
        (["checkpoint.best_metric=validation_loss/code"], "/code, but validation measures validation_loss"),
        (["checkpoint.best_metric=least loss"], "'least loss' is no metric to go by; write its name, or `min NAME`"),
    ],
)
def test_a_run_that_cannot_tell_how_good_its_checkpoints_are_is_refused(run, tmp_path, overrides, message):
    with pytest.raises(ValueError) as caught:
        jf.fit(run | {"run_dir": str(tmp_path / "run")}, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_metric_that_steps_do_not_have_is_refused_after_the_first(run, tmp_path):
    with pytest.raises(ValueError, match=r"^checkpoint.best_metric: los is no number that this run measures; .* loss"):
        jf.fit(run | {"run_dir": str(tmp_path / "run")}, ["checkpoint.best_metric=los"])
    assert not list((tmp_path / "run" / FOLDER).iterdir())
