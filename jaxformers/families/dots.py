"""dots.llm1: DeepSeek-V3's routing over grouped-query attention with normalised queries and keys."""

from dataclasses import replace

from jaxformers.families import common as fam
from jaxformers.families.deepseek import deepseek_moe
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_dots1(c: Keys) -> ModelConfig:
    window, start = c.integer("sliding_window", 4096, null=None), c.integer("max_window_layers", 62, minimum=0)
    kinds = fam.typed_layers(
        c,
        lambda i: "sliding_attention" if window is not None and i >= start else "full_attention",
        window,
        fam.rope(c, fam.head_dim(c)),
    )
    first, bias = c.integer("first_k_dense_replace", 0, minimum=0), c.flag("attention_bias", False)
    return fam.llama_config(
        c,
        layers=tuple(replace(kind, ffn="dense" if i < first else "moe") for i, kind in enumerate(kinds)),
        moe=deepseek_moe(c, normalize=False),
        num_kv_heads=c.integer("num_key_value_heads", 32, null=c.integer("num_attention_heads")),
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
    )


FAMILIES = {"dots1": fam.Family(read_dots1, fam.moe_names)}
