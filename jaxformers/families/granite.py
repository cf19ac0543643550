"""Granite: multipliers on embeddings, residuals, attention and logits; experts fused in one tensor each."""

from typing import Any

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig, MoE


def _granite(c: Keys, ffn: str, **values: Any) -> ModelConfig:
    return fam.llama_config(
        c,
        layers=fam.uniform_layers(c, ffn=ffn, rope=fam.rope(c, fam.head_dim(c))),
        **fam.llama_attention(c),
        embed_scale=c.number("embedding_multiplier", 1.0),
        residual_scale=c.number("residual_multiplier", 1.0),
        attn_scale=c.number("attention_multiplier", 1.0),
        logit_scale=1 / c.number("logits_scaling", 1.0),
        **values,
    )


def read_granite(c: Keys) -> ModelConfig:
    return _granite(c, "dense", mlp_bias=c.flag("mlp_bias", False))


def read_granitemoe(c: Keys) -> ModelConfig:
    moe = MoE(**fam.experts(c, "num_local_experts"), d_ff=c.integer("intermediate_size"), score="softmax_topk")
    return _granite(c, "moe", moe=moe)


def granitemoe_names(cfg: ModelConfig) -> fam.Names:
    assert cfg.moe is not None
    prefix, view = f"{fam.LAYER}block_sparse_moe.", (cfg.moe.num_experts, cfg.d_model, 2, cfg.moe.d_ff)
    fused = fam.slices(f"{prefix}input_linear.weight", view, 2, {"ffn.gate": 1, "ffn.up": 1})
    others = {"ffn.router": f"{prefix}router.layer.weight", "ffn.down": f"{prefix}output_linear.weight"}
    return fam.Names(fam.LLAMA, moe=fused | others)


FAMILIES = {
    "granite": fam.Family(read_granite, fam.llama_names),
    "granitemoe": fam.Family(read_granitemoe, granitemoe_names),
}
