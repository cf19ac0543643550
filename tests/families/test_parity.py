"""Every family computes what `transformers` computes: logits, loss, gradients, greedy tokens, import and export.

The truth is always the reference's plain forward pass over one unpadded text in float32; packed rows, caches, scans
and rematerialization are all compared with that.
"""

import copy
import functools
import json
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from families.checkpoints import ROWS, assert_close, checkpoint, reference_logits, tokens
from families.foreign import TWINS
from families.passes import (
    LENGTH,
    PROMPTS,
    check_gradients,
    check_packing,
    check_ragged_decoding,
    compile_decoding,
    compile_training,
    greedy_text,
    jit,
)

from jaxformers.families import FAMILIES
from jaxformers.hub.convert import export_tensors
from jaxformers.hub.pretrained import write_pretrained
from jaxformers.hub.safetensors import open_tensors
from jaxformers.models.decoder import forward
from jaxformers.models.runtime import Runtime

every_row = pytest.mark.parametrize("name", list(ROWS))
cached_rows = pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.cached])


@functools.lru_cache(maxsize=4)
def training_pass(name: str, runtime: Runtime = Runtime()) -> Any:
    """A compiled function (tokens, positions, segment_ids) -> Pass, the same one for every test of a row."""
    return compile_training(checkpoint(name).ours, runtime)


@functools.lru_cache(maxsize=4)
def decoding_step(name: str) -> Any:
    """A compiled function (tokens, positions, cache) -> (logits, cache)."""
    return compile_decoding(checkpoint(name).ours)


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
    foreign = {twin.config["model_type"] for twin in TWINS.values()}
    assert set(FAMILIES) - foreign <= set(ROWS)
    assert {row.model_type for row in ROWS.values()} | foreign == set(FAMILIES)


@every_row
def test_logits_are_the_references(name):
    ids = tokens(2, LENGTH)
    assert_close(training_pass(name)(ids).logits, reference_logits(checkpoint(name).model, ids))


def test_a_text_past_the_first_context_turns_by_the_long_factors_of_phimoe():
    """As with its authors. This version of the reference takes its short ones, for it drops the length on the way."""
    (cfg, params, _), model, ids = checkpoint("phimoe").ours, copy.deepcopy(checkpoint("phimoe").model), tokens(2, 40)
    rotary = model.model.rotary_emb
    rotary.rope_init_fn = functools.partial(rotary.rope_init_fn, seq_len=ids.shape[1])
    assert cfg.layers[0].rope.scaling.original_positions < ids.shape[1]
    assert_close(jit(lambda params: forward(params, cfg, ids))(params), reference_logits(model, ids))


@every_row
def test_loss_and_every_gradient_are_the_references(name, tmp_path):
    ids = tokens(2, LENGTH)
    ours = training_pass(name)(ids)
    loss, truth = reference_gradients(name, ids, tmp_path)
    assert_close(ours.loss, loss)
    check_gradients(export_tensors(checkpoint(name).ours.config, ours.grads), truth)


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
    text = greedy_text(decoding_step(name), c.ours, prompt)
    np.testing.assert_array_equal(text, truth.numpy())


@cached_rows
def test_cached_decoding_of_ragged_rows_is_the_forward_pass_at_every_position(name):
    c = checkpoint(name)
    check_ragged_decoding(decoding_step(name), c.ours, functools.partial(reference_logits, c.model))


@cached_rows
def test_documents_packed_into_a_row_do_not_see_each_other(name):
    check_packing(training_pass(name), functools.partial(reference_logits, checkpoint(name).model))


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
# Types take turns in the quick suite: compiling a backward pass of each takes many minutes.
RUNS = [
    pytest.param(name, runtime, marks=() if i % 4 == j else pytest.mark.slow)
    for i, name in enumerate(name for name in FAMILIES if name in ROWS)
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
