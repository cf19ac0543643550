"""Gemma (norms that store w - 1) and Gemma 2 (norms around each branch, windows on every other layer, soft caps)."""

from typing import Any

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def _gemma(c: Keys, **values: Any) -> ModelConfig:
    bias = c.flag("attention_bias", False)
    return fam.llama_config(
        c,
        norm_offset=1.0,
        embed_scale=c.integer("hidden_size") ** 0.5,
        tie_embeddings=c.flag("tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        **values,
    )


def read_gemma(c: Keys) -> ModelConfig:
    c.expect(hidden_activation="gelu_pytorch_tanh")
    # The first files say gelu and were trained with its approximation.
    kinds = {"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
    activation, size = c.choice("hidden_act", kinds, "gelu_pytorch_tanh"), fam.head_dim(c, 256)
    kv_heads = c.integer("num_key_value_heads", 16)
    return _gemma(c, activation=activation, head_dim=size, num_kv_heads=kv_heads)


def gemma2_config(c: Keys, **values: Any) -> ModelConfig:
    # Older files name the activation under `hidden_act` too, and `hidden_activation` wins.
    c.expect(hidden_act=("gelu", "gelu_pytorch_tanh"))
    return _gemma(
        c,
        post_norm=True,
        activation=c.choice("hidden_activation", fam.ACTIVATIONS, "gelu_pytorch_tanh"),
        attn_scale=c.number("query_pre_attn_scalar", 256) ** -0.5,
        **values,
    )


def read_gemma2(c: Keys) -> ModelConfig:
    size, window = c.integer("head_dim", 256), c.integer("sliding_window", 4096, null=None)
    return gemma2_config(
        c,
        layers=fam.typed_layers(c, fam.full_every(2), window, fam.rope(c, size)),
        head_dim=size,
        attn_softcap=c.number("attn_logit_softcapping", 50.0, null=None),
        logit_softcap=c.number("final_logit_softcapping", 30.0, null=None),
    )


def gemma2_names(_cfg: ModelConfig) -> fam.Names:
    return fam.Names(fam.LLAMA | fam.SANDWICH_NORMS)


FAMILIES = {"gemma": fam.Family(read_gemma, fam.llama_names), "gemma2": fam.Family(read_gemma2, gemma2_names)}
