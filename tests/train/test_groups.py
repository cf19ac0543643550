"""Groups of parameters and layer-wise rates: every parameter's own rate and decay against what the settings say of its
name, in every form that a tree may have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LLAMA

from jaxformers.families import read_config
from jaxformers.models.layout import unstack, unstack_spec
from jaxformers.models.params import model_spec
from jaxformers.train.optim import decay_mask, make_optimizer
from jaxformers.train.optimizer_config import GroupConfig, OptimizerConfig, ScheduleConfig

LR, STEPS = 0.5, 10
# A pattern of two kinds of layers, twice, then nothing else: rows of one array are layers 0 and 2, or 1 and 3.
CFG = read_config(
    LLAMA
    | {
        "model_type": "gemma2",
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 12,
        "head_dim": 4,
        "sliding_window": 8,
        "num_hidden_layers": 4,
        "query_pre_attn_scalar": 4,
        "tie_word_embeddings": True,
    }
)
MOE = read_config(
    LLAMA | {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 2}
)


def optimizer(spec, *, cfg=CFG, slots=None, **settings):
    config = OptimizerConfig(name="sgd", momentum=0.0, learning_rate=LR, **settings)
    return make_optimizer(config, lambda step: jnp.float32(LR), spec, cfg=cfg, steps=STEPS, slots=slots)


def moves(spec, updates: int = 1, **settings):
    """What the last of some updates adds to parameters of 1 with gradients of 1: -rate x (1 + decay)."""
    tx = optimizer(spec, **settings)
    ones = jax.tree.map(lambda s: jnp.ones(s.shape), spec)
    state = tx.init(ones)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(updates):
            found, state = jax.jit(tx.update)(ones, state, ones)
    return jax.device_get(found)


def by_layer(tree) -> list:
    """One dict a layer, in the model's order, and last what is outside layers."""
    whole = unstack(tree, CFG) if "layers" in tree else tree
    return [*whole["blocks"], {name: leaf for name, leaf in whole.items() if name != "blocks"}]


def assert_moves(found, rate, decay):
    """rate(layer, name) and decay(layer, name) of every parameter; layer 4 is what is outside layers."""
    mask = by_layer(jax.tree.map(lambda on: np.array([on] * 2), decay_mask(model_spec(CFG))))
    for layer, (leaves, decayed) in enumerate(zip(by_layer(found), mask, strict=True)):
        paths = jax.tree_util.tree_flatten_with_path(leaves)[0]
        for (path, leaf), on in zip(paths, jax.tree.leaves(decayed), strict=True):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            usual = 0.1 * bool(np.all(on))
            truth = -rate(layer, name) * (1 + decay(layer, name, usual))
            np.testing.assert_allclose(leaf, np.full(leaf.shape, truth), rtol=1e-6, err_msg=f"{layer} {name}")


FORMS = {"stacked": model_spec, "unrolled": lambda cfg: unstack_spec(model_spec(cfg), cfg)}


@pytest.mark.parametrize("form", FORMS)
def test_each_group_has_its_own_rate_and_decay_and_the_first_that_matches_counts(form):
    groups = {
        "one": GroupConfig(match="model.layers.1.*", scale=0.25),
        "queries": GroupConfig(match=("*q_proj*", "*.attn.k"), learning_rate=2.0, weight_decay=0.5),
        "norms": GroupConfig(match="*norm*", weight_decay=0.7),
        "table": GroupConfig(match="embed", scale=0.0),
    }
    found = moves(FORMS[form](CFG), groups=groups)

    def rate(layer, name):
        if layer == 1:
            return LR / 4
        return {"attn.q": 2.0, "attn.k": 2.0, "embed": 0.0}.get(name, LR)

    def decay(layer, name, usual):
        if layer == 1 or name == "embed":
            return usual
        return 0.5 if name in ("attn.q", "attn.k") else 0.7 if "norm" in name else usual

    assert_moves(found, rate, decay)


@pytest.mark.parametrize("form", FORMS)
def test_layer_wise_rates_fall_from_the_head_to_the_embedding(form):
    found = moves(FORMS[form](CFG), layer_decay=0.5)

    def rate(layer, name):
        if layer == 4:
            return LR * 0.5**5 if name == "embed" else LR
        return LR * 0.5 ** (4 - layer)

    assert_moves(found, rate, lambda layer, name, usual: usual)


def test_layer_wise_rates_and_groups_multiply():
    found = moves(model_spec(CFG), layer_decay=0.5, groups={"up": GroupConfig(match="*.up_proj.*", scale=3.0)})
    np.testing.assert_allclose(found["layers"][0][1]["ffn"]["up"][1], -LR * 3 * 0.5 * 1.1, rtol=1e-6)
    np.testing.assert_allclose(found["layers"][0][1]["ffn"]["up"][0], -LR * 3 * 0.125 * 1.1, rtol=1e-6)


def test_a_group_may_follow_a_schedule_of_its_own_in_rows_of_one_array():
    own = ScheduleConfig(name="linear", warmup_steps=2, final_fraction=0.0)
    groups = {"late": GroupConfig(match="layers.2.*", schedule=own, scale=2.0)}
    for updates, rate in ((1, LR), (2, 2 * LR), (STEPS, 0.0)):
        found = moves(model_spec(CFG), updates, groups=groups)["layers"][0][0]["ffn"]["up"]
        np.testing.assert_allclose(found[0], -LR * 1.1, rtol=1e-6)
        np.testing.assert_allclose(found[1], -rate * 1.1, rtol=1e-6, atol=1e-7)


def test_rows_that_a_pipeline_arranges_keep_their_layers_rates():
    slots = np.array([1, 0, 1])
    spec = jax.tree.map(lambda s: s, model_spec(CFG))
    arranged = spec | {"layers": jax.tree.map(lambda s: s.drop_leading().stacked(3), spec["layers"])}
    found = moves(arranged, layer_decay=0.5, slots=slots)["layers"][0][0]["ffn"]["up"]
    np.testing.assert_allclose(found[:, 0, 0], -LR * 1.1 * np.array([0.25, 0.0625, 0.25]), rtol=1e-6)


@pytest.mark.parametrize(
    "groups, message",
    [
        (
            {"x": GroupConfig(match="*.query.*")},
            "optimizer.groups.x: '*.query.*' matches no parameter; there are model.embed_tokens.weight, "
            "model.norm.weight, model.layers.0.self_attn.k_proj.weight, ",
        ),
        (
            {"a": GroupConfig(match="*.mlp.*"), "b": GroupConfig(match="*.down_proj.*")},
            "optimizer.groups.b: all that '*.down_proj.*' matches is already in a, and the first group counts",
        ),
    ],
)
def test_a_pattern_for_nothing_is_refused_with_what_there_is(groups, message):
    with pytest.raises(ValueError) as caught:
        optimizer(model_spec(CFG), groups=groups)
    assert str(caught.value).startswith(message)


def test_a_layers_experts_are_one_group():
    spec = model_spec(MOE)
    found = moves(spec, cfg=MOE, groups={"experts": GroupConfig(match="*.1.*experts*", scale=0.0)})["layers"][0][0]
    assert not found["ffn"]["up"][1].any()
    assert found["ffn"]["up"][0].all()
    assert found["ffn"]["router"].all()
    with pytest.raises(ValueError, match=r"'\*experts.1.\*' matches some experts of layers.0.ffn.down; a layer's exp"):
        optimizer(spec, cfg=MOE, groups={"experts": GroupConfig(match="*experts.1.*")})


def test_a_group_with_two_rates_or_none_to_match_is_refused():
    with pytest.raises(ValueError, match=r"learning_rate=0.1 and scale=0.5 exclude each other"):
        GroupConfig(match="*", learning_rate=0.1, scale=0.5)
    with pytest.raises(ValueError, match="match holds no pattern"):
        GroupConfig(match=())
