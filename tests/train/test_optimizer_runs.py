"""A whole run with what optimizers can be told, stopped and resumed, and what of that is refused in one line."""

import json
import shutil

import jax
import numpy as np
import pytest
import yaml
from tiny import LLAMA, assert_bit_equal, run_config
from whole_runs import again, saved_state, steps_of

import jaxformers as jf
from jaxformers.train import soap

SETTINGS = {
    # A layer's matrices are large enough for 8 bits.
    "model": LLAMA | {"hidden_size": 64, "intermediate_size": 96},
    "mesh": {"fsdp": 4, "dp": 2},
    "runtime": {"layers": "scan", "zero": 1},
    "train": {"steps": 8, "batch_size": 8, "eval_batches": 0, "average": "sma", "average_from": 3},
    "schedule": {"warmup_steps": 2, "cycles": 2},
    "optimizer": {
        "name": "muon",
        "state": "int8",
        "learning_rate": 1e-2,
        "layer_decay": 0.9,
        "groups": {"first": {"match": "model.layers.0.*", "scale": 0.5}, "head": {"match": "*lm_head*", "scale": 0.0}},
    },
}


def stopped_and_resumed(folder, settings):
    """(the whole run's last state, its losses), after the same run stopped behind step 4 came to the same bits."""
    whole, stopped = folder / "whole", folder / "stopped"
    config = run_config(folder, **settings)
    result = jf.fit(again(config, whole))
    shutil.copytree(whole / "run", stopped / "run")
    shutil.rmtree(stopped / "run" / "checkpoints" / "8")  # as after a stop behind step 4
    resumed = jf.fit(again(config, stopped))
    assert_bit_equal(jax.device_get(resumed.model.params), jax.device_get(result.model.params))
    (state, _), (truth, _) = saved_state(again(config, stopped)), saved_state(again(config, whole))
    assert_bit_equal(state, truth)
    return truth, [loss for _, loss, *_ in steps_of(whole / "run")]


def test_a_run_with_all_of_it_learns_and_resumes_bit_equal(tmp_path):
    state, losses = stopped_and_resumed(tmp_path, SETTINGS)
    assert losses[-1] < losses[0] - 0.5
    assert any(leaf.dtype in (np.int8, np.uint8) for leaf in jax.tree.leaves(state.opt_state))
    average = jax.device_get(jf.load(tmp_path / "whole" / "run", ema=True).params)
    assert_bit_equal(average, state.ema)
    assert np.abs(average["layers"][0][0]["ffn"]["up"] - state.params["layers"][0][0]["ffn"]["up"]).max() > 0


@pytest.mark.slow
def test_bases_that_move_before_a_stop_and_after_it_resume_bit_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(soap, "EVERY", 3)
    groups = {"first": {"match": "model.layers.0.*", "scale": 0.5}}
    optimizer = {"name": "soap", "learning_rate": 1e-2, "groups": groups}
    _, losses = stopped_and_resumed(tmp_path, SETTINGS | {"optimizer": optimizer})
    assert losses[-1] < losses[0] - 0.5


def test_what_does_not_fit_is_one_line(tmp_path, command):
    path = tmp_path / "config.yaml"

    def mistake(**optimizer):
        path.write_text(yaml.safe_dump(json.loads(json.dumps(run_config(tmp_path, optimizer=optimizer)))))
        return command("train", path, "--dry-run").mistake

    assert mistake(name="lion", eps=1e-4).endswith(
        "optimizer: lion does not read eps (here 0.0001); it is for adamw, ademamix, adopt, muon, soap"
    )
    assert "optimizer.groups.x: '*.wq' matches no parameter; there are model.embed_tokens.weight, " in mistake(
        groups={"x": {"match": "*.wq"}}
    )
    assert "optimizer.groups.x: learning_rate=0.1 and scale=0.5 exclude" in mistake(
        groups={"x": {"match": "*", "learning_rate": 0.1, "scale": 0.5}}
    )
    assert "unknown key 'optimizer.groups.x.lr'" in mistake(groups={"x": {"match": "*", "lr": 0.1}})
