"""Megatron's indexed data set: tokens.bin, ids end to end, and tokens.idx, which says where each document lies.

The layout is that of `IndexedDataset` in Megatron-LM (megatron/core/datasets/indexed_dataset.py), little-endian:

    9 bytes      "MMIDIDX\\0\\0"
    u64, u8      version, 1; code of the ids' dtype
    u64, u64     sequences S; entries of the last table, S + 1 here
    i32 [S]      tokens of each sequence
    i64 [S]      byte of the .bin that each begins at
    i64 [S + 1]  first sequence of each document, and their end

A document is one sequence here, and its last id is the end-of-document id.
"""

import struct
from pathlib import Path

import numpy as np

from jaxformers.data.cache import TokenCache

_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_DTYPE_CODES = {"int32": 4, "uint16": 8}
_LONGEST = 2**31 - 1  # a sequence's length is an int32
_UINT16_BELOW = 65500  # vocabularies smaller than this one take uint16: Megatron's own bound, not 65536
_AT_ONCE = 1 << 22  # tokens


def megatron_dtype(vocab_size: int) -> str:
    """The dtype that Megatron itself stores ids of such a vocabulary in."""
    return "uint16" if vocab_size < _UINT16_BELOW else "int32"


def write_megatron_tokens(path: Path, cache: TokenCache, *, dtype: str) -> None:
    """The .bin of a cache: the ids of all documents, end to end."""
    with open(path, "wb") as out:
        for start in range(0, len(cache.tokens), _AT_ONCE):
            out.write(cache.tokens[start : start + _AT_ONCE].astype(np.dtype(dtype).newbyteorder("<")).tobytes())


def write_megatron_index(path: Path, cache: TokenCache, *, dtype: str) -> None:
    """The .idx of a cache.

    Raises:
        ValueError: a document too long for the format.
    """
    longest = int(cache.lengths.max())
    if longest > _LONGEST:
        raise ValueError(f"a document of {longest} tokens cannot be written: Megatron's index counts to {_LONGEST}")
    documents = len(cache.lengths)
    with open(path, "wb") as out:
        out.write(_MAGIC + struct.pack("<QBQQ", _VERSION, _DTYPE_CODES[dtype], documents, documents + 1))
        out.write(cache.lengths.astype("<i4").tobytes())
        out.write((cache.starts * np.dtype(dtype).itemsize).astype("<i8").tobytes())
        out.write(np.arange(documents + 1, dtype="<i8").tobytes())
