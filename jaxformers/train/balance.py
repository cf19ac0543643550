"""Balancing experts without a loss: each expert's selection bias drifts towards an even load.

The bias chooses experts and does not weigh them, so no gradient reaches it: after each update it moves by a fixed step,
by which experts had too few tokens and which too many (arXiv:2408.15664).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.models.config import ModelConfig, longest_stack, plan_stacks
from jaxformers.models.params import Params


def check_expert_bias(cfg: ModelConfig, *, rate: float) -> None:
    """ValueError for a rate that the model has no biases for."""
    if rate and (cfg.moe is None or not cfg.moe.select_bias):
        raise ValueError(
            f"loss: expert_bias_rate={rate} moves experts' selection biases, which {cfg.family} has none of; "
            "use loss.balance_loss"
        )


def shift_expert_biases(
    params: Params, load: jax.Array, cfg: ModelConfig, *, rate: float, slots: np.ndarray | None = None
) -> Params:
    """The parameters with every selection bias moved by rate x sign(mean load - load).

    load float32 [sparse layers, E] counts the visits of a whole batch, which float32 does exactly up to 2^24 a layer;
    modules for multi-token prediction come last, if they were run.
    params is the plain tree or `layout.unstack`'s; slots: which repeat each place of the longest stack holds, where
    they are not in the model's order.
    """
    sparse = [i for i, kind in enumerate(cfg.layers) if kind.ffn == "moe"]
    shift = rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)

    def shifted(p: Params, rows: int | np.ndarray) -> Params:
        bias = p["ffn"]["select_b"]
        return p | {"ffn": p["ffn"] | {"select_b": bias + shift[rows].astype(bias.dtype)}}

    if len(load) > len(sparse):
        modules = enumerate(params["mtp"], start=len(sparse))
        params = params | {"mtp": [p | {"layer": shifted(p["layer"], row)} for row, p in modules]}
    if "blocks" in params:
        blocks = list(params["blocks"])
        for row, layer in enumerate(sparse):
            blocks[layer] = shifted(blocks[layer], row)
        return params | {"blocks": blocks}
    layers = [list(patterns) for patterns in params["layers"]]
    stacks = plan_stacks(cfg.layers)
    for k, (patterns, stack) in enumerate(zip(layers, stacks, strict=True)):
        held = range(stack.repeats) if slots is None or k != longest_stack(stacks) else slots
        for j, kind in enumerate(stack.pattern):
            if kind.ffn == "moe":
                rows = np.array([sparse.index(stack.layer(j, repeat)) for repeat in held])
                patterns[j] = shifted(patterns[j], rows)
    return params | {"layers": layers}
