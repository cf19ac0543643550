"""Hunyuan V1: queries and keys normalised after the rotation; a mixture with one shared expert."""

from typing import Any

from jaxformers.families.common import (
    ATTN,
    EXPERTS,
    LLAMA,
    MLP,
    Family,
    Names,
    head_dim,
    llama_config,
    norms,
    rope,
    uniform_layers,
)
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig, MoE


def _hunyuan(c: Keys, ffn: str, **values: Any) -> ModelConfig:
    bias, kv_heads = c.flag("attention_bias", False), c.integer("num_key_value_heads", c.integer("num_attention_heads"))
    return llama_config(
        c,
        layers=uniform_layers(c, ffn=ffn, rope=rope(c, head_dim(c))),
        num_kv_heads=kv_heads,
        norm_eps=c.number("rms_norm_eps", 1e-5),
        qk_norm="head",
        qk_norm_after_rope=True,
        qkv_bias=bias,
        o_bias=bias,
        **values,
    )


def read_hunyuan_moe(c: Keys) -> ModelConfig:
    count, top_k, width = c.integer("num_experts"), c.integer("moe_topk"), c.integer("intermediate_size")
    if top_k > count:
        raise c.error("moe_topk", top_k, f"at most num_experts ({count})")
    return _hunyuan(c, "moe", moe=MoE(num_experts=count, top_k=top_k, d_ff=width, shared_d_ff=width))


def hunyuan_names(_cfg: ModelConfig) -> Names:
    shared = {f"ffn.shared.{x}": f"{MLP}shared_mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
    table = LLAMA | norms(**{"attn.q_norm": f"{ATTN}query_layernorm", "attn.k_norm": f"{ATTN}key_layernorm"})
    return Names(table, moe=EXPERTS | shared | {"ffn.router": f"{MLP}gate.wg.weight"})


FAMILIES = {
    "hunyuan_v1_dense": Family(lambda c: _hunyuan(c, "dense"), hunyuan_names),
    "hunyuan_v1_moe": Family(read_hunyuan_moe, hunyuan_names),
}
