"""Gemma 1 to 3: norms that store w - 1; from 2 on, norms around each branch and local layers between global ones."""

from typing import Any

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import LayerKind, ModelConfig, Rope


def _gemma1(c: Keys, **values: Any) -> ModelConfig:
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
    c.expect("hidden_activation", "gelu_pytorch_tanh")
    # The first files say gelu and were trained with its approximation.
    kinds = {"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
    activation, size = c.choice("hidden_act", kinds, "gelu_pytorch_tanh"), fam.head_dim(c, 256)
    layers, kv_heads = fam.uniform_layers(c, rope=fam.rope(c, size)), c.integer("num_key_value_heads", 16)
    return _gemma1(c, layers=layers, activation=activation, head_dim=size, num_kv_heads=kv_heads)


def _gemma(c: Keys, **values: Any) -> ModelConfig:
    # Older files name the activation under `hidden_act` too, and `hidden_activation` wins.
    c.expect("hidden_act", "gelu", "gelu_pytorch_tanh")
    return _gemma1(
        c,
        post_norm=True,
        activation=c.choice("hidden_activation", fam.ACTIVATIONS, "gelu_pytorch_tanh"),
        attn_scale=c.number("query_pre_attn_scalar", 256) ** -0.5,
        **values,
    )


def read_gemma2(c: Keys) -> ModelConfig:
    types = fam.layer_types(c, lambda i: "full_attention" if i % 2 else "sliding_attention")
    window, turn = c.integer("sliding_window", 4096, null=None), fam.rope(c, c.integer("head_dim", 256))
    layers = tuple(LayerKind(window=window if t == "sliding_attention" else None, rope=turn) for t in types)
    return _gemma(
        c,
        layers=layers,
        head_dim=c.integer("head_dim", 256),
        attn_softcap=c.number("attn_logit_softcapping", 50.0, null=None),
        logit_softcap=c.number("final_logit_softcapping", 30.0, null=None),
    )


def read_gemma3(c: Keys) -> ModelConfig:
    pattern = c.integer("sliding_window_pattern", c.integer("_sliding_window_pattern", 6))
    types = fam.layer_types(c, lambda i: "sliding_attention" if (i + 1) % pattern else "full_attention")
    dim, window = c.integer("head_dim", 256), c.integer("sliding_window", 4096, null=None)
    kinds = {
        "sliding_attention": LayerKind(window=window, rope=_local_rope(c, dim)),
        "full_attention": LayerKind(rope=fam.rope(c, dim, layer_type="full_attention", theta=1e6)),
    }
    softcaps = c.number("attn_logit_softcapping", None), c.number("final_logit_softcapping", None)
    layers = tuple(kinds[t] for t in types)
    return _gemma(c, layers=layers, qk_norm="head", attn_softcap=softcaps[0], logit_softcap=softcaps[1], head_dim=dim)


def _local_rope(c: Keys, dim: int) -> Rope:
    """The local layers' rope: unscaled, with a base of its own, under a key of its own in older files."""
    base = c.number("rope_local_base_freq", 10_000.0)
    return fam.rope(c, dim, layer_type="sliding_attention") if c.table("rope_parameters", None) else Rope(dim, base)


def gemma_names(_cfg: ModelConfig) -> fam.Names:
    return fam.Names(fam.LLAMA | fam.SANDWICH_NORMS)


FAMILIES = {
    "gemma": fam.Family(read_gemma, fam.llama_names),
    "gemma2": fam.Family(read_gemma2, gemma_names),
    "gemma3_text": fam.Family(read_gemma3, gemma_names),
}
