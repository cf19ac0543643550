"""How the process is set up before jax is used: the persistent compilation cache and quiet libraries."""

from __future__ import annotations

import logging
import os

import jax

from jaxformers.data.home import cache_root


def set_up() -> None:
    """Keeps compiled programs in the user's cache folder, so that the next start skips compiling.

    A cache folder that the user has set (`JAX_COMPILATION_CACHE_DIR`) is left alone;
    `JAXFORMERS_COMPILATION_CACHE=0` turns ours off.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    if jax.config.jax_compilation_cache_dir or os.environ.get("JAXFORMERS_COMPILATION_CACHE") == "0":
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
