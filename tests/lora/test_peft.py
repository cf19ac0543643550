"""Adapters are what `peft` makes of them: logits, gradients, files in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

import jaxformers as jf
from jaxformers.adapters import save_adapter
from jaxformers.api import find_model
from jaxformers.hub.peft import attach, read_adapter
from jaxformers.models.decoder import forward
from jaxformers.models.weights import LoRA

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*",
    "ignore:Setting .save_embedding_layers.*",
    "ignore:Model has .tie_word_embeddings.*",
)
IDS = np.random.default_rng(0).integers(0, 96, (2, 12))
SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2}
LLAMA = transformers.LlamaConfig(
    **SIZES, num_attention_heads=4, num_key_value_heads=2, attention_bias=True, tie_word_embeddings=False
)
GPT2 = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32)
TIED = transformers.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
CASES = {
    "lora": (LLAMA, {"target_modules": ["q_proj", "v_proj"]}),
    "all linear layers": (LLAMA, {"target_modules": "all-linear"}),
    "rslora": (LLAMA, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "dora": (LLAMA, {"target_modules": ["q_proj", "o_proj", "up_proj"], "use_dora": True}),
    "embeddings": (LLAMA, {"target_modules": ["embed_tokens", "k_proj", "lm_head"]}),
    "a tied embedding": (TIED, {"target_modules": ["embed_tokens", "k_proj"]}),
    "ranks by module": (
        LLAMA,
        {
            "target_modules": ["q_proj", "o_proj", "gate_proj"],
            "rank_pattern": {"o_proj": 2, "layers.1.self_attn.q_proj": 6},
            "alpha_pattern": {"gate_proj": 3},
        },
    ),
    "some layers": (LLAMA, {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "biases": (LLAMA, {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "a fused family": (GPT2, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
}


@pytest.fixture(scope="module", params=list(CASES), ids=list(CASES))
def theirs(request, tmp_path_factory):
    """A base and an adapter on disk, the adapted torch model, and its logits; every factor is perturbed."""
    config, settings = CASES[request.param]
    folder = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.05 * torch.randn_like(p))
    base.save_pretrained(folder / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return folder, model, model(torch.tensor(IDS)).logits


def close(ours, truth, tolerance=1e-5):
    truth = np.asarray(truth)
    np.testing.assert_allclose(np.asarray(ours), truth, rtol=0, atol=tolerance * np.abs(truth).max())


def adapted(folder):
    """The base's parameters with `LoRA` leaves."""
    base = jf.load(folder / "base")
    return jax.tree.map(jnp.asarray, attach(base.params, base.config, read_adapter(folder / "adapter"))), base.config


def test_logits_and_gradients_are_those_of_peft(theirs):
    folder, model, logits = theirs
    params, cfg = adapted(folder)
    cotangent = np.random.default_rng(1).standard_normal(logits.shape).astype(np.float32)
    found, pull = jax.vjp(lambda p: forward(p, cfg, IDS), params)
    close(found, logits.detach())
    model.zero_grad()
    (logits * torch.tensor(cotangent)).sum().backward(retain_graph=True)
    grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    ours = pull(jnp.asarray(cotangent))[0]
    compared = 0
    for i in range(2):
        name = f"layers.{i}.self_attn.q_proj"
        truth = {k: g for k, g in grads.items() if name in k and "lora" in k}
        if truth and cfg.family == "llama":
            leaf = jax.tree.map(lambda a, i=i: a[i], ours["layers"][0][0]["attn"]["q"])
            rank = next(g for k, g in truth.items() if "lora_A" in k).shape[0]
            for key, g in truth.items():
                kind = "a" if "lora_A" in key else "b" if "lora_B" in key else "magnitude"
                mine = {
                    "a": lambda leaf=leaf, r=rank: leaf.a.reshape(64, -1).T[:r],
                    "b": lambda leaf=leaf, r=rank: leaf.b.reshape(-1, 64).T[:, :r],
                    "magnitude": lambda leaf=leaf: leaf.magnitude.reshape(-1),
                }[kind]()
                close(mine, g)
                compared += 1
    if "embed_tokens.lora_embedding_A.default" in " ".join(grads):
        key = next(k for k in grads if "embed_tokens.lora_embedding_A" in k)
        close(ours["embed"].a.T, grads[key])
        close(ours["embed"].b.T, grads[key.replace("_A", "_B")])
        compared += 2
    assert compared or cfg.family == "gpt2" or "q_proj" not in str(grads)


def test_the_adapter_merged_into_its_base_gives_the_same_logits(theirs):
    folder, _, logits = theirs
    model = jf.load(folder / "adapter")
    assert not any(isinstance(w, LoRA) for w in jax.tree.leaves(model.params, is_leaf=lambda w: isinstance(w, LoRA)))
    close(forward(model.params, model.config, IDS), logits.detach())


def test_an_adapter_read_and_written_is_bit_equal_and_opens_in_peft(theirs, tmp_path):
    folder, _, logits = theirs
    found = find_model(folder / "adapter")
    save_adapter(found, tmp_path / "again")
    ours, first = read_adapter(tmp_path / "again"), read_adapter(folder / "adapter")
    assert ours.modules.keys() == first.modules.keys()
    for name, low in first.modules.items():
        assert low.scale == ours.modules[name].scale
        assert low.a.tobytes() == ours.modules[name].a.tobytes()
        assert low.b.tobytes() == ours.modules[name].b.tobytes()
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "again").eval()
    close(again(torch.tensor(IDS)).logits.detach(), logits.detach(), 1e-6)


def test_merged_weights_are_written_for_transformers(theirs, tmp_path, command):
    folder, _, logits = theirs
    done = command("convert", folder / "adapter", tmp_path / "merged", "--merge-adapter")
    assert done.code == 0, done
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    close(model(torch.tensor(IDS)).logits.detach(), logits.detach())


# Adapters with weights of their own are not added up.
@pytest.mark.parametrize(
    "theirs", sorted(CASES.keys() - {"dora", "embeddings", "a tied embedding", "biases"}), indirect=True
)
def test_the_sum_of_two_adapters_is_the_weighted_sum_of_what_they_add(theirs):
    folder, _, _ = theirs
    base, one = jf.load(folder / "base"), jf.load(folder / "adapter")
    both = jf.load(folder / "base", adapter=[folder / "adapter"] * 2, adapter_weights=[0.5, -2.0])
    wanted = jax.tree.map(lambda b, o: b - 1.5 * (o - b), base.params, one.params)
    for ours, truth in zip(jax.tree.leaves(both.params), jax.tree.leaves(wanted), strict=True):
        close(ours, truth)
