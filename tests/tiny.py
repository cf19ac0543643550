"""Models, batches and corpora small enough to compile in seconds, shared by tests of several folders."""

import json
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxformers.models.config import LayerKind, ModelConfig, MoE
from jaxformers.models.params import Params, ParamSpec, model_spec

LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Latent attention, experts behind a first dense layer, and a module that predicts a token further.
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
}


def one_sparse_layer(m: MoE, *, d_model: int, d_ff: int) -> ModelConfig:
    """A model of one layer with these experts."""
    return ModelConfig(
        family="none",
        vocab_size=11,
        d_model=d_model,
        d_ff=d_ff,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        layers=(LayerKind(ffn="moe"),),
        context_length=16,
        moe=m,
    )


def packed_batch(rows: int, length: int = 32, *, vocab_size: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch whose rows hold one to three documents of random lengths, and padding behind most of them."""
    draw = np.random.default_rng(seed)
    batch = {
        "tokens": draw.integers(0, vocab_size, (rows, length), dtype=np.int32),
        "targets": draw.integers(0, vocab_size, (rows, length), dtype=np.int32),
        "weights": np.zeros((rows, length), np.float32),
        "positions": np.zeros((rows, length), np.int32),
        "segment_ids": np.zeros((rows, length), np.int32),
    }
    for row in range(rows):
        ends = np.sort(draw.choice(np.arange(2, length + 1), size=draw.integers(1, 4), replace=False))
        for segment, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True), start=1):
            batch["weights"][row, start : end - 1] = 1  # a document's last token has no target
            batch["positions"][row, start:end] = np.arange(end - start)
            batch["segment_ids"][row, start:end] = segment
    return batch


def random_params(cfg: ModelConfig, *, seed: int = 0) -> Params:
    """Parameters as numpy arrays, made without a compiler; no norm or bias is at its initial one or zero, which would
    hide that it is missing."""
    draw = np.random.default_rng(seed)

    def make(spec: ParamSpec) -> np.ndarray:
        noise = draw.standard_normal(spec.shape, dtype=np.float32)
        if spec.init in ("zeros", "ones"):
            return 0.1 * noise + np.float32(spec.init == "ones")
        return noise * np.float32(spec.fan_in**-0.5)

    return jax.tree.map(make, model_spec(cfg))


def relative_error(ours: Any, truth: Any) -> float:
    """The largest distance of any element of two trees, relative to the largest magnitude in its own leaf."""

    def error(a: Any, b: Any) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        return float(np.abs(a - b).max(initial=0.0) / max(np.abs(b).max(initial=0.0), 1e-30))

    return max(jax.tree.leaves(jax.tree.map(error, ours, truth)))


def assert_bit_equal(ours: Any, truth: Any) -> None:
    """Every leaf of two trees holds the same bytes."""
    ours, truth = jax.tree_util.tree_flatten_with_path(ours)[0], jax.tree_util.tree_flatten_with_path(truth)[0]
    assert [path for path, _ in ours] == [path for path, _ in truth]
    for (path, a), (_, b) in zip(ours, truth, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype, jax.tree_util.keystr(path)
        assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


def write_corpus(path: Path, *, documents: int = 80, seed: int = 0) -> Path:
    """A .jsonl of short texts with some regularity in them, so that a loss can fall."""
    draw = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "of", "the", "and", "naïve", "x1 ==", "42;"]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 14))) + "\n" for _ in range(documents)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def run_config(folder: Path, **sections: Any) -> dict[str, Any]:
    """A training run over a tiny corpus in `folder`, byte tokens, two layers; sections are merged over it."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus)
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": LLAMA,
        "tokenizer": {"kind": "bytes"},
        "data": {
            "paths": str(corpus),
            "cache_dir": str(folder / "cache"),
            "sequence_length": 32,
            "packing_window": 16,
            "validation_fraction": 0.2,
            "workers": 1,
        },
        "mesh": {"fsdp": 1, "dp": 8},
        "runtime": {"layers": "scan"},
        "train": {"steps": 8, "batch_size": 8, "eval_batches": 2},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"every_steps": 4},
    }
    for name, section in sections.items():
        mergeable = isinstance(section, dict) and isinstance(values.get(name), dict)
        values[name] = values[name] | section if mergeable else section
    return values


def flip(path: Path, bit: int = 999) -> None:
    """One bit of a file changes, as it does on a bad disk."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
