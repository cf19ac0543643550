"""Every switch of the decoder does what it says, against a decoder written out in float64 NumPy, one row and one head
at a time. The families under test elsewhere do not use all of them yet."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families.checkpoints import assert_close

from jaxformers.models.attention import alibi_slopes
from jaxformers.models.cache import init_cache
from jaxformers.models.config import LayerKind, ModelConfig, Rope, plan_stacks
from jaxformers.models.decoder import forward, hidden_states, unembed
from jaxformers.models.layers import norm
from jaxformers.models.params import model_spec
from jaxformers.models.runtime import Runtime

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
ROPE = Rope(6, 100.0)
BASE = ModelConfig(
    family="none",
    vocab_size=19,
    d_model=16,
    d_ff=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    layers=(LayerKind(rope=ROPE), LayerKind(rope=ROPE)),
    context_length=32,
)
UNROTATED = {"layers": (LayerKind(), LayerKind())}
VARIANTS = {
    "plain": {},
    "part of each head rotated": {"layers": (LayerKind(rope=Rope(4, 100.0)),) * 2},
    "layer norm with bias": {"norm": "layer", "norm_bias": True},
    "norms without weights": {"norm": "layer", "norm_weight": False},
    "norms that store w - 1": {"norm_offset": 1.0, "norm_eps": 1e-2},
    "norms after each branch": {"post_norm": True},
    "norms after each branch only": {"post_norm": True, "pre_norm": False},
    "parallel branches": {"parallel": True},
    "parallel branches, one norm": {"parallel": True, "shared_norm": True},
    "no norm before the branches": {"pre_norm": False},
    "q and k normed, one weight": {"qk_norm": "head"},
    "q and k normed, a weight per head": {"qk_norm": "heads"},
    "q and k normed over all heads": {"qk_norm": "full"},
    "q and k normed after rotation": {"qk_norm": "head", "qk_norm_after_rope": True},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "lm_head_bias": True},
    "q, k and v clipped": {"qkv_clip": 0.5},
    "plain relu network": {"gated": False, "activation": "relu", "mlp_bias": True},
    "squared relu": {"gated": False, "activation": "relu2"},
    "exact gelu": {"activation": "gelu"},
    "tanh gelu": {"activation": "gelu_tanh"},
    "learned positions with an offset": {**UNROTATED, "learned_positions": 12, "position_offset": 2},
    "linear biases by distance": {**UNROTATED, "alibi": True},
    "embedding norm": {"embed_norm": True},
    "scaled embedding, residual and logits": {"embed_scale": 3.0, "residual_scale": 0.3, "logit_scale": 0.25},
    "tied, soft capped, own attention scale": {
        "tie_embeddings": True,
        "logit_softcap": 2.0,
        "attn_softcap": 1.0,
        "attn_scale": 0.9,
    },
    "sinks and windows": {"attn_sinks": True, "layers": (LayerKind(window=2, rope=ROPE), LayerKind(rope=ROPE))},
}


def perturbed(cfg: ModelConfig):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda spec: (0.4 * rng.standard_normal(spec.shape)).astype(np.float32), model_spec(cfg))


# -- the decoder, written out


def erf(x):
    return np.vectorize(math.erf)(x)


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


def norm_by_hand(p, x, cfg):
    """Over the last dim of x [..., N]."""
    if cfg.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps)
    return x * (p.get("w", 1.0 - cfg.norm_offset) + cfg.norm_offset) + p.get("b", 0.0)


def qk_norm_by_hand(p, x, cfg):
    """x [T, H, N]."""
    if cfg.qk_norm == "full":
        flat = {name: leaf.reshape(-1) for name, leaf in p.items()}
        return norm_by_hand(flat, x.reshape(len(x), -1), cfg).reshape(x.shape)
    return norm_by_hand(p, x, cfg)


def rotate_by_hand(x, rope):
    """x [T, H, N], row t at position t."""
    out, half = x.copy(), rope.dim // 2
    for t, i in np.ndindex(len(x), half):
        angle = t * rope.theta ** (-2 * i / rope.dim)
        a, b = x[t, :, i], x[t, :, i + half]
        out[t, :, i], out[t, :, i + half] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return out


def attention_by_hand(p, x, cfg, kind):
    """x [T, D] -> [T, D]."""
    parts = {}
    for name in "qkv":
        parts[name] = np.einsum("td,dhn->thn", x, p[name]) + p.get(f"{name}_b", 0.0)
        if cfg.qkv_clip is not None:
            parts[name] = np.clip(parts[name], -cfg.qkv_clip, cfg.qkv_clip)
    for name in "qk":
        if cfg.qk_norm != "none" and not cfg.qk_norm_after_rope:
            parts[name] = qk_norm_by_hand(p[f"{name}_norm"], parts[name], cfg)
        if kind.rope is not None:
            parts[name] = rotate_by_hand(parts[name], kind.rope)
        if cfg.qk_norm != "none" and cfg.qk_norm_after_rope:
            parts[name] = qk_norm_by_hand(p[f"{name}_norm"], parts[name], cfg)
    scale = cfg.head_dim**-0.5 if cfg.attn_scale is None else cfg.attn_scale
    out = np.zeros((len(x), cfg.num_heads, cfg.head_dim))
    for t, h in np.ndindex(len(x), cfg.num_heads):
        first = 0 if kind.window is None else max(0, t - kind.window + 1)
        group = h // (cfg.num_heads // cfg.num_kv_heads)
        logits = parts["k"][first : t + 1, group] @ parts["q"][t, h] * scale
        if cfg.attn_softcap is not None:
            logits = cfg.attn_softcap * np.tanh(logits / cfg.attn_softcap)
        if cfg.alibi:
            logits = logits - alibi_slopes(cfg.num_heads)[h] * np.arange(t - first, -1, -1)
        total = np.exp(logits).sum() + (np.exp(p["sinks"][h]) if cfg.attn_sinks else 0.0)
        out[t, h] = np.exp(logits) / total @ parts["v"][first : t + 1, group]
    return np.einsum("thn,hnd->td", out, p["o"]) + p.get("o_b", 0.0)


def mlp_by_hand(p, x, cfg):
    act = ACTIVATIONS[cfg.activation]
    up = x @ p["up"] + p.get("up_b", 0.0)
    hidden = act(x @ p["gate"] + p.get("gate_b", 0.0)) * up if cfg.gated else act(up)
    return hidden @ p["down"] + p.get("down_b", 0.0)


def block_by_hand(p, x, cfg, kind):
    def normed(name, x):
        return norm_by_hand(p[name], x, cfg) if name in p else x

    attended = normed("attn_post_norm", attention_by_hand(p["attn"], normed("attn_norm", x), cfg, kind))
    if cfg.parallel:
        source = normed("attn_norm" if cfg.shared_norm else "ffn_norm", x)
        fed = normed("ffn_post_norm", mlp_by_hand(p["ffn"], source, cfg))
        return x + cfg.residual_scale * (attended + fed)
    x = x + cfg.residual_scale * attended
    return x + cfg.residual_scale * normed("ffn_post_norm", mlp_by_hand(p["ffn"], normed("ffn_norm", x), cfg))


def forward_by_hand(params, cfg, row):
    """Logits [T, V] of one row of tokens."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = params["embed"][row] * cfg.embed_scale
    if cfg.learned_positions:
        x = x + params["positions"][np.arange(len(row)) + cfg.position_offset]
    if cfg.embed_norm:
        x = norm_by_hand(params["embed_norm"], x, cfg)
    for stack, layers in zip(plan_stacks(cfg.layers), params["layers"], strict=True):
        for repeat in range(stack.repeats):
            for kind, layer in zip(stack.pattern, layers, strict=True):
                x = block_by_hand(jax.tree.map(lambda a, r=repeat: a[r], layer), x, cfg, kind)
    x = norm_by_hand(params["final_norm"], x, cfg)
    logits = x @ (params["embed"].T if cfg.tie_embeddings else params["lm_head"]) + params.get("lm_head_b", 0.0)
    logits = logits * cfg.logit_scale
    return logits if cfg.logit_softcap is None else cfg.logit_softcap * np.tanh(logits / cfg.logit_softcap)


@pytest.fixture(autouse=True)
def exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_decoder_is_the_one_written_out(variant):
    cfg = BASE.replace(**VARIANTS[variant])
    params = perturbed(cfg)
    ids = np.random.default_rng(1).integers(0, cfg.vocab_size, (1, 7), np.int32)
    assert_close(jit(forward, static_argnums=1)(params, cfg, ids)[0], forward_by_hand(params, cfg, ids[0]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_switch_changes_what_is_computed(variant):
    # Otherwise the comparison above could not fail.
    if variant == "plain":
        return
    ids = np.arange(7)
    cfg = BASE.replace(**VARIANTS[variant])
    plain = forward_by_hand(perturbed(BASE), BASE, ids)
    assert np.abs(forward_by_hand(perturbed(cfg), cfg, ids) - plain).max() > 1e-3


@pytest.mark.parametrize(
    "variant", ["learned positions with an offset", "linear biases by distance", "sinks and windows"]
)
def test_a_cache_knows_positions_of_every_kind(variant):
    cfg = BASE.replace(**VARIANTS[variant])
    params = perturbed(cfg)
    ids = np.random.default_rng(1).integers(0, cfg.vocab_size, (2, 7), np.int32)
    truth = [forward_by_hand(params, cfg, row) for row in ids]

    @jit
    def step(params, ids, positions, cache):
        hidden = hidden_states(params, cfg, ids, positions=positions, cache=cache, read_slots=8)
        return unembed(params, cfg, hidden.x, Runtime()), hidden.cache

    positions = np.broadcast_to(np.arange(3, dtype=np.int32), (2, 3))
    _, cache = step(params, ids[:, :3], positions, init_cache(cfg, 2, 10))
    for n in range(1, 5):
        here = np.array([[n], [n + 2]], np.int32)  # the first row goes on from inside what it was given
        logits, cache = step(params, np.take_along_axis(ids, here, 1), here, cache)
        assert_close(logits[:, 0], [truth[row][here[row, 0]] for row in (0, 1)], what=f"step {n}")


# -- norms on their own


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("parts", ["", "w", "b", "wb"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_is_its_formula(kind, parts, offset):
    cfg = replace(BASE, norm=kind, norm_offset=offset, norm_eps=1e-3)
    rng = np.random.default_rng(0)
    p, x = {name: rng.standard_normal(16) for name in parts}, 3 + rng.standard_normal((2, 5, 16))
    found = norm({name: leaf.astype(np.float32) for name, leaf in p.items()}, jnp.asarray(x, jnp.float32), cfg)
    assert_close(found, norm_by_hand(p, x, cfg))


def test_a_norm_of_bfloat16_is_computed_in_float32():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16)) * 100, jnp.bfloat16)
    found = norm({}, x, BASE)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, norm({}, x.astype(jnp.float32), BASE).astype(jnp.bfloat16))


# -- bfloat16
