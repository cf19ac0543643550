"""Llama, and types that are Llama under another name or with other biases."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_llama(c: Keys) -> ModelConfig:
    layers, mlp_bias = fam.uniform_layers(c, rope=fam.rope(c, fam.head_dim(c))), c.flag("mlp_bias", False)
    return fam.llama_config(c, layers=layers, mlp_bias=mlp_bias, **fam.llama_attention(c))


def read_arcee(c: Keys) -> ModelConfig:
    return fam.llama_config(
        c,
        layers=fam.uniform_layers(c, rope=fam.rope(c, fam.head_dim(c))),
        **fam.llama_attention(c),
        gated=False,
        activation=c.choice("hidden_act", {"relu2": "relu2"}, "relu2"),
        norm_eps=c.number("rms_norm_eps", 1e-5),
        mlp_bias=c.flag("mlp_bias", False),
    )


def read_seed_oss(c: Keys) -> ModelConfig:
    size, bias = fam.head_dim(c, 128), c.flag("attention_bias", True)
    return fam.llama_config(
        c,
        layers=fam.uniform_layers(c, rope=fam.rope(c, size)),
        head_dim=size,
        num_kv_heads=c.integer("num_key_value_heads", 8, null=c.integer("num_attention_heads")),
        qkv_bias=bias,
        o_bias=c.flag("attention_out_bias", False),
        mlp_bias=c.flag("mlp_bias", False),
    )


FAMILIES = {
    "llama": fam.Family(read_llama, fam.llama_names),
    "arcee": fam.Family(read_arcee, fam.llama_names),
    "seed_oss": fam.Family(read_seed_oss, fam.llama_names),
}
