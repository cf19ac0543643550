"""Quantized tensors of GGUF files as plain numbers: how each type's blocks of weights are packed.

A row is cut into blocks of 32 or 256 weights. A block holds float16 scales and a few bits a weight; the K types cut
it further into parts with scales of their own, of 6 or 8 bits (layouts: `block_q4_0` and its kin in
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h).

    B blocks
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxformers.hub.copying import empty_aligned

BLOCKS_AT_ONCE = 2**14  # bounds what is held beside the result, and stays near the caches


class Block(NamedTuple):
    """A quantized type: `size` weights of a row share a block of `nbytes`, which unpack(uint8 [B, nbytes]) makes
    float32 [B, size]."""

    name: str
    size: int
    nbytes: int
    unpack: Callable[[np.ndarray], np.ndarray]


def dequantized(packed: np.ndarray, block: Block) -> np.ndarray:
    """Rows of blocks uint8 [..., bytes] as float32 [..., weights]."""
    blocks = packed.reshape(-1, block.nbytes)
    plain = empty_aligned((len(blocks), block.size), np.dtype(np.float32))
    with np.errstate(all="ignore"):  # a damaged scale gives NaN, as it would in any other reader
        for start in range(0, len(blocks), BLOCKS_AT_ONCE):
            plain[start : start + BLOCKS_AT_ONCE] = block.unpack(blocks[start : start + BLOCKS_AT_ONCE])
    return plain.reshape(*packed.shape[:-1], -1)


def _float16(blocks: np.ndarray, begin: int) -> np.ndarray:
    """The scale at a byte of each block, float32 [B, 1]."""
    return np.ascontiguousarray(blocks[:, begin : begin + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """[..., n] -> [..., 2 n]: the low halves of all bytes, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _bits(packed: np.ndarray) -> np.ndarray:
    """[B, n] -> [B, 8 n]: the bits of each byte, the lowest first."""
    return np.unpackbits(packed, axis=-1, bitorder="little")


def _q4_0(b: np.ndarray) -> np.ndarray:
    return _float16(b, 0) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _float16(b, 0) * _nibbles(b[:, 4:]) + _float16(b, 2)


def _q5_0(b: np.ndarray) -> np.ndarray:
    fifth = _bits(b[:, 2:6]) << 4
    return _float16(b, 0) * ((_nibbles(b[:, 6:]) | fifth).astype(np.float32) - 16)


def _q5_1(b: np.ndarray) -> np.ndarray:
    fifth = _bits(b[:, 4:8]) << 4
    return _float16(b, 0) * (_nibbles(b[:, 8:]) | fifth) + _float16(b, 2)


def _q8_0(b: np.ndarray) -> np.ndarray:
    return _float16(b, 0) * b[:, 2:].view(np.int8)


def _scales_and_minima(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the 8 parts of a K block multiply by and subtract, each float32 [B, 8, 1], from two float16 and 16 numbers
    of 6 bits in 12 bytes: the first four of each whole, the others' upper bits in what those leave free."""
    first, second, third = (b[:, begin : begin + 4] for begin in (4, 8, 12))
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=-1)
    minima = np.concatenate([second & 63, third >> 4 | (second >> 6) << 4], axis=-1)
    return (_float16(b, 0) * scales)[..., None], (_float16(b, 2) * minima)[..., None]


def _q4_k(b: np.ndarray) -> np.ndarray:
    scales, minima = _scales_and_minima(b)
    weights = _nibbles(b[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return (scales * weights - minima).reshape(-1, 256)


def _q5_k(b: np.ndarray) -> np.ndarray:
    scales, minima = _scales_and_minima(b)
    fifth = b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    weights = _nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | fifth << 4
    return (scales * weights - minima).reshape(-1, 256)


def _q6_k(b: np.ndarray) -> np.ndarray:
    scales = _float16(b, 208) * b[:, 192:208].view(np.int8)
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = b[:, 128:192].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    weights = (low | high << 4).astype(np.float32) - 32
    return (scales[..., None] * weights.reshape(-1, 16, 16)).reshape(-1, 256)


BLOCKS = {
    2: Block("Q4_0", 32, 18, _q4_0),
    3: Block("Q4_1", 32, 20, _q4_1),
    6: Block("Q5_0", 32, 22, _q5_0),
    7: Block("Q5_1", 32, 24, _q5_1),
    8: Block("Q8_0", 32, 34, _q8_0),
    12: Block("Q4_K", 256, 144, _q4_k),
    13: Block("Q5_K", 256, 176, _q5_k),
    14: Block("Q6_K", 256, 210, _q6_k),
}
# What files may hold besides, to be named when refused.
UNREAD = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
