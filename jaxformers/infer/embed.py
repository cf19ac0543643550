"""One vector for a text: the decoder's last hidden states, pooled.

B texts, T prompt time, D model
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.infer.generate import Prepared, bucket
from jaxformers.models.config import ModelConfig
from jaxformers.models.decoder import gather_shared, hidden_states
from jaxformers.models.layers import named_norm
from jaxformers.models.params import Params
from jaxformers.models.runtime import Runtime

Pooling = Literal["mean", "last"]


def embed(model: Prepared, prompts: Sequence[Sequence[int]], *, pooling: Pooling = "mean") -> np.ndarray:
    """Vectors of length 1, float32 [B, D], of prompts of ids: the states after the final norm, their mean over the
    prompt or those of its last token. One text at a time, each padded to one of few lengths, so that a vector depends
    on no other text.

    ValueError for an unknown pooling, and for a prompt without tokens or longer than the model's context.
    """
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(get_args(Pooling))}")
    for prompt in prompts:
        if not 0 < len(prompt) <= model.config.context_length:
            allowed = f"1 to {model.config.context_length}"
            raise ValueError(f"a text has {len(prompt)} tokens; the model takes {allowed}")
    return np.stack([_embed_one(model, prompt, pooling) for prompt in prompts])


def _embed_one(model: Prepared, prompt: Sequence[int], pooling: Pooling) -> np.ndarray:
    length = min(bucket(len(prompt)), model.config.context_length)
    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(prompt)] = prompt
    vector = _pooled(
        model.params, tokens, np.int32(len(prompt)), cfg=model.config, runtime=model.runtime, pooling=pooling
    )
    return np.asarray(vector)


@functools.partial(jax.jit, static_argnames=("cfg", "runtime", "pooling"))
def _pooled(
    params: Params, tokens: jax.Array, length: jax.Array, *, cfg: ModelConfig, runtime: Runtime, pooling: Pooling
) -> jax.Array:
    """[D] of tokens [1, T], of which `length` count."""
    params = gather_shared(params, cfg, runtime)
    positions = jnp.arange(tokens.shape[1])[None]
    states = hidden_states(params, cfg, tokens, positions=positions, runtime=runtime).x
    states = named_norm(params, "final_norm", states, cfg)[0].astype(jnp.float32)
    if pooling == "last":
        vector = states[length - 1]
    else:
        counts = (positions[0] < length)[:, None]
        vector = jnp.where(counts, states, 0.0).sum(axis=0) / length.astype(jnp.float32)
    return vector / jnp.maximum(jnp.linalg.norm(vector), 1e-12)
