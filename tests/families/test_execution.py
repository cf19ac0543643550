"""Every family on another machine shape: heads and widths split over four devices, and bfloat16 arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families.checkpoints import ROWS, assert_close, checkpoint, reference_logits, tokens
from families.test_parity import LENGTH, jit, positions_of

from jaxformers.hub.pretrained import read_pretrained
from jaxformers.models.config import ModelConfig
from jaxformers.models.decoder import forward
from jaxformers.models.params import Params, model_spec
from jaxformers.models.runtime import Runtime
from jaxformers.parallel.mesh import MeshConfig, gatherer, make_mesh, param_shardings, sharder

every_row = pytest.mark.parametrize("name", list(ROWS))


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
    """The reference's model with all its weights in bfloat16, opened from the files."""
    import transformers

    c = checkpoint(name)
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        c.directory, dtype=torch.bfloat16, attn_implementation=c.row.attention
    )
    return opened.eval()
