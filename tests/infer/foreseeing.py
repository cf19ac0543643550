"""A model whose modules for multi-token prediction mostly agree with it, for tests of several modules."""

from __future__ import annotations

import jax
import numpy as np
import tiny

from jaxformers.models.config import ModelConfig
from jaxformers.models.params import Params, path_name

DEEPSEEK = tiny.DEEPSEEK | {
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "max_position_embeddings": 96,
}


def foreseeing_params(cfg: ModelConfig, *, doubt: float, seed: int = 0) -> Params:
    """Parameters of a model that says its tokens in one order, again and again, and of modules that say the same by
    what the decoder made of the token before: less surely the larger `doubt` is, the part of all other weights.

    The head likes the token behind the one whose embedding it is shown, and a module turns the embedding of a token
    into that of the next; with fewer tokens than dims it can do so for all.
    """
    params = tiny.random_params(cfg, seed=seed)
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
