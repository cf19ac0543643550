"""Qwen2 (biases on q, k, v), Qwen3 (normalised q and k) and their mixtures of experts."""

from collections.abc import Sequence
from dataclasses import replace

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import LayerKind, ModelConfig, MoE


def _window(c: Keys) -> int | None:
    """Most files name a `sliding_window` that `use_sliding_window` then switches off."""
    size = c.integer("sliding_window", 4096, null=None, minimum=0)
    if size == 0 and c.flag("use_sliding_window", False):
        raise c.error("sliding_window", size, "1 or more where use_sliding_window is true")
    return size if c.flag("use_sliding_window", False) else None


def _layers(c: Keys, head_size: int) -> tuple[LayerKind, ...]:
    """Windows on the layers from `max_window_layers` on."""
    window, first = _window(c), c.integer("max_window_layers", 28, minimum=0)
    types = fam.layer_types(c, lambda i: "sliding_attention" if window and i >= first else "full_attention")
    turn = fam.rope(c, head_size)
    return tuple(LayerKind(window=window if t == "sliding_attention" else None, rope=turn) for t in types)


def read_qwen2(c: Keys) -> ModelConfig:
    return fam.llama_config(c, layers=_layers(c, fam.head_dim(c)), qkv_bias=True)


def read_qwen3(c: Keys) -> ModelConfig:
    size, bias = fam.head_dim(c, 128), c.flag("attention_bias", False)
    return fam.llama_config(c, layers=_layers(c, size), head_dim=size, qk_norm="head", qkv_bias=bias, o_bias=bias)


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
    bias = c.flag("qkv_bias", True)
    return fam.llama_config(c, layers=_sparse(c, _layers(c, fam.head_dim(c))), moe=moe, qkv_bias=bias)


def qwen2_moe_names(_cfg: ModelConfig) -> fam.Names:
    shared = {f"ffn.shared.{x}": f"{fam.MLP}shared_expert.{x}_proj.weight" for x in ("gate", "up", "down")}
    return fam.Names(fam.LLAMA, moe=fam.EXPERTS | shared | {"ffn.shared_gate": f"{fam.MLP}shared_expert_gate.weight"})


def read_qwen3_moe(c: Keys) -> ModelConfig:
    count = "num_experts" if c.integer("num_experts", None) else "num_local_experts"
    moe = MoE(
        **fam.experts(c, count), d_ff=c.integer("moe_intermediate_size"), normalize=c.flag("norm_topk_prob", False)
    )
    c.integer("max_window_layers", None, minimum=0)  # in every file, and of no effect in this type
    kinds, bias = (
        fam.uniform_layers(c, window=_window(c), rope=fam.rope(c, fam.head_dim(c))),
        c.flag("attention_bias", False),
    )
    return fam.llama_config(c, layers=_sparse(c, kinds), moe=moe, qk_norm="head", qkv_bias=bias, o_bias=bias)


FAMILIES = {
    "qwen2": fam.Family(read_qwen2, fam.llama_names),
    "qwen3": fam.Family(read_qwen3, fam.llama_names),
    "qwen2_moe": fam.Family(read_qwen2_moe, qwen2_moe_names),
    "qwen3_moe": fam.Family(read_qwen3_moe, fam.moe_names),
}
