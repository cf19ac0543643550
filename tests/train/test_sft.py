"""Fine-tuning on conversations, from a file to gradients, against `transformers` on labels that it masks itself; and a
run whose result can chat."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import pytest
import torch
import transformers
from tiny import LLAMA, random_params, relative_error, run_config

import jaxformers as jf
from jaxformers.data.chat_templates import BUILT_IN
from jaxformers.data.config import DataConfig
from jaxformers.data.corpus import open_corpus
from jaxformers.data.tokenizer import byte_tokenizer
from jaxformers.families import read_config
from jaxformers.hub.convert import export_tensors
from jaxformers.hub.pretrained import write_pretrained
from jaxformers.models.runtime import Runtime
from jaxformers.train.config import LossConfig
from jaxformers.train.losses import Totals, lm_loss

MODEL = LLAMA | {"hidden_size": 64, "max_position_embeddings": 128, "tie_word_embeddings": False}
ROW = 96


def conversation(number: int) -> list[dict[str, str]]:
    said = []
    for turn in range(1 + number % 2):
        said.append({"role": "user", "content": f"{number} plus {turn}?"})
        said.append({"role": "assistant", "content": f"It is {number + turn}" + "!" * (number % 3)})
    return said


CONVERSATIONS = [conversation(number) for number in range(6)]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(("<|im_start|>", "<|im_end|>")).with_chat_template(BUILT_IN["chatml"])


@pytest.fixture(scope="module")
def truth(tokenizer, tmp_path_factory):
    """(loss, gradient by tensor) of `transformers`: one conversation a row, labels where its own mask says."""
    folder = tmp_path_factory.mktemp("model")
    cfg = read_config(MODEL)
    write_pretrained(folder, cfg, random_params(cfg))
    tokenizer.save(folder)
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    batch = reader.apply_chat_template(
        CONVERSATIONS, return_assistant_tokens_mask=True, return_dict=True, padding=True, return_tensors="pt"
    )
    mask = torch.as_tensor(batch["assistant_masks"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    loss.backward()
    return loss.item(), {name: tensor.grad.numpy() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("packing", ["first_fit", "none"])
def test_loss_and_gradients_are_those_of_transformers_on_the_same_labels(packing, tokenizer, truth, tmp_path):
    lines = [json.dumps({"messages": said}) + "\n" for said in CONVERSATIONS]
    (tmp_path / "chat.jsonl").write_text("".join(lines))
    config = DataConfig(
        paths=f"{tmp_path}/chat.jsonl",
        cache_dir=tmp_path / "cache",
        chat={"format": "messages"},
        sequence_length=ROW,
        packing=packing,
        validation_fraction=0.0,
        workers=1,
    )
    rows = open_corpus(config, tokenizer).train
    assert (rows.rows_per_epoch < len(CONVERSATIONS)) == (packing != "none")
    batch = jax.tree.map(jnp.asarray, dict(rows.batch(range(rows.rows_per_epoch))))
    cfg = read_config(MODEL)
    evaluate = partial(lm_loss, cfg=cfg, runtime=Runtime(), config=LossConfig(chunk="none"))
    (loss, _), found = jax.jit(jax.value_and_grad(evaluate, has_aux=True))(random_params(cfg), batch, Totals.of(batch))
    reference, gradients = truth
    assert float(loss) == pytest.approx(reference, rel=1e-5)
    ours = export_tensors(cfg, found)
    assert set(ours) == set(gradients)
    for name, gradient in gradients.items():
        assert relative_error(ours[name], gradient) < 1e-5, name


def test_a_run_learns_answers_and_keeps_the_template_it_was_given(tmp_path):
    lines = [json.dumps({"question": said[0]["content"], "answer": said[1]["content"]}) for said in CONVERSATIONS]
    (tmp_path / "chat.jsonl").write_text("\n".join([*lines, '{"question": "", "answer": "Nothing."}']))
    chat = {"format": "auto", "template": "plain", "fields": {"prompt": "question", "completion": "answer"}}
    result = jf.fit(run_config(tmp_path, data={"paths": f"{tmp_path}/chat.jsonl", "chat": chat}))
    metrics = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert losses[-1] < losses[0]
    assert result.validation
    saved = transformers.AutoTokenizer.from_pretrained(result.run_dir / "tokenizer")
    assert saved.chat_template == jf.load(result.run_dir).tokenizer.chat_template == BUILT_IN["plain"]
