"""Nemotron 3 and 4: layer norms that store w - 1, half of each head rotated, squared ReLU without a gate."""

from jaxformers.families.common import ACTIVATIONS, Family, head_dim, llama_config, llama_names, rope, uniform_layers
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_nemotron(c: Keys) -> ModelConfig:
    bias, kv_heads = c.flag("attention_bias", False), c.integer("num_key_value_heads", c.integer("num_attention_heads"))
    return llama_config(
        c,
        layers=uniform_layers(c, rope=rope(c, head_dim(c), fraction=0.5)),
        num_kv_heads=kv_heads,
        norm="layer",
        norm_bias=True,
        norm_offset=1.0,
        norm_eps=c.number("norm_eps", 1e-5),
        gated=False,
        activation=c.choice("hidden_act", ACTIVATIONS, "relu2"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=c.flag("mlp_bias", False),
    )


FAMILIES = {"nemotron": Family(read_nemotron, llama_names)}
