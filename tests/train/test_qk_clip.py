"""QK-clip against its formula: a head's logits, computed from the scaled weights, are those before times
min(1, threshold / largest), and no other head's change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LLAMA, assert_bit_equal, packed_batch, random_params, relative_error

from jaxformers.data.pipeline import to_global
from jaxformers.families import read_config
from jaxformers.models.layout import stack, unstack
from jaxformers.models.params import model_spec
from jaxformers.parallel.mesh import MeshConfig, batch_sharding, make_mesh, param_shardings
from jaxformers.train.build import Trainer
from jaxformers.train.config import MonitorConfig, TrainConfig
from jaxformers.train.optimizer_config import OptimizerConfig, ScheduleConfig
from jaxformers.train.qk_clip import qk_clip

THRESHOLD = 30.0
HEADS = {"hidden_size": 16, "head_dim": 4, "intermediate_size": 8, "vocab_size": 16, "num_hidden_layers": 3}
MODELS = {
    "gqa": LLAMA | HEADS,
    "mha, biases": LLAMA | HEADS | {"model_type": "qwen2", "num_key_value_heads": 4},
    "mla": LLAMA
    | HEADS
    | {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "q_lora_rank": 6,
        "kv_lora_rank": 5,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 4,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 4,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
}
MODELS["mla, whole queries"] = MODELS["mla"] | {"q_lora_rank": None}


def logits(p, x, cfg):
    """Unrotated products of queries and keys of every head, [H, T, T]; p: one layer's attention in float64."""
    if cfg.mla is not None:
        asking = x[:, : cfg.mla.q_rank] if cfg.mla.q_rank else x
        q = np.einsum("td,dhn->htn", asking, p["q_b"] if cfg.mla.q_rank else p["q"])
        nope = np.einsum("td,dhn->htn", x[:, : cfg.mla.kv_rank], p["k_b"])
        rope = np.broadcast_to(x @ p["k_rope"], (*nope.shape[:2], cfg.mla.rope_dim))
        return np.einsum("htn,hsn->hts", q, np.concatenate([nope, rope], -1))
    groups = cfg.num_heads // cfg.num_kv_heads
    q, k = (np.einsum("td,dhn->htn", x, p[n]) + p.get(f"{n}_b", np.zeros((1, 1)))[:, None] for n in "qk")
    return np.einsum("htn,hsn->hts", q, np.repeat(k, groups, axis=0))


def attention_of(params, cfg):
    blocks = unstack(params, cfg)["blocks"] if "layers" in params else params["blocks"]
    return [jax.tree.map(lambda a: np.asarray(a, np.float64), p["attn"]) for p in blocks]


@pytest.mark.parametrize("name", MODELS)
def test_each_heads_logits_are_scaled_to_the_threshold_and_others_are_not_touched(name):
    cfg = read_config(MODELS[name])
    params = jax.tree.map(jnp.asarray, random_params(cfg))
    draw = np.random.default_rng(1)
    largest = draw.uniform(10, 90, (3, 4)).astype(np.float32)
    largest[2] = 5.0  # a layer that needs nothing
    clipped = qk_clip(params, jnp.asarray(largest), THRESHOLD, cfg)
    x = draw.standard_normal((5, 16))
    before, after = attention_of(params, cfg), attention_of(clipped, cfg)
    for layer in range(3):
        factors = np.minimum(1, THRESHOLD / largest[layer].astype(np.float64))
        assert (factors < 1).any() == (layer != 2)
        truth = factors[:, None, None] * logits(before[layer], x, cfg)
        assert relative_error(logits(after[layer], x, cfg), truth) < 1e-6
    assert_bit_equal(jax.device_get(attention_of(clipped, cfg)[2]), before[2])


def test_weights_of_a_heads_own_share_the_factor_as_roots_and_shared_keys_stay():
    largest = jnp.full((3, 4), 4 * THRESHOLD)
    for name, queries, keys in (("gqa", 0.25, 1.0), ("mha, biases", 0.5, 0.5)):
        cfg = read_config(MODELS[name])
        params = random_params(cfg)
        before, after = params["layers"][0][0]["attn"], qk_clip(params, largest, THRESHOLD, cfg)["layers"][0][0]["attn"]
        np.testing.assert_allclose(after["q"], queries * before["q"], rtol=1e-6)
        np.testing.assert_allclose(after["k"], keys * before["k"], rtol=1e-6)
        assert {n for n in before if not np.array_equal(before[n], after[n])} <= {"q", "k", "q_b", "k_b"}
    cfg = read_config(MODELS["mla"])
    params = random_params(cfg)
    before, after = params["layers"][0][0]["attn"], qk_clip(params, largest, THRESHOLD, cfg)["layers"][0][0]["attn"]
    np.testing.assert_allclose(after["q_b"][..., :4], 0.5 * before["q_b"][..., :4], rtol=1e-6)
    np.testing.assert_allclose(after["q_b"][..., 4:], 0.25 * before["q_b"][..., 4:], rtol=1e-6)
    np.testing.assert_allclose(after["k_b"], 0.5 * before["k_b"], rtol=1e-6)
    assert after["k_rope"] is before["k_rope"]


def test_unrolled_and_arranged_trees_give_what_the_plain_one_gives():
    cfg = read_config(MODELS["gqa"])
    params = jax.tree.map(jnp.asarray, random_params(cfg))
    largest = jnp.asarray(np.random.default_rng(2).uniform(10, 90, (3, 4)), jnp.float32)
    plain = qk_clip(params, largest, THRESHOLD, cfg)
    assert_bit_equal(jax.device_get(stack(qk_clip(unstack(params, cfg), largest, THRESHOLD, cfg), cfg)), plain)
    slots = np.array([2, 0, 1, 1])
    arranged = params | {"layers": jax.tree.map(lambda a: a[slots], params["layers"])}
    found = qk_clip(arranged, largest, THRESHOLD, cfg, slots=slots)["layers"]
    assert_bit_equal(jax.device_get(found), jax.tree.map(lambda a: a[slots], plain["layers"]))


def test_a_model_that_normalises_its_queries_is_refused():
    cfg = read_config(LLAMA | HEADS | {"model_type": "qwen3"})
    with pytest.raises(ValueError, match=r"do not bound the logits of qwen3, as it normalises both \(qk_norm=head\)"):
        qk_clip(random_params(cfg), jnp.ones((3, 4)), THRESHOLD, cfg)


# -- in a step

CFG = read_config(LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8})
LIMIT, ROWS, LENGTH = 3.0, 8, 16


def stepped(axes=None, *, qk_clip=None, accumulation=1, **settings):
    """The plain parameters after an update, and its metrics."""
    axes = {"fsdp": 1} | (axes or {})
    trainer = Trainer(
        CFG,
        make_mesh(MeshConfig(**axes), devices=jax.devices()[: int(np.prod(list(axes.values())))]),
        LENGTH,
        train=TrainConfig(steps=10, batch_size=ROWS, accumulation=accumulation),
        optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-2, qk_clip=qk_clip),
        schedule=ScheduleConfig(warmup_steps=0),
        **settings,
    )
    trainer.check()
    with jax.set_mesh(trainer.mesh), jax.default_matmul_precision("highest"):
        params = jax.device_put(random_params(CFG), param_shardings(model_spec(CFG), trainer.mesh))
        state = trainer.from_params(params, 0)
        batch = to_global(packed_batch(ROWS, LENGTH), trainer.mesh, batch_sharding((ROWS, LENGTH), trainer.mesh).spec)
        program = trainer.program
        state, metrics = (program.measured_step or program.step)(state, batch)
        return jax.device_get(trainer.to_plain(state).params), program.name(jax.device_get(metrics))


@pytest.fixture(scope="module")
def clipped():
    """What an update without a limit gives, scaled by the logits that it saw; and the largest of those."""
    free, metrics = stepped(monitor=MonitorConfig(values=("attention_logits",), every=1))
    logits = np.array([metrics[f"max_attention_logit/layers.{i}"] for i in range(CFG.num_layers)], np.float32)
    assert 0 < (logits > LIMIT).sum() < logits.size
    return qk_clip(free, jnp.asarray(logits), LIMIT, CFG), logits.max()


@pytest.mark.parametrize(
    "axes, settings", [({}, {}), ({"fsdp": 2, "tp": 2}, {"accumulation": 2})], ids=["one device", "fsdp2 tp2"]
)
def test_an_update_ends_with_the_clip_of_what_its_forward_pass_saw(axes, settings, clipped):
    params, metrics = stepped(axes, qk_clip=LIMIT, **settings)
    expected, largest = clipped
    assert metrics["max_attention_logit"] == pytest.approx(largest, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, expected)


@pytest.mark.parametrize(
    "axes, settings, said",
    [
        ({"pp": 2}, {}, "optimizer.qk_clip=3.0 needs attention logits, which layers in a pipeline do not show (mesh."),
        ({}, {"frozen": {"embed": np.ones((), bool)}}, "optimizer.qk_clip=3.0 scales weights of attention, which lora"),
    ],
)
def test_a_limit_on_logits_that_are_not_seen_or_not_trained_is_refused(axes, settings, said):
    with pytest.raises(ValueError) as caught:
        stepped(axes, qk_clip=LIMIT, **settings)
    assert str(caught.value).startswith(said)
