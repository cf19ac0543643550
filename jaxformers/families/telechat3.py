"""TeleChat 3: its dense models are Llama's, its sparse ones DeepSeek-V3's, under other type names."""

from jaxformers.families import common as fam
from jaxformers.families.deepseek import deepseek_names, read_deepseek_v3
from jaxformers.families.keys import Keys
from jaxformers.families.llama import read_llama
from jaxformers.models.config import ModelConfig


def read_telechat3(c: Keys) -> ModelConfig:
    """Sparse where the file speaks of latent attention, or dense."""
    return read_deepseek_v3(c) if "kv_lora_rank" in c.values else read_llama(c)


def telechat3_names(cfg: ModelConfig) -> fam.Names:
    return deepseek_names(cfg) if cfg.mla else fam.llama_names(cfg)


FAMILY = fam.Family(read_telechat3, telechat3_names)
FAMILIES = {"telechat3": FAMILY, "telechat3_moe": FAMILY}
