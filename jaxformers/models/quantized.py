"""A weight kept in few bits, unpacked where it is used: how it is packed, and back.

Packing happens along the input dims: each group of inputs of one output shares a scale. Knows nothing of models,
training or files.

    G groups of S inputs each, out outputs; batch dims of layers and experts come first everywhere
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Scheme = Literal["int8", "int4", "nf4"]
GROUP_SIZE = 64  # inputs that share a scale, in int4 and nf4
# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (arXiv:2305.14314, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@flax.struct.dataclass
class Quantized:
    """A weight [batch..., *in, *out] in few bits.

    codes [batch..., G, S, out] int8, or uint8 [batch..., G, S / 2, out] with the codes of inputs 2i and 2i + 1 in the
    low and the high half of a byte. scales float32 [batch..., G, 1, out].
    """

    codes: jax.Array
    scales: jax.Array
    ins: tuple[int, ...] = flax.struct.field(pytree_node=False)
    outs: tuple[int, ...] = flax.struct.field(pytree_node=False)
    scheme: Scheme = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        *batch, groups, rows, out = self.codes.shape
        # Where devices hold parts of it, ins and outs say the whole's: those of one dim are told from what is here.
        ins = (groups * rows * (1 if self.scheme == "int8" else 2),) if len(self.ins) == 1 else self.ins
        return (*batch, *ins, *((out,) if len(self.outs) == 1 else self.outs))

    @property
    def dtype(self) -> Any:
        """Of the weight, unpacked."""
        return np.dtype(np.float32)

    def dequantized(self, dtype: Any = jnp.float32) -> jax.Array:
        """The weight [batch..., *in, *out]."""
        values = _decode(self.codes, self.scheme) * self.scales
        return values.astype(dtype).reshape(self.shape)


def quantize(w: jax.Array, scheme: Scheme, *, n_in: int, num_batch: int = 0) -> Quantized:
    """The weight [batch..., *in, *out] in few bits, each rounded to the nearest code.

    int8: one scale for each output, absmax / 127. int4: one for 64 inputs, absmax / 7. nf4: one for 64 inputs, absmax,
    over quantiles of a normal distribution (arXiv:2305.14314).
    """
    batch, ins, outs = w.shape[:num_batch], w.shape[num_batch : num_batch + n_in], w.shape[num_batch + n_in :]
    groups, size = group_shape(math.prod(ins), scheme)
    grouped = w.astype(jnp.float32).reshape(*batch, groups, size, math.prod(outs))
    largest = jnp.maximum(jnp.abs(grouped).max(axis=-2, keepdims=True), jnp.finfo(jnp.float32).tiny)
    scales = largest / {"int8": 127.0, "int4": 7.0, "nf4": 1.0}[scheme]
    return Quantized(_encode(grouped / scales, scheme), scales, ins, outs, scheme)


def group_shape(inputs: int, scheme: Scheme) -> tuple[int, int]:
    """How many groups of how many inputs; where 64 does not divide them, groups are smaller."""
    size = inputs if scheme == "int8" else math.gcd(inputs, GROUP_SIZE)
    if scheme != "int8" and size % 2:
        raise ValueError(f"{scheme} packs two inputs in a byte, which {inputs} inputs do not fill; use int8")
    return inputs // size, size


def _encode(values: jax.Array, scheme: Scheme) -> jax.Array:
    if scheme == "int8":
        return jnp.round(values).astype(jnp.int8)
    if scheme == "int4":
        codes = (jnp.round(values) + 8).astype(jnp.uint8)
    else:
        # How many middles lie below, counted: a search's passes over whole weights would need many times their memory.
        middles = [jnp.float32((a + b) / 2) for a, b in itertools.pairwise(NF4)]
        codes = sum(((values > middle).astype(jnp.uint8) for middle in middles), jnp.uint8(0))
    return codes[..., 0::2, :] | (codes[..., 1::2, :] << 4)


def _decode(codes: jax.Array, scheme: Scheme) -> jax.Array:
    """What codes stand for, before scales: float32 [..., S, out]."""
    if scheme == "int8":
        return codes.astype(jnp.float32)
    both = jnp.stack([codes & 15, codes >> 4], axis=-2)  # [..., S / 2, 2, out]
    codes = both.reshape(*codes.shape[:-2], 2 * codes.shape[-2], codes.shape[-1])
    if scheme == "int4":
        return codes.astype(jnp.float32) - 8
    return jnp.asarray(NF4, jnp.float32)[codes]
