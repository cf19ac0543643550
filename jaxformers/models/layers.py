"""Norms and activations: the parts every layer is made of."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxformers.models.config import ModelConfig
from jaxformers.models.params import Params

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def norm(p: Params, x: jax.Array, cfg: ModelConfig, *, dims: int = 1, eps: float | None = None) -> jax.Array:
    """RMS norm (arXiv:1910.07467) or layer norm over the last `dims` dims of x, computed in float32, in x's dtype.

    eps defaults to the architecture's.
    """
    axes = tuple(range(-dims, 0))
    y = x.astype(jnp.float32)
    if cfg.norm == "layer":
        y -= y.mean(axes, keepdims=True)
    y *= jax.lax.rsqrt(jnp.square(y).mean(axes, keepdims=True) + (cfg.norm_eps if eps is None else eps))
    if "w" in p:
        y *= p["w"].astype(jnp.float32) + cfg.norm_offset
    if "b" in p:
        y += p["b"].astype(jnp.float32)
    return y.astype(x.dtype)


def named_norm(params: Params, name: str, x: jax.Array, cfg: ModelConfig) -> jax.Array:
    """x through the norm of that name, or x itself where the architecture has none."""
    return norm(params[name], x, cfg) if name in params else x


def activate(p: Params, x: jax.Array, cfg: ModelConfig) -> jax.Array:
    """x through the activation of a feed-forward network whose weights are p."""
    return xielu(p["xielu"], x) if cfg.activation == "xielu" else ACTIVATIONS[cfg.activation](x)


def xielu(p: Params, x: jax.Array) -> jax.Array:
    """xIELU (arXiv:2411.13010): quadratic above zero and an integrated ELU below, with two learned curvatures.

    beta and eps are constants that checkpoints carry; they are not trained.
    """
    beta, eps = (jax.lax.stop_gradient(p[name]).astype(x.dtype) for name in ("beta", "eps"))
    above = jax.nn.softplus(p["alpha_p"].astype(x.dtype))
    below = beta + jax.nn.softplus(p["alpha_n"].astype(x.dtype))
    return beta * x + jnp.where(x > 0, above * x * x, below * (jnp.expm1(jnp.minimum(x, eps)) - x))


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """x squashed into (-cap, cap) by tanh; None leaves it alone."""
    return x if cap is None else cap * jnp.tanh(x / cap)
