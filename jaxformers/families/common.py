"""What families share: the form of a family, where a weight lies in a checkpoint, and the Llama tables most build
on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxformers.families.keys import Keys
from jaxformers.models.config import (
    DynamicScaling,
    LayerKind,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
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
    `{e}` an expert. `shape` is that of the tensor where it does not follow from the weight's. The form is invertible,
    so export needs no second table.
    """

    name: str
    view: tuple[int, ...] = ()
    axis: int = 0
    start: int = 0
    stop: int | None = None
    transposed: bool = True
    shape: tuple[int, ...] = ()


NameTable = Mapping[str, str | Source]


@dataclass(frozen=True)
class Names:
    """The checkpoint's names: a leaf's path within its layer (or the model) -> where it lives.

    `moe` overrides entries in layers whose feed-forward is a mixture of experts. `copies` are what each module for
    multi-token prediction repeats of the model's weights. `ignored` are regular expressions of tensors that carry no
    weight of ours.
    """

    table: NameTable
    moe: NameTable = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
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
GPT_LAYER = "transformer.h.{l}."
MTP_KEY = "num_nextn_predict_layers"
WEIGHT_BIAS = (("w", "weight"), ("b", "bias"))


def norms(**names: str) -> dict[str, str]:
    """Table entries for weight and bias of each norm."""
    return {f"{ours}.{leaf}": f"{theirs}.{tail}" for ours, theirs in names.items() for leaf, tail in WEIGHT_BIAS}


def linears(prefix: str, **names: str) -> dict[str, str]:
    """Table entries for weight and bias of each linear layer under `prefix`, such as `attn.`."""
    entries = {f"{prefix}{ours}": f"{theirs}.weight" for ours, theirs in names.items()}
    return entries | {f"{prefix}{ours}_b": f"{theirs}.bias" for ours, theirs in names.items()}


def slices(name: str, view: tuple[int, ...], axis: int, parts: Mapping[str, int], **how: Any) -> dict[str, Source]:
    """Table entries for weights that lie one after another along one axis of a fused tensor: each one's size there."""
    table, start = {}, 0
    for path, size in parts.items():
        table[path] = Source(name, view, axis, start, start + size, **how)
        start += size
    return table


def fused_gate_up(cfg: ModelConfig, name: str = f"{MLP}gate_up_proj") -> dict[str, Source]:
    """Gate and up of a dense layer in one tensor, gate first, and their bias."""
    weight = slices(f"{name}.weight", (cfg.d_model, 2, cfg.d_ff), 1, {"ffn.gate": 1, "ffn.up": 1})
    return weight | slices(f"{name}.bias", (2, cfg.d_ff), 0, {"ffn.gate_b": 1, "ffn.up_b": 1})


def fused_qkv(
    name: str, cfg: ModelConfig, view: tuple[int, ...], axis: int, sizes: tuple[int, int, int] = (1, 1, 1), **how: Any
) -> dict[str, Source]:
    """q, k and v in one tensor, and their bias: the outputs seen as `view`, and what each takes along `axis` of it."""
    parts = dict(zip("qkv", sizes, strict=True))
    weights = {f"attn.{x}": size for x, size in parts.items()}
    biases = {f"attn.{x}_b": size for x, size in parts.items()}
    return slices(f"{name}.weight", (cfg.d_model, *view), axis + 1, weights, **how) | slices(
        f"{name}.bias", view, axis, biases
    )


def biases(on: bool) -> dict[str, bool]:
    """A bias on every projection, or on none."""
    return {"qkv_bias": on, "o_bias": on, "mlp_bias": on}


def layer_norm(eps: float) -> dict[str, Any]:
    """Layer norms with weight and bias in place of RMS norms."""
    return {"norm": "layer", "norm_bias": True, "norm_eps": eps}


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
GPT: dict[str, str | Source] = {
    "embed": "transformer.wte.weight",
    "lm_head": "lm_head.weight",
    "lm_head_b": "lm_head.bias",
    **norms(attn_norm=f"{GPT_LAYER}ln_1", ffn_norm=f"{GPT_LAYER}ln_2", final_norm="transformer.ln_f"),
}
BLOOM: dict[str, str | Source] = {
    "embed": "transformer.word_embeddings.weight",
    "lm_head": "lm_head.weight",
    **norms(
        embed_norm="transformer.word_embeddings_layernorm",
        attn_norm=f"{GPT_LAYER}input_layernorm",
        ffn_norm=f"{GPT_LAYER}post_attention_layernorm",
        final_norm="transformer.ln_f",
    ),
    **linears("attn.", o=f"{GPT_LAYER}self_attention.dense"),
    **linears("ffn.", up=f"{GPT_LAYER}mlp.dense_h_to_4h", down=f"{GPT_LAYER}mlp.dense_4h_to_h"),
}
SANDWICH_NORMS = norms(
    attn_post_norm=f"{LAYER}post_attention_layernorm",
    ffn_norm=f"{LAYER}pre_feedforward_layernorm",
    ffn_post_norm=f"{LAYER}post_feedforward_layernorm",
)
POST_NORMS = norms(
    attn_post_norm=f"{LAYER}post_attention_layernorm", ffn_post_norm=f"{LAYER}post_feedforward_layernorm"
)
EXPERTS: dict[str, str | Source] = {
    "ffn.router": f"{MLP}gate.weight",
    "ffn.select_b": f"{MLP}gate.e_score_correction_bias",
    **{f"ffn.{x}": f"{MLP}experts.{{e}}.{x}_proj.weight" for x in ("gate", "up", "down")},
    **{f"ffn.shared.{x}": f"{MLP}shared_experts.{x}_proj.weight" for x in ("gate", "up", "down")},
}


MIXTRAL_EXPERTS: dict[str, str | Source] = {
    "ffn.router": f"{LAYER}block_sparse_moe.gate.weight",
    "ffn.select_b": f"{LAYER}block_sparse_moe.e_score_correction_bias",
    **{
        f"ffn.{ours}": f"{LAYER}block_sparse_moe.experts.{{e}}.{theirs}.weight"
        for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
    },
}


# A module for multi-token prediction is a further layer, with what it needs beside one (arXiv:2412.19437).
MTP: dict[str, str | Source] = {
    "mtp.proj": f"{LAYER}eh_proj.weight",
    **norms(
        **{
            "mtp.token_norm": f"{LAYER}enorm",
            "mtp.hidden_norm": f"{LAYER}hnorm",
            "mtp.norm": f"{LAYER}shared_head.norm",
        }
    ),
}
MTP_COPIES = {"embed": f"{LAYER}embed_tokens.weight", "lm_head": f"{LAYER}shared_head.head.weight"}


def mtp_names(cfg: ModelConfig, table: NameTable) -> Names:
    """`table` with DeepSeek-V3's experts and modules for multi-token prediction. A model that is read without modules
    leaves its checkpoint's alone."""
    ignored = () if cfg.mtp_modules else (rf"^model\.layers\.{cfg.num_layers}\.",)
    return Names({**table, **MTP}, moe=EXPERTS, copies=MTP_COPIES, ignored=ignored)


def mtp_modules(c: Keys) -> int:
    """How many modules for multi-token prediction a file says its model has."""
    return c.integer(MTP_KEY, 0, minimum=0)


def without_mtp(cfg: ModelConfig) -> ModelConfig:
    """The same model without modules for multi-token prediction, and with a `config.json` that speaks of none."""
    source = cfg.source
    if source is not None and source.get(MTP_KEY):
        source = {**source, MTP_KEY: 0}
    return cfg.replace(mtp_modules=0, source=source)


def untied(cfg: ModelConfig) -> ModelConfig:
    """The same model with a head of its own, and with a `config.json` that says so."""
    source = None if cfg.source is None else {**cfg.source, "tie_word_embeddings": False}
    return cfg.replace(tie_embeddings=False, source=source)


def llama_names(_cfg: ModelConfig) -> Names:
    return Names(LLAMA, ignored=(r"\.rotary_emb\.inv_freq$",))


def moe_names(_cfg: ModelConfig) -> Names:
    """Llama's names, with experts as DeepSeek and Qwen write them."""
    return Names(LLAMA, moe=EXPERTS)


def even_heads(c: Keys, width: str, heads: str) -> int:
    """The width of a head where the hidden size is split evenly over the heads. Arguments are the two keys."""
    if c.integer(width) % c.integer(heads):
        raise c.error(width, c.integer(width), f"a multiple of {heads} ({c.integer(heads)})")
    return c.integer(width) // c.integer(heads)


def gpt_aliases(c: Keys) -> None:
    """GPT-2's keys under the names that later types gave them."""
    c.alias(hidden_size="n_embd", num_attention_heads="n_head", num_hidden_layers="n_layer")
    c.alias(max_position_embeddings="n_positions")


# Llama's keys of those that `gpt_config` asks for.
LLAMA_KEYS = {"width": "hidden_size", "heads": "num_attention_heads", "layers": "num_hidden_layers"}


def gpt_config(
    c: Keys, *, width: str = "n_embd", heads: str = "n_head", layers: str = "n_layer", **values: Any
) -> ModelConfig:
    """The GPT line: layer norms with bias, a plain feed-forward network four times as wide, tied embeddings; width,
    heads and layers are the keys of those."""
    d, h, n = c.integer(width), c.integer(heads), even_heads(c, width, heads)
    kind, kv_heads = LayerKind(rope=values.pop("rope", None)), values.get("num_kv_heads", h)
    if h % kv_heads:
        raise c.error("num_key_value_heads", kv_heads, f"a divisor of {heads} ({h})")
    defaults = {
        "family": c.model_type,
        "vocab_size": c.integer("vocab_size"),
        "d_model": d,
        "d_ff": 4 * d,
        "num_heads": h,
        "num_kv_heads": h,
        "head_dim": n,
        "layers": (kind,) * c.integer(layers),
        "norm": "layer",
        "norm_bias": True,
        "gated": False,
    }
    if "norm_eps" not in values:
        defaults["norm_eps"] = c.number("layer_norm_epsilon", 1e-5)
    if "tie_embeddings" not in values:
        defaults["tie_embeddings"] = c.flag("tie_word_embeddings", True)
    return ModelConfig(**(defaults | values))


def head_dim(c: Keys, default: int | None = None) -> int:
    """`head_dim`, or the family's default, or the hidden size split evenly over the heads."""
    heads, width = c.integer("num_attention_heads"), c.integer("hidden_size")
    size = c.integer("head_dim", default, null=None)
    if size is None:
        if width % heads:
            raise c.error("hidden_size", width, f"a multiple of num_attention_heads ({heads}), or head_dim be given")
        size = width // heads
    return size


def llama_config(c: Keys, **values: Any) -> ModelConfig:
    """The keys most families spell as Llama does; `values` override or complete what they give. Layers are all of one
    plain kind unless they are given."""
    heads = c.integer("num_attention_heads")
    kv_heads = values.pop("num_kv_heads", None) or c.integer("num_key_value_heads", null=heads)
    if heads % kv_heads:
        raise c.error("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
    defaults = {
        "family": c.model_type,
        "vocab_size": c.integer("vocab_size"),
        "d_model": c.integer("hidden_size"),
        "d_ff": c.integer("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "norm_eps": c.number("rms_norm_eps", 1e-6),
    }
    if "context_length" not in values:
        defaults["context_length"] = c.integer("max_position_embeddings")
    if "head_dim" not in values:
        defaults["head_dim"] = head_dim(c)
    if "layers" not in values:
        defaults["layers"] = uniform_layers(c, rope=rope(c, (defaults | values)["head_dim"]))
    if "activation" not in values:
        defaults["activation"] = c.choice("hidden_act", ACTIVATIONS, "silu")
    if "tie_embeddings" not in values:
        defaults["tie_embeddings"] = c.flag("tie_word_embeddings", False)
    return ModelConfig(**(defaults | values))


def llama_attention(c: Keys) -> dict[str, Any]:
    """What many types read as Llama does: one switch for the biases of all four projections, and as many kv heads as
    heads where the file names none, as the first Llama's do not."""
    bias = c.flag("attention_bias", False)
    kv_heads = c.integer("num_key_value_heads", c.integer("num_attention_heads"))
    return {"num_kv_heads": kv_heads, "qkv_bias": bias, "o_bias": bias}


def experts(c: Keys, key: str, top_key: str = "num_experts_per_tok") -> dict[str, int]:
    """`num_experts`, read from `key`, and the `top_k` of them that a token visits, read from `top_key`."""
    count, top_k = c.integer(key), c.integer(top_key)
    if top_k > count:
        raise c.error(top_key, top_k, f"at most {key} ({count})")
    return {"num_experts": count, "top_k": top_k}


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


def full_every(n: int) -> Callable[[int], str]:
    """The rule by which every n-th layer sees all of the text and the others a window of it."""
    return lambda i: "sliding_attention" if (i + 1) % n else "full_attention"


def typed_layers(
    c: Keys, default: Callable[[int], str], window: int | None, turn: Rope | None, **kind: Any
) -> tuple[LayerKind, ...]:
    """`layer_types` with a window on the sliding layers, and the same rope on all."""
    return tuple(
        LayerKind(window=window if t == "sliding_attention" else None, rope=turn, **kind)
        for t in layer_types(c, default)
    )


def rope(
    c: Keys,
    dim: int,
    *,
    layer_type: str | None = None,
    interleaved: bool = False,
    theta: float = 1e4,
    fraction: float | None = None,
    context: int | None = None,
    original: int | None = None,
    beside: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> Rope:
    """Rotary settings from either spelling: `rope_parameters` (possibly one a layer type), or `rope_theta` with
    `rope_scaling`.

    theta, fraction (of the head that is rotated; None: always all of it), context (positions) and original (positions
    before scaling) are the family's defaults; beside: keys among the settings that are not about the rotation; renamed:
    the family's names of scalings.
    """
    table = c.table("rope_parameters", {})
    if layer_type is not None and table:
        if not isinstance(table.get(layer_type), Mapping):
            raise c.error("rope_parameters", dict(table), f"settings for each of layer_types, {layer_type} among them")
        table = table[layer_type]
    old = c.table("rope_scaling", {})
    if old and any(old.get(key) != value for key, value in table.items() if key != "rope_theta"):
        raise c.error("rope_scaling", dict(old), "absent beside rope_parameters that say something else")
    old_theta, old_fraction = c.number("rope_theta", None), c.number("partial_rotary_factor", None)
    values = Keys({**old, **table, "model_type": f"{c.model_type} rope"})
    values.skip("finetuned", *beside)  # the first says of a YaRN that it was trained with
    base = values.number("rope_theta", theta if old_theta is None else old_theta)
    turned = values.number("partial_rotary_factor", (fraction or 1.0) if old_fraction is None else old_fraction)
    if fraction is None and turned != 1:
        raise c.error("partial_rotary_factor", turned, "1 in this type, which turns whole heads")
    context = c.integer("max_position_embeddings", context) if context else c.integer("max_position_embeddings")
    scaling = rope_scaling(values, context, c.integer("original_max_position_embeddings", original), renamed or {})
    values.finish()
    rotated = int(dim * turned) // 2 * 2
    if isinstance(scaling, LongRopeScaling) and len(scaling.short) != rotated // 2:
        raise values.error("short_factor", list(scaling.short), f"{rotated // 2} numbers, one a rotated pair")
    return Rope(rotated, base, interleaved, scaling)


def rope_scaling(c: Keys, context: int, outer: int | None, renamed: Mapping[str, str]) -> RopeScaling | None:
    """The scaling that `rope_type` (or the older `type`) names.

    context: `max_position_embeddings`. outer: `original_max_position_embeddings` where the file has it outside of the
    rope's settings, and then it counts. renamed: other names of scalings.
    """
    kind, inner = c.text("rope_type", c.text("type", "default")), c.integer("original_max_position_embeddings", context)
    original = inner if outer is None else outer
    match renamed.get(kind, kind):
        case "default":
            return None
        case "linear":
            return LinearScaling(c.number("factor"))
        case "dynamic":
            return DynamicScaling(c.number("factor"), context)
        case "llama3":
            low, high = c.number("low_freq_factor"), c.number("high_freq_factor")
            return Llama3Scaling(c.number("factor"), original, low, high)
        case "yarn":
            return _yarn(c, original)
        case "longrope":
            return _longrope(c, context, original)
        case "telechat3-yarn":
            return _yarn(c, original, growth=0.7)
    raise c.error("rope_type", kind, "one of default, dynamic, linear, llama3, longrope, telechat3-yarn, yarn")


def _numbers(c: Keys, key: str) -> list[float]:
    values = c.sequence(key)
    if not all(isinstance(x, int | float) for x in values):
        raise c.error(key, values, "a list of numbers")
    return [float(x) for x in values]


def _longrope(c: Keys, context: int, original: int) -> LongRopeScaling:
    short, long = (tuple(_numbers(c, f"{name}_factor")) for name in ("short", "long"))
    if len(short) != len(long):
        raise c.error("long_factor", list(long), f"of the length of short_factor ({len(short)})")
    growth = c.number("factor", context / original)
    factor = c.number("attention_factor", math.sqrt(1 + math.log(growth) / math.log(original)) if growth > 1 else 1.0)
    return LongRopeScaling(short, long, original, c.number("short_mscale", factor), c.number("long_mscale", factor))


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's growth of attention logits with the context (arXiv:2309.00071, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(c: Keys, original: int, *, growth: float = 1.0) -> YarnScaling:
    factor, mscale, mscale_all = c.number("factor"), c.number("mscale", None), c.number("mscale_all_dim", None)
    if mscale and mscale_all:
        grown = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all)
    else:
        grown = yarn_mscale(factor, growth)
    return YarnScaling(
        factor,
        original,
        attention_factor=c.number("attention_factor", grown),
        beta_fast=c.number("beta_fast", 32.0),
        beta_slow=c.number("beta_slow", 1.0),
        truncate=c.flag("truncate", True),
    )
