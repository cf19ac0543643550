"""Granite: multipliers on embeddings, residuals, attention and logits; experts fused in one tensor each."""

from typing import Any

from jaxformers.families.common import (
    LAYER,
    LLAMA,
    Family,
    Names,
    experts,
    head_dim,
    llama_config,
    llama_names,
    rope,
    slices,
    uniform_layers,
)
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig, MoE


def _granite(c: Keys, ffn: str, **values: Any) -> ModelConfig:
    bias, kv_heads = c.flag("attention_bias", False), c.integer("num_key_value_heads", c.integer("num_attention_heads"))
    return llama_config(
        c,
        layers=uniform_layers(c, ffn=ffn, rope=rope(c, head_dim(c))),
        num_kv_heads=kv_heads,
        embed_scale=c.number("embedding_multiplier", 1.0),
        residual_scale=c.number("residual_multiplier", 1.0),
        attn_scale=c.number("attention_multiplier", 1.0),
        logit_scale=1 / c.number("logits_scaling", 1.0),
        qkv_bias=bias,
        o_bias=bias,
        **values,
    )


def read_granite(c: Keys) -> ModelConfig:
    return _granite(c, "dense", mlp_bias=c.flag("mlp_bias", False))


def read_granitemoe(c: Keys) -> ModelConfig:
    moe = MoE(**experts(c, "num_local_experts"), d_ff=c.integer("intermediate_size"), score="softmax_topk")
    return _granite(c, "moe", moe=moe)


def granitemoe_names(cfg: ModelConfig) -> Names:
    assert cfg.moe is not None
    prefix, view = f"{LAYER}block_sparse_moe.", (cfg.moe.num_experts, cfg.d_model, 2, cfg.moe.d_ff)
    fused = slices(f"{prefix}input_linear.weight", view, 2, {"ffn.gate": 1, "ffn.up": 1})
    others = {"ffn.router": f"{prefix}router.layer.weight", "ffn.down": f"{prefix}output_linear.weight"}
    return Names(LLAMA, moe=fused | others)


FAMILIES = {
    "granite": Family(read_granite, llama_names),
    "granitemoe": Family(read_granitemoe, granitemoe_names),
}
