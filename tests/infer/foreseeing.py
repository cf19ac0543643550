"""A model whose modules for multi-token prediction mostly agree with it, for tests of several modules."""

from __future__ import annotations

import jax
import numpy as np
from tiny import random_params

from jaxformers.models.config import ModelConfig
from jaxformers.models.params import Params, path_name

DEEPSEEK = {
    "model_type": "deepseek_v3",
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "head_dim": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
}


def foreseeing_params(cfg: ModelConfig, *, doubt: float, seed: int = 0) -> Params:
    """Parameters of a model that says its tokens in one order, again and again, and of modules that say the same by
    what the decoder made of the token before: less surely the larger `doubt` is, the part of all other weights.

    The head likes the token behind the one whose embedding it is shown, and a module turns the embedding of a token
    into that of the next; with fewer tokens than dims it can do so for all.
    """
    params = random_params(cfg, seed=seed)
    embed = params["embed"]
    assert cfg.vocab_size <= cfg.d_model

    def quieter(path: tuple, leaf: np.ndarray) -> np.ndarray:
        return leaf * np.float32(doubt) if path_name(path).rpartition(".")[2] in ("o", "down") else leaf

    params = jax.tree_util.tree_map_with_path(quieter, params)
    params["lm_head"] = np.roll(embed, 1, axis=0).T.copy()
    onwards = np.linalg.pinv(embed) @ np.roll(embed, -1, axis=0)
    for module in params["mtp"]:
        module["proj"] = np.stack([np.float32(doubt) * module["proj"][0], onwards.astype(np.float32)])
    return params
