"""GGUF files mean what `transformers` makes of them: every type of tensor, every architecture, and a real model."""

import contextlib
import functools
import struct

import gguf
import jax
import numpy as np
import pytest
import torch
import transformers
from hub.gguf_files import MODELS, random_model, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxformers.api import load, save_pretrained
from jaxformers.hub.convert import import_params
from jaxformers.hub.gguf import TYPE_NAMES, open_gguf
from jaxformers.hub.gguf_blocks import BLOCKS, dequantized
from jaxformers.hub.gguf_models import gguf_config, gguf_tensors
from jaxformers.models.decoder import forward

TOKENS = np.random.default_rng(0).integers(0, 320, (2, 12), dtype=np.int32)


@functools.partial(jax.jit, static_argnames="cfg", compiler_options={"xla_backend_optimization_level": 0})
def logits_of(params, cfg, tokens):
    return forward(params, cfg, tokens)


def ours(path):
    file = open_gguf(path)
    cfg = gguf_config(file)
    return np.asarray(logits_of(import_params(cfg, gguf_tensors(file)), cfg, TOKENS))


def logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


def theirs(path):
    """Logits of `transformers`' own loading of the file."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return logits(model.eval())


def assert_equal(found, truth, tolerance=1e-4):
    assert np.abs(found - truth).max() <= tolerance * np.abs(truth).max()


@pytest.fixture(scope="module")
def llama():
    return random_model("llama")


@pytest.mark.parametrize("kind", TYPE_NAMES.values())
def test_every_type_of_tensor_is_dequantized(kind, llama, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", llama, kind=kind)
    assert kind in open_gguf(path).stored
    assert_equal(ours(path), theirs(path))


@pytest.mark.parametrize("type_id", BLOCKS)
def test_any_block_is_unpacked_as_the_formats_own_library_does(type_id):
    block = BLOCKS[type_id]
    packed = np.random.default_rng(0).integers(0, 256, (3, 20_000 * block.nbytes), np.uint8)
    ours = dequantized(packed, block)
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(packed, gguf.GGMLQuantizationType(type_id))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("arch", MODELS)
def test_every_architecture_is_the_model_that_was_converted(arch, tmp_path):
    model = random_model(arch)
    path = write_gguf(tmp_path / "model.gguf", arch, model)
    assert_equal(ours(path), logits(model), 1e-5)
    if arch != "gemma":  # which transformers does not read from GGUF
        assert_equal(ours(path), theirs(path))


def test_plain_tensors_are_not_copied_and_keep_their_type(llama, tmp_path):
    file = open_gguf(write_gguf(tmp_path / "model.gguf", "llama", llama, kind="F16"))
    assert file.tensors["token_embd.weight"].dtype == np.float16
    assert isinstance(file.tensors["token_embd.weight"], np.ndarray)
    assert not file.tensors["token_embd.weight"].flags.owndata
    params = import_params(gguf_config(file), gguf_tensors(file))
    assert params["embed"].dtype == np.float16
    assert params["final_norm"]["w"].dtype == np.float32


def test_loading_on_a_mesh_gives_the_same_parameters(llama, tmp_path):
    from jaxformers.parallel.mesh import MeshConfig

    path = write_gguf(tmp_path / "model.gguf", "llama", llama, kind="Q8_0")
    one, split = load(path), load(path, mesh=MeshConfig(tp=2))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one.params), jax.device_get(split.params))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
)
def test_a_scaled_rope_is_read(scaling, tmp_path):
    rope = {"rope_theta": 10_000.0, **scaling}
    model = random_model("llama", rope_parameters=rope)

    def extra(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling.get("original_max_position_embeddings", 16))

    assert_equal(ours(write_gguf(tmp_path / "model.gguf", "llama", model, extra=extra)), logits(model), 1e-5)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_the_scaling_of_llama_3_is_recovered_from_its_factors(tmp_path):
    model = random_model("llama", rope_parameters=LLAMA3)
    plain = 500_000.0 ** -(np.arange(0, 64, 2) / 64)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    path = write_gguf(tmp_path / "model.gguf", "llama", model, more=[("rope_freqs.weight", factors)])
    assert gguf_config(open_gguf(path)).source["rope_scaling"] == {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    assert_equal(ours(path), logits(model), 1e-5)


def test_biases_of_a_llama_are_reordered_too(tmp_path):
    model = random_model("llama", attention_bias=True, mlp_bias=True)
    path = write_gguf(tmp_path / "model.gguf", "llama", model)
    assert_equal(ours(path), logits(model), 1e-5)


def test_a_scaled_gemma_scales_its_global_layers_only_and_so_does_its_export(tmp_path):
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    model = random_model("gemma3", rope_parameters=rope)

    def extra(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    path = write_gguf(tmp_path / "model.gguf", "gemma3", model, extra=extra)
    assert_equal(ours(path), logits(model), 1e-5)
    save_pretrained(load(path), tmp_path / "converted")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32)
    assert_equal(logits(exported.eval()), logits(model), 1e-6)


def test_one_part_of_a_split_model_is_refused(llama, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", llama, extra=lambda w: w.add_uint16("split.count", 3))
    assert "is one of 3 files" in refusal(path)


def test_factors_of_another_scaling_are_refused(llama, tmp_path):
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    path = write_gguf(tmp_path / "model.gguf", "llama", llama, more=[("rope_freqs.weight", factors)])
    with pytest.raises(ValueError, match=r"rope_freqs.weight is not the scaling of Llama 3.1"):
        gguf_config(open_gguf(path))


def test_the_biggest_gemmas_scale_their_queries_by_their_width(tmp_path):
    path = tmp_path / "model.gguf"
    model = random_model(
        "gemma2", num_hidden_layers=46, hidden_size=64, intermediate_size=32, head_dim=32, query_pre_attn_scalar=16
    )
    write_gguf(path, "gemma2", model)
    assert gguf_config(open_gguf(path)).attn_scale == 16**-0.5
    assert_equal(ours(path), logits(model), 1e-5)


def refusal(path):
    with pytest.raises(ValueError) as caught:
        ours(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_architecture_is_named_with_the_known_ones(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "rwkv7")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "'rwkv7' is not read from GGUF; known are gemma, " in refusal(tmp_path / "model.gguf")


def test_an_unknown_type_of_tensor_is_named_with_the_known_ones(llama, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", llama, kind="Q4_0")
    data = path.read_bytes()
    at = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 16
    path.write_bytes(data[:at] + struct.pack("<I", 10) + data[at + 4 :])
    assert "tensor 'blk.0.attn_q.weight' of type Q2_K, which is not read; known: F32, F16, BF16, Q4_0" in refusal(path)


@pytest.mark.parametrize(
    "extra, told",
    [
        (lambda w: w.add_expert_count(8), "expert_count is 8; it must be 0"),
        (lambda w: w.add_causal_attention(False), "attention.causal is False; it must be True"),
        (lambda w: w.add_key_value("llama.attention.scale", 0.5, gguf.GGUFValueType.FLOAT32), "attention.scale = 0.5"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "'rope.scaling.factor' is missing"),
        (lambda w: w.add_token_list(["a"] * 400), "has 400 tokens, but token_embd.weight only 320 rows"),
    ],
)
def test_a_setting_that_is_not_understood_is_named(extra, told, llama, tmp_path):
    assert told in refusal(write_gguf(tmp_path / "model.gguf", "llama", llama, extra=extra))


def test_settings_that_contradict_the_tensors_are_named(llama, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", llama)
    data = path.read_bytes()

    def with_value(key, value):
        at = data.index(key.encode()) + len(key) + 4
        path.write_bytes(data[:at] + struct.pack("<I", value) + data[at + 4 :])
        return refusal(path)

    assert "vocab_size is 999; it must be 320" in with_value("llama.vocab_size", 999)
    assert "rope.dimension_count is 32; it must be 64" in with_value("llama.rope.dimension_count", 32)
    assert "9 tensors missing: model.layers.2." in with_value("llama.block_count", 3)
    assert "block_count is 4000000000; it must be at most the number of tensors" in with_value(
        "llama.block_count", 4_000_000_000
    )
    assert "of another shape" in with_value("llama.feed_forward_length", 256)


def test_missing_and_unknown_tensors_are_all_listed(llama, tmp_path):
    path = write_gguf(
        tmp_path / "model.gguf",
        "llama",
        llama,
        drop=("blk.0.attn_q.weight", "blk.1.ffn_up.weight"),
        more=[("blk.0.ffn_gate_exps.weight", np.zeros((8, 8), np.float32))],
    )
    told = refusal(path)
    assert "model.layers.0.self_attn.q_proj.weight, model.layers.1.mlp.up_proj.weight" in told
    assert "blk.0.ffn_gate_exps.weight" in told


def test_a_file_cut_anywhere_is_refused(llama, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", llama)
    data = path.read_bytes()
    start = data.index(b"blk.1.ffn_down.weight")
    for length in (0, 3, 7, 20, 100, 500, start, start + 30, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert any(word in refusal(path) for word in ("truncated", "empty")), length


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_in_a_header_are_read_or_refused_with_a_value_error(llama, tmp_path, data):
    path = tmp_path / "model.gguf"
    if not path.exists():
        write_gguf(path, "llama", llama, kind="Q4_0")
    content = bytearray(path.read_bytes())
    header = content.rindex(b"output.weight") + 40
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header))
        content[at] = data.draw(st.integers(0, 12) | st.integers(0, 255))
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(content)
    with contextlib.suppress(ValueError):
        file = open_gguf(changed)
        gguf_config(file)
        gguf_tensors(file)


def damaged(path, data, at, packed):
    path.write_bytes(data[:at] + packed + data[at + len(packed) :])
    return refusal(path)


def test_a_header_that_contradicts_itself_is_refused(llama, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", llama)
    data = path.read_bytes()
    tensor = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight")
    assert "does not begin with 'GGUF'" in damaged(path, data, 0, b"GGML")
    assert "version 1;" in damaged(path, data, 4, struct.pack("<I", 1))
    assert "big-endian version 3" in damaged(path, data, 4, struct.pack(">I", 3))
    assert "truncated" in damaged(path, data, 8, struct.pack("<Q", 2**60))
    assert "truncated" in damaged(path, data, 16, struct.pack("<Q", 2**60))
    assert "a text of 18446744073709551615 bytes" in damaged(path, data, 24, b"\xff" * 8)
    assert "is truncated: the tensor 'blk.0.attn_q.weight'" in damaged(
        path, data, tensor + 4, struct.pack("<QQ", 2**40, 2**40)
    )
    assert "of 1000 dims (at most 4)" in damaged(path, data, tensor, struct.pack("<I", 1000))
    assert "overlaps" in damaged(path, data, tensor + 24, struct.pack("<Q", 64))
    assert "twice" in damaged(path, data, tensor - len("attn_q.weight"), b"attn_k.weight")
    assert "not UTF-8" in damaged(path, data, data.index(b"tiny"), b"\xff")


def test_a_file_becomes_a_hugging_face_directory_that_transformers_opens(llama, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", llama, kind="Q8_0")
    save_pretrained(load(path), tmp_path / "converted")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32)
    assert_equal(logits(model.eval()), theirs(path))
