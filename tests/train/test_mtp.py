"""Multi-token prediction against the paper written out in torch over layers of `transformers`, a document at a time."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tiny import LLAMA, assert_bit_equal, packed_batch, random_params, relative_error

from jaxformers.families import read_config
from jaxformers.hub.pretrained import write_pretrained
from jaxformers.models.params import count_params, flops_per_token
from jaxformers.models.runtime import Runtime
from jaxformers.train.balance import shift_expert_biases
from jaxformers.train.columns import look_ahead
from jaxformers.train.config import LossConfig
from jaxformers.train.losses import Totals, lm_loss
from jaxformers.train.step import value_and_gradient

DEEPSEEK = LLAMA | {
    "model_type": "deepseek_v3",
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
MODELS = {
    "one sparse module": DEEPSEEK | {"num_nextn_predict_layers": 1},
    "two sparse modules": DEEPSEEK | {"num_nextn_predict_layers": 2},
    "two dense modules, tied": DEEPSEEK
    | {"num_nextn_predict_layers": 2, "first_k_dense_replace": 9, "tie_word_embeddings": True},
    "one module, glm": LLAMA
    | {
        "model_type": "glm4_moe",
        "vocab_size": 64,
        "head_dim": 8,
        "num_nextn_predict_layers": 1,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": True,
    },
}
PLAIN = LossConfig(chunk="none", balance_loss=0.0)


def batch_of(rows: int = 3, length: int = 24) -> dict[str, np.ndarray]:
    """Packed rows whose targets are what follows, of which some are not to be learned."""
    batch = packed_batch(rows, length)
    batch["targets"] = np.where(batch["weights"] > 0, np.roll(batch["tokens"], -1, axis=1), 0)
    batch["weights"] *= np.random.default_rng(1).random(batch["weights"].shape) < 0.8
    return batch


@functools.cache
def reference(name: str, folder) -> tuple[float, float, dict[str, np.ndarray]]:
    """The losses of the model and of its modules, and the gradient of the first plus half of the second, in torch.

    The exported modules' layers are opened as further layers of the model.
    """
    cfg = read_config(MODELS[name])
    write_pretrained(folder, cfg, random_params(cfg))
    layers, modules = cfg.num_layers, cfg.mtp_modules
    config = transformers.AutoConfig.from_pretrained(folder, num_hidden_layers=layers + modules)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, attn_implementation="eager")
    tensors = transformers.modeling_utils.load_state_dict(folder / "model.safetensors")
    own = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
    extras = {n: t.clone().requires_grad_() for n, t in tensors.items() if n.endswith(own)}

    def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + cfg.norm_eps) * weight

    def run(layers, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1])[None]
        mask = torch.full((1, 1, x.shape[1], x.shape[1]), -torch.inf).triu(1)
        for layer in layers:
            turns = model.model.rotary_emb(x, positions)
            x = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=turns)
        return x

    def nll(x: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.cross_entropy(model.lm_head(x)[0], targets, reduction="none") * weights).sum()

    batch, sums = batch_of(), torch.zeros(1 + modules)
    counts = torch.zeros(1 + modules)
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            tokens, targets = (torch.tensor(batch[n][row, here]).long() for n in ("tokens", "targets"))
            weights = torch.tensor(batch["weights"][row, here])
            embedded = model.model.embed_tokens(tokens)[None]
            h = rms(run(model.model.layers[:layers], embedded), model.model.norm.weight)
            for k in range(modules + 1):
                if k:  # h'_i = M [norm(Emb(t_{i+k})); norm(h_i)] for the places that have a token k further on
                    e = f"model.layers.{layers + k - 1}."
                    h = h[:, : len(tokens) - k]
                    if not h.shape[1]:
                        break
                    both = [rms(embedded[:, k:], extras[f"{e}enorm.weight"]), rms(h, extras[f"{e}hnorm.weight"])]
                    h = torch.cat(both, dim=-1) @ extras[f"{e}eh_proj.weight"].T
                    h = rms(run([model.model.layers[layers + k - 1]], h), extras[f"{e}shared_head.norm.weight"])
                sums[k] += nll(h, targets[k:], weights[k:])
                counts[k] += weights[k:].sum()
    assert (counts > 5).all()
    means = sums / counts
    mtp = means[1:].mean()
    (means[0] + 0.5 * mtp).backward()
    gradients = {n: p.grad.numpy() for n, p in [*model.named_parameters(), *extras.items()] if p.grad is not None}
    return means[0].item(), mtp.item(), gradients


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_are_the_papers(name, tmp_path_factory):
    cfg, config = read_config(MODELS[name]), PLAIN.model_copy(update={"mtp_loss": 0.5})
    main, mtp, gradients = reference(name, tmp_path_factory.mktemp("exported"))
    batch = look_ahead(jax.tree.map(jnp.asarray, batch_of()), cfg.mtp_modules)
    evaluate = jax.jit(jax.value_and_grad(partial(lm_loss, cfg=cfg, runtime=Runtime(), config=config), has_aux=True))
    (loss, sums), found = evaluate(random_params(cfg), batch, Totals.of(batch))
    assert float(sums.mtp) == pytest.approx(mtp, rel=1e-5)
    assert float(loss) == pytest.approx(main + 0.5 * mtp, rel=1e-5)
    norm = "model.layers.{}.{}.weight".format
    assert gradients["model.embed_tokens.weight"].any()
    assert relative_error(found["embed"], gradients["model.embed_tokens.weight"]) < 1e-5
    assert relative_error(found["final_norm"]["w"], gradients["model.norm.weight"]) < 1e-5
    assert relative_error(found["layers"][0][0]["attn_norm"]["w"][0], gradients[norm(0, "input_layernorm")]) < 1e-5
    for m, p in enumerate(found["mtp"]):
        i = cfg.num_layers + m
        proj = p["proj"].reshape(-1, cfg.d_model).T
        for ours, theirs in (
            (proj, norm(i, "eh_proj")),
            (p["token_norm"]["w"], norm(i, "enorm")),
            (p["hidden_norm"]["w"], norm(i, "hnorm")),
            (p["norm"]["w"], norm(i, "shared_head.norm")),
            (p["layer"]["attn_norm"]["w"], norm(i, "input_layernorm")),
            (p["layer"]["ffn_norm"]["w"], norm(i, "post_attention_layernorm")),
        ):
            assert relative_error(ours, gradients[theirs]) < 1e-5, theirs


def test_a_module_reads_and_predicts_further_on_in_the_same_document_alone():
    batch = {
        "tokens": np.array([[1, 2, 3, 4, 5, 0]]),
        "targets": np.array([[2, 3, 0, 5, 6, 0]]),
        "weights": np.array([[1, 1, 0, 1, 1, 0]], np.float32),  # the second document goes on in another row
        "segment_ids": np.array([[1, 1, 1, 2, 2, 0]]),
    }
    found = look_ahead(jax.tree.map(jnp.asarray, batch), 2)
    first, second = ({n: found[f"mtp_{n}"][0, :, m].tolist() for n in batch} for m in (0, 1))
    assert first["tokens"] == [2, 3, 0, 5, 0, 0]
    assert first["segment_ids"] == [1, 1, 0, 2, 0, 0]
    assert first["targets"] == [3, 0, 0, 6, 0, 0]
    assert first["weights"] == [0.25, 0, 0, 0.25, 0, 0]  # half of the loss, over two targets
    assert second["tokens"] == [3, 0, 0, 0, 0, 0]
    assert not any(second["weights"])


def test_columns_in_any_order_look_ahead_alike():
    batch = jax.tree.map(jnp.asarray, batch_of(2, 16))
    order = np.random.default_rng(0).permutation(16)
    mixed = look_ahead({name: a[:, order] for name, a in batch.items()}, 2, order=order)
    assert_bit_equal(mixed, {name: a[:, order] for name, a in look_ahead(batch, 2).items()})


def test_microbatches_chunks_and_recomputation_change_nothing():
    cfg = read_config(MODELS["two sparse modules"] | {"num_hidden_layers": 1, "first_k_dense_replace": 0})
    params, batch = random_params(cfg), look_ahead(jax.tree.map(jnp.asarray, batch_of(4, 16)), 2)
    found = []
    for accumulation, chunk, runtime in ((1, None, Runtime()), (4, 8, Runtime(remat="full"))):
        loss = partial(lm_loss, cfg=cfg, runtime=runtime, config=LossConfig(), chunk=chunk)
        found.append(jax.jit(partial(value_and_gradient, loss, accumulation=accumulation))(params, batch))
    assert relative_error(found[1], found[0]) < 1e-5


def test_biases_that_select_a_modules_experts_move_with_the_others():
    cfg = read_config(MODELS["two sparse modules"])
    before, load = random_params(cfg), np.array([[2, 2, 2, 2], [4, 0, 2, 2], [1, 1, 1, 5]], np.float32)
    after = shift_expert_biases(before, jnp.asarray(load), cfg, rate=0.25)
    moves = [
        a["layer"]["ffn"]["select_b"] - b["layer"]["ffn"]["select_b"]
        for a, b in zip(after["mtp"], before["mtp"], strict=True)
    ]
    np.testing.assert_allclose(moves, 0.25 * np.array([[-1, 1, 0, 0], [1, 1, 1, -1]]), atol=1e-6)


def test_modules_are_counted_apart():
    cfg, plain = read_config(MODELS["two sparse modules"]), read_config(DEEPSEEK)
    assert count_params(cfg) == count_params(plain)
    layer = count_params(read_config(DEEPSEEK | {"num_hidden_layers": 3})) - count_params(plain)
    assert count_params(cfg, mtp=True) == count_params(plain) + 2 * (layer + 2 * 32 * 32 + 3 * 32)
    assert flops_per_token(cfg, 16) == flops_per_token(plain, 16)
    further = flops_per_token(read_config(DEEPSEEK | {"num_hidden_layers": 4}), 16) + 2 * 6 * (2 * 32 * 32 + 64 * 32)
    assert flops_per_token(cfg, 16, mtp=True) == pytest.approx(further)
