"""The architecture of a decoder-only language model as frozen, hashable data.

Everything here changes what a checkpoint means; nothing here says how to run it (see `decoder.Runtime`). A family fills
these values in; the decoder reads values and never a family's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """NTK-aware base that grows once a sequence passes `original_positions`."""

    factor: float
    original_positions: int


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend between."""

    factor: float
    original_positions: int
    low_freq_factor: float
    high_freq_factor: float


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071). `attention_factor` multiplies sin and cos."""

    factor: float
    original_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (arXiv:2402.13753): a divisor for each rotated pair, `long` ones once a sequence passes
    `original_positions` and `short` ones before, each with a factor that multiplies sin and cos."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_positions: int
    short_factor: float
    long_factor: float


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True)
class Rope:
    """Rotary embedding (arXiv:2104.09864) of one kind of layer.

    `dim` leading dims of each head are rotated and the rest pass through. `interleaved` pairs dims (0, 1), (2, 3), ...;
    otherwise dim i is paired with dim i + dim / 2. `backward` turns by the negative angle.
    """

    dim: int
    theta: float = 10_000.0
    interleaved: bool = False
    scaling: RopeScaling | None = None
    backward: bool = False


@dataclass(frozen=True)
class LayerKind:
    """All that may differ between layers. Layers of equal kinds share one compiled body.

    A `query` layer (PanGu-alpha, arXiv:2104.12369) is grouped-query attention whose queries are made from a table of
    positions instead of the layer's input, over a residual that is normalised first.
    """

    mixer: Literal["gqa", "mla", "query"] = "gqa"
    ffn: Literal["dense", "moe"] = "dense"
    window: int | None = None  # keys visible behind each query, itself included; None = all
    rope: Rope | None = None


@dataclass(frozen=True, kw_only=True)
class MoE:
    """A mixture of experts: how tokens choose experts, and how wide experts are.

    `score` turns router logits into weights: softmax over all experts, sigmoid of each, softmax over the chosen ones
    only, or the sparse mixer (arXiv:2409.12136), which weighs each of two experts by a softmax over those within
    `jitter` of it. `select_bias` is added to choose experts but not to weigh them (DeepSeek-V3, arXiv:2412.19437).
    With `groups`, only experts of the best `top_groups` groups may be chosen.
    """

    num_experts: int
    top_k: int
    d_ff: int
    score: Literal["softmax", "sigmoid", "softmax_topk", "sparse_mixer"] = "softmax"
    jitter: float = 0.0
    normalize: bool = True
    scale: float = 1.0
    router_bias: bool = False
    select_bias: bool = False
    expert_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    shared_d_ff: int = 0  # width of the always-on expert; 0 = none
    shared_gate: bool = False


@dataclass(frozen=True, kw_only=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): ranks of the compressed queries and keys, and
    head dims."""

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    norm_eps: float = 1e-6  # of the norms between down- and up-projection, whatever the layers' norms have


@dataclass(frozen=True)
class QueryGrowth:
    """Queries multiplied by 1 + beta ln(1 + floor(position / span)), so that attention stays sharp over long texts
    (Llama 4)."""

    beta: float
    span: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only language model. Hashable, static under `jax.jit`.

    `source` is the Hugging Face `config.json` it was read from. It takes no part in equality: it is kept so that an
    export can write back what was read.
    """

    family: str
    vocab_size: int
    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerKind, ...]
    context_length: int  # positions the checkpoint was made for
    # norms
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_weight: bool = True
    norm_bias: bool = False
    norm_offset: float = 0.0  # Gemma stores w where the layer multiplies by 1 + w
    pre_norm: bool = True
    final_norm: bool = True
    post_norm: bool = False  # each branch's output is normalised before the residual add
    parallel: bool = False  # attention and feed-forward read the same residual
    shared_norm: bool = False  # ... through the same norm
    qk_norm: Literal["none", "head", "heads", "full"] = (
        "none"  # head: one weight for all heads; heads: one a head; full: over all
    )
    qk_norm_after_rope: bool = False
    # projections
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    down_bias: bool = False  # TeleChat: of the feed-forward's projections, only the last has a bias
    normalize_head: bool = False  # Baichuan 2: each row of the head is divided by its length
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "xielu"] = "silu"  # xielu has weights
    gated: bool = True
    tie_embeddings: bool = False
    # positions other than rope
    learned_positions: int = 0  # rows of the table; 0 = none
    position_offset: int = 0
    alibi: bool = False
    alibi_scale: float = 1.0  # multiplies the slopes
    alibi_rounded: bool = False  # biases are bfloat16 products of a slope and a key's position
    embed_norm: bool = False
    # scalars
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    attn_scale: float | None = None  # None = head_dim ** -0.5
    query_growth: QueryGrowth | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    attn_softcap: float | None = None
    qkv_clip: float | None = None
    attn_sinks: bool = False
    swiglu_limit: float | None = None  # gpt-oss: clamped gate with sigmoid(1.702 x)
    moe: MoE | None = None
    mla: MLA | None = None
    mtp_modules: int = 0  # layers of the last kind behind the decoder, to predict further tokens in training
    source: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed. It no longer matches its `config.json`, so `source` is dropped."""
        return dataclasses.replace(self, **{"source": None, **changes})

    def differences(self, other: ModelConfig) -> list[str]:
        """Names of the fields in which two architectures differ; empty where they are equal."""
        compared = [f.name for f in dataclasses.fields(self) if f.compare]
        return [name for name in compared if getattr(self, name) != getattr(other, name)]


@dataclass(frozen=True)
class Stack:
    """`repeats` copies of `pattern`, stored as arrays with a leading [repeats] dim and run by one scan."""

    pattern: tuple[LayerKind, ...]
    repeats: int
    first: int  # index of its first layer

    def layer(self, position: int, repeat: int) -> int:
        """The model's layer index of one position of the pattern in one repeat."""
        return self.first + repeat * len(self.pattern) + position


def plan_stacks(layers: tuple[LayerKind, ...]) -> tuple[Stack, ...]:
    """Cuts a layer list into repeating runs, the longest first at each point.

    Gemma-3-1B's 26 layers become a 6-layer pattern x 4 and one layer x 2; DeepSeek-V3's become 3 dense and 58 sparse.
    """
    stacks, start = [], 0
    while start < len(layers):
        length, repeats = _longest_run(layers, start)
        stacks.append(Stack(layers[start : start + length], repeats, start))
        start += length * repeats
    return tuple(stacks)


def longest_stack(stacks: tuple[Stack, ...]) -> int:
    """Index of the stack that holds most layers, the first among equals: the one that a pipeline cuts into stages."""
    return max(range(len(stacks)), key=lambda k: (stacks[k].repeats * len(stacks[k].pattern), -k))


def _longest_run(layers: tuple[LayerKind, ...], start: int) -> tuple[int, int]:
    """(pattern length, repeats) of the run that covers most layers from `start`; the shortest pattern among equals."""
    best = (1, 1)
    for length in range(1, (len(layers) - start) // 2 + 1):
        pattern, repeats = layers[start : start + length], 1
        while layers[start + repeats * length : start + (repeats + 1) * length] == pattern:
            repeats += 1
        if repeats > 1 and length * repeats > best[0] * best[1]:
            best = (length, repeats)
    return best
