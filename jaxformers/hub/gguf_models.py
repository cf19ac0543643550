"""What a GGUF file means: its keys as a Hugging Face `config.json`, its tensors under Hugging Face names.

Converters to GGUF rename keys and tensors, reorder Llama's queries and keys for a rotation of neighbouring dims, and
store Gemma's norms as 1 + w; all of that is undone here, so that a GGUF file is one more checkpoint of its family.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxformers.families import read_config
from jaxformers.families.keys import Keys
from jaxformers.hub.gguf import GgufFile, Tensor
from jaxformers.hub.safetensors import Deferred
from jaxformers.models.config import ModelConfig

ROPE_FACTORS = "rope_freqs.weight"
TOKEN_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
END_OF_TURN = ("eos", "eot", "eom")  # tokens that end an answer
# Of no effect on what is computed: how a file and its model were made.
IRRELEVANT = ("tensor_data_layout", "rope.scaling.finetuned")

GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}
SANDWICH_NAMES = LAYER_NAMES | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
TENSOR_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<stem>\w+)\.(?P<tail>weight|bias)")


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`: the Hugging Face model it is, and what its converter changed.

    `read` gives the `config.json` keys beyond those that all share. `interleaved`: queries and keys were reordered.
    `norm_offset` was added to the weights of norms.
    """

    model_type: str
    class_name: str
    read: Callable[[Keys, GgufFile], dict[str, Any]]
    layer_names: Mapping[str, str] = field(default_factory=lambda: LAYER_NAMES)
    interleaved: bool = False
    norm_offset: float = 0.0


def gguf_config(file: GgufFile) -> ModelConfig:
    """The architecture of a GGUF file; its `source` is an equivalent `config.json`.

    ValueError names an unknown architecture (with those known), a missing, mistyped or unknown key, and settings that
    contradict each other or the tensors.
    """
    parts = file.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise ValueError(f"{file.path} is one of {parts} files of a model; join them with `llama-gguf-split --merge`")
    architecture = _architecture(file)
    keys = _keys(file)
    values = _common(keys, file) | architecture.read(keys, file)
    for key in IRRELEVANT:
        if key in keys.values:
            keys.expect(**{key: keys.values[key]})
    keys.finish()
    try:
        return read_config({"architectures": [architecture.class_name], "model_type": architecture.model_type} | values)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None


def gguf_tensors(file: GgufFile) -> dict[str, Tensor]:
    """The tensors under Hugging Face names and in Hugging Face order. A name that is not known stays as it is."""
    architecture, keys = _architecture(file), _keys(file)
    heads = keys.integer("attention.head_count")
    kv_heads = keys.integer("attention.head_count_kv", heads)
    tensors: dict[str, Tensor] = {}
    for name, tensor in file.tensors.items():
        if architecture.interleaved and (match := re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name)):
            tensor = _halves(tensor, heads if match[1] == "q" else kv_heads)
        if architecture.norm_offset and name.endswith("norm.weight"):
            tensor = _shifted(tensor, -architecture.norm_offset)
        if name != ROPE_FACTORS:  # it is in the config
            tensors[_hub_name(name, architecture.layer_names)] = tensor
    return tensors


def gguf_generation(file: GgufFile) -> dict[str, Any]:
    """What the file says as a generation_config.json: the ids that begin, end and pad a text."""
    ids = _token_ids(file)
    ends = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in END_OF_TURN]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    return ids | ({"eos_token_id": ends} if len(ends) > 1 else {})


def _architecture(file: GgufFile) -> Architecture:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(f"{file.path}: the architecture {name!r} is not read from GGUF; known are {known}")
    return ARCHITECTURES[name]


def _keys(file: GgufFile) -> Keys:
    """The keys of the architecture, without its name before each."""
    prefix = f"{file.metadata['general.architecture']}."
    own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    return Keys(own | {"model_type": f"{file.path}: {prefix[:-1]}"})


def _token_ids(file: GgufFile) -> dict[str, int]:
    found = {ours: file.metadata.get(f"tokenizer.ggml.{theirs}_token_id") for theirs, ours in TOKEN_IDS.items()}
    return {name: value for name, value in found.items() if value is not None}


def _common(c: Keys, file: GgufFile) -> dict[str, Any]:
    """The `config.json` keys that every architecture here has."""
    width, heads = c.integer("embedding_length"), c.integer("attention.head_count")
    head_dim = c.integer("attention.key_length", width // heads)
    c.expect(**{"attention.value_length": head_dim, "rope.dimension_count": head_dim, "attention.causal": True})
    c.expect(expert_count=0, expert_used_count=0)
    vocabulary = _vocabulary(file, width)
    c.expect(vocab_size=vocabulary)
    layers = c.integer("block_count")
    if layers > len(file.tensors):
        raise c.error("block_count", layers, f"at most the number of tensors, {len(file.tensors)}")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": c.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": c.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": c.integer("context_length"),
        "rms_norm_eps": c.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": c.number("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_rope_scaling(c, file),
        **_token_ids(file),
    }


def _vocabulary(file: GgufFile, width: int) -> int:
    """Ids that the embedding has; a tokenizer may not have more."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[1] != width:
        found = "missing" if embedding is None else f"of shape {list(embedding.shape)}"
        raise ValueError(f"{file.path}: token_embd.weight is {found}; it must be [vocabulary, {width}]")
    tokens = file.metadata.get("tokenizer.ggml.tokens", ())
    if isinstance(tokens, list) and len(tokens) > embedding.shape[0]:
        raise ValueError(f"{file.path} has {len(tokens)} tokens, but token_embd.weight only {embedding.shape[0]} rows")
    return embedding.shape[0]


def _rope_scaling(c: Keys, file: GgufFile) -> dict[str, Any]:
    kind = c.text("rope.scaling.type", "none")
    original = c.integer("rope.scaling.original_context_length", None)
    if ROPE_FACTORS in file.tensors:
        return {"rope_scaling": _llama3_scaling(c, file)}
    if kind == "none":
        return {}
    scaling = {"rope_type": kind, "factor": c.number("rope.scaling.factor")}
    if kind == "yarn" and original is not None:
        scaling["original_max_position_embeddings"] = original
    return {"rope_scaling": scaling}


def _llama3_scaling(c: Keys, file: GgufFile) -> dict[str, Any]:
    """The settings behind the divisors of Llama 3.1's frequencies, which are all that a file keeps of them."""
    factors = np.asarray(file.tensors[ROPE_FACTORS]).astype(np.float64)
    dim = c.integer("attention.key_length", c.integer("embedding_length") // c.integer("attention.head_count"))
    scaling = {
        "rope_type": "llama3",
        "factor": round(float(factors.max()), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = _llama3_factors(scaling, dim, c.number("rope.freq_base", 10_000.0))
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(f"{file.path}: {ROPE_FACTORS} is not the scaling of Llama 3.1, the only one read from factors")
    return scaling


def _llama3_factors(scaling: Mapping[str, Any], dim: int, theta: float) -> np.ndarray:
    """What each of the dim / 2 frequencies is divided by."""
    factor, low, high = (scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = scaling["original_max_position_embeddings"] * theta ** -(np.arange(0, dim, 2) / dim) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / factor + smooth)


def _llama(_c: Keys, file: GgufFile) -> dict[str, Any]:
    biases = {"attention_bias": "attn_output.bias", "mlp_bias": "ffn_down.bias"}
    return {key: f"blk.0.{name}" in file.tensors for key, name in biases.items()}


def _plain(_c: Keys, _file: GgufFile) -> dict[str, Any]:
    return {}


def _gemma(_c: Keys, _file: GgufFile) -> dict[str, Any]:
    return {"hidden_activation": "gelu_pytorch_tanh"}


def _scaled_query(c: Keys, big: int) -> int:
    """What attention logits are divided by the root of: the head's width, or in the biggest model, which is known by
    its number of layers, the model's width over its heads."""
    width, heads = c.integer("embedding_length"), c.integer("attention.head_count")
    return width // heads if c.integer("block_count") == big else c.integer("attention.key_length", width // heads)


def _gemma2(c: Keys, file: GgufFile) -> dict[str, Any]:
    return _gemma(c, file) | {
        "query_pre_attn_scalar": _scaled_query(c, big=46),
        "sliding_window": c.integer("attention.sliding_window", 4096),
        "attn_logit_softcapping": c.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": c.number("final_logit_softcapping", 30.0),
    }


def _gemma3(c: Keys, file: GgufFile) -> dict[str, Any]:
    pattern = c.integer("attention.sliding_window_pattern", 6)
    kinds = ("full_attention", "sliding_attention")
    return _gemma(c, file) | {
        "query_pre_attn_scalar": _scaled_query(c, big=62),
        "sliding_window": c.integer("attention.sliding_window", 4096),
        "rope_theta": c.number("rope.freq_base", 1_000_000.0),
        "rope_local_base_freq": c.number("rope.freq_base_swa", 10_000.0),
        "layer_types": [kinds[(i + 1) % pattern > 0] for i in range(c.integer("block_count"))],
    }


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _llama, interleaved=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _plain),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _plain),
    "gemma": Architecture("gemma", "GemmaForCausalLM", _gemma, norm_offset=1.0),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _gemma2, SANDWICH_NAMES, norm_offset=1.0),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", _gemma3, SANDWICH_NAMES, norm_offset=1.0),
}


def _hub_name(name: str, layer_names: Mapping[str, str]) -> str:
    match = TENSOR_NAME.fullmatch(name)
    table = layer_names if match and match["layer"] else GLOBAL_NAMES
    if match is None or match["stem"] not in table:
        return name
    layer = f"model.layers.{match['layer']}." if match["layer"] else ""
    return f"{layer}{table[match['stem']]}.{match['tail']}"


def _halves(tensor: Tensor, heads: int) -> Tensor:
    """Rows [heads, N / 2, 2] of a rotation of neighbours, as the rows [heads, 2, N / 2] of one of halves."""
    rows, *rest = tensor.shape

    def reordered() -> np.ndarray:
        return np.asarray(tensor).reshape(heads, -1, 2, *rest).swapaxes(1, 2).reshape(rows, *rest)

    # Rows that are no multiple of two a head are of the wrong shape, which the import says of them.
    return tensor if rows % (2 * heads) else Deferred(tensor.shape, tensor.dtype, reordered)


def _shifted(tensor: Tensor, by: float) -> Tensor:
    return Deferred(tensor.shape, tensor.dtype, lambda: (np.asarray(tensor) + by).astype(tensor.dtype))
