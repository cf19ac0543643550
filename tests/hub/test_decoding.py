"""A checkpoint read straight into the layout that a CPU decodes from: the same tree, bit by bit, as by way of the plain
one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from families.checkpoints import checkpoint

from jaxformers.hub.convert import import_params
from jaxformers.hub.copying import empty_aligned
from jaxformers.hub.decoding import decoding_shapes, import_decoding
from jaxformers.hub.safetensors import Deferred, open_tensors
from jaxformers.models.layout import prepare
from jaxformers.parallel.mesh import replicated, single_device_mesh

# Tied and untied, with biases, inputs first on disk, fused and interleaved tensors, experts in one tensor and in many,
# routers, latent attention, no two of them alike.
ROWS = ("qwen3-yarn", "gpt2", "phi3", "bloom", "mixtral", "gpt_oss", "deepseek_v3")
BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


def tensors_of(name: str, convert: Callable[[np.ndarray], np.ndarray]) -> dict[str, Deferred]:
    """A checkpoint's tensors, each made when it is asked for."""
    return {
        name: Deferred(made.shape, made.dtype, lambda made=made: made)
        for name, tensor in open_tensors(checkpoint(name).directory).items()
        for made in [convert(np.asarray(tensor))]
    }


@pytest.mark.parametrize(
    ("name", "stored", "asked", "compute"),
    [
        *((name, BFLOAT16, None, FLOAT32) for name in ROWS),
        ("llama", FLOAT32, None, FLOAT32),
        ("mixtral", FLOAT32, BFLOAT16, BFLOAT16),
    ],
)
def test_it_is_the_tree_that_is_made_of_the_plain_one(name, stored, asked, compute, quick_compilation):
    cfg, tensors = checkpoint(name).ours.config, tensors_of(name, lambda tensor: tensor.astype(stored))
    plain = import_params(cfg, tensors, dtype=asked)
    expected = prepare(plain, cfg, dtype=jnp.dtype(compute), whole=True, on_cpu=True)
    how = {"dtype": compute, "place": replicated(single_device_mesh()), "stored": asked}
    made, foreseen = import_decoding(cfg, tensors, **how), decoding_shapes(cfg, tensors, **how)
    assert jax.tree.structure(made) == jax.tree.structure(expected) == jax.tree.structure(foreseen)
    for leaf, truth, shape in zip(*map(jax.tree.leaves, (made, expected, foreseen)), strict=True):
        assert leaf.dtype == truth.dtype == shape.dtype
        assert leaf.shape == truth.shape == shape.shape
        assert leaf.sharding == shape.sharding
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(truth))


def test_a_model_does_not_change_with_its_files():
    cfg, place = checkpoint("llama").ours.config, replicated(single_device_mesh())
    mapped = dict(open_tensors(checkpoint("llama").directory))
    made = import_decoding(cfg, mapped, dtype=FLOAT32, place=place)
    held = [np.asarray(leaf) for leaf in jax.tree.leaves(made)]
    assert not any(np.may_share_memory(tensor, leaf) for tensor in mapped.values() for leaf in held)


def test_tensors_that_need_no_change_are_taken_over_as_they_are():
    cfg, place = checkpoint("llama").ours.config, replicated(single_device_mesh())
    made = {name: empty_aligned(t.shape, FLOAT32) for name, t in open_tensors(checkpoint("llama").directory).items()}
    for tensor in made.values():
        tensor[...] = 1
    held = import_decoding(cfg, made, dtype=FLOAT32, place=place)
    down = made["model.layers.0.mlp.down_proj.weight"]
    assert held["embed"].unsafe_buffer_pointer() == made["model.embed_tokens.weight"].ctypes.data
    assert held["blocks"][0]["ffn"]["down"].matrix.unsafe_buffer_pointer() == down.ctypes.data


def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_read():
    cfg, tensors = checkpoint("llama").ours.config, tensors_of("llama", lambda tensor: tensor)
    del tensors["model.norm.weight"]
    with pytest.raises(ValueError, match="1 tensors missing"):
        import_decoding(cfg, tensors, dtype=FLOAT32, place=replicated(single_device_mesh()))
