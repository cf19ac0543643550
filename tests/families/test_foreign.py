"""Types that live in their authors' repositories alone compute what their twins do: see `foreign`."""

import functools
import json
from typing import Any

import jax
import numpy as np
import pytest
from families.checkpoints import assert_close, reference_logits, tokens
from families.foreign import TWINS, checkpoint, gradients
from families.passes import (
    LENGTH,
    PROMPTS,
    check_gradients,
    check_packing,
    check_ragged_decoding,
    compile_decoding,
    compile_training,
    greedy_text,
)

from jaxformers.hub.convert import export_tensors
from jaxformers.hub.pretrained import write_pretrained
from jaxformers.hub.safetensors import open_tensors
from jaxformers.models.decoder import unembed
from jaxformers.models.layout import prepare
from jaxformers.models.runtime import Runtime
from jaxformers.train.losses import head_loss

every_twin = pytest.mark.parametrize("name", TWINS)


@functools.lru_cache(maxsize=4)
def training_pass(name: str) -> Any:
    return compile_training(checkpoint(name).ours)


@functools.lru_cache(maxsize=4)
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
    theirs = {tensor: gradient.numpy() for tensor, gradient in truth.items()}
    check_gradients(export_tensors(checkpoint(name).ours.config, ours.grads), theirs)


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


def test_a_normalized_head_trains_in_chunks():
    cfg, params, _ = checkpoint("baichuan2").ours
    ids = tokens(2, LENGTH)
    hidden = jax.random.normal(jax.random.key(0), (2, LENGTH, cfg.d_model))
    batch = {"targets": ids, "weights": np.ones(ids.shape, np.float32)}
    head = {name: params[name] for name in ("lm_head", "final_norm")}

    def loss(head, hidden, chunk):
        return head_loss(head, hidden, batch, cfg, Runtime(), z_weight=0.1, chunk=chunk)[0]

    whole = jax.value_and_grad(loss, argnums=(0, 1))(head, hidden, None)
    jax.tree.map(assert_close, jax.value_and_grad(loss, argnums=(0, 1))(head, hidden, 4), whole)


@pytest.mark.parametrize("name", ["baichuan2", "gpt_pangu"])
def test_prepared_weights_decode_the_same_text(name):
    ours = checkpoint(name).ours
    prepared = prepare(ours.params, ours.config, dtype=np.float32, whole=True, on_cpu=True)
    prompt = tokens(2, PROMPTS[0])
    text = greedy_text(compile_decoding(ours._replace(params=prepared)), ours, prompt)
    np.testing.assert_array_equal(text, greedy_text(decoding_step(name), ours, prompt))


def test_an_all_zero_row_of_a_normalized_head_has_a_logit_and_a_gradient_of_zero():
    cfg, params, _ = checkpoint("baichuan2").ours
    head = {"final_norm": params["final_norm"], "lm_head": params["lm_head"].at[:, 5].set(0.0)}
    logits, pull = jax.vjp(lambda head: unembed(head, cfg, np.ones((1, cfg.d_model), np.float32), Runtime()), head)
    assert logits[0, 5] == 0.0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(pull(logits)))
