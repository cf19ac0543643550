"""EXAONE 4: norms behind each branch, and rope on the sliding layers only where there are any."""

from jaxformers.families.common import LLAMA, POST_NORMS, Family, Names, head_dim, layer_types, llama_config, rope
from jaxformers.families.keys import Keys
from jaxformers.models.config import LayerKind, ModelConfig


def read_exaone4(c: Keys) -> ModelConfig:
    window = c.integer("sliding_window", 4096, null=None)
    pattern = c.integer("sliding_window_pattern", 4, null=0, minimum=0)
    if window is not None and not pattern:
        raise c.error("sliding_window_pattern", pattern, "1 or more where there is a sliding_window")
    types = layer_types(c, lambda i: "sliding_attention" if window and (i + 1) % pattern else "full_attention")
    turn = rope(c, head_dim(c))
    layers = tuple(
        LayerKind(window=window, rope=turn) if t == "sliding_attention" else LayerKind(rope=None if window else turn)
        for t in types
    )
    return llama_config(
        c,
        layers=layers,
        num_kv_heads=c.integer("num_key_value_heads", 32),
        norm_eps=c.number("rms_norm_eps", 1e-5),
        pre_norm=False,
        post_norm=True,
        qk_norm="head",
    )


FAMILIES = {"exaone4": Family(read_exaone4, lambda _cfg: Names(LLAMA | POST_NORMS))}
