"""Checkpoints of the types that `transformers` does not implement.

Each has a *twin*: a tiny model that `transformers` does implement, computing the same, whose tensors are laid out anew
under the names and in the fusions that the type's authors publish. Where a model differs from every twin by one part,
that part is written here from its published description.
"""

import copy
import functools
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from families.checkpoints import BASE, DEEPSEEK, VOCAB, Row, build_model, perturb
from torch import nn
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from jaxformers.hub.pretrained import Pretrained, read_pretrained

LAYERS = 2
TINY = BASE | {"num_hidden_layers": LAYERS, "rope_theta": 10_000.0}
MULTI_HEAD = {"num_key_value_heads": 4}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}
# What the authors' files share with a twin's.
SHARED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LLAMA_KEYS = {key: TINY[key] for key in SHARED} | {"hidden_act": "silu", "rms_norm_eps": 1e-6}
POSITIONS = {"max_position_embeddings": 64}

Tensors = dict[str, torch.Tensor]


# -- laying a twin's tensors out anew


@dataclass(frozen=True)
class Layout:
    """Where a twin's tensors go, by module: `renamed` moves one, `packed` joins some into one. `{l}` is the layer.

    The weight and the bias of a module move alike. `dropped` are endings of foreign tensors that the type lacks; in
    the twin they are zero.
    """

    renamed: Mapping[str, str]
    packed: Mapping[str, tuple[tuple[str, ...], Callable[..., torch.Tensor]]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def __call__(self, tensors: Tensors) -> Tensors:
        left, laid = dict(tensors), {}
        moves = {new: ((old,), lambda a: a) for old, new in self.renamed.items()} | dict(self.packed)
        for layer in range(LAYERS):
            for new, (old, join) in moves.items():
                for tail in ("weight", "bias"):
                    names = [f"{module.format(l=layer)}.{tail}" for module in old]
                    if names[0] in left:
                        laid[f"{new.format(l=layer)}.{tail}"] = join(*(left.pop(name) for name in names))
        assert not left, sorted(left)
        return {name: tensor.contiguous() for name, tensor in laid.items() if not name.endswith(self.dropped)}


def stacked(*parts: torch.Tensor) -> torch.Tensor:
    """The rows of one after those of another."""
    return torch.cat(parts)


def by_kv_head(heads: int) -> Callable[..., torch.Tensor]:
    """For each of the kv heads, all that it has in every part."""
    return lambda *parts: torch.cat([p.unflatten(0, (heads, -1)) for p in parts], dim=1).flatten(0, 1)


LAYER = "model.layers.{l}."
ATTENTION, MLP = f"{LAYER}self_attn.", f"{LAYER}mlp."
QKV = tuple(f"{ATTENTION}{x}_proj" for x in "qkv")
SAME = {"model.embed_tokens": "model.embed_tokens", "model.norm": "model.norm", "lm_head": "lm_head"}
SAME |= {f"{LAYER}{x}": f"{LAYER}{x}" for x in ("input_layernorm", "post_attention_layernorm", "self_attn.o_proj")}
SAME |= {f"{MLP}{x}_proj": f"{MLP}{x}_proj" for x in ("gate", "up", "down")}
LLAMA = SAME | {module: module for module in QKV}


def under(embed: str, norm: str, head: str, layer: str, **modules: str) -> dict[str, str]:
    """The twin's modules under the names of another type; those of a layer are given by our own short names."""
    ours = {
        "o": f"{ATTENTION}o_proj",
        "q": QKV[0],
        "attn_norm": f"{LAYER}input_layernorm",
        "ffn_norm": f"{LAYER}post_attention_layernorm",
        **{x: f"{MLP}{x}_proj" for x in ("gate", "up", "down")},
    }
    outside = {"model.embed_tokens": embed, "model.norm": norm, "lm_head": head}
    return outside | {ours[name]: f"{layer}{module}" for name, module in modules.items()}


# -- parts that no model of `transformers` has


class NormHead(nn.Linear):
    """A head whose rows are divided by their length (Baichuan 2, arXiv:2309.10305, section 2.4)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, nn.functional.normalize(self.weight))


class NoRotation(nn.Module):
    """The rotation by an angle of zero at every position."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim = head_dim

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        one = torch.ones(*position_ids.shape, self.head_dim, dtype=x.dtype)
        return one, 0 * one


class AlibiLlama(transformers.LlamaForCausalLM):
    """Llama with linear biases by distance (arXiv:2108.12409) in place of its rotation; the slopes are BLOOM's."""

    def __init__(self, config: transformers.LlamaConfig):
        super().__init__(config)
        self.model.rotary_emb = NoRotation(config.head_dim)
        heads = config.num_attention_heads
        self.slopes = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1].view(1, heads, 1, 1)

    def forward(self, ids: torch.Tensor, **kwargs: Any) -> Any:
        t = torch.arange(ids.shape[1])
        distance = (t[:, None] - t)[None, None]
        bias = torch.where(distance < 0, torch.finfo(torch.float32).min, -self.slopes * distance)
        return super().forward(ids, attention_mask=bias.to(self.dtype), use_cache=False, **kwargs)


class PanguLayer(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({f"{x}_proj": nn.Linear(width, width) for x in "qkvc"})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, ffn), "c_proj": nn.Linear(ffn, width)})

    def forward(self, x: torch.Tensor, query: torch.Tensor | None) -> torch.Tensor:
        normed = self.ln_1(x)
        asking = normed if query is None else query.expand_as(normed)
        q, k, v = (
            self.attn[f"{name}_proj"](source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name, source in (("q", asking), ("k", normed), ("v", normed))
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](mixed.transpose(1, 2).flatten(2))
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class PanguAlpha(nn.Module):
    """PanGu-alpha (arXiv:2104.12369, section 2.2): on top of a GPT, a layer of the same shape whose query is an
    embedding of the position and not of what was read; the GPT's final norm comes before it."""

    def __init__(self, *, width: int = 32, heads: int = 4, ffn: int = 48, layers: int = 3):
        super().__init__()
        tables = {"wte": nn.Embedding(VOCAB, width), "wpe": nn.Embedding(64, width), "wqe": nn.Embedding(64, width)}
        stack = nn.ModuleList(PanguLayer(width, heads, ffn) for _ in range(layers))
        self.transformer = nn.ModuleDict(tables | {"h": stack, "ln_f": nn.LayerNorm(width)})
        perturb(self)

    def forward(self, ids: torch.Tensor) -> SimpleNamespace:
        t = self.transformer
        positions = torch.arange(ids.shape[1])
        x = t["wte"](ids) + t["wpe"](positions)
        *gpt, top = t["h"]
        for layer in gpt:
            x = layer(x, None)
        x = top(t["ln_f"](x), t["wqe"](positions))
        return SimpleNamespace(logits=nn.functional.linear(x, t["wte"].weight))


def llama(model_type: str = "llama", **settings: Any) -> nn.Module:
    """A perturbed twin of Llama's shape."""
    return build_model(Row(model_type, settings, base=TINY))


def with_normalized_head() -> nn.Module:
    model = llama(**MULTI_HEAD)
    head = NormHead(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


def with_alibi() -> nn.Module:
    config = transformers.LlamaConfig(**TINY | ALIBI_SHAPE | {"num_key_value_heads": 6, "head_dim": 8})
    config._attn_implementation = "eager"
    model = AlibiLlama(config).eval().float()
    perturb(model)
    return model


def telechat(**settings: Any) -> nn.Module:
    """Biases behind attention and feed-forward only."""
    model = llama(attention_bias=True, mlp_bias=True, **settings)
    for name, parameter in model.named_parameters():
        if name.endswith(tuple(f"{x}_proj.bias" for x in ("q", "k", "v", "gate", "up"))):
            nn.init.zeros_(parameter)
    return model


# -- the twins

ALIBI_SHAPE = {"hidden_size": 48, "num_attention_heads": 6}  # heads that are no power of two
BAICHUAN = Layout(SAME, {f"{ATTENTION}W_pack": (QKV, stacked)})
INTERNLM2 = Layout(
    under(
        "model.tok_embeddings",
        "model.norm",
        "output",
        LAYER,
        o="attention.wo",
        attn_norm="attention_norm",
        ffn_norm="ffn_norm",
        gate="feed_forward.w1",
        down="feed_forward.w2",
        up="feed_forward.w3",
    ),
    {f"{LAYER}attention.wqkv": (QKV, by_kv_head(2))},
)
H = "transformer.h.{l}."
QWEN = Layout(
    under(
        "transformer.wte",
        "transformer.ln_f",
        "lm_head",
        H,
        o="attn.c_proj",
        attn_norm="ln_1",
        ffn_norm="ln_2",
        up="mlp.w1",
        gate="mlp.w2",
        down="mlp.c_proj",
    ),
    {f"{H}attn.c_attn": (QKV, stacked)},
)
GLM_LAYER = "transformer.encoder.layers.{l}."
CHATGLM = Layout(
    {
        **under(
            "transformer.embedding.word_embeddings",
            "transformer.encoder.final_layernorm",
            "transformer.output_layer",
            GLM_LAYER,
            o="self_attention.dense",
            attn_norm="input_layernorm",
            ffn_norm="post_attention_layernorm",
            down="mlp.dense_4h_to_h",
        ),
        f"{MLP}gate_up_proj": f"{GLM_LAYER}mlp.dense_h_to_4h",
    },
    {f"{GLM_LAYER}self_attention.query_key_value": (QKV, stacked)},
)
TELECHAT = Layout(
    under(
        "transformer.word_embeddings",
        "transformer.ln_f",
        "lm_head",
        H,
        q="self_attention.query",
        o="self_attention.dense",
        attn_norm="input_layernorm",
        ffn_norm="post_attention_layernorm",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
    ),
    {f"{H}self_attention.key_value": (QKV[1:], by_kv_head(2))},
    dropped=("query.bias", "key_value.bias", "gate_proj.bias", "up_proj.bias"),
)
TELECHAT_KEYS = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "n_layer": LAYERS,
    "n_head": 4,
    "num_key_value_heads": 2,
    "layer_norm_epsilon": 1e-6,
    "tie_word_embeddings": False,
}
TELECHAT3_YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0, "beta_slow": 1.0}


@dataclass(frozen=True)
class Twin:
    """`config` is the foreign `config.json`; `build` makes the twin, and `layout` moves its tensors."""

    config: dict[str, Any]
    build: Callable[[], nn.Module]
    layout: Callable[[Tensors], Tensors] = field(default_factory=lambda: Layout(LLAMA))


TWINS = {
    "baichuan": Twin(
        LLAMA_KEYS | POSITIONS | {"model_type": "baichuan", "architectures": ["BaiChuanForCausalLM"]},
        lambda: llama(**MULTI_HEAD),
        BAICHUAN,
    ),
    "baichuan-alibi": Twin(
        LLAMA_KEYS
        | ALIBI_SHAPE
        | {"model_type": "baichuan", "model_max_length": 64, "architectures": ["BaichuanForCausalLM"]},
        with_alibi,
        BAICHUAN,
    ),
    "baichuan2": Twin(
        LLAMA_KEYS | POSITIONS | {"model_type": "baichuan", "model_max_length": 64, "z_loss_weight": 0},
        with_normalized_head,
        BAICHUAN,
    ),
    "internlm": Twin(
        LLAMA_KEYS | POSITIONS | {"model_type": "internlm", "bias": True, "rotary": {"type": "origin", "base": 1000}},
        lambda: llama(attention_bias=True, **MULTI_HEAD, **ROPE),
    ),
    "internlm2": Twin(
        LLAMA_KEYS
        | POSITIONS
        | {"model_type": "internlm2", "bias": True, "num_key_value_heads": 2, "rope_theta": 1000},
        lambda: llama(attention_bias=True, **ROPE),
        INTERNLM2,
    ),
    "qwen": Twin(
        {key: TINY[key] for key in SHARED}
        | {
            "model_type": "qwen",
            "intermediate_size": 96,
            "kv_channels": 8,
            "layer_norm_epsilon": 1e-6,
            "rotary_emb_base": 1000,
            "rotary_pct": 1.0,
            "seq_length": 64,
            "no_bias": True,
            "use_dynamic_ntk": True,
            "use_logn_attn": True,
        },
        lambda: llama("qwen2", **MULTI_HEAD, **ROPE),
        QWEN,
    ),
    "chatglm": Twin(
        {
            "model_type": "chatglm",
            "add_bias_linear": False,
            "add_qkv_bias": True,
            "ffn_hidden_size": 48,
            "hidden_size": 32,
            "kv_channels": 16,
            "layernorm_epsilon": 1e-6,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "num_attention_heads": 4,
            "num_layers": LAYERS,
            "padded_vocab_size": VOCAB,
            "rope_ratio": 0.1,
            "seq_length": 64,
        },
        lambda: llama(
            "glm",
            head_dim=16,
            attention_bias=True,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
        ),
        CHATGLM,
    ),
    # The trained length is twice the first: a base of 3 ** (8 / 6) times 10,000.
    "telechat": Twin(
        TELECHAT_KEYS | {"model_type": "telechat", "training_seqlen": 64, "base_seqlen": 32},
        lambda: telechat(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0 * 3 ** (8 / 6)}),
        TELECHAT,
    ),
    "telechat2": Twin(
        TELECHAT_KEYS
        | {"model_type": "telechat2", "training_seqlen": 64, "base_seqlen": 64, "tie_word_embeddings": True},
        lambda: telechat(tie_word_embeddings=True),
        TELECHAT,
    ),
    "telechat3": Twin(
        LLAMA_KEYS
        | POSITIONS
        | {
            "model_type": "telechat3",
            "num_key_value_heads": 2,
            "rope_theta": 1000,
            "rope_scaling": TELECHAT3_YARN | {"rope_type": "telechat3-yarn", "type": "telechat3-yarn"},
        },
        lambda: llama(
            rope_parameters=TELECHAT3_YARN
            | {"rope_type": "yarn", "rope_theta": 1000.0, "attention_factor": 0.07 * np.log(4.0) + 1}
        ),
    ),
    "telechat3_moe": Twin(
        TINY | DEEPSEEK | {"model_type": "telechat3_moe", "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        lambda: build_model(Row("deepseek_v3", DEEPSEEK)),
        lambda tensors: tensors,
    ),
    "skywork": Twin(
        LLAMA_KEYS | POSITIONS | {"model_type": "skywork", "num_key_value_heads": 2, "rope_theta": 1000},
        lambda: llama(**ROPE),
    ),
    "Yi": Twin(
        LLAMA_KEYS | POSITIONS | {"model_type": "Yi", "num_key_value_heads": 2, "rope_theta": 1000},
        lambda: llama(**ROPE),
        Layout(LLAMA | {f"{LAYER}input_layernorm": f"{LAYER}ln1", f"{LAYER}post_attention_layernorm": f"{LAYER}ln2"}),
    ),
    "gpt_pangu": Twin(
        {
            "model_type": "gpt_pangu",
            "vocab_size": VOCAB,
            "max_position_embeddings": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": 3,
            "num_heads": 4,
            "activation_function": "gelu",
            "layer_norm_epsilon": 1e-5,
        },
        PanguAlpha,
        lambda tensors: tensors,
    ),
}


# -- their checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """One twin, the directory its foreign form is in, and what we read from there."""

    twin: Twin
    directory: Path
    model: nn.Module
    ours: Pretrained


@functools.cache
def checkpoint(name: str) -> Checkpoint:
    """The checkpoint of a twin, made once a session."""
    twin, directory = TWINS[name], Path(_root().name, name)
    directory.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = twin.build()
    safetensors.torch.save_file(twin.layout(tensors_of(model)), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(twin.config | {"dtype": "float32"}))
    return Checkpoint(twin, directory, model, read_pretrained(directory))


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="jaxformers-foreign-")


def tensors_of(model: nn.Module) -> Tensors:
    """The tensors of a model under the names that it is saved with, which are not always those in memory."""
    if not isinstance(model, transformers.PreTrainedModel):
        return dict(model.state_dict())
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return safetensors.torch.load_file(Path(directory, "model.safetensors"))


def gradients(name: str, ids: np.ndarray) -> tuple[float, Tensors]:
    """The mean next-token loss, and its gradients under the foreign names."""
    c = checkpoint(name)
    model, ids = copy.deepcopy(c.model), torch.from_numpy(ids).long()
    loss = nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for buffer in model.buffers():
        buffer.zero_()
    return loss.item(), c.twin.layout(tensors_of(model))
