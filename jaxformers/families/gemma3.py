"""Gemma 3: Gemma 2 with normalised queries and keys in place of caps, and a rope of its own on local layers."""

from jaxformers.families import common as fam
from jaxformers.families.gemma import gemma2_config, gemma2_names
from jaxformers.families.keys import Keys
from jaxformers.models.config import LayerKind, ModelConfig, Rope


def read_gemma3(c: Keys) -> ModelConfig:
    pattern = c.integer("sliding_window_pattern", c.integer("_sliding_window_pattern", 6))
    types = fam.layer_types(c, fam.full_every(pattern))
    dim, window = c.integer("head_dim", 256), c.integer("sliding_window", 4096, null=None)
    kinds = {
        "sliding_attention": LayerKind(window=window, rope=_local_rope(c, dim)),
        "full_attention": LayerKind(rope=fam.rope(c, dim, layer_type="full_attention", theta=1e6)),
    }
    softcaps = c.number("attn_logit_softcapping", None), c.number("final_logit_softcapping", None)
    layers = tuple(kinds[t] for t in types)
    return gemma2_config(
        c, layers=layers, qk_norm="head", attn_softcap=softcaps[0], logit_softcap=softcaps[1], head_dim=dim
    )


def _local_rope(c: Keys, dim: int) -> Rope:
    """The local layers' rope: unscaled, with a base of its own, under a key of its own in older files."""
    base = c.number("rope_local_base_freq", 10_000.0)
    nested = c.table("rope_parameters", None)
    if not nested:
        return Rope(dim, base)
    turn = fam.rope(c, dim, layer_type="sliding_attention", theta=base)
    if turn.theta != base and "rope_theta" not in nested["sliding_attention"]:
        raise c.error("rope_theta", turn.theta, "in rope_parameters where these are given")
    return turn


FAMILIES = {"gemma3_text": fam.Family(read_gemma3, gemma2_names)}
