"""Hunyuan V1: queries and keys normalised after the rotation; a mixture with one shared expert."""

from typing import Any

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import ModelConfig, MoE


def _hunyuan(c: Keys, ffn: str, **values: Any) -> ModelConfig:
    return fam.llama_config(
        c,
        layers=fam.uniform_layers(c, ffn=ffn, rope=fam.rope(c, fam.head_dim(c))),
        **fam.llama_attention(c),
        norm_eps=c.number("rms_norm_eps", 1e-5),
        qk_norm="head",
        qk_norm_after_rope=True,
        **values,
    )


def read_hunyuan_moe(c: Keys) -> ModelConfig:
    count, top_k, width = c.integer("num_experts"), c.integer("moe_topk"), c.integer("intermediate_size")
    if top_k > count:
        raise c.error("moe_topk", top_k, f"at most num_experts ({count})")
    return _hunyuan(c, "moe", moe=MoE(num_experts=count, top_k=top_k, d_ff=width, shared_d_ff=width))


def hunyuan_names(_cfg: ModelConfig) -> fam.Names:
    shared = {f"ffn.shared.{x}": f"{fam.MLP}shared_mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
    table = fam.LLAMA | fam.norms(
        **{"attn.q_norm": f"{fam.ATTN}query_layernorm", "attn.k_norm": f"{fam.ATTN}key_layernorm"}
    )
    return fam.Names(table, moe=fam.EXPERTS | shared | {"ffn.router": f"{fam.MLP}gate.wg.weight"})


FAMILIES = {
    "hunyuan_v1_dense": fam.Family(lambda c: _hunyuan(c, "dense"), hunyuan_names),
    "hunyuan_v1_moe": fam.Family(read_hunyuan_moe, hunyuan_names),
}
