"""Loading 1 GB of bfloat16 weights on CPU: ours, reading the file, and transformers' `from_pretrained`, turn by turn.

    python tests/benchmarks/loading.py [--dtype bfloat16] [--rounds 5] [--directory DIR]

A process loads one model, so each time is of the first load in a process of its own, after what it imports. Each round
times each arm once, so a machine that slows down slows all of them; ratios are of medians, and above 1 ours is the
faster. The file is read just before, so all read the page cache. As much memory as loading takes is written and given
back last: hosts of virtual machines take free memory away within seconds, and to get a gigabyte back took 0.7 s here,
more than anything that is to be compared.

`reading` is `Path.read_bytes`, the plain way to have a file in memory. `reading into memory` is `readinto` of a buffer
that was written before: one pass over the cached file and one over the buffer, the least that any copy costs. Ours
needs those passes too, has to get its memory from the system, and transposes each matrix, [out, in] on disk, to the
[in, out] of its parameters, 16 bits at a time: 0.4 s of processor time a gigabyte, where memory alone would allow a
quarter of it. It makes one copy, and that in threads, so processors that are free shorten it.

`ours, to generate` is the layout that `generate`, `chat` and `serve` run from on CPU: matrices as files have them, a
buffer a layer, copied without a transposition.

`from_pretrained` in the dtype of the file reads nothing: its parameters are views of the mapped file, and each costs
its reading when it is first used. Nothing that copies can be as fast. `from_pretrained, held` is what compares: its
parameters in memory of their own, as ours are. In another dtype both arms are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
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
TINY = ONE_GIGABYTE | {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
STORED = "bfloat16"
REST_SECONDS = 0.5  # before what is timed, in which threads that still spin come to rest


def write_checkpoint(directory: Path, config: dict[str, Any]) -> None:
    """Random bfloat16 weights; what they are does not matter to their loading."""
    import ml_dtypes
    import numpy as np

    from jaxformers.families import read_config
    from jaxformers.hub.layout import parts
    from jaxformers.hub.safetensors import Deferred, write_tensors

    noise = np.random.default_rng(0).standard_normal(2**20, np.float32).astype(ml_dtypes.bfloat16)
    shapes = {part.source.name: part.disk_shape() for part in parts(read_config(config))}
    write_tensors(
        directory,
        {
            name: Deferred(shape, noise.dtype, lambda shape=shape: np.resize(noise, prod(shape)).reshape(shape))
            for name, shape in shapes.items()
        },
    )
    (directory / "config.json").write_text(json.dumps(config))


def ways(directory: Path, dtype: str) -> dict[str, Callable[[], Any]]:
    """What each arm runs before it is timed, and returns what is."""
    import jax
    import numpy as np

    [file] = directory.glob("*.safetensors")

    def ours() -> Callable[[], Any]:
        from jaxformers.hub.pretrained import read_pretrained

        return lambda: jax.block_until_ready(read_pretrained(directory, dtype=dtype).params)

    def ours_to_generate() -> Callable[[], Any]:
        from jaxformers.api import load_to_generate

        return lambda: jax.block_until_ready(load_to_generate(directory, dtype=dtype).params)

    def reading_into_memory() -> Callable[[], Any]:
        buffer = memoryview(np.ones(file.stat().st_size, np.uint8))

        def read() -> None:
            with file.open("rb") as opened:
                opened.readinto(buffer)

        return read

    def theirs() -> Callable[[], Any]:
        import torch
        from transformers import AutoModelForCausalLM

        return lambda: AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))

    def theirs_held() -> Callable[[], Any]:
        load = theirs()

        def held() -> Any:
            model = load()
            if dtype == STORED:
                for parameter in model.parameters():
                    parameter.data = parameter.data.clone()
            return model

        return held

    return {
        "ours": ours,
        "ours, to generate": ours_to_generate,
        "reading": lambda: file.read_bytes,
        "reading into memory": reading_into_memory,
        "from_pretrained": theirs,
        "from_pretrained, held": theirs_held,
    }


def seconds_of(arm: str, directory: Path, dtype: str) -> float:
    """Of the first load in this process."""
    import numpy as np

    with TemporaryDirectory() as tiny:
        write_checkpoint(Path(tiny), TINY)
        ways(Path(tiny), dtype)[arm]()()  # what is imported late
    run = ways(directory, dtype)[arm]()
    [file] = directory.glob("*.safetensors")
    file.read_bytes()
    time.sleep(REST_SECONDS)
    np.ones(2 * file.stat().st_size, np.uint8)  # freed at once; as much as a float32 model
    start = time.perf_counter()
    kept = run()
    elapsed = time.perf_counter() - start
    del kept
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=(STORED, "float32"), default=STORED, help="of the loaded parameters")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="of a bfloat16 checkpoint in one file; none: one is made")
    parser.add_argument("--arm", help="time this one alone, in this process; needs --directory")
    options = parser.parse_args()
    if options.arm:
        print(seconds_of(options.arm, options.directory, options.dtype))
        return
    with TemporaryDirectory() as temporary:
        directory = options.directory or Path(temporary)
        if options.directory is None:
            write_checkpoint(directory, ONE_GIGABYTE)
        gigabytes = sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 1e9
        seconds: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for arm in ways(directory, options.dtype):
                same = ["--directory", str(directory), "--dtype", options.dtype, "--arm", arm]
                child = subprocess.run([sys.executable, __file__, *same], stdout=subprocess.PIPE, text=True, check=True)
                seconds.setdefault(arm, []).append(float(child.stdout.split()[-1]))
    load = os.getloadavg()[0]
    print(f"{gigabytes:.2f} GB, {os.cpu_count()} processors, load {load:.1f}, medians of {options.rounds} rounds")
    median = {name: statistics.median(times) for name, times in seconds.items()}
    for name, value in median.items():
        ratio = "" if name == "ours" else f"   ours is {value / median['ours']:.2f} x as fast"
        spread = f"{min(seconds[name]):.2f} to {max(seconds[name]):.2f}"
        print(f"{name:24}{value:7.3f} s ({spread}){gigabytes / value:8.2f} GB/s{ratio}")


if __name__ == "__main__":
    main()
