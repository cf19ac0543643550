"""One declaration per weight, from which init, shapes, counts, shardings and checkpoint maps are all derived.

The parameter tree is a nested dict of arrays. `params["layers"][i][j]` holds the layers at position j of stack i's
pattern (see `config.plan_stacks`), each leaf with a leading [repeats] dim. `params["mtp"]` is a list of modules that
predict further tokens (see `mtp`).
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxformers.models.config import LayerKind, ModelConfig, plan_stacks

Params = dict[str, Any]
Init = Literal["normal", "residual", "zeros", "ones"] | float


@dataclass(frozen=True)
class ParamSpec:
    """One weight: its shape, a logical name per dim, and how it starts (a number is a constant).

    Not a pytree: a leaf, so `jax.tree.map` walks specs directly. `fan_in` sets the spread of a normal init; `n_in`
    is the number of input dims of a linear layer (those after an `experts` dim), 0 for anything that is not one.
    `flat` marks a vector that is one dim on disk although its shape here has more. dtype is what training keeps it in.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Init = "normal"
    fan_in: int = 1
    n_in: int = 0
    flat: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), self

    @property
    def num_batch(self) -> int:
        """Leading dims that count separate matrices: layers and experts."""
        return sum(axis in ("layers", "experts") for axis in self.axes)

    def drop_leading(self) -> ParamSpec:
        """The spec of one entry along the first dim."""
        return replace(self, shape=self.shape[1:], axes=self.axes[1:])

    def stacked(self, repeats: int) -> ParamSpec:
        """The spec of `repeats` of these in one array."""
        return replace(self, shape=(repeats, *self.shape), axes=("layers", *self.axes))


def linear_spec(
    shape: tuple[int, ...], axes: tuple[str | None, ...], *, n_in: int = 1, init: Init = "normal"
) -> ParamSpec:
    """The spec of a linear layer whose `n_in` dims after any `experts` dim are inputs."""
    first = int(axes[0] == "experts")
    return ParamSpec(shape, axes, init, math.prod(shape[first : first + n_in]), n_in)


def norm_spec(cfg: ModelConfig, *dims: int, axes: tuple[str | None, ...] | None = None) -> Params:
    """Weight and bias of a norm over `dims`, as far as the architecture has them."""
    axes = axes or (None,) * len(dims)
    spec = {}
    if cfg.norm_weight:
        spec["w"] = ParamSpec(dims, axes, "zeros" if cfg.norm_offset else "ones", flat=cfg.qk_norm == "full")
    if cfg.norm_bias:
        spec["b"] = ParamSpec(dims, axes, "zeros")
    return spec


def gqa_spec(cfg: ModelConfig) -> Params:
    """Grouped-query attention: q [D, H, N], k and v [D, K, N], o [H, N, D]."""
    d, h, k, n = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    spec: Params = {
        "q": linear_spec((d, h, n), ("embed", "heads", None)),
        "k": linear_spec((d, k, n), ("embed", "kv_heads", None)),
        "v": linear_spec((d, k, n), ("embed", "kv_heads", None)),
        "o": linear_spec((h, n, d), ("heads", None, "embed"), n_in=2, init="residual"),
    }
    if cfg.qkv_bias:
        spec["q_b"] = ParamSpec((h, n), ("heads", None), "zeros", flat=True)
        spec["k_b"] = ParamSpec((k, n), ("kv_heads", None), "zeros", flat=True)
        spec["v_b"] = ParamSpec((k, n), ("kv_heads", None), "zeros", flat=True)
    if cfg.o_bias:
        spec["o_b"] = ParamSpec((d,), (None,), "zeros")
    if cfg.qk_norm == "head":
        spec |= {"q_norm": norm_spec(cfg, n), "k_norm": norm_spec(cfg, n)}
    elif cfg.qk_norm != "none":
        spec["q_norm"] = norm_spec(cfg, h, n, axes=("heads", None))
        spec["k_norm"] = norm_spec(cfg, k, n, axes=("kv_heads", None))
    if cfg.attn_sinks:
        spec["sinks"] = ParamSpec((h,), ("heads",), "zeros")
    return spec


def query_spec(cfg: ModelConfig) -> Params:
    """Grouped-query attention with the table [P, D] that its queries are made from."""
    table = ParamSpec((cfg.context_length, cfg.d_model), (None, "embed"), "normal", cfg.d_model)
    return gqa_spec(cfg) | {"queries": table}


def mla_spec(cfg: ModelConfig) -> Params:
    """Multi-head latent attention: kv_a [D, R] and k_rope [D, P] compress, k_b and v_b [R, H, N] expand."""
    m = cfg.mla
    assert m is not None
    d, h, qk_dim = cfg.d_model, cfg.num_heads, m.nope_dim + m.rope_dim
    spec: Params = {
        "kv_a": linear_spec((d, m.kv_rank), ("embed", None)),
        "k_rope": linear_spec((d, m.rope_dim), ("embed", None)),
        "kv_norm": norm_spec(cfg, m.kv_rank),
        "k_b": linear_spec((m.kv_rank, h, m.nope_dim), ("embed", "heads", None)),
        "v_b": linear_spec((m.kv_rank, h, m.v_dim), ("embed", "heads", None)),
        "o": linear_spec((h, m.v_dim, d), ("heads", None, "embed"), n_in=2, init="residual"),
    }
    if m.q_rank is None:
        spec["q"] = linear_spec((d, h, qk_dim), ("embed", "heads", None))
    else:
        spec["q_a"] = linear_spec((d, m.q_rank), ("embed", None))
        spec["q_norm"] = norm_spec(cfg, m.q_rank)
        spec["q_b"] = linear_spec((m.q_rank, h, qk_dim), ("embed", "heads", None))
    return spec


def mlp_spec(cfg: ModelConfig, d_ff: int) -> Params:
    """Feed-forward network: up and gate [D, F], down [F, D]."""
    d = cfg.d_model
    spec = {
        "up": linear_spec((d, d_ff), ("embed", "mlp")),
        "down": linear_spec((d_ff, d), ("mlp", "embed"), init="residual"),
    }
    if cfg.gated:
        spec["gate"] = linear_spec((d, d_ff), ("embed", "mlp"))
    if cfg.mlp_bias or cfg.down_bias:
        spec["down_b"] = ParamSpec((d,), (None,), "zeros")
    if cfg.mlp_bias:
        spec["up_b"] = ParamSpec((d_ff,), ("mlp",), "zeros")
        if cfg.gated:
            spec["gate_b"] = ParamSpec((d_ff,), ("mlp",), "zeros")
    if cfg.activation == "xielu":
        # Both curvatures start at 0.8; a softplus keeps them positive, and that of the lower one above beta.
        alphas = {"alpha_p": math.log(math.expm1(0.8)), "alpha_n": math.log(math.expm1(0.8 - 0.5))}
        spec["xielu"] = {name: ParamSpec((1,), (None,), start) for name, start in alphas.items()}
        spec["xielu"] |= {"beta": ParamSpec((), (), 0.5), "eps": ParamSpec((), (), -1e-6)}
    return spec


def moe_spec(cfg: ModelConfig) -> Params:
    """Mixture of experts: router [D, E], gate and up [E, D, F], down [E, F, D], and the shared expert if there is
    one."""
    m, d = cfg.moe, cfg.d_model
    assert m is not None
    e, f = m.num_experts, m.d_ff
    spec: Params = {
        "router": linear_spec((d, e), ("embed", None)),
        "gate": linear_spec((e, d, f), ("experts", "embed", "mlp")),
        "up": linear_spec((e, d, f), ("experts", "embed", "mlp")),
        "down": linear_spec((e, f, d), ("experts", "mlp", "embed"), init="residual"),
    }
    if m.router_bias:
        spec["router_b"] = ParamSpec((e,), (None,), "zeros")
    if m.select_bias:
        spec["select_b"] = ParamSpec((e,), (None,), "zeros")
    if m.expert_bias:
        spec["gate_b"] = ParamSpec((e, f), ("experts", "mlp"), "zeros")
        spec["up_b"] = ParamSpec((e, f), ("experts", "mlp"), "zeros")
        spec["down_b"] = ParamSpec((e, d), ("experts", None), "zeros")
    if m.shared_d_ff:
        spec["shared"] = mlp_spec(cfg, m.shared_d_ff)
        if m.shared_gate:
            spec["shared_gate"] = linear_spec((d, 1), ("embed", None))
    return spec


MIXER_SPECS = {"gqa": gqa_spec, "mla": mla_spec, "query": query_spec}


def layer_spec(cfg: ModelConfig, kind: LayerKind) -> Params:
    """Every weight of one layer."""
    spec: Params = {
        "attn": MIXER_SPECS[kind.mixer](cfg),
        "ffn": mlp_spec(cfg, cfg.d_ff) if kind.ffn == "dense" else moe_spec(cfg),
    }
    names = ["entry_norm"] if kind.mixer == "query" else []
    if cfg.pre_norm:
        names += ["attn_norm"] if cfg.shared_norm else ["attn_norm", "ffn_norm"]
    if cfg.post_norm:
        names += ["attn_post_norm", "ffn_post_norm"]
    return spec | {name: norm_spec(cfg, cfg.d_model) for name in names}


def mtp_spec(cfg: ModelConfig) -> Params:
    """Every weight of one module for multi-token prediction: proj [2, D, D] takes the token's embedding, then the
    hidden state."""
    d = cfg.d_model
    norms = {name: norm_spec(cfg, d) for name in ("token_norm", "hidden_norm", "norm")}
    proj = linear_spec((2, d, d), (None, "embed", None), n_in=2)
    return norms | {"proj": proj, "layer": layer_spec(cfg, cfg.layers[-1])}


def model_spec(cfg: ModelConfig) -> Params:
    """The whole tree of `ParamSpec`s. `lm_head` is absent where the embedding is tied, `mtp` where there is none."""
    v, d = cfg.vocab_size, cfg.d_model
    spec: Params = {
        "embed": ParamSpec((v, d), ("vocab", "embed"), "normal", d),
        "layers": [
            [jax.tree.map(lambda s, n=stack.repeats: s.stacked(n), layer_spec(cfg, kind)) for kind in stack.pattern]
            for stack in plan_stacks(cfg.layers)
        ],
    }
    if cfg.final_norm:
        spec["final_norm"] = norm_spec(cfg, d)
    if cfg.learned_positions:
        spec["positions"] = ParamSpec((cfg.learned_positions, d), (None, "embed"), "normal", d)
    if cfg.embed_norm:
        spec["embed_norm"] = norm_spec(cfg, d)
    if not cfg.tie_embeddings:
        spec["lm_head"] = linear_spec((d, v), ("embed", "vocab"))
    if cfg.lm_head_bias:
        spec["lm_head_b"] = ParamSpec((v,), ("vocab",), "zeros")
    if cfg.mtp_modules:
        spec["mtp"] = [mtp_spec(cfg) for _ in range(cfg.mtp_modules)]
    return spec


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as one dotted name, such as `layers.0.0.attn.q`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def init_params(cfg: ModelConfig, key: jax.Array, *, dtype: Any = jnp.float32) -> Params:
    """Random parameters. Normal with variance 1 / fan_in; projections back into the residual stream are divided by
    sqrt(2 x layers) as in GPT-2, so the residual's variance does not grow with depth.

    Each leaf's key depends on its name alone, so adding a weight changes no other. Under `jax.jit` with output
    shardings every device makes only its own part.
    """

    def init(path: tuple[Any, ...], spec: ParamSpec) -> jax.Array:
        if spec.init not in ("normal", "residual"):
            return jnp.full(spec.shape, {"zeros": 0.0, "ones": 1.0}.get(spec.init, spec.init), dtype)
        std = spec.fan_in**-0.5
        if spec.init == "residual":
            std *= (2 * cfg.num_layers) ** -0.5
        leaf_key = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
        return (std * jax.random.normal(leaf_key, spec.shape, jnp.float32)).astype(dtype)

    return jax.tree_util.tree_map_with_path(init, model_spec(cfg))


def abstract_params(cfg: ModelConfig, *, dtype: Any = jnp.float32) -> Params:
    """The tree of `jax.ShapeDtypeStruct`, for planning without allocating."""
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype), model_spec(cfg))


def count_params(cfg: ModelConfig, *, active: bool = False, mtp: bool = False) -> int:
    """Number of parameters, a tied embedding counted once. `active`: only the experts one token visits.

    As in published counts, modules for multi-token prediction are no part of it, unless `mtp`.
    """
    specs = jax.tree.leaves(_decoder_spec(cfg)) + (_module_leaves(cfg) if mtp else [])
    return sum(_visited(cfg, spec) if active else math.prod(spec.shape) for spec in specs)


def _decoder_spec(cfg: ModelConfig) -> Params:
    return {name: spec for name, spec in model_spec(cfg).items() if name != "mtp"}


def _module_leaves(cfg: ModelConfig) -> list[ParamSpec]:
    return jax.tree.leaves(mtp_spec(cfg)) * cfg.mtp_modules


def flops_per_token(cfg: ModelConfig, sequence_length: int, *, backward: bool = True, mtp: bool = False) -> float:
    """Floating-point operations per token: 2 per weight of every matmul a token visits, plus causal attention.

    Each query sees (T + 1) / 2 keys on average, or fewer under a window. `backward` counts the gradient as twice the
    forward pass; recomputation is never counted. Norms, activations and lookups are left out, as is usual for MFU
    (arXiv:2204.02311, appendix B, with causal attention). `mtp`: with the modules for multi-token prediction, each of
    which computes the head once more.
    """
    modules = cfg.mtp_modules if mtp else 0
    specs = jax.tree.leaves(_decoder_spec(cfg)) + (_module_leaves(cfg) if mtp else [])
    heads = modules + (1 if cfg.tie_embeddings else 0)
    matmul = sum(_visited(cfg, spec) for spec in specs if spec.n_in) + heads * cfg.vocab_size * cfg.d_model
    kinds = (*cfg.layers, *(cfg.layers[-1:] * modules))
    attention = sum(_mean_keys(kind, sequence_length) * _attention_width(cfg, kind) for kind in kinds)
    return (2.0 * matmul + 2.0 * attention) * (3.0 if backward else 1.0)


def _visited(cfg: ModelConfig, spec: ParamSpec) -> int:
    size = math.prod(spec.shape)
    return size // cfg.moe.num_experts * cfg.moe.top_k if cfg.moe and "experts" in spec.axes else size


def _mean_keys(kind: LayerKind, length: int) -> float:
    window = min(kind.window or length, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length


def _attention_width(cfg: ModelConfig, kind: LayerKind) -> int:
    """Multiply-adds per query and key: scores, then the weighted sum of values."""
    if kind.mixer == "mla":
        assert cfg.mla is not None
        return cfg.num_heads * (cfg.mla.nope_dim + cfg.mla.rope_dim + cfg.mla.v_dim)
    return cfg.num_heads * 2 * cfg.head_dim
