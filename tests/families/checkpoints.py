"""Tiny random checkpoints of every family, written by `transformers` itself: the truth that ours is compared with.

No two settings of a row agree by accident: kv heads differ from heads, head dims from d_model / heads, windows are
shorter than the text, and every weight is perturbed, so that no missing bias or `1 + w` norm can hide behind its
initial value.
"""

import functools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from jaxformers.hub.pretrained import Pretrained, read_pretrained

VOCAB = 67
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
DEEPSEEK = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9},
}
GPT2 = {name: BASE[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}


@dataclass(frozen=True)
class Row:
    """The `config.json` of one checkpoint. `cached` is False where the cache is known to differ from a single pass."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=lambda: BASE)
    cached: bool = True


# One row is named after each model type; further rows are variants, where a type has settings worth a second look.
ROWS = {
    "llama": Row("llama", {"head_dim": 16, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "llama-linear": Row(
        "llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}, "tie_word_embeddings": True}
    ),
    # Longer texts than the context grow the base of the rotation, which keys in a cache do not follow.
    "llama-dynamic": Row(
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 8},
        cached=False,
    ),
    "mistral": Row("mistral", {"head_dim": 16, "sliding_window": 5}),
    "mixtral": Row("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 6}),
    "qwen2": Row(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "tie_word_embeddings": True},
    ),
    "qwen3": Row("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3-yarn": Row("qwen3", {"head_dim": 16, "rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3_moe": Row(
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
            "num_hidden_layers": 3,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3_moe-sparse-step": Row(
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 5,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "gemma2": Row(
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3_text": Row(
        "gemma3_text",
        {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 24,
            "attention_bias": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "tie_word_embeddings": True,
        },
    ),
    "deepseek_v3": Row("deepseek_v3", DEEPSEEK),
    "deepseek_v3-lite": Row(
        "deepseek_v3",
        DEEPSEEK
        | {
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "rope_interleave": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
            "rms_norm_eps": 1e-3,
        },
    ),
    "gpt2": Row("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64, "n_inner": 40}, base=GPT2),
    "gpt_oss": Row(
        "gpt_oss",
        {
            "head_dim": 16,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "swiglu_limit": 0.7,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
}


@dataclass(frozen=True)
class Checkpoint:
    """One row as the reference's model, the directory it was saved in, and what we read from there."""

    name: str
    row: Row
    directory: Path
    model: torch.nn.Module
    ours: Pretrained


@functools.cache
def checkpoint(name: str) -> Checkpoint:
    """The checkpoint of a row, made once a session."""
    row = ROWS[name]
    directory = Path(_root().name, name)
    model = build_model(row)
    model.save_pretrained(directory)
    return Checkpoint(name, row, directory, model, read_pretrained(directory))


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="jaxformers-checkpoints-")


def build_model(row: Row) -> torch.nn.Module:
    """The reference's model with random weights, in evaluation mode and float32."""
    config = transformers.AutoConfig.for_model(row.model_type, **row.base | row.settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    perturb(model)
    return model


@torch.no_grad()
def perturb(model: torch.nn.Module) -> None:
    """Moves every parameter and every saved buffer away from its initial value, always by the same noise."""
    noise = torch.Generator().manual_seed(1)
    for name, tensor in sorted(saved_tensors(model).items()):
        # A selection bias larger than the scores it shifts: most experts then have a negative preference.
        shift, spread = (-0.8, 0.4) if name.endswith("e_score_correction_bias") else (0.0, 0.12)
        tensor.copy_(tensor + shift + spread * torch.randn(tensor.shape, generator=noise))


def saved_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers under the names they have in memory, tied ones once."""
    parameters = dict(model.named_parameters())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    return parameters | buffers


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    """Random token ids int32, none of them special."""
    return np.random.default_rng(seed).integers(3, VOCAB, shape, dtype=np.int32)


@torch.no_grad()
def reference_logits(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(ids).long()).logits.float().numpy()


def assert_close(ours: Any, truth: Any, *, what: str = "", tolerance: float = 1e-5) -> None:
    """Every element is as near as `tolerance` times the largest magnitude of the truth."""
    ours, truth = (np.asarray(values).astype(np.float64) for values in (ours, truth))
    assert ours.shape == truth.shape, f"{what}: {ours.shape} is not {truth.shape}"
    error, scale = np.abs(ours - truth).max(initial=0.0), np.abs(truth).max(initial=0.0)
    assert error <= tolerance * scale, f"{what}: off by {error:.2e} where the largest is {scale:.2e}"
