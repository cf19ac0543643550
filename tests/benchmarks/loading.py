"""Loading 1 GB of bfloat16 weights on CPU: ours, reading the file, and transformers' `from_pretrained`, turn by turn.

    python tests/benchmarks/loading.py [--dtype bfloat16] [--rounds 5] [--directory DIR]

Every file is read once before anything is timed, so all read the page cache. Each round times each arm once, so a
machine that slows down slows all of them; ratios are of medians, and above 1 ours is the faster.

`reading` is `Path.read_bytes`, the plain way to have a file in memory. `reading into memory` is `readinto` of a buffer
that was written before: one pass over the cached file and one over the buffer, the least that any copy costs. Ours
needs those passes too, has to get its memory from the system, and transposes each matrix, [out, in] on disk, to the
[in, out] of its parameters, 16 bits at a time: half a second of processor time a gigabyte, where memory alone would
allow a ninth of it. It makes one copy, and that in threads, so processors that are free shorten it. What the system
takes to find large pages for the parameters comes on top, 0.2 s where memory is whole and more than 1 s where it is in
pieces.

`ours, to generate` is the layout that `generate`, `chat` and `serve` run from on CPU: matrices as files have them, a
buffer a layer, copied without a transposition. Such buffers, as those of `from_pretrained, held`, the allocator hands
out again, so from the second round on they cost no new pages; the first load of a process takes several times as long.

`from_pretrained` in the dtype of the file reads nothing: its parameters are views of the mapped file, and each costs
its reading when it is first used. Nothing that copies can be as fast. `from_pretrained, held` is what compares: its
parameters in memory of their own, as ours are. In another dtype both arms are the same.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

ONE_GIGABYTE = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 9,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
STORED = "bfloat16"
REST_SECONDS = 0.5  # before each arm, in which threads that still spin for the one before come to rest


def write_checkpoint(directory: Path) -> None:
    """Random bfloat16 weights; what they are does not matter to their loading."""
    import ml_dtypes
    import numpy as np

    from jaxformers.families import read_config
    from jaxformers.hub.layout import parts
    from jaxformers.hub.safetensors import Deferred, write_tensors

    noise = np.random.default_rng(0).standard_normal(2**20, np.float32).astype(ml_dtypes.bfloat16)
    shapes = {part.source.name: part.disk_shape() for part in parts(read_config(ONE_GIGABYTE))}
    write_tensors(
        directory,
        {
            name: Deferred(shape, noise.dtype, lambda shape=shape: np.resize(noise, prod(shape)).reshape(shape))
            for name, shape in shapes.items()
        },
    )
    (directory / "config.json").write_text(json.dumps(ONE_GIGABYTE))


def arms(directory: Path, dtype: str) -> dict[str, Callable[[], Any]]:
    import jax
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from jaxformers.api import load_to_generate
    from jaxformers.hub.pretrained import read_pretrained

    files = sorted(directory.glob("*.safetensors"))
    buffer = np.ones(sum(file.stat().st_size for file in files), np.uint8)

    def read_into_memory() -> None:
        start = 0
        for file in files:
            with file.open("rb") as opened:
                start += opened.readinto(memoryview(buffer)[start:])

    def theirs() -> Any:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))

    def theirs_held() -> Any:
        model = theirs()
        for parameter in model.parameters():
            parameter.data = parameter.data.clone() if dtype == STORED else parameter.data
        return model

    return {
        "ours": lambda: jax.block_until_ready(read_pretrained(directory, dtype=dtype).params),
        "ours, to generate": lambda: jax.block_until_ready(load_to_generate(directory, dtype=dtype).params),
        "reading": lambda: [file.read_bytes() for file in files],
        "reading into memory": read_into_memory,
        "from_pretrained": theirs,
        "from_pretrained, held": theirs_held,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=(STORED, "float32"), default=STORED, help="of the loaded parameters")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="of a bfloat16 checkpoint; none: one is made")
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        directory = options.directory or Path(temporary)
        if options.directory is None:
            write_checkpoint(directory)
        gigabytes = sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 1e9
        ways, seconds = arms(directory, options.dtype), {}
        for count in range(options.rounds + 1):
            for name, way in ways.items():
                gc.collect()
                time.sleep(REST_SECONDS)
                start = time.perf_counter()
                kept = way()
                elapsed = time.perf_counter() - start
                del kept
                if count:  # the first round warms the page cache, and imports what is imported late
                    seconds.setdefault(name, []).append(elapsed)
    load = os.getloadavg()[0]
    print(f"{gigabytes:.2f} GB, {os.cpu_count()} processors, load {load:.1f}, medians of {options.rounds} rounds")
    median = {name: statistics.median(times) for name, times in seconds.items()}
    for name, value in median.items():
        ratio = "" if name == "ours" else f"   ours is {value / median['ours']:.2f} x as fast"
        print(f"{name:24}{value:7.3f} s{gigabytes / value:8.2f} GB/s{ratio}")


if __name__ == "__main__":
    main()
