"""Weights stored as blocks of float8 with a scale each open as plain numbers, and are exported as such."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from families.checkpoints import checkpoint, reference_logits, tokens
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxformers as jf
from jaxformers.hub.convert import import_params
from jaxformers.hub.fp8 import open_weights
from jaxformers.hub.pretrained import read_pretrained, write_pretrained
from jaxformers.hub.safetensors import open_tensors, write_tensors

BLOCKS = (16, 12)  # neither divides every weight
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": BLOCKS}
LARGEST = 448.0  # of float8 e4m3


def quantized(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(float8 weight, float32 scales), each block scaled so that its largest number is the format's."""
    rows, columns = (range(0, size, block) for size, block in zip(weight.shape, BLOCKS, strict=True))
    scales = np.empty((len(rows), len(columns)), np.float32)
    coded = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            here = np.s_[row : row + BLOCKS[0], column : column + BLOCKS[1]]
            scales[i, j] = np.abs(weight[here]).max() / LARGEST
            coded[here] = (weight[here] / scales[i, j]).astype(coded.dtype)
    return coded, scales


def multiplied(coded: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The published formula, in torch."""
    plain = torch.from_numpy(coded.view(np.uint8)).view(torch.float8_e4m3fn).float()
    for i, j in np.ndindex(*scales.shape):
        plain[i * BLOCKS[0] : (i + 1) * BLOCKS[0], j * BLOCKS[1] : (j + 1) * BLOCKS[1]] *= float(scales[i, j])
    return plain.numpy()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(directory, its tensors as plain float32 by the formula)."""
    directory = tmp_path_factory.mktemp("fp8")
    written, plain = {}, {}
    for name, tensor in open_tensors(checkpoint("deepseek_v3").directory).items():
        written[name] = plain[name] = tensor
        if "_proj" in name:
            written[name], written[f"{name}_scale_inv"] = coded, scales = quantized(tensor)
            plain[name] = multiplied(coded, scales)
    write_tensors(directory, written)
    config = checkpoint("deepseek_v3").ours.config.source | {"quantization_config": QUANTIZATION}
    (directory / "config.json").write_text(json.dumps(config))
    return directory, plain


def test_every_weight_is_its_float8_times_its_blocks_scale(stored):
    directory, plain = stored
    ours = read_pretrained(directory, dtype=np.float32)
    jax.tree.map(np.testing.assert_array_equal, ours.params, import_params(ours.config, plain))


def test_weights_are_bfloat16_unless_another_dtype_is_asked_for(stored):
    directory, plain = stored
    params = jf.load(directory).params
    gate = params["layers"][0][0]["ffn"]["gate"]
    assert gate.dtype == ml_dtypes.bfloat16
    truth = plain["model.layers.0.mlp.gate_proj.weight"].T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(gate[0], truth)
    assert params["embed"].dtype == np.float32  # stored so


def test_the_parts_of_devices_are_those_of_the_whole(stored):
    directory, _ = stored
    whole = read_pretrained(directory)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    places = jax.tree.map(lambda a: NamedSharding(mesh, P(*[None] * (a.ndim - 1), "x")), whole.params)
    places = jax.tree.map(
        lambda a, place: place if a.shape[-1] % 2 == 0 else NamedSharding(mesh, P()), whole.params, places
    )
    parts = read_pretrained(directory, shardings=places)
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)


def test_an_export_holds_plain_numbers_and_says_so(stored, tmp_path):
    directory, plain = stored
    ours = read_pretrained(directory, dtype=np.float32)
    write_pretrained(tmp_path, ours.config, ours.params, generation=ours.generation)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    written = open_tensors(tmp_path)
    assert written.keys() == plain.keys()
    assert all(written[name].tobytes() == tensor.tobytes() for name, tensor in plain.items())
    reopened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert np.isfinite(reference_logits(reopened, tokens(1, 5))).all()


def rewritten(stored, folder, **changes):
    directory, _ = stored
    tensors = dict(open_tensors(directory)) | changes
    write_tensors(folder, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    (folder / "config.json").write_text((directory / "config.json").read_text())
    return folder


def test_every_scale_of_another_shape_is_listed(stored, tmp_path):
    names = [f"model.layers.{i}.self_attn.o_proj.weight_scale_inv" for i in (0, 1)]
    with pytest.raises(ValueError, match="scales that do not fit") as caught:
        open_weights(rewritten(stored, tmp_path, **{name: np.ones((1, 2), np.float32) for name in names}))
    assert all(f"{name} is [1, 2], not [2, 4]" in str(caught.value) for name in names)


def test_a_weight_without_scales_and_scales_without_a_weight_are_refused(stored, tmp_path):
    gone, stray = "model.layers.0.mlp.up_proj.weight_scale_inv", "model.norm.weight_scale_inv"
    with pytest.raises(ValueError) as caught:
        read_pretrained(rewritten(stored, tmp_path, **{gone: None, stray: np.ones((1, 1), np.float32)}))
    assert "model.layers.0.mlp.up_proj.weight (float8_e4m3fn)" in str(caught.value)
    assert f"1 tensors without a place in the model: {stray}" in str(caught.value)
