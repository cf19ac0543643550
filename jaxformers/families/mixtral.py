"""Mixtral: Mistral with a mixture of experts in every layer."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig, MoE


def read_mixtral(c: Keys) -> ModelConfig:
    window = c.integer("sliding_window", None)
    layers = fam.uniform_layers(c, ffn="moe", window=window, rope=fam.rope(c, fam.head_dim(c), theta=1e6))
    moe = MoE(**fam.experts(c, "num_local_experts"), d_ff=c.integer("intermediate_size"))
    return fam.llama_config(c, layers=layers, moe=moe, norm_eps=c.number("rms_norm_eps", 1e-5))


def mixtral_names(_cfg: ModelConfig) -> fam.Names:
    return fam.Names(fam.LLAMA, moe=fam.MIXTRAL_EXPERTS)


FAMILIES = {"mixtral": fam.Family(read_mixtral, mixtral_names)}
