"""Seed-OSS: Llama with heads wider than the hidden size gives, and biases on q, k and v."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_seed_oss(c: Keys) -> ModelConfig:
    return fam.llama_config(
        c,
        head_dim=fam.head_dim(c, 128),
        num_kv_heads=c.integer("num_key_value_heads", 8, null=c.integer("num_attention_heads")),
        qkv_bias=c.flag("attention_bias", True),
        o_bias=c.flag("attention_out_bias", False),
        mlp_bias=c.flag("mlp_bias", False),
    )


FAMILIES = {"seed_oss": fam.Family(read_seed_oss, fam.llama_names)}
