"""Apertus: an activation with two learned curvatures a layer, normalised queries and keys."""

from jaxformers.families.common import (
    LAYER,
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
from jaxformers.models.config import ModelConfig


def read_apertus(c: Keys) -> ModelConfig:
    bias, kv_heads = c.flag("attention_bias", False), c.integer("num_key_value_heads", c.integer("num_attention_heads"))
    if not (c.table("rope_parameters", None) or c.table("rope_scaling", None)):
        raise ValueError("apertus config: the required key 'rope_parameters' (or 'rope_scaling') is missing")
    c.expect("mlp_bias", False)
    c.expect("qk_norm", True)
    c.expect("post_norm", False)
    return llama_config(
        c,
        layers=uniform_layers(c, rope=rope(c, head_dim(c), theta=12e6)),
        num_kv_heads=kv_heads,
        norm_eps=c.number("rms_norm_eps", 1e-5),
        gated=False,
        activation=c.choice("hidden_act", {"xielu": "xielu"}, "xielu"),
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
    )


def apertus_names(_cfg: ModelConfig) -> Names:
    before = norms(attn_norm=f"{LAYER}attention_layernorm", ffn_norm=f"{LAYER}feedforward_layernorm")
    curve = {f"ffn.xielu.{x}": f"{MLP}act_fn.{x}" for x in ("alpha_p", "alpha_n", "beta", "eps")}
    return Names(LLAMA | before | curve)


FAMILIES = {"apertus": Family(read_apertus, apertus_names)}
