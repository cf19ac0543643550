"""Qwen2 (biases on q, k, v) and Qwen3 (normalised q and k)."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import LayerKind, ModelConfig


def qwen_window(c: Keys) -> int | None:
    """Most files name a `sliding_window` that `use_sliding_window` then switches off."""
    size = c.integer("sliding_window", 4096, null=None, minimum=0)
    if size == 0 and c.flag("use_sliding_window", False):
        raise c.error("sliding_window", size, "1 or more where use_sliding_window is true")
    return size if c.flag("use_sliding_window", False) else None


def qwen_layers(c: Keys, head_size: int) -> tuple[LayerKind, ...]:
    """Windows on the layers from `max_window_layers` on."""
    window, first = qwen_window(c), c.integer("max_window_layers", 28, minimum=0)
    return fam.typed_layers(
        c, lambda i: "sliding_attention" if window and i >= first else "full_attention", window, fam.rope(c, head_size)
    )


def read_qwen2(c: Keys) -> ModelConfig:
    return fam.llama_config(c, layers=qwen_layers(c, fam.head_dim(c)), qkv_bias=True)


def read_qwen3(c: Keys) -> ModelConfig:
    size, bias = fam.head_dim(c, 128), c.flag("attention_bias", False)
    return fam.llama_config(c, layers=qwen_layers(c, size), head_dim=size, qk_norm="head", qkv_bias=bias, o_bias=bias)


FAMILIES = {"qwen2": fam.Family(read_qwen2, fam.llama_names), "qwen3": fam.Family(read_qwen3, fam.llama_names)}
