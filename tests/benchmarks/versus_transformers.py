"""Ours and transformers + torch, turn by turn, on the same shapes: tokens per second and their ratio.

    python tests/benchmarks/versus_transformers.py train [--dtype bfloat16] [--rounds 5]
    python tests/benchmarks/versus_transformers.py decode [--batch 8]
    python tests/benchmarks/versus_transformers.py memory [--remat full --chunk 64]

Every round times each arm once, so a machine that slows down slows all of them; the ratio is of medians. Llama
shape: 12 layers, d_model 768, 12 heads, 4 kv heads, d_ff 2048, vocabulary 32000, tied: 100M parameters.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

SHAPE = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
ROWS, LENGTH = 4, 256
PROMPT, NEW = 128, 128


def ours_train(dtype: str, remat: str, chunk: str) -> Callable[[], None]:
    import jax
    import numpy as np

    from jaxformers.families import read_config
    from jaxformers.parallel.mesh import single_device_mesh
    from jaxformers.train.build import Trainer
    from jaxformers.train.config import LossConfig, RuntimeConfig, TrainConfig
    from jaxformers.train.optimizer_config import ScheduleConfig

    trainer = Trainer(
        read_config(SHAPE),
        single_device_mesh(),
        LENGTH,
        train=TrainConfig(steps=10_000, batch_size=ROWS),
        runtime=RuntimeConfig(dtype=dtype, remat=remat),
        schedule=ScheduleConfig(warmup_steps=0),
        loss=LossConfig(chunk=int(chunk) if chunk.isdecimal() else chunk),
    )
    tokens = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (ROWS, LENGTH + 1)).astype(np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((ROWS, LENGTH), np.float32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "segment_ids": np.ones((ROWS, LENGTH), np.int32),
    }
    batch = jax.tree.map(jax.numpy.asarray, batch)
    state = [trainer.init(0)]
    start = time.perf_counter()
    compiled = trainer.program.step.lower(state[0], batch).compile()
    print(f"ours: compiled in {time.perf_counter() - start:.1f} s")

    def step() -> None:
        state[0], metrics = compiled(state[0], batch)
        metrics["loss"].block_until_ready()

    return step


def theirs_train(dtype: str) -> Callable[[], None]:
    import torch

    model = torch_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(0, SHAPE["vocab_size"], (ROWS, LENGTH + 1))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def torch_model():
    import torch
    import transformers

    torch.manual_seed(0)
    shape = {key: value for key, value in SHAPE.items() if key != "model_type"}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, attn_implementation="sdpa"))


def ours_decode(batch: int) -> Callable[[], None]:
    import jax
    import numpy as np

    import jaxformers as jf
    from jaxformers.infer.generate import Generation, prepare_model
    from jaxformers.parallel.mesh import single_device_mesh

    cfg = jf.read_config(SHAPE)
    model = prepare_model(jf.init_params(cfg, jax.random.key(0)), cfg, single_device_mesh())
    prompts = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (batch, PROMPT)).tolist()

    def run() -> None:
        steps = list(Generation(model, prompts, max_new_tokens=NEW))
        assert sum(len(step.tokens[0]) for step in steps) == NEW

    return run


def theirs_decode(batch: int, cache: str) -> Callable[[], None]:
    import torch

    model = torch_model().eval()
    prompts = torch.randint(0, SHAPE["vocab_size"], (batch, PROMPT))
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "cache_implementation": cache}
    options |= {"attention_mask": torch.ones_like(prompts), "pad_token_id": 0}

    def run() -> None:
        with torch.no_grad():
            model.generate(prompts, **options)

    return run


def compare(arms: dict[str, Callable[[], None]], tokens: int, rounds: int) -> None:
    """Prints tokens per second of each arm (median, and the fastest round) and how much faster the first is than
    each other: by median wall time, by the fastest round, and by processor time, which other load on the machine
    disturbs least."""
    wall: dict[str, list[float]] = {name: [] for name in arms}
    processor: dict[str, list[float]] = {name: [] for name in arms}
    for round_number in range(rounds + 1):
        for name, arm in arms.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            arm()
            if round_number:  # the first round warms up
                wall[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - start_cpu)
    ours = next(iter(wall))

    def ratio(times: dict[str, list[float]], name: str, statistic: Callable[[list[float]], float]) -> float:
        return statistic(times[name]) / statistic(times[ours])

    for name, seconds in wall.items():
        print(
            f"{name:28s} {tokens / statistics.median(seconds):8.1f} tokens/s (best {tokens / min(seconds):8.1f})   "
            f"{ours} is {ratio(wall, name, statistics.median):.2f} x as fast "
            f"(best {ratio(wall, name, min):.2f} x, processor time {ratio(processor, name, min):.2f} x)"
        )


def peak_memory(arm: str, remat: str, chunk: str) -> None:
    """Resident memory of one arm in a process of its own: between steps (state and libraries), and what a step adds."""
    step = ours_train("float32", remat, chunk) if arm == "ours" else theirs_train("float32")
    step()  # makes the optimizer's state
    gc.collect()
    between = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for _ in range(2):
        step()
    peak = resident("VmHWM")
    print(f"peak {peak:.2f} GiB = {between:.2f} GiB between steps + {peak - between:.2f} GiB during one")


def resident(field: str) -> float:
    """A field of this process's memory status, in GiB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{field}:")[2].split()[0]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "decode", "memory"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--remat", choices=("none", "full", "dots", "projections"), default="none")
    parser.add_argument("--chunk", default="auto", help="tokens of a row whose logits exist at once")
    parser.add_argument("--batch", type=int, default=1, help="rows to decode")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arm", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "memory":
        if options.arm:
            return peak_memory(options.arm, options.remat, options.chunk)
        for arm in ("ours", "theirs"):
            command = [
                sys.executable,
                __file__,
                "memory",
                "--arm",
                arm,
                "--remat",
                options.remat,
                "--chunk",
                options.chunk,
            ]
            shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            print(f"{arm:8s} {shown}")
        return None
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if options.what == "train":
        arms = {
            "ours": ours_train(options.dtype, options.remat, options.chunk),
            "transformers": theirs_train(options.dtype),
        }
        return compare(arms, ROWS * LENGTH, options.rounds)
    arms = {"ours": ours_decode(options.batch)}
    for cache in ("static", "dynamic"):
        arms[f"transformers, {cache} cache"] = theirs_decode(options.batch, cache)
    return compare(arms, options.batch * NEW, options.rounds)


if __name__ == "__main__":
    main()
