"""What the devices can do: published peaks of accelerators, measured ones of CPUs."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

# Dense matmul peaks in FLOP/s as (bfloat16, float32), from the vendors' data sheets; float32 is TF32 on GPUs.
PUBLISHED_PEAKS = {
    "NVIDIA H200": (989.4e12, 494.7e12),
    "NVIDIA H100 80GB HBM3": (989.4e12, 494.7e12),
    "NVIDIA H100 PCIe": (756e12, 378e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 156e12),
    "NVIDIA A100-SXM4-40GB": (312e12, 156e12),
    "NVIDIA L4": (121e12, 60e12),
    "TPU v4": (275e12, 137e12),
    "TPU v5 lite": (197e12, 98e12),
    "TPU v5": (459e12, 229e12),
    "TPU v6 lite": (918e12, 459e12),
}


def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """Matmul FLOP/s one device can reach: published for known accelerators, measured on CPU, None for any other."""
    if device.platform == "cpu":
        # All CPU devices of a process share its cores.
        return measured_matmul_flops("float32") / len(jax.local_devices())
    peaks = PUBLISHED_PEAKS.get(device.device_kind)
    return None if peaks is None else peaks[dtype == "float32"]


@functools.cache
def measured_matmul_flops(dtype: str, size: int = 1536, repeats: int = 5) -> float:
    """FLOP/s of the fastest of some square matmuls on the default device."""
    a = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda a: jax.lax.dot(a, a, preferred_element_type=jnp.float32))
    return 2 * size**3 / _fastest(multiply, a, repeats=repeats)


@functools.cache
def measured_bandwidth(megabytes: int = 512, repeats: int = 5) -> float:
    """Bytes per second read from the default device's memory by the fastest of some reductions."""
    a = jnp.ones(megabytes * 2**20 // 4, jnp.float32)
    return megabytes * 2**20 / _fastest(jax.jit(jnp.sum), a, repeats=repeats)


def _fastest(function: jax.stages.Wrapped, *args: jax.Array, repeats: int) -> float:
    """Seconds of the fastest call after a warm-up."""
    function(*args).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(*args).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
