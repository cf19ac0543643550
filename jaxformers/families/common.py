"""What families share: the form of a family, where a weight lies in a checkpoint, and the Llama tables most build
on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxformers.families.keys import Keys
from jaxformers.models.config import (
    DynamicScaling,
    LayerKind,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    Rope,
    RopeScaling,
    YarnScaling,
)

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


@dataclass(frozen=True)
class Source:
    """Where one weight lives in a checkpoint: a named tensor, and the slice of it that is the weight.

    A linear layer on disk is [out, in] unless `transposed` is False; it is brought to [experts?, in, out], viewed as
    `view`, sliced [start:stop] along `axis`, and reshaped to the weight's spec. `{l}` in the name is the layer and
    `{e}` an expert. The form is invertible, so export needs no second table.
    """

    name: str
    view: tuple[int, ...] = ()
    axis: int = 0
    start: int = 0
    stop: int | None = None
    transposed: bool = True


NameTable = Mapping[str, str | Source]


@dataclass(frozen=True)
class Names:
    """The checkpoint's names: a leaf's path within its layer (or the model) -> where it lives.

    `moe` overrides entries in layers whose feed-forward is a mixture of experts. `ignored` are regular expressions of
    tensors that carry no weight of ours.
    """

    table: NameTable
    moe: NameTable = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def source(self, path: str, kind: LayerKind | None) -> Source:
        table = self.moe if kind is not None and kind.ffn == "moe" and path in self.moe else self.table
        found = table[path]
        return Source(found) if isinstance(found, str) else found


@dataclass(frozen=True)
class Family:
    """One model type: how its `config.json` reads, and how its tensors are named."""

    read: Callable[[Keys], ModelConfig]
    names: Callable[[ModelConfig], Names]


ATTN, MLP, LAYER = "model.layers.{l}.self_attn.", "model.layers.{l}.mlp.", "model.layers.{l}."
WEIGHT_BIAS = (("w", "weight"), ("b", "bias"))


def norms(**names: str) -> dict[str, str]:
    """Table entries for weight and bias of each norm."""
    return {f"{ours}.{leaf}": f"{theirs}.{tail}" for ours, theirs in names.items() for leaf, tail in WEIGHT_BIAS}


def linears(prefix: str, **names: str) -> dict[str, str]:
    """Table entries for weight and bias of each linear layer under `prefix`, such as `attn.`."""
    entries = {f"{prefix}{ours}": f"{theirs}.weight" for ours, theirs in names.items()}
    return entries | {f"{prefix}{ours}_b": f"{theirs}.bias" for ours, theirs in names.items()}


LLAMA: dict[str, str | Source] = {
    "embed": "model.embed_tokens.weight",
    "lm_head": "lm_head.weight",
    "lm_head_b": "lm_head.bias",
    **linears("attn.", **{x: f"{ATTN}{x}_proj" for x in "qkvo"}),
    **linears("ffn.", **{x: f"{MLP}{x}_proj" for x in ("gate", "up", "down")}),
    **norms(
        final_norm="model.norm",
        attn_norm=f"{LAYER}input_layernorm",
        ffn_norm=f"{LAYER}post_attention_layernorm",
    ),
    **norms(**{f"attn.{x}_norm": f"{ATTN}{x}_norm" for x in "qk"}),
}
SANDWICH_NORMS = norms(
    attn_post_norm=f"{LAYER}post_attention_layernorm",
    ffn_norm=f"{LAYER}pre_feedforward_layernorm",
    ffn_post_norm=f"{LAYER}post_feedforward_layernorm",
)
EXPERTS: dict[str, str | Source] = {
    "ffn.router": f"{MLP}gate.weight",
    "ffn.select_b": f"{MLP}gate.e_score_correction_bias",
    **{f"ffn.{x}": f"{MLP}experts.{{e}}.{x}_proj.weight" for x in ("gate", "up", "down")},
    **{f"ffn.shared.{x}": f"{MLP}shared_experts.{x}_proj.weight" for x in ("gate", "up", "down")},
}


def llama_names(_cfg: ModelConfig) -> Names:
    return Names(LLAMA, ignored=(r"\.rotary_emb\.inv_freq$",))


def head_dim(c: Keys) -> int:
    """`head_dim`, or the hidden size split evenly over the heads."""
    heads, width = c.integer("num_attention_heads"), c.integer("hidden_size")
    size = c.integer("head_dim", None)
    if size is None:
        if width % heads:
            raise c.error("hidden_size", width, f"a multiple of num_attention_heads ({heads}), or head_dim be given")
        size = width // heads
    return size


def llama_config(c: Keys, **values: Any) -> ModelConfig:
    """The keys most families spell as Llama does; `values` override or complete what they give."""
    heads, kv_heads = c.integer("num_attention_heads"), c.integer("num_key_value_heads", None)
    kv_heads = heads if kv_heads is None else kv_heads
    if heads % kv_heads:
        raise c.error("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
    defaults = {
        "family": c.model_type,
        "vocab_size": c.integer("vocab_size"),
        "d_model": c.integer("hidden_size"),
        "d_ff": c.integer("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "context_length": c.integer("max_position_embeddings"),
        "norm_eps": c.number("rms_norm_eps", 1e-6),
    }
    if "head_dim" not in values:
        defaults["head_dim"] = head_dim(c)
    if "activation" not in values:
        defaults["activation"] = c.choice("hidden_act", ACTIVATIONS, "silu")
    if "tie_embeddings" not in values:
        defaults["tie_embeddings"] = c.flag("tie_word_embeddings", False)
    return ModelConfig(**(defaults | values))


def uniform_layers(c: Keys, **kind: Any) -> tuple[LayerKind, ...]:
    """The same kind for every layer."""
    return (LayerKind(**kind),) * c.integer("num_hidden_layers")


def layer_types(c: Keys, default: Callable[[int], str]) -> list[str]:
    """`layer_types`, or the family's rule for layer i where the file is older than that key."""
    count = c.integer("num_hidden_layers")
    types = c.sequence("layer_types", None)
    types = [default(i) for i in range(count)] if types is None else list(types)
    known = ("full_attention", "sliding_attention")
    if len(types) != count or not set(types) <= set(known):
        raise c.error("layer_types", types, f"{count} entries from {', '.join(known)}")
    return types


def rope(c: Keys, dim: int, *, layer_type: str | None = None, interleaved: bool = False, theta: float = 1e4) -> Rope:
    """Rotary settings from either spelling: `rope_parameters` (possibly one a layer type), or `rope_theta` with
    `rope_scaling`."""
    values = dict(c.table("rope_parameters", {}))
    if layer_type is not None and layer_type in values:
        values = dict(values[layer_type])
    old_theta, old_scaling = c.number("rope_theta", None), c.table("rope_scaling", None)
    if not values:
        values = dict(old_scaling or {})
    base = values.pop("rope_theta", None) or (theta if old_theta is None else old_theta)
    fraction = values.pop("partial_rotary_factor", None) or c.number("partial_rotary_factor", 1.0)
    rotated = int(dim * fraction) // 2 * 2
    return Rope(rotated, float(base), interleaved, rope_scaling(c, values))


def rope_scaling(c: Keys, values: dict[str, Any]) -> RopeScaling | None:
    """The scaling that `rope_type` (or the older `type`) names. Unknown kinds and unread keys are refused."""
    values = {k: v for k, v in values.items() if v is not None}
    kind = values.pop("rope_type", values.pop("type", "default"))
    values.pop("type", None)
    context = c.integer("max_position_embeddings")
    original = values.pop("original_max_position_embeddings", context)
    try:
        match kind:
            case "default":
                scaling: RopeScaling | None = None
            case "linear":
                scaling = LinearScaling(float(values.pop("factor")))
            case "dynamic":
                scaling = DynamicScaling(float(values.pop("factor")), context)
            case "llama3":
                low, high = float(values.pop("low_freq_factor")), float(values.pop("high_freq_factor"))
                scaling = Llama3Scaling(float(values.pop("factor")), original, low, high)
            case "yarn":
                scaling = _yarn(values, original)
            case _:
                raise c.error("rope_type", kind, "one of default, dynamic, linear, llama3, yarn")
    except KeyError as missing:
        raise ValueError(f"{c.model_type} config: rope scaling {kind!r} needs the key {missing}") from None
    if values:
        raise ValueError(f"{c.model_type} config: rope scaling {kind!r} has unknown keys {sorted(values)}")
    return scaling


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's growth of attention logits with the context (arXiv:2309.00071, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(values: dict[str, Any], original: int) -> YarnScaling:
    factor, attention = float(values.pop("factor")), values.pop("attention_factor", None)
    mscale, mscale_all = values.pop("mscale", None), values.pop("mscale_all_dim", None)
    if attention is None:
        both = mscale and mscale_all
        attention = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all) if both else yarn_mscale(factor)
    fast, slow = float(values.pop("beta_fast", 32.0)), float(values.pop("beta_slow", 1.0))
    return YarnScaling(factor, original, float(attention), fast, slow, bool(values.pop("truncate", True)))
