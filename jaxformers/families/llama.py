"""Llama, and what repeats it under other names: Skywork, and the first release of Yi, whose norms have other names."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig


def read_llama(c: Keys) -> ModelConfig:
    return fam.llama_config(c, mlp_bias=c.flag("mlp_bias", False), **fam.llama_attention(c))


def yi_names(_cfg: ModelConfig) -> fam.Names:
    return fam.Names(fam.LLAMA | fam.norms(attn_norm=f"{fam.LAYER}ln1", ffn_norm=f"{fam.LAYER}ln2"))


FAMILIES = {
    "llama": fam.Family(read_llama, fam.llama_names),
    "skywork": fam.Family(read_llama, fam.llama_names),
    "Yi": fam.Family(read_llama, yi_names),
}
