"""One session for every test: eight CPU devices, strict dtypes, a persistent compilation cache, no network."""

import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("JAXFORMERS_CACHE", str(Path(tempfile.gettempdir()) / "jaxformers-tests"))

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", str(Path(os.environ["JAXFORMERS_CACHE"]) / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
