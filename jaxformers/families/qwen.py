"""Qwen2 (biases on q, k, v), Qwen3 (normalised q and k) and its mixture of experts."""

from jaxformers.families.common import (
    EXPERTS,
    LLAMA,
    Family,
    Names,
    head_dim,
    layer_types,
    llama_config,
    llama_names,
    rope,
)
from jaxformers.families.keys import Keys
from jaxformers.models.config import LayerKind, ModelConfig, MoE


def _layers(c: Keys) -> tuple[LayerKind, ...]:
    """Windows on the layers from `max_window_layers` on, and only where `use_sliding_window` says so."""
    size = c.integer("sliding_window", None)
    window = size if c.flag("use_sliding_window", False) else None
    first = c.integer("max_window_layers", 28)
    types = layer_types(c, lambda i: "sliding_attention" if window and i >= first else "full_attention")
    turn = rope(c, head_dim(c))
    return tuple(LayerKind(window=window if t == "sliding_attention" else None, rope=turn) for t in types)


def read_qwen2(c: Keys) -> ModelConfig:
    return llama_config(c, layers=_layers(c), qkv_bias=True)


def read_qwen3(c: Keys) -> ModelConfig:
    bias = c.flag("attention_bias", False)
    return llama_config(c, layers=_layers(c), qk_norm="head", qkv_bias=bias, o_bias=bias)


def read_qwen3_moe(c: Keys) -> ModelConfig:
    experts = c.integer("num_experts", None) or c.integer("num_local_experts")
    moe = MoE(
        num_experts=experts,
        top_k=c.integer("num_experts_per_tok"),
        d_ff=c.integer("moe_intermediate_size"),
        normalize=c.flag("norm_topk_prob", False),
    )
    dense, step = set(c.sequence("mlp_only_layers", [])), c.integer("decoder_sparse_step", 1)
    window = c.integer("sliding_window", None) if c.flag("use_sliding_window", False) else None
    c.integer("sliding_window", None), c.integer("max_window_layers", None)
    turn, bias = rope(c, head_dim(c)), c.flag("attention_bias", False)
    layers = tuple(
        LayerKind(ffn="moe" if i not in dense and (i + 1) % step == 0 else "dense", window=window, rope=turn)
        for i in range(c.integer("num_hidden_layers"))
    )
    return llama_config(c, layers=layers, moe=moe, qk_norm="head", qkv_bias=bias, o_bias=bias)


FAMILIES = {
    "qwen2": Family(read_qwen2, llama_names),
    "qwen3": Family(read_qwen3, llama_names),
    "qwen3_moe": Family(read_qwen3_moe, lambda _cfg: Names(LLAMA, moe=EXPERTS)),
}
