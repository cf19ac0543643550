"""How the process is set up before jax is used: the compilation cache, threads for CPU devices, quiet libraries."""

from __future__ import annotations

import logging
import os
import re

import jax

from jaxformers.data.home import cache_root

# A device that waits in a collective keeps its thread, and it waits in as many collectives at once as a program has
# loops that do not depend on each other: policy and reference, teacher and student.
THREADS_PER_CPU_DEVICE = 4


def set_up() -> None:
    """Keeps compiled programs in the user's cache folder, so that the next start skips compiling.

    A cache folder that the user has set (`JAX_COMPILATION_CACHE_DIR`) is left alone;
    `JAXFORMERS_COMPILATION_CACHE=0` turns ours off. Several CPU devices get the threads that they need.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    give_cpu_devices_threads()
    if jax.config.jax_compilation_cache_dir or os.environ.get("JAXFORMERS_COMPILATION_CACHE") == "0":
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def give_cpu_devices_threads() -> None:
    """Has XLA start threads enough for all CPU devices, if jax was asked for several; call it before jax makes them.

    By default XLA starts no more threads than there are devices or cores. Programs that run then share them with
    programs that wait for their turn (from the 33rd in flight on), and with other collectives of the same program:
    once every thread waits for a device that finds none left, XLA ends the process, minutes later.

    The number goes into `PJRT_NPROC`; one that the user has set there is left alone.
    """
    devices = _cpu_devices_asked_for()
    if devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(os.cpu_count() or 1, THREADS_PER_CPU_DEVICE * devices)))


def _cpu_devices_asked_for() -> int:
    """By jax's own setting (`JAX_NUM_CPU_DEVICES`), which wins, or by XLA's older flag."""
    if jax.config.jax_num_cpu_devices > 0:
        return jax.config.jax_num_cpu_devices
    flags = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return int(flags[-1]) if flags else 1
