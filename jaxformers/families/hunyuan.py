"""Hunyuan V1: queries and keys normalised after the rotation; a mixture with one shared expert."""

from dataclasses import replace
from typing import Any

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import DynamicScaling, ModelConfig, MoE, Rope


def _rope(c: Keys) -> Rope:
    """A "dynamic" scaling with an `alpha` stretches the base once and for all, whatever the length of the text."""
    dim, settings = fam.head_dim(c), c.table("rope_parameters", {}) or c.table("rope_scaling", {})
    turn = fam.rope(c, dim, beside=("alpha", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"))
    if isinstance(turn.scaling, DynamicScaling) and (alpha := settings.get("alpha")):
        return replace(turn, theta=turn.theta * alpha ** (dim / (dim - 2)), scaling=None)
    return turn


def read_hunyuan_dense(c: Keys) -> ModelConfig:
    return _hunyuan(c, layers=fam.uniform_layers(c, rope=_rope(c)))


def _hunyuan(c: Keys, **values: Any) -> ModelConfig:
    c.expect(mlp_bias=False)
    return fam.llama_config(
        c,
        **fam.llama_attention(c),
        norm_eps=c.number("rms_norm_eps", 1e-5),
        qk_norm="head",
        qk_norm_after_rope=True,
        **values,
    )


def read_hunyuan_moe(c: Keys) -> ModelConfig:
    width = c.integer("intermediate_size")
    moe = MoE(**fam.experts(c, "num_experts", "moe_topk"), d_ff=width, shared_d_ff=width)
    return _hunyuan(c, layers=fam.uniform_layers(c, ffn="moe", rope=_rope(c)), moe=moe)


def hunyuan_names(_cfg: ModelConfig) -> fam.Names:
    shared = {f"ffn.shared.{x}": f"{fam.MLP}shared_mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
    table = fam.LLAMA | fam.norms(
        **{"attn.q_norm": f"{fam.ATTN}query_layernorm", "attn.k_norm": f"{fam.ATTN}key_layernorm"}
    )
    return fam.Names(table, moe=fam.EXPERTS | shared | {"ffn.router": f"{fam.MLP}gate.wg.weight"})


FAMILIES = {
    "hunyuan_v1_dense": fam.Family(read_hunyuan_dense, hunyuan_names),
    "hunyuan_v1_moe": fam.Family(read_hunyuan_moe, hunyuan_names),
}
