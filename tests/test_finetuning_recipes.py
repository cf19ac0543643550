"""Every recipe of fine-tuning, run from its first step to its last at a tiny size: on one device and on eight alike."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import LLAMA, random_params

import jaxformers as jf
from jaxformers import training
from jaxformers.data.chat_templates import BUILT_IN
from jaxformers.data.tokenizer import byte_tokenizer
from jaxformers.families import read_config
from jaxformers.hub.pretrained import write_pretrained
from jaxformers.parallel.mesh import make_mesh

CONFIGS = Path(__file__).parent.parent / "configs"
SHAPE = LLAMA | {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
ROWS = [(f"What is {a} + {b}?", f"It is {a + b}.") for a in range(6) for b in range(6)]
TINY = (
    "data.sequence_length=64",
    "data.workers=1",
    "data.validation_fraction=0.2",
    "train.steps=3",
    "train.batch_size=8",
    "train.eval_every=2",
    "runtime.dtype=float32",
    "runtime.layers=scan",
    "schedule.warmup_steps=1",
    "checkpoint.every_steps=null",
    "checkpoint.keep_best=null",
    "sample.prompts=[]",
)
MESHES = {"one": (1, ()), "fsdp2 x tp2": (4, ("mesh.fsdp=2", "mesh.tp=2"))}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a tiny model and questions with answers, both as fields and as messages."""
    folder = tmp_path_factory.mktemp("given")
    cfg = read_config(SHAPE)
    write_pretrained(folder / "model", cfg, random_params(cfg))
    byte_tokenizer().with_chat_template(BUILT_IN["zephyr"]).save(folder / "model")
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ROWS]
    forms = {"fields": [{"question": q, "answer": a} for q, a in ROWS], "messages": [{"messages": t} for t in turns]}
    for name, rows in forms.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


SMALL = ["smollm2-sft", "smollm2-lora", "smollm2-qlora"]
LARGE = ["qwen3-8b-sft", "qwen3-8b-lora", "qwen3-8b-qlora"]


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_a_recipe_runs_on_one_device_and_on_four_with_the_same_losses(name, given, tmp_path, monkeypatch):
    accumulation, rows = (1, "fields") if name in SMALL else (2, "messages")
    overrides = [
        *TINY,
        f"model={given / 'model'}",
        f"data.paths={given / f'{rows}.jsonl'}",
        f"data.cache_dir={given / 'cache'}",
        f"train.accumulation={accumulation}",
    ]
    told = {}
    for mesh, (devices, axes) in MESHES.items():
        monkeypatch.setattr(training, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:devices]))
        run = tmp_path / mesh.replace(" ", "")
        result = jf.fit(CONFIGS / f"{name}.yaml", [*overrides, *axes, f"run_dir={run}"])
        assert result.model.mesh.size == devices
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
        held_out = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
        assert len(steps) == 3
        assert list(held_out) == [0, 2, 3], "what the weights knew is evaluated before the first step"
        assert held_out[3] != held_out[0]
        told[mesh] = [*np.ravel(steps), *held_out.values()]
    np.testing.assert_allclose(told["fsdp2 x tp2"], told["one"], rtol=1e-5, atol=0)
