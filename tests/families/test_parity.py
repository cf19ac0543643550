"""Every family computes what `transformers` computes: logits, loss, gradients, greedy tokens, import and export.

The truth is always the reference's plain forward pass over one unpadded text in float32; packed rows, caches, scans
and rematerialization are all compared with that.
"""

import copy
import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from families.checkpoints import ROWS, assert_close, checkpoint, reference_logits, tokens

from jaxformers.families import FAMILIES
from jaxformers.hub.convert import export_tensors
from jaxformers.hub.pretrained import write_pretrained
from jaxformers.hub.safetensors import open_tensors
from jaxformers.models.cache import init_cache
from jaxformers.models.decoder import gather_shared, hidden_states, unembed
from jaxformers.models.runtime import Runtime

LENGTH = 16
PROMPTS = (9, 5)  # tokens of each row of a ragged batch
# Programs here run once or twice, so compiling them is all they cost.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
every_row = pytest.mark.parametrize("name", list(ROWS))
cached_rows = pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.cached])


class Pass(NamedTuple):
    """What one training step sees of a batch: mean next-token loss, logits [B, T, V], expert sums, gradients."""

    loss: jax.Array
    logits: jax.Array
    moe: Any
    grads: Any


def positions_of(ids: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)


@functools.cache
def training_pass(name: str, runtime: Runtime = Runtime()) -> Any:
    """A compiled function (tokens, positions, segment_ids) -> Pass, the same one for every test of a row."""
    cfg, params, _ = checkpoint(name).ours

    def loss(params, ids, positions, segments):
        params = gather_shared(params, cfg, runtime)
        hidden = hidden_states(params, cfg, ids, positions=positions, segment_ids=segments, runtime=runtime)
        logits = unembed(params, cfg, hidden.x, runtime)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)
        return -picked.mean(), (logits, hidden.moe)

    compiled = jit(jax.value_and_grad(loss, has_aux=True))

    def run(ids, positions=None, segments=None) -> Pass:
        positions = (
            np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape) if positions is None else positions
        )
        segments = np.ones_like(ids) if segments is None else segments
        (value, (logits, moe)), grads = compiled(params, ids, positions, segments)
        return Pass(value, logits, moe, grads)

    return run


@functools.cache
def decoding_step(name: str) -> Any:
    """A compiled function (tokens, positions, cache) -> (logits, cache)."""
    cfg, params, _ = checkpoint(name).ours

    def step(params, ids, positions, cache):
        hidden = hidden_states(params, cfg, ids, positions=positions, cache=cache)
        return unembed(params, cfg, hidden.x, Runtime()), hidden.cache

    return functools.partial(jit(step), params)


def reference_gradients(name: str, ids: np.ndarray, directory: Any) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients under the tensor names of a checkpoint, which are not those that the model has in memory."""
    model = copy.deepcopy(checkpoint(name).model)
    ids = torch.from_numpy(ids).long()
    loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for buffer in model.buffers():
        buffer.zero_()
    model.save_pretrained(directory)
    return loss.item(), open_tensors(directory)


def test_every_family_has_a_checkpoint_here():
    assert set(FAMILIES) <= set(ROWS)
    assert {row.model_type for row in ROWS.values()} == set(FAMILIES)


@every_row
def test_logits_are_the_references(name):
    ids = tokens(2, LENGTH)
    assert_close(training_pass(name)(ids).logits, reference_logits(checkpoint(name).model, ids))


@every_row
def test_loss_and_every_gradient_are_the_references(name, tmp_path):
    ids = tokens(2, LENGTH)
    ours = training_pass(name)(ids)
    loss, truth = reference_gradients(name, ids, tmp_path)
    assert_close(ours.loss, loss)
    grads = export_tensors(checkpoint(name).ours.config, ours.grads)
    assert grads.keys() == truth.keys()
    for tensor, gradient in truth.items():
        assert_close(grads[tensor], gradient, what=tensor)


@every_row
def test_greedy_tokens_are_the_references(name):
    prompt = tokens(2, PROMPTS[0])
    c = checkpoint(name)
    with torch.no_grad():
        # The reference's dynamic rope remembers the longest text it has seen, until it sees a short one.
        c.model(torch.zeros(1, 1, dtype=torch.long))
        truth = c.model.generate(
            torch.from_numpy(prompt).long(), do_sample=False, max_new_tokens=7, eos_token_id=None, pad_token_id=0
        )
    step = decoding_step(name)
    logits, cache = step(prompt, positions_of(prompt), init_cache(c.ours.config, 2, LENGTH))
    text = [prompt, np.asarray(logits[:, -1:].argmax(-1), np.int32)]
    for position in range(PROMPTS[0], LENGTH - 1):
        logits, cache = step(text[-1], np.full((2, 1), position, np.int32), cache)
        text.append(np.asarray(logits.argmax(-1), np.int32))
    np.testing.assert_array_equal(np.concatenate(text, axis=1), truth.numpy())


@cached_rows
def test_cached_decoding_of_ragged_rows_is_the_forward_pass_at_every_position(name):
    c = checkpoint(name)
    ids = tokens(2, LENGTH)
    truth = reference_logits(c.model, ids)
    widest = max(PROMPTS)
    prompt = np.where(np.arange(widest) < np.array(PROMPTS)[:, None], ids[:, :widest], 0).astype(np.int32)
    step = decoding_step(name)
    logits, cache = step(prompt, positions_of(prompt), init_cache(c.ours.config, 2, LENGTH))
    for row, length in enumerate(PROMPTS):
        assert_close(logits[row, :length], truth[row, :length], what=f"prompt of row {row}")
    for n in range(LENGTH - widest):
        here = np.array(PROMPTS, np.int32)[:, None] + n  # each row at a position of its own
        logits, cache = step(np.take_along_axis(ids, here, axis=1), here, cache)
        assert_close(logits[:, 0], truth[[0, 1], here[:, 0]], what=f"step {n}")


@cached_rows
def test_documents_packed_into_a_row_do_not_see_each_other(name):
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
    packed = training_pass(name)(ids, positions, segments).logits
    for place in documents:
        assert_close(packed[place], reference_logits(checkpoint(name).model, ids[place][None])[0], what=str(place))


@every_row
def test_import_and_export_are_bit_equal_and_the_reference_opens_the_result(name, tmp_path):
    c = checkpoint(name)
    write_pretrained(tmp_path, c.ours.config, c.ours.params, generation=c.ours.generation)
    theirs, ours = open_tensors(c.directory), open_tensors(tmp_path)
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        assert (ours[tensor].dtype, ours[tensor].shape) == (value.dtype, value.shape), tensor
        assert ours[tensor].tobytes() == value.tobytes(), tensor
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / file).read_text()) == json.loads((c.directory / file).read_text())
    reopened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=c.row.attention)
    ids = tokens(2, LENGTH)
    np.testing.assert_array_equal(reference_logits(reopened, ids), reference_logits(c.model, ids))


RUNTIMES = {
    "scan, full remat": Runtime(layers="scan", remat="full"),
    "unroll, projections kept": Runtime(layers="unroll", remat="projections"),
    "unroll, dots kept": Runtime(layers="unroll", remat="dots"),
}
# Types take turns in the quick suite: compiling 33 backward passes takes minutes.
RUNS = [
    pytest.param(name, runtime, marks=() if (i + j) % len(RUNTIMES) == 0 else pytest.mark.slow)
    for i, name in enumerate(FAMILIES)
    for j, runtime in enumerate(RUNTIMES)
]


@pytest.mark.parametrize("name, runtime", RUNS)
def test_how_a_model_is_run_changes_nothing(name, runtime):
    ids = tokens(2, LENGTH)
    truth, ours = training_pass(name)(ids), training_pass(name, RUNTIMES[runtime])(ids)
    assert_close(ours.loss, truth.loss)
    assert_close(ours.logits, truth.logits)
    jax.tree.map(assert_close, ours.moe, truth.moe)
    # As tensors of the checkpoint: without a rotation a key's bias alone has no gradient but rounding errors.
    cfg = checkpoint(name).ours.config
    expected = export_tensors(cfg, truth.grads)
    for tensor, gradient in export_tensors(cfg, ours.grads).items():
        assert_close(gradient, expected[tensor], what=tensor)
