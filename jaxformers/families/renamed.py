"""Llama under other type names: Skywork, and the first release of Yi, whose norms have other names too."""

from jaxformers.families.common import LAYER, LLAMA, Family, Names, llama_names, norms
from jaxformers.families.llama import read_llama
from jaxformers.models.config import ModelConfig


def yi_names(_cfg: ModelConfig) -> Names:
    return Names(LLAMA | norms(attn_norm=f"{LAYER}ln1", ffn_norm=f"{LAYER}ln2"))


FAMILIES = {"skywork": Family(read_llama, llama_names), "Yi": Family(read_llama, yi_names)}
