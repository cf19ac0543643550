"""Types that live in their authors' repositories alone compute what their twins do: see `foreign`."""

import functools
import json
from typing import Any

import numpy as np
import pytest
from families.checkpoints import assert_close, reference_logits, tokens
from families.foreign import TWINS, checkpoint, gradients
from families.passes import (
    LENGTH,
    PROMPTS,
    check_packing,
    check_ragged_decoding,
    compile_decoding,
    compile_training,
    greedy_text,
)

from jaxformers.hub.convert import export_tensors
from jaxformers.hub.pretrained import write_pretrained
from jaxformers.hub.safetensors import open_tensors

every_twin = pytest.mark.parametrize("name", TWINS)


@functools.cache
def training_pass(name: str) -> Any:
    return compile_training(checkpoint(name).ours)


@functools.cache
def decoding_step(name: str) -> Any:
    return compile_decoding(checkpoint(name).ours)


@every_twin
def test_logits_are_the_twins(name):
    ids = tokens(2, LENGTH)
    assert_close(training_pass(name)(ids).logits, reference_logits(checkpoint(name).model, ids))


@every_twin
def test_loss_and_every_gradient_are_the_twins(name):
    ids = tokens(2, LENGTH)
    ours = training_pass(name)(ids)
    loss, truth = gradients(name, ids)
    assert_close(ours.loss, loss)
    grads = export_tensors(checkpoint(name).ours.config, ours.grads)
    assert grads.keys() == truth.keys()
    for tensor, gradient in truth.items():
        assert_close(grads[tensor], gradient, what=tensor)


@every_twin
def test_greedy_tokens_are_the_twins(name):
    c = checkpoint(name)
    prompt = tokens(2, PROMPTS[0])
    text = prompt
    while text.shape[1] < LENGTH:
        likeliest = reference_logits(c.model, text)[:, -1:].argmax(-1)
        text = np.concatenate([text, likeliest], axis=1)
    np.testing.assert_array_equal(greedy_text(decoding_step(name), c.ours, prompt), text)


@every_twin
def test_cached_decoding_of_ragged_rows_is_the_forward_pass_at_every_position(name):
    c = checkpoint(name)
    check_ragged_decoding(decoding_step(name), c.ours, functools.partial(reference_logits, c.model))


@every_twin
def test_documents_packed_into_a_row_do_not_see_each_other(name):
    check_packing(training_pass(name), functools.partial(reference_logits, checkpoint(name).model))


@every_twin
def test_import_and_export_are_bit_equal(name, tmp_path):
    c = checkpoint(name)
    write_pretrained(tmp_path, c.ours.config, c.ours.params)
    theirs, ours = open_tensors(c.directory), open_tensors(tmp_path)
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        assert (ours[tensor].dtype, ours[tensor].shape) == (value.dtype, value.shape), tensor
        assert ours[tensor].tobytes() == value.tobytes(), tensor
    assert json.loads((tmp_path / "config.json").read_text()) == c.twin.config | {"dtype": "float32"}
