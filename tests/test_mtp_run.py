"""A run that trains modules for multi-token prediction: its metrics, its resume, its checkpoints and its model."""

import json

import jax
import numpy as np
from tiny import DEEPSEEK, assert_bit_equal, run_config

import jaxformers as jf
from jaxformers.config import load_config
from jaxformers.hub.safetensors import open_tensors
from jaxformers.training import describe_setup, prepare_run


def losses(run_dir) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["mtp_loss"]) for line in lines if "mtp_loss" in line]


def test_a_run_with_modules_learns_resumes_generates_and_exports_them(tmp_path):
    values = run_config(
        tmp_path,
        model=DEEPSEEK,
        train={"steps": 6},
        schedule={"name": "constant"},
        checkpoint={"every_steps": 3},
        loss={"expert_bias_rate": 0.01},
        sample={"prompts": ["alpha"], "max_new_tokens": 2},
    )
    values["mesh"] = {"cp": 2, "dp": 4, "fsdp": 1}
    whole = jf.fit(values | {"run_dir": str(tmp_path / "whole")})
    jf.fit(values, ["train.steps=3", "sample.prompts=[]"])
    resumed = jf.fit(values)
    found = losses(tmp_path / "run")
    assert found == losses(tmp_path / "whole")
    assert len(found) == 6
    assert found[-1][1] < found[0][1] - 0.3, "modules learn"
    assert_bit_equal(jax.device_get(resumed.model.params), jax.device_get(whole.model.params))
    assert len(whole.samples) == 1

    # Who opens a run to generate leaves the modules in its checkpoint; who writes it again takes them along.
    assert "mtp" not in jf.load(tmp_path / "run").params
    model = jf.load(tmp_path / "run", mtp=True)
    assert_bit_equal(jax.device_get(model.params), jax.device_get(whole.model.params))
    jf.save_pretrained(model, tmp_path / "exported")
    proj = np.asarray(open_tensors(tmp_path / "exported")["model.layers.2.eh_proj.weight"])
    np.testing.assert_array_equal(proj.T.reshape(2, 16, 16), model.params["mtp"][0]["proj"])

    # Fine-tuning goes on with them.
    setup = prepare_run(load_config(values | {"model": str(tmp_path / "exported"), "run_dir": str(tmp_path / "tuned")}))
    assert setup.cfg.mtp_modules == 1
    tuned = setup.pretrained.read_params(setup.mesh, dtype="float32")
    assert_bit_equal(jax.device_get(tuned), jax.device_get(whole.model.params))


def test_modules_are_named_apart_in_the_plan_and_not_run_with_a_weight_of_zero(tmp_path):
    values = run_config(tmp_path, model=DEEPSEEK)
    setup = prepare_run(load_config(values))
    modules = jf.count_params(setup.cfg, mtp=True) - jf.count_params(setup.cfg)
    assert describe_setup(setup)["parameters"].endswith(f" active) + {modules:,} for multi-token prediction")
    off = prepare_run(load_config(values, ["loss.mtp_loss=0"]))
    assert off.trainer.program.flops_per_token < setup.trainer.program.flops_per_token
