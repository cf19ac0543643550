"""Llama and the types that differ from it by windows or experts: mistral, mixtral."""

from jaxformers.families.common import (
    LAYER,
    LLAMA,
    Family,
    Names,
    experts,
    head_dim,
    llama_config,
    llama_names,
    rope,
    uniform_layers,
)
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig, MoE


def read_llama(c: Keys) -> ModelConfig:
    bias = c.flag("attention_bias", False)
    layers = uniform_layers(c, rope=rope(c, head_dim(c)))
    # The first Llama had no groups, and its files lack the key.
    kv_heads = c.integer("num_key_value_heads", c.integer("num_attention_heads"))
    mlp_bias = c.flag("mlp_bias", False)
    return llama_config(c, layers=layers, num_kv_heads=kv_heads, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


def read_mistral(c: Keys) -> ModelConfig:
    window = c.integer("sliding_window", 4096, null=None)
    return llama_config(c, layers=uniform_layers(c, window=window, rope=rope(c, head_dim(c))))


def read_mixtral(c: Keys) -> ModelConfig:
    window = c.integer("sliding_window", None)
    layers = uniform_layers(c, ffn="moe", window=window, rope=rope(c, head_dim(c), theta=1e6))
    moe = MoE(**experts(c, "num_local_experts"), d_ff=c.integer("intermediate_size"))
    return llama_config(c, layers=layers, moe=moe, norm_eps=c.number("rms_norm_eps", 1e-5))


def mixtral_names(_cfg: ModelConfig) -> Names:
    prefix = f"{LAYER}block_sparse_moe."
    experts = {
        f"ffn.{ours}": f"{prefix}experts.{{e}}.{w}.weight" for ours, w in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
    }
    return Names(LLAMA, moe={"ffn.router": f"{prefix}gate.weight", **experts})


FAMILIES = {
    "llama": Family(read_llama, llama_names),
    "mistral": Family(read_mistral, llama_names),
    "mixtral": Family(read_mixtral, mixtral_names),
}
