"""Weights in few bits, experts with adapters, and adapters on every mesh, against arrays written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import packed_batch, random_params, relative_error

from jaxformers.families import read_config
from jaxformers.hub.targets import Wish, plan_adapter
from jaxformers.models.adapters import add_adapter, merge
from jaxformers.models.decoder import forward
from jaxformers.models.quantized import NF4, quantize
from jaxformers.models.weights import LoRA, grouped_linear, linear
from jaxformers.parallel.mesh import MeshConfig, make_mesh, single_device_mesh
from jaxformers.train.build import Trainer
from jaxformers.train.config import LossConfig, RuntimeConfig, TrainConfig
from jaxformers.train.optimizer_config import ScheduleConfig

MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def written_out(w, scheme):
    """The nearest code of each value, with the scale of its group of 64 inputs (int8: of all inputs)."""
    w = np.asarray(w, np.float64)
    size = w.shape[0] if scheme == "int8" else 64
    out = np.empty_like(w)
    codes = {"int8": np.arange(-127, 128) / 127, "int4": np.arange(-7, 8) / 7, "nf4": np.asarray(NF4)}[scheme]
    for start in range(0, w.shape[0], size):
        group = w[start : start + size]
        top = np.abs(group).max(axis=0)
        nearest = np.abs(group[..., None] / top[:, None] - codes).argmin(-1)
        out[start : start + size] = codes[nearest] * top
    return out


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_a_weight_in_few_bits_is_each_value_at_its_nearest_code(scheme):
    w, x = draw(128, 24), draw(5, 128, seed=1)
    kept = quantize(w, scheme, n_in=1)
    assert relative_error(kept.dequantized(), written_out(w, scheme)) < 1e-6
    assert relative_error(linear(x, kept), linear(x, kept.dequantized())) < 1e-6
    assert sum(a.nbytes for a in jax.tree.leaves(kept)) < {"int8": 0.27, "int4": 0.145, "nf4": 0.145}[scheme] * w.nbytes


def test_batches_of_weights_are_packed_each_for_itself():
    w = draw(3, 4, 32, 2, 8)
    kept = quantize(w, "nf4", n_in=1, num_batch=2)
    assert kept.shape == w.shape
    assert relative_error(kept.dequantized()[1, 2], quantize(w[1, 2], "nf4", n_in=1).dequantized()) == 0


def test_experts_with_adapters_are_each_their_merged_matrix():
    base, a, b, scale = draw(3, 16, 12), draw(3, 16, 2, seed=1), draw(3, 2, 12, seed=2), draw(3, seed=3)
    x, sizes = draw(10, 16, seed=4), jnp.asarray([4, 0, 5], jnp.int32)
    y = grouped_linear(x, LoRA(base, a, b, scale), sizes)
    whole = np.asarray(base) + np.asarray(scale)[:, None, None] * np.einsum("eir,ero->eio", a, b)
    wanted = np.zeros((10, 12))
    wanted[:4], wanted[4:9] = x[:4] @ whole[0], x[4:9] @ whole[2]
    assert relative_error(y, wanted) < 1e-5


def steps(cfg, mesh, adapter, runtime, batch):
    """The adapted model after two steps, and its losses."""
    trainer = Trainer(
        cfg,
        mesh,
        batch["tokens"].shape[1],
        train=TrainConfig(steps=10, batch_size=8),
        schedule=ScheduleConfig(warmup_steps=0),
        loss=LossConfig(chunk=8),
        runtime=RuntimeConfig(**runtime),
        adapter=adapter,
    )
    trainer.check()
    with jax.set_mesh(mesh):
        state, losses = trainer.from_params(jax.tree.map(jnp.asarray, random_params(cfg)), 0), []
        for _ in range(2):
            state, metrics = trainer.program.step(state, batch)
            losses.append(float(metrics["loss"]))
        frozen = state.frozen
        return jax.device_get(trainer.whole(trainer.to_plain(state).params, frozen)), losses


@pytest.fixture(scope="module")
def sparse():
    """Experts, attention and head with adapters over an int8 base, on one device."""
    cfg = read_config(MIXTRAL)
    adapter = plan_adapter(cfg, Wish(targets=("w1", "w2", "q_proj", "lm_head"), rank=4, base="int8"))
    batch = packed_batch(8)
    return cfg, adapter, batch, steps(cfg, single_device_mesh(), adapter, {"layers": "unroll"}, batch)


@pytest.mark.parametrize(
    "mesh", [{"fsdp": 2, "tp": 2, "ep": 2}, {"pp": 2, "fsdp": 2, "ep": 2}], ids=["fsdp2 tp2 ep2", "pp2 fsdp2 ep2"]
)
def test_adapters_of_experts_train_alike_on_every_mesh(mesh, sparse):
    cfg, adapter, batch, (model, losses) = sparse
    runtime = {"layers": "scan", "microbatches": 2}
    ours, found = steps(cfg, make_mesh(MeshConfig(**mesh)), adapter, runtime, batch)
    assert relative_error(np.asarray(found), np.asarray(losses)) < 1e-5
    assert relative_error(merge(ours), merge(model)) < 1e-5


def test_only_the_adapter_of_a_packed_base_has_changed(sparse):
    cfg, adapter, _, (model, losses) = sparse
    fresh = add_adapter(jax.tree.map(jnp.asarray, random_params(cfg)), cfg, adapter, jax.random.key(0))
    ours, before = model["layers"][0][0], fresh["layers"][0][0]
    assert losses[1] < losses[0]
    assert np.array_equal(ours["ffn"]["gate"].base.codes, before["ffn"]["gate"].base.codes)
    assert np.array_equal(ours["attn"]["k"].codes, before["attn"]["k"].codes)
    assert np.abs(ours["ffn"]["gate"].b).max() > 0
    assert (
        relative_error(forward(merge(fresh), cfg, np.arange(8)[None]), forward(fresh, cfg, np.arange(8)[None])) < 1e-5
    )


def test_experts_are_not_dropped_out_of():
    with pytest.raises(ValueError, match="dropout is not for experts, such as model"):
        plan_adapter(read_config(MIXTRAL), Wish(targets=("w1",), dropout=0.1))
