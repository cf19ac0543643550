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
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPED = MOE | {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}
GPT2 = {name: BASE[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}


@dataclass(frozen=True)
class Row:
    """The `config.json` of one checkpoint. `cached` is False where the cache is known to differ from a single pass.

    `attention` is the reference's implementation to compare with.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=lambda: BASE)
    cached: bool = True
    attention: str = "eager"


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
    "arcee": Row("arcee", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "seed_oss": Row("seed_oss", {"head_dim": 16, "attention_out_bias": True}),
    "internlm3": Row("internlm3", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "ministral": Row(
        "ministral", {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"] * 2, "head_dim": 16}
    ),
    "ministral3": Row(
        "ministral3",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "rope_parameters": YARN
            | {
                "llama_4_scaling_beta": 0.5,
                "original_max_position_embeddings": 4,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "ernie4_5": Row("ernie4_5", {"head_dim": 16, "use_bias": True}),
    "ernie4_5_moe": Row(
        "ernie4_5_moe",
        {
            "moe_k": 2,
            "moe_num_experts": 5,
            "moe_intermediate_size": 16,
            "moe_layer_start_index": 1,
            "moe_layer_interval": 2,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": Row(
        "smollm3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5, "tie_word_embeddings": True},
    ),
    "hunyuan_v1_dense": Row("hunyuan_v1_dense", {"head_dim": 16, "attention_bias": True}),
    "hunyuan_v1_dense-alpha": Row(
        "hunyuan_v1_dense", {"head_dim": 16, "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0}}
    ),
    "hunyuan_v1_moe": Row("hunyuan_v1_moe", {"head_dim": 16, "num_experts": 5, "moe_topk": 2}),
    "exaone4": Row("exaone4", {"sliding_window": 5}),
    "exaone4-full": Row(
        "exaone4", {"sliding_window": None, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    ),
    "qwen2_moe": Row(
        "qwen2_moe",
        MOE | {"num_experts": 5, "shared_expert_intermediate_size": 20, "num_hidden_layers": 3, "mlp_only_layers": [0]},
    ),
    "qwen2_moe-windows": Row(
        "qwen2_moe",
        MOE
        | {"num_experts": 4, "shared_expert_intermediate_size": 20, "num_hidden_layers": 4}
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
    ),
    "gemma": Row("gemma", {"head_dim": 16, "tie_word_embeddings": True}),
    "phi": Row("phi"),
    "phi3": Row("phi3", {"sliding_window": 6}),
    # A longer text than the first context turns all its keys by other factors, so short prompts are no part of it.
    "phi3-long": Row(
        "phi3",
        {"original_max_position_embeddings": 8, "rope_parameters": LONGROPE, "num_hidden_layers": 2},
        cached=False,
    ),
    "phimoe": Row(
        "phimoe",
        {
            "num_local_experts": 5,
            "router_jitter_noise": 0.3,
            "attention_bias": True,
            "lm_head_bias": True,
            "rope_parameters": LONGROPE
            | {"short_mscale": 1.1, "long_mscale": 1.2, "original_max_position_embeddings": 32},
        },
    ),
    "olmo": Row("olmo", {"clip_qkv": 0.3}),
    "olmo2": Row("olmo2", {"attention_bias": True}),
    "olmo3": Row(
        "olmo3",
        {
            "sliding_window": 5,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "olmoe": Row("olmoe", {"num_experts": 5, "num_experts_per_tok": 2, "clip_qkv": 0.5, "norm_topk_prob": True}),
    "deepseek_v2": Row(
        "deepseek_v2", DEEPSEEK | {"topk_method": "group_limited_greedy", "rope_parameters": YARN | {"mscale": 0.7}}
    ),
    "deepseek_v2-lite": Row("deepseek_v2", DEEPSEEK | {"q_lora_rank": None, "topk_method": "greedy"}),
    "dots1": Row(
        "dots1",
        GROUPED | {"norm_topk_prob": True, "routed_scaling_factor": 2.0, "sliding_window": 5, "max_window_layers": 2},
    ),
    "glm": Row("glm", {"head_dim": 16}),
    "glm4": Row("glm4", {"head_dim": 16}),
    "glm4_moe": Row("glm4_moe", GROUPED | {"head_dim": 16, "use_qk_norm": True, "attention_bias": True}),
    "granite": Row(
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.0,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "granitemoe": Row("granitemoe", {"num_local_experts": 5, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "cohere": Row("cohere", {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.5}),
    "cohere2": Row("cohere2", {"sliding_window": 5, "tie_word_embeddings": True}),
    "starcoder2": Row("starcoder2", {"sliding_window": 5, "tie_word_embeddings": True}),
    "gpt_bigcode": Row(
        "gpt_bigcode", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "n_inner": 40}, base=GPT2
    ),
    "gpt_bigcode-heads": Row(
        "gpt_bigcode", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "multi_query": False}, base=GPT2
    ),
    "stablelm": Row("stablelm", {"use_qkv_bias": True}),
    "stablelm-parallel": Row("stablelm", {"use_parallel_residual": True, "num_hidden_layers": 2}),
    "nemotron": Row("nemotron", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "gpt_neox": Row("gpt_neox", base={name: BASE[name] for name in BASE if name != "num_key_value_heads"}),
    "gpt_neox-serial": Row(
        "gpt_neox",
        {"use_parallel_residual": False, "num_hidden_layers": 2, "tie_word_embeddings": True},
        base={name: BASE[name] for name in BASE if name != "num_key_value_heads"},
    ),
    "gptj": Row("gptj", {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64, "rotary_dim": 4}, base=GPT2),
    "opt": Row(
        "opt",
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "ffn_dim": 40,
            "max_position_embeddings": 64,
        },
        base=GPT2,
    ),
    # Six heads, so that the slopes are no plain geometric sequence.
    "bloom": Row("bloom", {"hidden_size": 48, "n_head": 6, "n_layer": 3}, base=GPT2),
    "mpt": Row("mpt", {"d_model": 48, "n_heads": 6, "n_layers": 3, "attn_config": {"clip_qkv": 0.5}}, base=GPT2),
    "falcon": Row("falcon", {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}, base=GPT2),
    "falcon-grouped": Row(
        "falcon",
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "num_hidden_layers": 2,
            "new_decoder_architecture": True,
            "bias": True,
            "tie_word_embeddings": False,
        },
        base=GPT2,
    ),
    "falcon-alibi": Row(
        "falcon",
        {
            "hidden_size": 64,
            "num_attention_heads": 16,
            "num_hidden_layers": 2,
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
        },
        base=GPT2,
        attention="sdpa",  # the eager one adds the position biases twice
    ),
    "apertus": Row("apertus", {"rope_parameters": LLAMA3, "attention_bias": True}),
    "helium": Row("helium", {"head_dim": 8}),
    "minimax_m2": Row(
        "minimax_m2",
        {
            "head_dim": 16,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "nanochat": Row("nanochat", {"final_logit_softcapping": 1.0}),
}


@dataclass(frozen=True)
class Checkpoint:
    """One row as the reference's model, the directory it was saved in, and what we read from there."""

    name: str
    row: Row
    directory: Path
    model: torch.nn.Module
    ours: Pretrained


# A session has hundreds of programs and models: those of a row go when its tests are over.
@functools.lru_cache(maxsize=4)
def checkpoint(name: str) -> Checkpoint:
    """The checkpoint of a row, made once for its tests."""
    row = ROWS[name]
    directory = Path(_root().name, name)
    model = build_model(row)
    model.save_pretrained(directory)
    return Checkpoint(name, row, directory, model, read_pretrained(directory))


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="jaxformers-checkpoints-")


def build_model(row: Row) -> torch.nn.Module:
    """The reference's model with random weights, the same each time, in evaluation mode and float32."""
    config = transformers.AutoConfig.for_model(row.model_type, **row.base | row.settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=row.attention)
    model = model.eval().float()
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


def assert_close(ours: Any, truth: Any, *, what: str = "", tolerance: float = 1e-5, scale: float | None = None) -> None:
    """Every element is as near as `tolerance` times the largest magnitude of the truth (or `scale`)."""
    ours, truth = (np.asarray(values).astype(np.float64) for values in (ours, truth))
    assert ours.shape == truth.shape, f"{what}: {ours.shape} is not {truth.shape}"
    error, scale = np.abs(ours - truth).max(initial=0.0), scale or np.abs(truth).max(initial=0.0)
    assert error <= tolerance * scale, f"{what}: off by {error:.2e} where the largest is {scale:.2e}"
