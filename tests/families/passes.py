"""What a model read by us computes, one way or another: in a training pass, decoding with a cache, over packed rows."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from families.checkpoints import assert_close, tokens

from jaxformers.hub.pretrained import Pretrained
from jaxformers.models.cache import init_cache
from jaxformers.models.decoder import gather_shared, hidden_states, unembed
from jaxformers.models.runtime import Runtime

LENGTH = 16
PROMPTS = (9, 5)  # tokens of each row of a ragged batch
Logits = Callable[[np.ndarray], np.ndarray]  # of one unpadded text per row: the truth
# Programs here run once or twice, so compiling them is all they cost.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Pass(NamedTuple):
    """What one training step sees of a batch: mean next-token loss, logits [B, T, V], expert sums, gradients."""

    loss: jax.Array
    logits: jax.Array
    moe: Any
    grads: Any


def positions_of(ids: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)


def compile_training(ours: Pretrained, runtime: Runtime = Runtime()) -> Any:
    """A compiled function (tokens, positions, segment_ids) -> Pass."""
    cfg, params, _ = ours

    def loss(params, ids, positions, segments):
        params = gather_shared(params, cfg, runtime)
        hidden = hidden_states(params, cfg, ids, positions=positions, segment_ids=segments, runtime=runtime)
        logits = unembed(params, cfg, hidden.x, runtime)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)
        return -picked.mean(), (logits, hidden.moe)

    compiled = jit(jax.value_and_grad(loss, has_aux=True))

    def run(ids, positions=None, segments=None) -> Pass:
        positions = positions_of(ids) if positions is None else positions
        segments = np.ones_like(ids) if segments is None else segments
        (value, (logits, moe)), grads = compiled(params, ids, positions, segments)
        return Pass(value, logits, moe, grads)

    return run


def compile_decoding(ours: Pretrained) -> Any:
    """A compiled function (tokens, positions, cache) -> (logits, cache)."""
    cfg, params, _ = ours

    def step(params, ids, positions, cache):
        hidden = hidden_states(params, cfg, ids, positions=positions, cache=cache)
        return unembed(params, cfg, hidden.x, Runtime()), hidden.cache

    return functools.partial(jit(step), params)


def greedy_text(step: Any, ours: Pretrained, prompt: np.ndarray) -> np.ndarray:
    """The prompt and what follows it, LENGTH tokens in all, one step at a time from a cache."""
    logits, cache = step(prompt, positions_of(prompt), init_cache(ours.config, len(prompt), LENGTH))
    text = [prompt, np.asarray(logits[:, -1:].argmax(-1), np.int32)]
    for position in range(prompt.shape[1], LENGTH - 1):
        logits, cache = step(text[-1], np.full((len(prompt), 1), position, np.int32), cache)
        text.append(np.asarray(logits.argmax(-1), np.int32))
    return np.concatenate(text, axis=1)


def check_ragged_decoding(step: Any, ours: Pretrained, reference: Logits) -> None:
    """Rows of different lengths, prefilled together and then fed a token at a time, give the truth everywhere."""
    ids = tokens(2, LENGTH)
    truth = reference(ids)
    widest = max(PROMPTS)
    prompt = np.where(np.arange(widest) < np.array(PROMPTS)[:, None], ids[:, :widest], 0).astype(np.int32)
    logits, cache = step(prompt, positions_of(prompt), init_cache(ours.config, 2, LENGTH))
    for row, length in enumerate(PROMPTS):
        assert_close(logits[row, :length], truth[row, :length], what=f"prompt of row {row}")
    for n in range(LENGTH - widest):
        here = np.array(PROMPTS, np.int32)[:, None] + n  # each row at a position of its own
        logits, cache = step(np.take_along_axis(ids, here, axis=1), here, cache)
        assert_close(logits[:, 0], truth[[0, 1], here[:, 0]], what=f"step {n}")


def check_gradients(ours: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> None:
    """Every tensor of the checkpoint has the gradient of the truth.

    Two kinds are rounding errors in part, in any implementation. Where nothing rotates, a key's bias shifts all
    scores of a query alike, so its gradient is zero; and a scalar's, a sum over all activations, may cancel in one
    layer, so it is measured by those of the same weight in all layers.
    """
    assert ours.keys() == truth.keys()
    largest = {tensor: float(np.abs(gradient).max()) for tensor, gradient in truth.items()}
    noise = 1e-6 * max(largest.values())
    for tensor, gradient in truth.items():
        if largest[tensor] < noise:
            assert np.abs(np.asarray(ours[tensor])).max() < noise, tensor
            continue
        layers = re.compile(r"\d+".join(re.escape(part) for part in re.split(r"\d+", tensor)))
        alike = [tensor] if gradient.size > 1 else [name for name in truth if layers.fullmatch(name)]
        assert_close(ours[tensor], gradient, what=tensor, scale=max(largest[name] for name in alike))


def check_packing(run: Any, reference: Logits) -> None:
    """Documents packed into rows give what each gives alone."""
    ids = tokens(2, LENGTH, seed=3)
    lengths = ((7, 6), (11, 5))  # the first row ends in padding
    positions, segments = np.zeros_like(ids), np.zeros_like(ids)
    documents = []
    for row, sizes in enumerate(lengths):
        start = 0
        for number, size in enumerate(sizes, start=1):
            place = (row, slice(start, start + size))
            positions[place], segments[place] = np.arange(size), number
            documents.append(place)
            start += size
    packed = run(ids, positions, segments).logits
    for place in documents:
        assert_close(packed[place], reference(ids[place][None])[0], what=str(place))
