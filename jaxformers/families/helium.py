"""Helium: Llama with interleaved rope."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_helium(c: Keys) -> ModelConfig:
    size, bias = fam.head_dim(c, 128), c.flag("attention_bias", False)
    if size * c.integer("num_attention_heads") != c.integer("hidden_size"):
        raise c.error("head_dim", size, "hidden_size / num_attention_heads")
    return fam.llama_config(
        c,
        layers=fam.uniform_layers(c, rope=fam.rope(c, size, interleaved=True, theta=1e5)),
        num_kv_heads=c.integer("num_key_value_heads", 20),
        head_dim=size,
        norm_eps=c.number("rms_norm_eps", 1e-8),
        qkv_bias=bias,
        mlp_bias=c.flag("mlp_bias", False),
    )


FAMILIES = {"helium": fam.Family(read_helium, fam.llama_names)}
