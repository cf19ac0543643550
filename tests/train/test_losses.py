"""Losses against their formulas in float64, and chunked against unchunked."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LLAMA, packed_batch, random_params, relative_error

from jaxformers.families import read_config
from jaxformers.models.decoder import hidden_states
from jaxformers.models.runtime import Runtime
from jaxformers.train.config import LossConfig
from jaxformers.train.losses import Totals, chunk_length, head_loss, lm_loss, token_sums

MOE = {
    **LLAMA,
    "model_type": "mixtral",
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_token_sums_are_cross_entropy_z_and_accuracy_over_weighted_targets():
    logits, targets = 3 * draw(2, 5, 7), np.random.default_rng(1).integers(0, 7, (2, 5))
    weights = np.abs(draw(2, 5, seed=2)) * (draw(2, 5, seed=3) > 0)
    exact = logits.astype(np.float64)
    lse = np.log(np.exp(exact).sum(-1))
    nll = lse - np.take_along_axis(exact, targets[..., None], -1)[..., 0]
    sums = token_sums(jnp.asarray(logits), jnp.asarray(targets, jnp.int32), jnp.asarray(weights))
    np.testing.assert_allclose(sums.nll, (nll * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(sums.z, (lse**2 * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(sums.correct, ((exact.argmax(-1) == targets) * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(sums.weight, weights.sum(), rtol=1e-6)


def test_large_logits_do_not_overflow():
    sums = token_sums(jnp.array([[1e4, -1e4]]), jnp.array([1]), jnp.ones(1))
    assert float(sums.nll) == pytest.approx(2e4)


def test_totals_count_weights_and_tokens_that_are_no_padding():
    batch = packed_batch(3)
    totals = Totals.of(jax.tree.map(jnp.asarray, batch))
    assert float(totals.weight) == batch["weights"].sum()
    assert float(totals.tokens) == (batch["segment_ids"] > 0).sum() > batch["weights"].sum()


HEADS = {
    "untied": {"tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
    "soft cap": {
        "model_type": "gemma2",
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": None,
        "sliding_window": 8,
    },
}


@pytest.mark.parametrize("head", HEADS)
def test_a_loss_in_chunks_has_the_value_and_gradients_of_the_loss_at_once(head):
    cfg = read_config(LLAMA | {"vocab_size": 61} | HEADS[head])
    params = random_params(cfg)
    head = {name: params[name] for name in ("embed", "final_norm", "lm_head") if name in params}
    batch = jax.tree.map(jnp.asarray, packed_batch(2, 12, vocab_size=61))
    x = jnp.asarray(draw(2, 12, cfg.d_model))

    def value(head, x, chunk):
        loss, sums = head_loss(head, x, batch, cfg, Runtime(), z_weight=0.1, chunk=chunk)
        return loss / 7, sums  # the scale stands for what comes after, as in the backward pass of a real loss

    evaluate = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True), static_argnums=2)
    whole, chunked = evaluate(head, x, None), evaluate(head, x, 4)
    assert relative_error(chunked, whole) < 1e-5
    only_value = jax.jit(value, static_argnums=2)(head, x, 3)
    assert relative_error(only_value, whole[0]) < 1e-5


@pytest.mark.parametrize(
    "setting, length, expected",
    [("none", 64, None), (16, 64, 16), (20, 64, 16), (64, 64, None), (100, 64, None), (7, 61, 1), (1, 64, 1)],
)
def test_a_chunk_is_the_largest_part_of_the_row_that_is_not_above_the_setting(setting, length, expected):
    found = chunk_length(LossConfig(chunk=setting), rows=4, length=length, vocab_size=100, devices=1)
    assert found == expected


def test_auto_chunks_only_where_logits_would_pass_a_gibibyte_a_device():
    auto = partial(chunk_length, LossConfig(), length=1024, vocab_size=2**17)
    assert auto(rows=2, devices=1) is None  # 2 x 1024 x 2^17 x 4 bytes = 1 GiB
    assert auto(rows=4, devices=1) == 512
    assert auto(rows=4, devices=2) is None
    assert auto(rows=2**20, devices=1) == 1
    assert auto(rows=2**20, devices=8, context_shards=4) == 4  # a token of each shard
    assert chunk_length(LossConfig(chunk=20), rows=4, length=48, vocab_size=9, devices=8, context_shards=8) == 16


def test_the_loss_is_cross_entropy_and_z_a_target_and_the_experts_losses_a_token_and_sparse_layer():
    cfg = read_config(MOE)
    params, batch = random_params(cfg), jax.tree.map(jnp.asarray, packed_batch(3))
    config = LossConfig(z_loss=0.01, balance_loss=0.5, router_z_loss=0.25, chunk="none")
    places = {"positions": batch["positions"], "segment_ids": batch["segment_ids"]}
    loss, sums = jax.jit(partial(lm_loss, cfg=cfg, runtime=Runtime(), config=config))(params, batch, Totals.of(batch))
    hidden = jax.jit(lambda params: hidden_states(params, cfg, batch["tokens"], **places))(params)
    targets, tokens, layers = batch["weights"].sum(), (batch["segment_ids"] > 0).sum(), cfg.num_layers
    truth = (
        float(sums.nll / targets)
        + 0.01 * float(sums.z / targets)
        + 0.5 * float(hidden.moe.balance.sum()) / (int(tokens) * layers)
        + 0.25 * float(hidden.moe.router_z.sum()) / (int(tokens) * layers)
    )
    assert float(loss) == pytest.approx(truth, rel=1e-5)
    assert float(sums.load.sum()) == int(tokens) * layers * 2  # top 2 of every token that is no padding
    evenly = float(sums.balance) / int(tokens)
    assert evenly > cfg.moe.top_k * 0.9  # E sum f P: top_k where experts are even, more where they are not


def test_padding_and_other_documents_change_no_loss():
    cfg = read_config(LLAMA | {"vocab_size": 64, "num_hidden_layers": 1})
    params, batch = random_params(cfg), packed_batch(2, 24)
    value = jax.jit(partial(lm_loss, cfg=cfg, runtime=Runtime(), config=LossConfig(chunk="none")))
    batch["segment_ids"][:, 20:] = batch["positions"][:, 20:] = 0
    batch["weights"][:, 20:] = 0
    other = {name: values.copy() for name, values in batch.items()}
    other["tokens"][:, 20:] = 5
    other["targets"][:, 20:] = 9
    found = [
        value(params, b, Totals.of(b))[0] for b in (jax.tree.map(jnp.asarray, batch), jax.tree.map(jnp.asarray, other))
    ]
    assert float(found[0]) == float(found[1])


def test_a_batch_of_padding_alone_has_a_loss_and_gradients_of_zero():
    cfg = read_config(MOE)
    params = random_params(cfg)
    batch = {name: jnp.zeros_like(values) for name, values in packed_batch(2).items()}
    evaluate = jax.jit(
        jax.value_and_grad(partial(lm_loss, cfg=cfg, runtime=Runtime(), config=LossConfig(z_loss=0.1)), has_aux=True)
    )
    (loss, sums), gradients = evaluate(params, batch, Totals.of(batch))
    assert float(loss) == float(sums.weight) == 0
    assert all(not np.any(gradient) for gradient in map(np.asarray, jax.tree.leaves(gradients)))


def test_bfloat16_computes_near_float32_and_gives_float32_gradients():
    cfg = read_config(LLAMA | {"vocab_size": 64, "num_hidden_layers": 1})
    params, batch = random_params(cfg), jax.tree.map(jnp.asarray, packed_batch(4))

    def evaluate(dtype):
        loss = partial(lm_loss, cfg=cfg, runtime=Runtime(dtype=dtype), config=LossConfig())
        (value, _), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, Totals.of(batch))
        return float(value), gradients

    (low, low_gradients), (full, gradients) = evaluate(jnp.bfloat16), evaluate(jnp.float32)
    assert low != full
    assert low == pytest.approx(full, rel=5e-3)
    assert {a.dtype for a in jax.tree.leaves(low_gradients)} == {np.dtype("float32")}
    assert relative_error(low_gradients, gradients) < 0.1


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_every_remat_policy_has_the_same_gradients_and_full_needs_less_memory(layers):
    cfg = read_config(LLAMA | {"vocab_size": 64, "num_hidden_layers": 4})
    params, batch = random_params(cfg), jax.tree.map(jnp.asarray, packed_batch(8, 64))
    found, memory = {}, {}
    for remat in ("none", "full", "dots", "projections"):
        loss = partial(lm_loss, cfg=cfg, runtime=Runtime(remat=remat, layers=layers), config=LossConfig())
        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, batch, Totals.of(batch)).compile()
        found[remat] = compiled(params, batch, Totals.of(batch))
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
    for remat in ("full", "dots", "projections"):
        assert relative_error(found[remat], found["none"]) < 1e-5, remat
    assert memory["full"] < 0.8 * memory["none"]
    assert memory["full"] <= memory["dots"] <= memory["none"]
