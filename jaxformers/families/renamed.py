"""Llama under other type names: Skywork, and the first release of Yi, whose norms have other names too."""

from jaxformers.families import common as fam
from jaxformers.families.llama import read_llama
from jaxformers.models.config import ModelConfig


def yi_names(_cfg: ModelConfig) -> fam.Names:
    return fam.Names(fam.LLAMA | fam.norms(attn_norm=f"{fam.LAYER}ln1", ffn_norm=f"{fam.LAYER}ln2"))


FAMILIES = {"skywork": fam.Family(read_llama, fam.llama_names), "Yi": fam.Family(read_llama, yi_names)}
