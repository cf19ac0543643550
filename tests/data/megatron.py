"""A writer of Megatron's indexed datasets, from the format's description and nothing of ours."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def write_megatron(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], *, dtype: str = "int32") -> None:
    """`prefix`.bin and .idx of documents, each a list of sequences of ids."""
    sequences = [
        np.array(sequence, np.dtype(dtype).newbyteorder("<")) for document in documents for sequence in document
    ]
    boundaries = [0]
    for document in documents:
        boundaries.append(boundaries[-1] + len(document))
    prefix.with_suffix(".bin").write_bytes(b"".join(sequence.tobytes() for sequence in sequences))
    prefix.with_suffix(".idx").write_bytes(
        index_bytes(
            lengths=[len(sequence) for sequence in sequences],
            pointers=np.cumsum([0] + [sequence.nbytes for sequence in sequences])[:-1].tolist(),
            boundaries=boundaries,
            code=CODES[dtype],
        )
    )


def index_bytes(
    *,
    lengths: Sequence[int],
    pointers: Sequence[int],
    boundaries: Sequence[int],
    code: int = 4,
    magic: bytes = b"MMIDIDX\x00\x00",
    version: int = 1,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """The content of an .idx; `counts` are what its header claims, if not the truth."""
    claimed = counts or (len(lengths), len(boundaries))
    return (
        magic
        + struct.pack("<Q", version)
        + struct.pack("<B", code)
        + struct.pack("<QQ", *claimed)
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(boundaries)}q", *boundaries)
    )
