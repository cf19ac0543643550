"""What an adapter saves: tokens per second and memory of a LoRA step, a full step and `peft` on torch, turn by turn.

    python tests/benchmarks/lora.py speed [--dtype bfloat16] [--rounds 5] [--targets q_proj,v_proj]
    python tests/benchmarks/lora.py memory [--remat none]

Llama shape: 12 layers, d_model 768, 12 heads, d_ff 2048, vocabulary 32000, tied: 110M parameters, as in
configs/llama-110m.yaml. An adapter's step recomputes what `--remat` says, by default as in the recipes of adapters; the
full step what `--full-remat` says, by default nothing. speed: every round times each arm once; the ratio is of medians.
memory: each arm in a process of its own, and what a state holds by how its base is kept.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

from versus_transformers import LENGTH, ROWS, SHAPE, compare, resident

LLAMA_110M = SHAPE | {"num_key_value_heads": 12}
ALL = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
KINDS = ("full", "lora", "bfloat16", "int8", "int4", "nf4")


def make_trainer(kind: str, options: argparse.Namespace):
    from jaxformers.families import read_config
    from jaxformers.hub.targets import Wish, plan_adapter
    from jaxformers.parallel.mesh import single_device_mesh
    from jaxformers.train.build import Trainer
    from jaxformers.train.config import RuntimeConfig, TrainConfig
    from jaxformers.train.optimizer_config import ScheduleConfig

    cfg = read_config(LLAMA_110M)
    wish = Wish(targets=options.targets.split(","), rank=options.rank, base=None if kind == "lora" else kind)
    return Trainer(
        cfg,
        single_device_mesh(),
        LENGTH,
        train=TrainConfig(steps=10_000, batch_size=ROWS),
        runtime=RuntimeConfig(dtype=options.dtype, remat=options.full_remat if kind == "full" else options.remat),
        schedule=ScheduleConfig(warmup_steps=0),
        adapter=None if kind == "full" else plan_adapter(cfg, wish),
    )


def ours(kind: str, options: argparse.Namespace) -> Callable[[], None]:
    import jax
    import numpy as np

    trainer = make_trainer(kind, options)
    tokens = np.random.default_rng(0).integers(0, LLAMA_110M["vocab_size"], (ROWS, LENGTH + 1)).astype(np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((ROWS, LENGTH), np.float32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "segment_ids": np.ones((ROWS, LENGTH), np.int32),
    }
    batch = jax.tree.map(jax.numpy.asarray, batch)
    state = [trainer.init(0)]
    compiled = trainer.program.step.lower(state[0], batch).compile()
    used = compiled.memory_analysis()
    held = used.argument_size_in_bytes / 2**30
    print(f"{kind}: {held:.2f} GiB of state and batch + {used.temp_size_in_bytes / 2**30:.2f} GiB during a step")

    def step() -> None:
        state[0], metrics = compiled(state[0], batch)
        metrics["loss"].block_until_ready()

    return step


def theirs(options: argparse.Namespace) -> Callable[[], None]:
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    shape = {key: value for key, value in LLAMA_110M.items() if key != "model_type"}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, attn_implementation="sdpa"))
    model = peft.get_peft_model(base, peft.LoraConfig(r=options.rank, target_modules=options.targets.split(",")))
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(0, LLAMA_110M["vocab_size"], (ROWS, LENGTH + 1))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
            logits = model(tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak_memory(arm: str, options: argparse.Namespace) -> None:
    """Resident memory of one arm in this process: between steps (state and libraries), and what a step adds."""
    step = theirs(options) if arm == "peft" else ours(arm, options)
    step()
    gc.collect()
    between = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for _ in range(2):
        step()
    peak = resident("VmHWM")
    print(f"peak {peak:.2f} GiB = {between:.2f} GiB between steps + {peak - between:.2f} GiB during one")


def state_bytes(kind: str, options: argparse.Namespace) -> dict[str, int]:
    """What a state holds: the base and what is trained, with its gradient and moments."""
    import jax

    state = make_trainer(kind, options).abstract_state

    def size(tree) -> int:
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))

    return {"base": size(state.frozen), "trained": 2 * size(state.params) + size(state.opt_state)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    for name, default in (("--remat", "dots"), ("--full-remat", "none")):
        parser.add_argument(name, choices=("none", "full", "dots", "projections"), default=default)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default=ALL)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        return peak_memory(options.arm, options)
    if options.what == "memory":
        print("base       frozen GiB   trained, its gradient and moments GiB")
        for kind in KINDS:
            held = {name: count / 2**30 for name, count in state_bytes(kind, options).items()}
            print(f"{kind:10s} {held['base']:10.3f}   {held['trained']:10.3f}")
        for arm in (*KINDS, "peft"):
            command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm]
            shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            print(f"{arm:10s} {shown}")
        return None
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    arms = {"lora": ours("lora", options), "full": ours("full", options), "peft": theirs(options)}
    return compare(arms, ROWS * LENGTH, options.rounds)


if __name__ == "__main__":
    main()
