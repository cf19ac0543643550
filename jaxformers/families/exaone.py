"""EXAONE 4: norms behind each branch, and rope on the sliding layers only where there are any."""

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import LayerKind, ModelConfig


def read_exaone4(c: Keys) -> ModelConfig:
    window = c.integer("sliding_window", 4096, null=None)
    if c.sequence("layer_types", None):
        c.skip("sliding_window_pattern")  # "LLLG" in a published file
        pattern = 4
    else:
        pattern = c.integer("sliding_window_pattern", 4, null=0, minimum=0)
    if window is not None and not pattern:
        raise c.error("sliding_window_pattern", pattern, "1 or more where there is a sliding_window")
    types = fam.layer_types(c, lambda i: "sliding_attention" if window and (i + 1) % pattern else "full_attention")
    turn = fam.rope(c, fam.head_dim(c))
    layers = tuple(
        LayerKind(window=window, rope=turn) if t == "sliding_attention" else LayerKind(rope=None if window else turn)
        for t in types
    )
    return fam.llama_config(
        c,
        layers=layers,
        num_kv_heads=c.integer("num_key_value_heads", 32),
        norm_eps=c.number("rms_norm_eps", 1e-5),
        pre_norm=False,
        post_norm=True,
        qk_norm="head",
    )


FAMILIES = {"exaone4": fam.Family(read_exaone4, lambda _cfg: fam.Names(fam.LLAMA | fam.POST_NORMS))}
