"""Runs over data that does harm: an update is left out, the run goes back or stops, each with a line that says so."""

import re

import jax
import numpy as np
import pytest
from tiny import assert_bit_equal, run_config, write_corpus

import jaxformers as jf
from jaxformers import training
from jaxformers.train.watch import Diverged

STEPS = 8


@pytest.fixture
def config(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    return run_config(tmp_path) | {"checkpoint": {"every_steps": 3}}


@pytest.fixture
def poison(monkeypatch):
    """Changes the batches of these steps of the next run, counted from 1, by a function."""
    place = training.to_global

    def install(steps, change):
        calls = iter(range(1, 10_000))

        def poisoned(batch, *args, **kwargs):
            return place(change(batch) if next(calls) in steps else batch, *args, **kwargs)

        monkeypatch.setattr(training, "to_global", poisoned)

    return install


def not_finite(batch):
    return batch | {"weights": np.full_like(batch["weights"], np.nan)}


def nonsense(batch):
    """Targets that nothing has taught."""
    return batch | {"targets": np.where(batch["weights"] > 0, 299, batch["targets"]).astype(np.int32)}


def test_a_batch_that_is_not_finite_costs_one_update(config, poison, capsys):
    poison({4}, not_finite)
    result = jf.fit(config)
    assert (result.step, result.metrics["skipped_total"], result.metrics["skipped_in_a_row"]) == (STEPS, 1, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(result.model.params)))
    said = capsys.readouterr().err
    assert re.search(r"\nstep 4: 1 updates that are not finite left out \(loss nan, gradient norm nan\)\n", said)


def test_what_was_left_out_is_remembered_by_a_resumed_run(config, poison):
    poison({4}, not_finite)
    whole = jf.fit(config)
    stopped = config | {"run_dir": config["run_dir"] + "-again"}
    poison({4}, not_finite)
    first = jf.fit(stopped, ["train.steps=6", "schedule.name=constant"])
    assert first.metrics["skipped_total"] == 1
    poison(set(), not_finite)
    resumed = jf.fit(stopped, ["schedule.name=constant"])
    assert resumed.metrics["skipped_total"] == whole.metrics["skipped_total"] == 1


def test_too_many_in_a_row_end_the_run_and_its_checkpoints_hold_no_harm(config, poison):
    poison({5, 6, 7}, not_finite)
    with pytest.raises(Diverged, match=r"^step 6: 2 updates in a row were left out \(loss nan, .*max_skipped is 2$"):
        jf.fit(config, ["guard.max_skipped=2"])
    model = jf.load(config["run_dir"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(model.params)))


def test_a_run_may_be_told_to_stop_at_once(config, poison):
    poison({2}, not_finite)
    with pytest.raises(Diverged, match=r"^step 2: a loss or gradient is not finite .* guard.nonfinite is stop$"):
        jf.fit(config, ["guard.nonfinite=stop"])


SPIKES = ["guard.spike_window=8", "guard.spike_deviations=0.5", "train.steps=12"]


def test_a_spike_can_send_the_run_back_to_its_newest_checkpoint(config, poison, capsys):
    poison({8}, nonsense)
    result = jf.fit(config, [*SPIKES, "guard.spike=rollback"])
    said = capsys.readouterr().err
    # Steps 7 and 8, and 9, which was under way when the loss of 8 arrived, are left out.
    assert re.search(r"step 8: the loss is far above the last ones; the update is left out \(loss ", said)
    assert "went back to the newest checkpoint; 2 more updates are left out" in said
    assert (result.step, result.metrics["skipped_total"], result.metrics["spikes_total"]) == (12, 3, 1)


def test_going_back_gives_what_a_run_without_those_updates_gives(config, poison):
    """The same run with steps 7 to 9 made impossible by other means ends in the same bits."""
    poison({8}, nonsense)
    back = jf.fit(config, [*SPIKES, "guard.spike=rollback"])
    poison({7, 8, 9}, not_finite)
    without = jf.fit(config | {"run_dir": config["run_dir"] + "-2"}, [*SPIKES, "guard.spike=rollback"])
    assert_bit_equal(jax.device_get(back.model.params), jax.device_get(without.model.params))


def test_without_a_checkpoint_a_spike_is_only_left_out(config, poison, capsys):
    poison({8}, nonsense)
    result = jf.fit(config | {"checkpoint": {"every_steps": None}}, [*SPIKES, "guard.spike=rollback"])
    assert "there is no checkpoint yet to go back to" in capsys.readouterr().err
    assert result.metrics["skipped_total"] == 1
