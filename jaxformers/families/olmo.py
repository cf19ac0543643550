"""OLMo: norms without weights first, then norms behind each branch with queries and keys normalised as a whole."""

from typing import Any

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import LayerKind, ModelConfig, MoE, Rope


def _olmo(c: Keys, **values: Any) -> ModelConfig:
    return fam.llama_config(c, **fam.llama_attention(c), **values)


def read_olmo(c: Keys) -> ModelConfig:
    return _olmo(c, norm="layer", norm_weight=False, norm_eps=1e-5, qkv_clip=c.number("clip_qkv", None))


def _olmo2(c: Keys, **values: Any) -> ModelConfig:
    eps = c.number("rms_norm_eps", 1e-5)
    return _olmo(c, pre_norm=False, post_norm=True, qk_norm="full", norm_eps=eps, **values)


def read_olmo3(c: Keys) -> ModelConfig:
    types = fam.layer_types(c, fam.full_every(4))
    window, dim = c.integer("sliding_window", 4096, null=None), fam.head_dim(c)
    full = fam.rope(c, dim, layer_type="full_attention", theta=5e5)
    # In older files a scaling stands beside the one base of all layers, and is of the full ones.
    nested = c.table("rope_parameters", None)
    local = fam.rope(c, dim, layer_type="sliding_attention", theta=5e5) if nested else Rope(dim, full.theta)
    kinds = {"full_attention": LayerKind(rope=full), "sliding_attention": LayerKind(window=window, rope=local)}
    return _olmo2(c, layers=tuple(kinds[t] for t in types))


def read_olmoe(c: Keys) -> ModelConfig:
    moe = MoE(
        **fam.experts(c, "num_experts"), d_ff=c.integer("intermediate_size"), normalize=c.flag("norm_topk_prob", False)
    )
    return _olmo(
        c,
        layers=fam.uniform_layers(c, ffn="moe", rope=fam.rope(c, fam.head_dim(c))),
        moe=moe,
        qk_norm="full",
        qkv_clip=c.number("clip_qkv", None),
        norm_eps=c.number("rms_norm_eps", 1e-5),
    )


def olmo2_names(_cfg: ModelConfig) -> fam.Names:
    return fam.Names(fam.LLAMA | fam.POST_NORMS)


FAMILIES = {
    "olmo": fam.Family(read_olmo, fam.llama_names),
    "olmo2": fam.Family(_olmo2, olmo2_names),
    "olmo3": fam.Family(read_olmo3, olmo2_names),
    "olmoe": fam.Family(read_olmoe, lambda _cfg: fam.Names(fam.LLAMA, moe=fam.EXPERTS)),
}
