"""The weights of a Hugging Face directory, also where they are stored as blocks of float8 with a scale each.

Nothing here computes in float8: each weight becomes plain numbers when its turn to be read comes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxformers.families import scale_blocks
from jaxformers.hub.safetensors import ArrayLike, Deferred, open_tensors

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
VALUES = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32)  # of every byte
SCALES = "_scale_inv"  # behind the weight's name


def open_weights(directory: str | Path) -> Mapping[str, ArrayLike]:
    """The tensors of a directory by name: memory-mapped views, or `Deferred` ones of weights that have scales.

    ValueError as `open_tensors` raises it, for a quantization that cannot be read, and listing every misshapen scale.
    """
    blocks, tensors = scale_blocks(directory), open_tensors(directory)
    return tensors if blocks is None else dequantized(tensors, blocks)


def dequantized(tensors: Mapping[str, np.ndarray], blocks: tuple[int, int]) -> dict[str, ArrayLike]:
    """`tensors` with each float8 weight and its scales as one tensor, bfloat16 unless another dtype is asked for.

    blocks: rows and columns that share a scale, which multiplies them.
    """
    scaled = {name for name, tensor in tensors.items() if tensor.dtype == FLOAT8 and name + SCALES in tensors}
    wrong = [problem for name in sorted(scaled) if (problem := _misfit(name, tensors, blocks))]
    if wrong:
        raise ValueError(f"scales that do not fit their weights in blocks of {list(blocks)}: {', '.join(wrong)}")
    plain: dict[str, ArrayLike] = {}
    for name, tensor in tensors.items():
        if name in scaled:
            load = functools.partial(_multiplied, tensor, tensors[name + SCALES], blocks)
            plain[name] = Deferred(tensor.shape, np.dtype(ml_dtypes.bfloat16), load)
        elif name.removesuffix(SCALES) not in scaled:
            plain[name] = tensor
    return plain


def _misfit(name: str, tensors: Mapping[str, np.ndarray], blocks: tuple[int, int]) -> str | None:
    shape, scales = tensors[name].shape, tensors[name + SCALES].shape
    expected = tuple(math.ceil(size / block) for size, block in zip(shape, blocks, strict=False))
    fits = len(shape) == len(blocks) and scales == expected
    return None if fits else f"{name + SCALES} is {list(scales)}, not {list(expected)}"


def _multiplied(weight: np.ndarray, scales: np.ndarray, blocks: tuple[int, int]) -> np.ndarray:
    """float32 [rows, columns]."""
    rows, columns = blocks
    plain = np.empty(weight.shape, np.float32)
    for i, scale in enumerate(scales.astype(np.float32)):
        here = slice(i * rows, (i + 1) * rows)
        np.take(VALUES, weight[here].view(np.uint8), out=plain[here], mode="clip")
        plain[here] *= np.repeat(scale, columns)[: weight.shape[1]]
    return plain
