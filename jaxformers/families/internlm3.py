"""InternLM3: Llama with one switch for all biases of attention and one for those of the feed-forward network."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_internlm3(c: Keys) -> ModelConfig:
    bias = c.flag("attention_bias", c.flag("qkv_bias", False))
    mlp_bias = c.flag("mlp_bias", c.flag("bias", False))
    if bias != mlp_bias:
        raise c.error("attention_bias (qkv_bias)", bias, f"the same as mlp_bias (bias), {mlp_bias}")
    return fam.llama_config(
        c,
        num_kv_heads=c.integer("num_key_value_heads", 2, null=c.integer("num_attention_heads")),
        head_dim=fam.head_dim(c, 128),
        norm_eps=c.number("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=mlp_bias,
    )


FAMILIES = {"internlm3": fam.Family(read_internlm3, fam.llama_names)}
