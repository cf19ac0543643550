"""Every family on another machine shape: heads and widths split over four devices, and bfloat16 arithmetic."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import checkpoints, foreign
from families.checkpoints import ROWS, assert_close, reference_logits, tokens
from families.foreign import TWINS
from families.passes import LENGTH, jit, positions_of

from jaxformers.hub.pretrained import read_pretrained
from jaxformers.models.config import ModelConfig
from jaxformers.models.decoder import forward
from jaxformers.models.params import Params, model_spec
from jaxformers.models.runtime import Runtime
from jaxformers.parallel.mesh import MeshConfig, gatherer, make_mesh, param_shardings, sharder

every_row = pytest.mark.parametrize("name", [*ROWS, *TWINS])


def checkpoint(name: str) -> checkpoints.Checkpoint | foreign.Checkpoint:
    return checkpoints.checkpoint(name) if name in ROWS else foreign.checkpoint(name)


def logits_of(params: Params, cfg: ModelConfig, ids: np.ndarray, runtime: Runtime) -> np.ndarray:
    run = jit(lambda params, ids, positions: forward(params, cfg, ids, positions=positions, runtime=runtime))
    return np.asarray(run(params, ids, positions_of(ids)), np.float32)


@every_row
def test_tensor_parallel_logits_are_the_references(name):
    """Weights stream from the files into their places on four devices, and are used from there."""
    mesh, c, ids = make_mesh(MeshConfig(fsdp=1, tp=4), devices=jax.devices()[:4]), checkpoint(name), tokens(2, LENGTH)
    ours = read_pretrained(c.directory, shardings=lambda cfg: param_shardings(model_spec(cfg), mesh))
    placed = jax.tree.leaves(ours.params)
    assert any(not leaf.sharding.is_fully_replicated for leaf in placed)
    with jax.set_mesh(mesh):
        logits = logits_of(ours.params, ours.config, ids, Runtime(shard=sharder(mesh), gather=gatherer(mesh)))
    assert_close(logits, reference_logits(c.model, ids))


@every_row
def test_bfloat16_logits_are_as_near_to_the_truth_as_the_references(name):
    """Both round in bfloat16 at places of their own, so each is measured against float32."""
    c, ids = checkpoint(name), tokens(2, LENGTH)
    truth = reference_logits(c.model, ids)
    rounded = torch_in_bfloat16(name)
    theirs = np.median(np.abs(reference_logits(rounded, ids) - truth))
    ours = logits_of(c.ours.params, c.ours.config, ids, Runtime(dtype=jnp.bfloat16))
    assert np.median(np.abs(ours - truth)) <= 1.5 * theirs


def torch_in_bfloat16(name: str) -> torch.nn.Module:
    """The reference's model with its weights in bfloat16; the angles of its rotation stay in float32."""
    model = copy.deepcopy(checkpoint(name).model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    for owner in model.modules():
        for key, buffer in owner.named_buffers(recurse=False):
            if key in owner.state_dict():
                setattr(owner, key, buffer.bfloat16())
    return model
