"""Ernie 4.5: interleaved rope, biases all or none, and experts chosen with a bias that only selects."""

from typing import Any

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import LayerKind, ModelConfig, MoE


def _ernie(c: Keys, size: int, kinds: list[str], kv_heads: int, **values: Any) -> ModelConfig:
    turn, bias = fam.rope(c, size, interleaved=True, theta=500_000.0), c.flag("use_bias", False)
    return fam.llama_config(
        c,
        layers=tuple(LayerKind(ffn=kind, rope=turn) for kind in kinds),
        head_dim=size,
        num_kv_heads=c.integer("num_key_value_heads", kv_heads, null=c.integer("num_attention_heads")),
        norm_eps=c.number("rms_norm_eps", 1e-5),
        tie_embeddings=c.flag("tie_word_embeddings", True),
        **fam.biases(bias),
        **values,
    )


def read_ernie(c: Keys) -> ModelConfig:
    return _ernie(c, fam.head_dim(c, 128), ["dense"] * c.integer("num_hidden_layers"), 2)


def read_ernie_moe(c: Keys) -> ModelConfig:
    count, width = c.integer("num_hidden_layers"), c.integer("moe_intermediate_size")
    first, last = c.integer("moe_layer_start_index", 1, minimum=0), c.integer("moe_layer_end_index", -1, minimum=-1)
    step, last = c.integer("moe_layer_interval", 1), count - 1 if last == -1 else last
    c.expect(moe_norm_min=1e-12, use_bias=False)
    shared = width * c.integer("moe_num_shared_experts", 2, null=0, minimum=0)
    chosen = fam.experts(c, "moe_num_experts", "moe_k")
    moe = MoE(**chosen, d_ff=width, select_bias=True, shared_d_ff=shared)
    kinds = ["moe" if first <= i <= last and (i + 1) % step == 0 else "dense" for i in range(count)]
    return _ernie(c, fam.head_dim(c), kinds, 4, moe=moe)


def ernie_moe_names(cfg: ModelConfig) -> fam.Names:
    assert cfg.moe is not None
    bias = fam.Source(f"{fam.MLP}moe_statics.e_score_correction_bias", shape=(1, cfg.moe.num_experts))
    return fam.Names(fam.LLAMA, moe=fam.EXPERTS | {"ffn.select_b": bias}, ignored=(r"^model\.mtp_",))


FAMILIES = {
    "ernie4_5": fam.Family(read_ernie, fam.llama_names),
    "ernie4_5_moe": fam.Family(read_ernie_moe, ernie_moe_names),
}
