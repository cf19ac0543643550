"""safetensors files read and written here are those of the `safetensors` and `transformers` libraries."""

import errno
import functools
import itertools
import json
import os
import resource
import struct
import weakref
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformers.hub.safetensors import DTYPES, Deferred, open_tensors, write_tensors


def random_array(rng, shape, dtype):
    """Random bits of any dtype; bool keeps to 0 and 1."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    high = 2 if np.dtype(dtype) == np.bool_ else 256
    return rng.integers(0, high, count, dtype=np.uint8).view(dtype).reshape(shape)


def assert_bit_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape), name
        assert ours[name].tobytes() == array.tobytes(), name


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    arrays = {f"of.{name}": random_array(rng, (3, 5), dtype) for name, dtype in DTYPES.items()}
    return arrays | {
        "scalar": np.array(1.5, np.float32),
        "empty": np.zeros((0, 7), np.int32),
        "größe": random_array(rng, (2, 2, 3), ml_dtypes.bfloat16),
        "strided": random_array(rng, (4, 6), np.float32).T[::2],
    }


def raw_file(path: Path, header, data=b"", *, length=None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def f32(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


# Reading and writing agree with the libraries


def test_a_file_of_the_library_reads_bit_equal_in_every_dtype(tmp_path, tensors):
    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    safetensors.numpy.save_file(contiguous, tmp_path / "model.safetensors")
    assert_bit_equal(open_tensors(tmp_path), tensors)
    assert_bit_equal(open_tensors(str(tmp_path / "model.safetensors")), tensors)


def test_a_written_file_is_byte_for_byte_the_librarys(tmp_path, tensors):
    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    safetensors.numpy.save_file(contiguous, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    write_tensors(tmp_path, tensors)
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_bfloat16_and_float8_reach_torch_with_their_values(tmp_path):
    values = np.array([0.5, -2.0, 448.0])
    dtypes = {"bf16": ml_dtypes.bfloat16, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
    write_tensors(tmp_path, {name: values.astype(dtype) for name, dtype in dtypes.items()})
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    torch_dtypes = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
    for name, dtype in torch_dtypes.items():
        assert loaded[name].dtype == dtype
        np.testing.assert_array_equal(loaded[name].float().numpy(), values.astype(dtypes[name]).astype(np.float32))


@pytest.fixture(scope="module")
def reference_model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        )
    )  # fmt: skip


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000, 5_000])
def test_a_directory_of_transformers_reads_back_and_is_written_alike(tmp_path, reference_model, max_shard_bytes):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    reference_model.save_pretrained(theirs, max_shard_size=max_shard_bytes)
    tensors = open_tensors(theirs)
    assert_bit_equal(tensors, {name: value.numpy() for name, value in reference_model.state_dict().items()})
    write_tensors(ours, {name: tensors[name] for name in reference_model.state_dict()}, max_shard_bytes=max_shard_bytes)
    weights = [path.name for path in sorted(theirs.iterdir()) if path.name.startswith("model")]
    assert [path.name for path in sorted(ours.iterdir())] == weights
    assert max_shard_bytes == 10**9 or len(weights) > 2
    for name in weights:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_transformers_opens_what_was_written(tmp_path, reference_model):
    reference_model.config.save_pretrained(tmp_path)
    state = {name: value.numpy() for name, value in reference_model.state_dict().items()}
    write_tensors(tmp_path, state, max_shard_bytes=20_000)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())


def test_jax_arrays_are_written_as_they_are(tmp_path):
    write_tensors(tmp_path, {"w": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)})
    assert_bit_equal(open_tensors(tmp_path), {"w": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3)})


# Nothing is held that need not be


def test_a_view_is_read_only_and_reads_only_its_slice(tmp_path):
    path = tmp_path / "model.safetensors"
    bytes_of_data = 1 << 40
    header = json.dumps({"w": f32(0, bytes_of_data, (1 << 20, 1 << 18))}).encode()
    with path.open("wb") as file:  # a sparse terabyte: only a lazy reader can open it
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + bytes_of_data)
    view = open_tensors(tmp_path)["w"]
    assert view.shape == (1 << 20, 1 << 18)
    assert not view.flags.writeable
    assert view[-1, -3:].tolist() == [0.0, 0.0, 0.0]


def test_deferred_tensors_are_made_one_at_a_time_and_released(tmp_path):
    alive, most = set(), 0

    def make(value):
        nonlocal most
        array = np.full((4,), value, np.float32)
        alive.add(value)
        weakref.finalize(array, alive.remove, value)
        most = max(most, len(alive))
        return array

    lazies = {f"t{i}": Deferred((4,), np.float32, functools.partial(make, i)) for i in range(6)}
    write_tensors(tmp_path, lazies, max_shard_bytes=40)
    assert_bit_equal(open_tensors(tmp_path), {f"t{i}": np.full((4,), i, np.float32) for i in range(6)})
    assert most == 1
    assert not alive


def test_a_model_can_be_rewritten_from_its_own_views(tmp_path):
    first = {f"t{i}": np.full((4,), i, np.float32) for i in range(5)}
    write_tensors(tmp_path, first, max_shard_bytes=32)
    views = open_tensors(tmp_path)
    for max_shard_bytes in (32, 10**6, 16, 48):
        write_tensors(tmp_path, views, max_shard_bytes=max_shard_bytes)
        assert_bit_equal(open_tensors(tmp_path), first)
    assert_bit_equal(views, first)


def test_weights_of_an_earlier_layout_are_gone_after_a_write(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    many = {f"t{i}": np.zeros(4, np.float32) for i in range(5)}
    layouts = {
        16: {f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)} | {"model.safetensors.index.json"},
        48: {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)} | {"model.safetensors.index.json"},
        10**6: {"model.safetensors"},
    }
    for max_shard_bytes in (10**6, 16, 48, 16, 10**6, 48):
        write_tensors(tmp_path, many, max_shard_bytes=max_shard_bytes)
        assert {path.name for path in tmp_path.iterdir()} == layouts[max_shard_bytes] | {"config.json"}


# A write that fails


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("before, after", [*itertools.product((16, 48, 10**6), repeat=2)])
def test_a_process_killed_while_files_change_places_never_leaves_a_mixture(tmp_path, monkeypatch, before, after):
    old, new = ({f"t{i}": np.full(4, fill, np.float32) for i in range(5)} for fill in (1, 2))
    for survived in itertools.count():
        directory = tmp_path / str(survived)
        write_tensors(directory, old, max_shard_bytes=before)
        steps = iter([False] * survived + [True])

        def killable(step, steps=steps):
            def wrapped(*args, **kwargs):
                if not str(args[0]).startswith(str(tmp_path)) or not next(steps, False):
                    return step(*args, **kwargs)
                raise Killed

            return wrapped

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killable(os.replace))
            patch.setattr(Path, "unlink", killable(Path.unlink))
            try:
                write_tensors(directory, new, max_shard_bytes=after)
            except Killed:
                assert_old_new_or_refused(directory, old, new)
            else:
                break
    assert survived >= 1
    assert_bit_equal(open_tensors(directory), new)


def assert_old_new_or_refused(directory, old, new):
    try:
        found = open_tensors(directory)
    except ValueError:
        return
    assert_bit_equal(found, old if found["t0"][0] == 1 else new)


def test_a_file_system_that_refuses_bytes_leaves_the_previous_model_and_nothing_else(tmp_path):
    good = {"w": np.arange(4, dtype=np.float32)}
    write_tensors(tmp_path, good)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write 0.0002 GB of weights to .*: File too large") as failure:
            write_tensors(tmp_path, {f"t{i}": np.ones(10_000, np.float32) for i in range(5)}, max_shard_bytes=80_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failure.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_bit_equal(open_tensors(tmp_path), good)


def test_a_full_disk_is_one_line_with_its_errno(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as failure:
        write_tensors(tmp_path / "new", {"w": np.zeros(3, np.float32)})
    assert failure.value.errno == errno.ENOSPC
    assert "\n" not in str(failure.value)
    assert not list((tmp_path / "new").iterdir())


def test_a_tensor_that_cannot_be_made_leaves_the_previous_model(tmp_path):
    good = {"w": np.arange(4, dtype=np.float32)}
    write_tensors(tmp_path, good)

    def fail():
        raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        write_tensors(tmp_path, {"a": np.zeros(2, np.float32), "w": Deferred((4,), np.float32, fail)})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_bit_equal(open_tensors(tmp_path), good)


@pytest.mark.parametrize(
    "name, dtype, said",
    [("w", np.complex128, "complex128"), ("w", ml_dtypes.int4, "int4"), ("__metadata__", np.float32, "__metadata__")],
)
def test_what_the_format_lacks_is_refused_before_anything_is_written(tmp_path, name, dtype, said):
    with pytest.raises(ValueError, match=said):
        write_tensors(tmp_path / "out", {name: np.zeros(2, dtype)})
    assert not (tmp_path / "out").exists()


# Bad files, each refused with one line


DUPLICATE = (
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
)

BAD_HEADERS = {
    "not JSON": (b"\x80\x02}q\x00." + b" " * 20, b"", "damaged header"),
    "not UTF-8": (b'{"\xff": 1}', b"", "damaged header"),
    "nested without end": (b"[" * 200_000, b"", "damaged header"),
    "not an object": (b"[1, 2]", b"", "a JSON object is expected, not list"),
    "duplicate name": (DUPLICATE, bytes(16), "'a' comes 2 times"),
    "duplicate field": (b'{"a":{"dtype":"F32","dtype":"I32","shape":[],"data_offsets":[0,4]}}', bytes(4), "'dtype'"),
    "unknown dtype": ({"a": f32(0, 8, dtype="F31")}, bytes(8), "'a' has the unknown dtype 'F31'; known: BOOL, U8"),
    "sub-byte dtype": ({"a": f32(0, 1, dtype="F4")}, bytes(1), "unknown dtype 'F4'"),
    "dtype of another type": ({"a": f32(0, 8, dtype=["F32"])}, bytes(8), "unknown dtype"),
    "fields missing": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "exactly dtype, shape and data_offsets"),
    "fields extra": ({"a": f32(0, 8) | {"url": "x"}}, bytes(8), "exactly dtype, shape and data_offsets"),
    "fields not an object": ({"a": 3}, b"", "exactly dtype, shape and data_offsets"),
    "shape not a list": ({"a": f32(0, 8) | {"shape": "2"}}, bytes(8), "shape that is not a list"),
    "negative size": ({"a": f32(0, 8, (-1, -2))}, bytes(8), "shape that is not a list"),
    "fractional size": ({"a": f32(0, 8, (2.0,))}, bytes(8), "shape that is not a list"),
    "boolean size": ({"a": f32(0, 4, (True,))}, bytes(4), "shape that is not a list"),
    "too many dims": ({"a": f32(0, 4, (1,) * 65)}, bytes(4), "at most 64 sizes"),
    "an empty tensor too large to address": ({"a": f32(0, 0, (0, 2**40, 2**40))}, b"", "fit memory"),
    "offsets not a pair": ({"a": f32(0, 8) | {"data_offsets": [0, 4, 8]}}, bytes(8), r"not \[begin, end\]"),
    "negative offset": ({"a": f32(-8, 0)}, bytes(8), r"not \[begin, end\]"),
    "end before begin": ({"a": f32(8, 0)}, bytes(8), "spans -8 bytes"),
    "offsets disagree with shape": ({"a": f32(0, 12)}, bytes(12), "spans 12 bytes, but F32 of shape .2. takes 8"),
    "overlap": ({"a": f32(0, 8), "b": f32(4, 12)}, bytes(12), "'b' at bytes .4, 12. overlaps another"),
    "the same bytes twice": ({"a": f32(0, 8), "b": f32(0, 8)}, bytes(8), "overlaps another"),
    "hole": ({"a": f32(0, 8), "b": f32(16, 24)}, bytes(24), "'b' at bytes .16, 24. leaves a hole"),
    "out of range": ({"a": f32(1 << 40, (1 << 40) + 8)}, bytes(8), "leaves a hole"),
    "truncated data": ({"a": f32(0, 8)}, bytes(7), "is truncated: its header describes 8 bytes of data, and it has 7"),
    "bytes of no tensor": ({"a": f32(0, 8)}, bytes(9), "bytes that belong to no tensor"),
    "metadata not strings": ({"__metadata__": {"n": 1}, "a": f32(0, 8)}, bytes(8), "must map strings to strings"),
    "metadata not an object": ({"__metadata__": [], "a": f32(0, 8)}, bytes(8), "must map strings to strings"),
}


def assert_refused(path, said):
    with pytest.raises(ValueError, match=said) as refusal:
        open_tensors(path)
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("header, data, said", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_malformed_header_is_refused(tmp_path, header, data, said):
    assert_refused(raw_file(tmp_path / "model.safetensors", header, data), said)


# Ours alone: what NumPy cannot view, and what the library keeps silent about.
STRICTER = {
    "sub-byte dtype",
    "fields extra",
    "duplicate field",
    "an empty tensor too large to address",
    "too many dims",
}


@pytest.mark.parametrize("case", sorted(BAD_HEADERS.keys() - STRICTER))
def test_the_reference_implementation_refuses_the_same_headers(tmp_path, case):
    header, data, _ = BAD_HEADERS[case]
    path = raw_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.numpy.load_file(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01\x00\x00",
        struct.pack("<Q", 0),
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
    ],
)
def test_a_file_shorter_than_its_header_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert_refused(path, "truncated|damaged")


def test_a_header_above_the_limit_is_refused_without_being_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(1 << 40)
    assert_refused(path, "announces a header of 100000001")


@pytest.fixture
def sharded(tmp_path):
    """Two shards and their index, as a dict to spoil."""
    write_tensors(tmp_path, {"a": np.zeros(4, np.float32), "b": np.ones(4, np.float32)}, max_shard_bytes=16)
    return json.loads((tmp_path / "model.safetensors.index.json").read_text())


def rewrite_index(directory, index):
    raw = index if isinstance(index, bytes) else json.dumps(index).encode()
    (directory / "model.safetensors.index.json").write_bytes(raw)


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path, sharded):
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert_refused(tmp_path, "names the shard 'model-00002-of-00002.safetensors', which is not there")


def test_an_index_that_misplaces_a_tensor_is_refused(tmp_path, sharded):
    sharded["weight_map"]["c"] = "model-00001-of-00002.safetensors"
    rewrite_index(tmp_path, sharded)
    assert_refused(tmp_path, "places tensor 'c' in 'model-00001-of-00002.safetensors', which does not have it")


def test_a_tensor_in_two_shards_is_refused(tmp_path, sharded):
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(
        (tmp_path / "model-00001-of-00002.safetensors").read_bytes()
    )
    assert_refused(tmp_path, "'a' is in 'model-00002-of-00002.safetensors' and in another shard")


@pytest.mark.parametrize(
    "shard",
    ["../evil.safetensors", "/tmp/evil.safetensors", "a/b.safetensors", "..\\e.safetensors", "..", ".", "", "\0"],
)
def test_a_shard_outside_the_directory_is_refused(tmp_path, sharded, shard):
    (tmp_path.parent / "evil.safetensors").write_bytes((tmp_path / "model-00001-of-00002.safetensors").read_bytes())
    sharded["weight_map"]["a"] = shard
    rewrite_index(tmp_path, sharded)
    assert_refused(tmp_path, "must be a file name in the same directory")


@pytest.mark.parametrize(
    "index, said",
    [
        (b"{", "damaged"),
        (b"[]", "a JSON object is expected"),
        ({}, "'weight_map' must map"),
        ({"weight_map": ["a"]}, "'weight_map' must map"),
        ({"weight_map": {"a": 1}}, "'weight_map' must map"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "never loaded"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' comes 2 times"),
    ],
)
def test_a_malformed_index_is_refused(tmp_path, sharded, index, said):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    rewrite_index(tmp_path, index)
    assert_refused(tmp_path, said)


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    assert_refused(tmp_path / "nowhere", "no such file or directory")


def test_a_directory_without_weights_is_refused_and_says_what_was_looked_for(tmp_path):
    assert_refused(tmp_path, "neither model.safetensors nor model.safetensors.index.json$")
    raw_file(tmp_path / "model-00001-of-00002.safetensors", {})
    assert_refused(tmp_path, "it has model-00001-of-00002.safetensors, so name one file, or add the index")


def test_pickled_weights_are_never_loaded_and_the_way_out_is_named(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert_refused(tmp_path, "never loaded because unpickling runs code.*save_pretrained")
    assert_refused(tmp_path / "pytorch_model.bin", "never loaded")


# Damage at random


GOOD = safetensors.numpy.save(
    {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.int8), "c": np.zeros((0, 3), np.float64)},
    metadata={"format": "pt"},
)
HEADER_END = 8 + int.from_bytes(GOOD[:8], "little")
replacements = st.one_of(st.integers(0, 255), st.sampled_from(list(b'0123456789"{}[],:-.eEtrufals \\')))
edits = st.lists(st.tuples(st.integers(0, HEADER_END - 1), replacements), min_size=1, max_size=6)


def refusal_of(path):
    """What was said when the file was refused, or None after every byte of every tensor was read."""
    try:
        views = open_tensors(path)
    except ValueError as error:
        return str(error)
    for view in views.values():
        view.tobytes()
    return None


def assert_read_or_refused_with_one_line(path):
    assert "\n" not in (refusal_of(path) or "")


@settings(max_examples=400, deadline=None)
@given(edits=edits)
def test_damaged_header_bytes_are_read_or_refused_with_one_line(tmp_path_factory, edits):
    raw = bytearray(GOOD)
    for place, value in edits:
        raw[place] = value
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(raw)
    assert_read_or_refused_with_one_line(path)


@settings(max_examples=100, deadline=None)
@given(length=st.integers(0, len(GOOD) - 1))
def test_a_file_cut_anywhere_is_refused(tmp_path_factory, length):
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    path.write_bytes(GOOD[:length])
    assert refusal_of(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4) | st.just("F32"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "w"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(header=json_values)
def test_any_json_as_a_header_is_read_or_refused_with_one_line(tmp_path_factory, header):
    assert_read_or_refused_with_one_line(
        raw_file(tmp_path_factory.getbasetemp() / "json.safetensors", header, bytes(8))
    )
