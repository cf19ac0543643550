"""Llama, and types that are Llama under another name or with other biases."""

from jaxformers.families.common import Family, head_dim, llama_config, llama_names, rope, uniform_layers
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_llama(c: Keys) -> ModelConfig:
    bias = c.flag("attention_bias", False)
    layers = uniform_layers(c, rope=rope(c, head_dim(c)))
    # The first Llama had no groups, and its files lack the key.
    kv_heads = c.integer("num_key_value_heads", c.integer("num_attention_heads"))
    mlp_bias = c.flag("mlp_bias", False)
    return llama_config(c, layers=layers, num_kv_heads=kv_heads, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


def read_arcee(c: Keys) -> ModelConfig:
    bias, kv_heads = c.flag("attention_bias", False), c.integer("num_key_value_heads", c.integer("num_attention_heads"))
    return llama_config(
        c,
        layers=uniform_layers(c, rope=rope(c, head_dim(c))),
        num_kv_heads=kv_heads,
        gated=False,
        activation=c.choice("hidden_act", {"relu2": "relu2"}, "relu2"),
        norm_eps=c.number("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=c.flag("mlp_bias", False),
    )


def read_seed_oss(c: Keys) -> ModelConfig:
    size, bias = head_dim(c, 128), c.flag("attention_bias", True)
    return llama_config(
        c,
        layers=uniform_layers(c, rope=rope(c, size)),
        head_dim=size,
        num_kv_heads=c.integer("num_key_value_heads", 8, null=c.integer("num_attention_heads")),
        qkv_bias=bias,
        o_bias=c.flag("attention_out_bias", False),
        mlp_bias=c.flag("mlp_bias", False),
    )


FAMILIES = {
    "llama": Family(read_llama, llama_names),
    "arcee": Family(read_arcee, llama_names),
    "seed_oss": Family(read_seed_oss, llama_names),
}
