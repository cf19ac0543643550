"""Command R: both branches behind one layer norm without bias, scaled logits; rope only on Command R7B's windows."""

from typing import Any

from jaxformers.families import common as fam
from jaxformers.families.keys import Keys
from jaxformers.models.config import LayerKind, ModelConfig


def _cohere(c: Keys, layers: tuple[LayerKind, ...], **values: Any) -> ModelConfig:
    return fam.llama_config(
        c,
        layers=layers,
        **fam.llama_attention(c),
        norm="layer",
        norm_eps=c.number("layer_norm_eps", 1e-5),
        parallel=True,
        shared_norm=True,
        logit_scale=c.number("logit_scale", 0.0625),
        tie_embeddings=c.flag("tie_word_embeddings", True),
        **values,
    )


def read_cohere(c: Keys) -> ModelConfig:
    layers = fam.uniform_layers(c, rope=fam.rope(c, fam.head_dim(c), interleaved=True, theta=500_000.0))
    return _cohere(c, layers, qk_norm="heads" if c.flag("use_qk_norm", False) else "none")


def read_cohere2(c: Keys) -> ModelConfig:
    pattern, window = c.integer("sliding_window_pattern", 4), c.integer("sliding_window", 4096, null=None)
    types = fam.layer_types(c, fam.full_every(pattern))
    local = LayerKind(window=window, rope=fam.rope(c, fam.head_dim(c), interleaved=True) if window else None)
    c.expect(use_qk_norm=False)
    # Settings of published files that say what the type always does.
    c.expect(use_parallel_block=True, use_embedding_sharing=True, use_gated_activation=True, rotary_pct=1.0)
    c.expect(position_embedding_type="rope_gptj", layer_switch=pattern)
    c.expect(order_of_interleaved_layers="local_attn_first")
    return _cohere(c, tuple(local if t == "sliding_attention" else LayerKind() for t in types))


FAMILIES = {"cohere": fam.Family(read_cohere, fam.llama_names), "cohere2": fam.Family(read_cohere2, fam.llama_names)}
