"""The mixtures of experts of Qwen2 (with an expert that is always on) and Qwen3."""

from collections.abc import Sequence
from dataclasses import replace

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.families.qwen import qwen_window
from jaxformers.models.config import LayerKind, ModelConfig, MoE


def _sparse(c: Keys, kinds: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """The layers with experts on those that are not named as dense."""
    dense, step = set(c.sequence("mlp_only_layers", [])), c.integer("decoder_sparse_step", 1)
    return tuple(
        replace(kind, ffn="moe" if i not in dense and (i + 1) % step == 0 else "dense") for i, kind in enumerate(kinds)
    )


def read_qwen2_moe(c: Keys) -> ModelConfig:
    moe = MoE(
        **fam.experts(c, "num_experts"),
        d_ff=c.integer("moe_intermediate_size"),
        normalize=c.flag("norm_topk_prob", False),
        shared_d_ff=c.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    bias, window, first = c.flag("qkv_bias", True), qwen_window(c), c.integer("max_window_layers", 28, minimum=0)

    def default(i: int) -> str:
        return "sliding_attention" if window and i % 2 == 0 and i < first else "full_attention"

    kinds = fam.typed_layers(c, default, window, fam.rope(c, fam.head_dim(c)))
    return fam.llama_config(c, layers=_sparse(c, kinds), moe=moe, qkv_bias=bias)


def qwen2_moe_names(_cfg: ModelConfig) -> fam.Names:
    shared = {f"ffn.shared.{x}": f"{fam.MLP}shared_expert.{x}_proj.weight" for x in ("gate", "up", "down")}
    return fam.Names(fam.LLAMA, moe=fam.EXPERTS | shared | {"ffn.shared_gate": f"{fam.MLP}shared_expert_gate.weight"})


def read_qwen3_moe(c: Keys) -> ModelConfig:
    count = "num_experts" if c.integer("num_experts", None) else "num_local_experts"
    moe = MoE(
        **fam.experts(c, count), d_ff=c.integer("moe_intermediate_size"), normalize=c.flag("norm_topk_prob", False)
    )
    c.integer("max_window_layers", None, minimum=0)  # in every file, and of no effect in this type
    kinds = fam.uniform_layers(c, window=qwen_window(c), rope=fam.rope(c, fam.head_dim(c)))
    bias = c.flag("attention_bias", False)
    return fam.llama_config(c, layers=_sparse(c, kinds), moe=moe, qk_norm="head", qkv_bias=bias, o_bias=bias)


FAMILIES = {
    "qwen2_moe": fam.Family(read_qwen2_moe, qwen2_moe_names),
    "qwen3_moe": fam.Family(read_qwen3_moe, fam.moe_names),
}
