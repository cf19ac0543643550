"""What a second process costs: two processes on a core each at twice the batch, beside one process on one core.

    python tests/benchmarks/processes.py [--rows 4] [--length 256] [--rounds 5] [--steps 3] [--hidden 512]

Both train a small Llama in float32 with AdamW, the two data parallel (`mesh.dp=2`), their gradients summed over gloo.
They are started once and take their rounds turn by turn, while the other waits. Printed are tokens per second and core
of each round, the medians, and their ratio; the floor is 0.8.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

FLOOR = 0.8


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4, help="of a process's batch")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="in a round")
    parser.add_argument("--worker", nargs=3, metavar=("COORDINATOR", "INDEX", "COUNT"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def work(given: argparse.Namespace) -> None:
    """One process: a round of steps for each line of standard input, answered with its seconds."""
    coordinator, index, count = given.worker[0], int(given.worker[1]), int(given.worker[2])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[index % len(cores)]})  # before jax counts the cores for its threads
    import jax
    import numpy as np

    from jaxformers.data.pipeline import to_global
    from jaxformers.families import read_config
    from jaxformers.parallel import distributed
    from jaxformers.parallel.mesh import MeshConfig, batch_sharding, make_mesh
    from jaxformers.parallel.processes import Processes
    from jaxformers.train.build import Trainer
    from jaxformers.train.config import TrainConfig

    distributed.start(Processes(count, index, coordinator))
    mesh = make_mesh(MeshConfig(dp=count, fsdp=1))
    shape = (count * given.rows, given.length)
    trainer = Trainer(read_config(model(given)), mesh, given.length, train=TrainConfig(batch_size=shape[0]))
    draw = np.random.default_rng(index)
    ids = draw.integers(0, 4096, (given.rows, given.length + 1), dtype=np.int32)
    rows = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": np.ones((given.rows, given.length), np.float32),
        "positions": np.tile(np.arange(given.length, dtype=np.int32), (given.rows, 1)),
        "segment_ids": np.ones((given.rows, given.length), np.int32),
    }
    with jax.set_mesh(mesh):
        state = trainer.init(0)
        batch = to_global(rows, mesh, batch_sharding(shape, mesh).spec)
        for line in sys.stdin:
            start = time.perf_counter()
            for _ in range(int(line)):
                state, metrics = trainer.program.step(state, batch)
                jax.block_until_ready(metrics)
            print(time.perf_counter() - start, flush=True)


def model(given: argparse.Namespace) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": given.hidden,
        "intermediate_size": 11 * given.hidden // 4,
        "num_hidden_layers": 4,
        "num_attention_heads": given.hidden // 64,
        "num_key_value_heads": given.hidden // 64,
        "max_position_embeddings": given.length,
    }


class Group:
    """Processes that train together, one on each core."""

    def __init__(self, count: int, arguments: Sequence[str]):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
        command = [sys.executable, __file__, *arguments, "--worker", coordinator]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        self.members = [
            subprocess.Popen(
                [*command, str(i), str(count)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for i in range(count)
        ]

    def seconds(self, steps: int) -> float:
        """How long so many steps take, of the slowest."""
        for member in self.members:
            assert member.stdin is not None
            member.stdin.write(f"{steps}\n")
            member.stdin.flush()
        return max(self._answer(member) for member in self.members)

    def _answer(self, member: subprocess.Popen[str]) -> float:
        assert member.stdout is not None
        for line in member.stdout:
            if not line.startswith("[Gloo]"):
                return float(line)
        raise SystemExit("a process ended early")

    def close(self) -> None:
        for member in self.members:
            assert member.stdin is not None
            member.stdin.close()
        for member in self.members:
            member.wait(60)


def main(arguments: Sequence[str]) -> None:
    given = parse(arguments)
    if given.worker:
        work(given)
        return
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two cores are needed")
    groups = {count: Group(count, arguments) for count in (1, 2)}
    for group in groups.values():
        group.seconds(1)  # compiles
        group.seconds(1)
    # Tokens and cores both grow with the processes, so a core's tokens are those of one process.
    tokens = given.rows * given.length * given.steps
    rates: dict[int, list[float]] = {count: [] for count in groups}
    for turn in range(given.rounds):
        for count, group in groups.items():
            rates[count].append(tokens / group.seconds(given.steps))
        print(f"round {turn + 1}: " + ", ".join(f"{count} x {rates[count][-1]:,.0f} tokens/s" for count in groups))
    for group in groups.values():
        group.close()
    one, two = (statistics.median(rates[count]) for count in groups)
    print(f"tokens/s per core: one process {one:,.0f}, two processes {two:,.0f}; ratio {two / one:.2f} (floor {FLOOR})")


if __name__ == "__main__":
    main(sys.argv[1:])
