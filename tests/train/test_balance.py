"""Selection biases move by what the published rule says, in every layout of the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LLAMA, random_params

from jaxformers.families import read_config
from jaxformers.models.layout import stack, unstack
from jaxformers.models.routing import MoEStats
from jaxformers.train.balance import check_expert_bias, shift_expert_biases
from jaxformers.train.config import LossConfig
from jaxformers.train.losses import expert_losses

DEEPSEEK = LLAMA | {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 4,
    "head_dim": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
CFG = read_config(DEEPSEEK)
# Visits of each expert in the three sparse layers; an expert with the mean load stays where it is.
LOAD = np.array([[4, 0, 2, 2], [1, 1, 1, 5], [2, 2, 2, 2]], np.float32)
SIGNS = np.array([[-1, 1, 0, 0], [1, 1, 1, -1], [0, 0, 0, 0]])


def biases(params) -> np.ndarray:
    return np.stack([p["ffn"]["select_b"] for p in unstack(params, CFG)["blocks"][1:]])


@pytest.mark.parametrize("layout", ["stacked", "one buffer a layer"])
def test_a_bias_moves_up_where_an_expert_had_too_few_tokens_and_down_where_it_had_too_many(layout):
    before = random_params(CFG)
    if layout == "stacked":
        after = shift_expert_biases(before, jnp.asarray(LOAD), CFG, rate=0.25)
    else:
        after = stack(shift_expert_biases(unstack(before, CFG), jnp.asarray(LOAD), CFG, rate=0.25), CFG)
    np.testing.assert_allclose(biases(after), biases(before) + 0.25 * SIGNS, rtol=1e-6)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    assert sum(jax.tree.leaves(moved)) == 1, "nothing else moves"


def test_a_rate_for_a_model_without_such_biases_is_refused():
    mixtral = read_config(LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2})
    for cfg in (mixtral, read_config(LLAMA)):
        with pytest.raises(ValueError, match=r"loss: expert_bias_rate=0.1 moves experts' selection biases, which"):
            check_expert_bias(cfg, rate=0.1)
        check_expert_bias(cfg, rate=0.0)
    check_expert_bias(CFG, rate=0.1)


def test_balance_over_the_batch_is_the_product_of_its_mean_visits_and_scores_averaged_over_layers():
    draw = np.random.default_rng(0)
    tokens, experts = 10, 4
    scores = draw.dirichlet(np.ones(experts), (3, tokens)).astype(np.float32)
    visits = draw.integers(0, 2, (3, tokens, experts)).astype(np.float32)
    zeros = np.zeros(3, np.float32)
    stats = MoEStats(zeros, zeros, visits.sum(1), scores.sum(1), zeros)
    balance, _ = expert_losses(stats, np.float32(tokens), LossConfig(balance_over="batch"))
    layers = [experts * (v.mean(0) * s.mean(0)).sum() for v, s in zip(visits, scores, strict=True)]
    np.testing.assert_allclose(balance / tokens, np.mean(layers), rtol=1e-6)
