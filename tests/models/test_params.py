"""One declaration per weight: initial values, counts and FLOPs all follow from it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.families import read_config
from jaxformers.models.config import LayerKind, ModelConfig
from jaxformers.models.decoder import forward
from jaxformers.models.params import (
    abstract_params,
    count_params,
    flops_per_token,
    init_params,
    model_spec,
    path_name,
)

DENSE = {
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MOE = DENSE | {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
MLA = DENSE | {
    "model_type": "deepseek_v3",
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 1.0,
}


def named_leaves(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def random_params(values, seed=0):
    return jax.jit(lambda key: init_params(read_config(values), key))(jax.random.key(seed))


# -- initial values


def test_linear_layers_start_normal_with_variance_one_over_inputs_and_projections_back_smaller():
    cfg = read_config(DENSE)
    leaves = named_leaves(random_params(DENSE))
    inputs = {"attn.q": 256, "attn.k": 256, "attn.o": 256, "ffn.up": 256, "ffn.gate": 256, "ffn.down": 384}
    for name, fan_in in inputs.items():
        values = np.asarray(leaves[f"layers.0.0.{name}"], np.float64)
        depth = 2 * cfg.num_layers if name in ("attn.o", "ffn.down") else 1
        assert values.std() * math.sqrt(fan_in * depth) == pytest.approx(1, abs=0.02), name
        assert abs(values.mean()) < 4 * values.std() / math.sqrt(values.size), name
    for name in ("embed", "lm_head"):
        assert np.asarray(leaves[name]).std() * 16 == pytest.approx(1, abs=0.02)


def test_experts_start_by_their_own_width():
    leaves = named_leaves(random_params(MOE))
    assert np.asarray(leaves["layers.0.0.ffn.up"]).std() * math.sqrt(256) == pytest.approx(1, abs=0.02)
    assert np.asarray(leaves["layers.0.0.ffn.down"]).std() * math.sqrt(384 * 6) == pytest.approx(1, abs=0.02)


def test_norms_start_as_the_identity_and_biases_at_zero():
    leaves = named_leaves(random_params(DENSE))
    assert (leaves["final_norm.w"] == 1).all()
    assert (leaves["layers.0.0.attn.q_b"] == 0).all()
    offset = ModelConfig(
        family="none",
        vocab_size=8,
        d_model=4,
        d_ff=4,
        num_heads=1,
        num_kv_heads=1,
        head_dim=4,
        layers=(LayerKind(),),
        context_length=8,
        norm_offset=1.0,
    )
    assert (init_params(offset, jax.random.key(0))["final_norm"]["w"] == 0).all()


def test_the_same_key_gives_the_same_parameters_and_another_key_others():
    first, again, other = (random_params(DENSE, seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["embed"], other["embed"])


def test_every_leaf_and_layer_has_values_of_its_own():
    leaves = named_leaves(random_params(DENSE))
    drawn = [np.asarray(v).reshape(-1)[:100] for n, v in leaves.items() if model_leaf(n).init in ("normal", "residual")]
    layers = np.asarray(leaves["layers.0.0.attn.q"]).reshape(3, -1)[:, :100]
    for values in (drawn, layers):
        correlations = np.corrcoef(np.stack(values)) - np.eye(len(values))
        assert np.abs(correlations).max() < 0.5


def model_leaf(name):
    return named_leaves(model_spec(read_config(DENSE)))[name]


def test_a_further_weight_changes_no_other():
    plain = named_leaves(random_params(DENSE | {"tie_word_embeddings": True}))
    untied = named_leaves(random_params(DENSE))
    assert untied.keys() - plain.keys() == {"lm_head"}
    for name, leaf in plain.items():
        np.testing.assert_array_equal(leaf, untied[name])


@pytest.mark.parametrize("values", [DENSE, MOE, MLA], ids=lambda v: v["model_type"])
def test_abstract_parameters_are_the_shapes_of_real_ones(values):
    cfg = read_config(values)
    real = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0), dtype=jnp.bfloat16))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract_params(cfg, dtype=jnp.bfloat16)) == jax.tree.map(
        lambda a: (a.shape, a.dtype), real
    )
    assert count_params(cfg) == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(real))


# -- counts


def test_active_parameters_leave_out_the_experts_a_token_does_not_visit():
    cfg = read_config(MOE)
    idle = 3 * 2 * 3 * 256 * 384  # layers, idle experts, matrices
    assert count_params(cfg) - count_params(cfg, active=True) == idle
    dense = read_config(DENSE)
    assert count_params(dense, active=True) == count_params(dense)


# -- floating-point operations


def compiled_flops(cfg, length):
    """What XLA counts of one forward pass, a token."""
    run = jax.jit(lambda params, tokens: forward(params, cfg, tokens))
    cost = run.lower(abstract_params(cfg), jax.ShapeDtypeStruct((2, length), jnp.int32)).cost_analysis()
    return cost["flops"] / (2 * length)


def with_every_key(cfg, length):
    """Our count, but of the whole square of queries and keys, which is what a plain matmul computes."""
    attention = flops_per_token(cfg, length, backward=False) - flops_per_token(cfg, 1, backward=False)
    one_key = attention / ((length + 1) / 2 - 1)
    return flops_per_token(cfg, 1, backward=False) + one_key * (length - 1)


@pytest.mark.parametrize("values", [DENSE, DENSE | {"tie_word_embeddings": True}, MLA], ids=["dense", "tied", "mla"])
def test_flops_are_those_of_the_compiled_forward_pass(values):
    # XLA counts a scanned body once, so that one layer is all it sees.
    cfg = read_config(values | {"num_hidden_layers": 1})
    assert with_every_key(cfg, 256) == pytest.approx(compiled_flops(cfg, 256), rel=0.03)


def test_causal_attention_counts_the_keys_a_query_sees():
    cfg = read_config(DENSE)
    length, width = 100, 3 * 2 * 2 * 4 * 64  # layers, matmuls, multiply and add, heads, head dim
    keys = sum(t + 1 for t in range(length)) / length
    matmuls = flops_per_token(cfg, 1, backward=False) - width
    assert flops_per_token(cfg, length, backward=False) == pytest.approx(matmuls + width * keys)


def test_a_window_counts_only_the_keys_inside_it():
    windowed = read_config(DENSE | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0})
    length, width = 100, 3 * 2 * 2 * 4 * 64
    keys = sum(min(t + 1, 16) for t in range(length)) / length
    matmuls = flops_per_token(windowed, 1, backward=False) - width
    assert flops_per_token(windowed, length, backward=False) == pytest.approx(matmuls + width * keys)


def test_experts_count_as_often_as_they_are_visited():
    cfg = read_config(MOE)
    matmuls = 3 * (256 * (256 + 128 + 128) + 256 * 256 + 256 * 4 + 2 * 3 * 256 * 384) + 256 * 512
    attention = 3 * 2 * 2 * 4 * 64
    assert flops_per_token(cfg, 1, backward=False) == 2 * matmuls + attention


def test_the_gradient_counts_twice_the_forward_pass():
    cfg = read_config(DENSE)
    assert flops_per_token(cfg, 64) == 3 * flops_per_token(cfg, 64, backward=False)
