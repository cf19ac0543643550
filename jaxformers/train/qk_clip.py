"""QK-clip: attention whose logits grow too large has its query and key weights scaled down, head by head.

What makes Muon stable at scale as MuonClip (arXiv:2507.20534, section 2.1). Knows nothing of how logits are measured.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.models.config import LayerKind, ModelConfig, longest_stack, plan_stacks
from jaxformers.models.params import Params


def qk_clip(
    params: Params, max_logits: jax.Array, threshold: float, cfg: ModelConfig, *, slots: np.ndarray | None = None
) -> Params:
    """The parameters with each head whose largest logit was S > threshold scaled so that it would have been the
    threshold: by threshold / S in all.

    max_logits float32 [layers, H]: the largest logit before the softmax over a batch. Queries and keys that are a
    head's own share the factor as its root each; where keys serve several heads, only queries take it, so that no head
    changes another: with grouped queries, and in the rotated part of latent attention.
    params is the plain tree or `layout.unstack`'s; slots: which repeat each place of the longest stack holds, where
    they are not in the model's order. ValueError for a model that normalises queries and keys, as their weights do not
    bound its logits.
    """
    check_qk_clip(cfg)
    factor = threshold / jnp.maximum(max_logits, threshold)

    def clipped(p: Params, kind: LayerKind, rows: int | np.ndarray) -> Params:
        scale = _latent if kind.mixer == "mla" else _grouped
        return p | {"attn": p["attn"] | scale(p["attn"], factor[rows], cfg)}

    if "blocks" in params:
        blocks = [clipped(p, kind, i) for i, (p, kind) in enumerate(zip(params["blocks"], cfg.layers, strict=True))]
        return params | {"blocks": blocks}
    stacks = plan_stacks(cfg.layers)
    layers = []
    for k, (patterns, stack) in enumerate(zip(params["layers"], stacks, strict=True)):
        held = range(stack.repeats) if slots is None or k != longest_stack(stacks) else slots
        rows = [np.array([stack.layer(j, repeat) for repeat in held]) for j in range(len(stack.pattern))]
        layers.append([clipped(p, *of) for p, *of in zip(patterns, stack.pattern, rows, strict=True)])
    return params | {"layers": layers}


def check_qk_clip(cfg: ModelConfig) -> None:
    """ValueError for a model that it cannot help."""
    if cfg.qk_norm != "none":
        raise ValueError(
            f"qk_clip scales the weights of queries and keys, which do not bound the logits of {cfg.family}, as it "
            f"normalises both (qk_norm={cfg.qk_norm})"
        )


def _grouped(p: Params, factor: jax.Array, cfg: ModelConfig) -> Params:
    """q [..., D, H, N] and k [..., D, K, N], and their biases [..., H, N]; factor [..., H]."""
    heads = factor[..., None, :, None]
    if cfg.num_kv_heads < cfg.num_heads:
        scales = {"q": heads, "q_b": heads[..., 0, :, :]}
    else:
        root = jnp.sqrt(heads)
        scales = {"q": root, "k": root, "q_b": root[..., 0, :, :], "k_b": root[..., 0, :, :]}
    return {name: p[name] * scale for name, scale in scales.items() if name in p}


def _latent(p: Params, factor: jax.Array, cfg: ModelConfig) -> Params:
    """The queries' last projection [..., R, H, nope + rope] and k_b [..., R, H, nope]; heads share the rotated key."""
    assert cfg.mla is not None
    name, heads = "q_b" if "q_b" in p else "q", factor[..., None, :, None]
    nope, rope = p[name][..., : cfg.mla.nope_dim], p[name][..., cfg.mla.nope_dim :]
    root = jnp.sqrt(heads)
    return {name: jnp.concatenate([nope * root, rope * heads], axis=-1), "k_b": p["k_b"] * root}
