"""Tiny GGUF files, written by the format's own library from random `transformers` models, as llama.cpp's converter
writes them."""

import gguf
import numpy as np
import torch
import transformers

SIZES = {
    "hidden_size": 256,  # a row of the K types is a multiple of 256
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
# Head widths are those that `transformers` takes for granted where it reads the architecture from GGUF.
MODELS = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": False}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 128, "tie_word_embeddings": False}),
    "gemma": (transformers.GemmaConfig, {"head_dim": 64}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 256, "sliding_window": 5}),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {"head_dim": 256, "sliding_window": 5, "num_hidden_layers": 7},
    ),
}
HAS_OFFSET_NORMS = ("gemma", "gemma2", "gemma3")
BLOCKS = {"Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,))}  # bytes, and where its scales are


def random_model(arch, *, seed=0, **changes):
    """A model of two layers with every weight perturbed."""
    config_class, own = MODELS[arch]
    torch.manual_seed(seed)
    config = config_class(**(SIZES | {"rope_theta": 50_000.0} | own | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight += (0.1 if "norm" in name or "bias" in name else 0.02) * torch.randn_like(weight)
    return model


def metadata(writer, config):
    """The keys that llama.cpp's converter writes for any of these."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if getattr(config, "sliding_window", None) and writer.arch.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)


def permuted(weight, heads):
    """Rows for a rotation of neighbouring dims, as llama.cpp's converter orders Llama's queries and keys."""
    rows, *rest = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, *rest).swapaxes(1, 2).reshape(rows, *rest)


def tensors_of(arch, model):
    """The model's tensors under GGUF's names, as the converter changes them."""
    config = model.config
    names = gguf.get_tensor_name_map(
        {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[arch], config.num_hidden_layers
    )
    for name, weight in model.state_dict().items():
        stem, _, tail = name.rpartition(".")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = weight.numpy()
        if arch == "llama" and stem.endswith(("q_proj", "k_proj")):
            weight = permuted(weight, config.num_attention_heads if "q_proj" in stem else config.num_key_value_heads)
        if arch in HAS_OFFSET_NORMS and stem.endswith("norm"):
            weight = weight + 1
        yield f"{names.get_name(stem)}.{tail}", weight


def quantized(weight, kind):
    """Bytes of a matrix in a type. The library has no quantizer for the K types, so theirs are random."""
    kind = gguf.GGMLQuantizationType[kind]
    if kind.name not in BLOCKS:
        return gguf.quantize(weight, kind)
    size, scales = BLOCKS[kind.name]
    draw = np.random.default_rng(weight.size)
    blocks = draw.integers(0, 256, (weight.size // 256, size), dtype=np.uint8)
    for at in scales:
        small = draw.uniform(1e-4, 1e-3, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = small.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(weight.shape[0], -1)


def write_gguf(path, arch, model, *, kind="F32", extra=lambda writer: None, drop=(), more=()):
    """The model as a GGUF file whose matrices have the type `kind`; `extra` adds keys, `more` adds tensors."""
    writer = gguf.GGUFWriter(path, arch)
    metadata(writer, model.config)
    extra(writer)
    for name, weight in [*tensors_of(arch, model), *more]:
        if name in drop:
            continue
        if weight.ndim == 1 or kind == "F32":
            writer.add_tensor(name, weight.astype(np.float32))
        else:
            writer.add_tensor(name, quantized(weight, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
