"""Copies are what NumPy's assignment gives, in every layout and dtype, and JAX takes their memory as it is."""

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxformers.hub import copying
from jaxformers.hub.copying import Copying, empty_aligned

BF16, F8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
SHAPES = [(48, 80), (200, 304), (64, 1000), (36, 7), (16, 2056), (1, 64), (64, 1)]


def random(shape, dtype):
    return np.random.default_rng(0).standard_normal(shape, np.float32).astype(dtype)


def copied(source, dtype):
    target = empty_aligned(source.shape, np.dtype(dtype))
    with Copying() as copies:
        copies.add(target, source)
    return target


def assert_same_bits(ours, truth):
    assert (ours.dtype, ours.shape) == (truth.dtype, truth.shape)
    assert ours.tobytes() == truth.tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "stored, asked",
    [
        (BF16, BF16),
        (BF16, np.float32),
        (np.float32, BF16),
        (np.float16, np.float32),
        (F8, F8),
        (np.float64, np.float64),
    ],
)
def test_plain_transposed_and_sliced_matrices_arrive_bit_for_bit(shape, stored, asked):
    matrix = random(shape, stored)
    out, width = shape
    heads = matrix.T.reshape(width, 4, -1) if out % 4 == 0 else matrix.T
    for source in (matrix, matrix.T, matrix.T[: width // 2 + 1], matrix[::2], heads, heads[:, 1:], heads[..., 1:]):
        assert_same_bits(copied(source, asked), source.astype(asked))


def test_large_matrices_are_cut_for_threads(monkeypatch):
    monkeypatch.setattr(copying, "CHUNK_BYTES", 10_000)
    for shape in SHAPES:
        matrix = random(shape, BF16)
        assert_same_bits(copied(matrix.T, BF16), np.ascontiguousarray(matrix.T))
        assert_same_bits(copied(matrix, np.float32), matrix.astype(np.float32))


def test_a_transposed_target_is_written_in_its_place():
    whole = np.zeros((96, 64), np.float32)
    entry = random((64, 96), np.float32)
    with Copying() as copies:
        copies.add(whole.T, entry)
        copies.add(whole.T[:, :8], entry[:, :8])
    np.testing.assert_array_equal(whole, entry.T)


@pytest.mark.parametrize("shape", [(), (1,), (0, 5), (3, 0)], ids=str)
def test_scalars_and_empty_arrays_are_copied_too(shape):
    source = random(shape, np.float32)
    assert_same_bits(copied(source, np.float32), source)


def test_sources_are_given_back_while_others_wait_and_all_by_the_end(monkeypatch):
    monkeypatch.setattr(copying, "AT_ONCE_BYTES", 1000)
    seen, sources = [], [np.full(100, i, np.float32) for i in range(7)]
    target = np.empty((7, 100), np.float32)
    with Copying(seen.append) as copies:
        for row, source in zip(target, sources, strict=True):
            copies.add(row, source)
        assert 0 < len(seen) < 7
    assert [array[0] for array in seen] == list(range(7))
    np.testing.assert_array_equal(target, np.stack(sources))


def test_a_failed_copy_is_raised():
    with pytest.raises(ValueError), Copying() as copies:
        copies.add(np.empty(3, np.float32), np.ones(4, np.float32))


def test_jax_on_cpu_takes_aligned_memory_as_it_is():
    array = empty_aligned((1000, 3), np.dtype(np.float32))
    array[...] = 1
    place = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    taken = jax.make_array_from_callback(array.shape, place, lambda _: array)
    assert taken.unsafe_buffer_pointer() == array.ctypes.data
