"""The engine beside the plain decoding loop and `transformers`, turn by turn: as many requests as rows, all at once.

    python tests/benchmarks/engine.py throughput [--batch 8] [--prompt 128] [--new-tokens 128] [--rounds 3]
    python tests/benchmarks/engine.py decode [the same]
    python tests/benchmarks/engine.py prefix [--prompt 1000]
    python tests/benchmarks/engine.py interference

Llama shape of 100M parameters, float32 (see versus_transformers.py). throughput: new tokens a second, prompts included,
of the engine with as many slots, of `infer.generate` (a jitted loop over one batch, the best that is to be had without
scheduling) and of `transformers` with a static cache. decode: the same behind the first tokens, by the difference to
the time that those alone take. prefix: the time to the first token of a prompt that was read
before, and of one that was not. interference: the times between tokens of requests that run while long prompts come.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

import versus_transformers as versus

GREEDY = {"temperature": 0.0}


def prepared():
    from jaxformers.bench import random_prepared
    from jaxformers.families import read_config

    return random_prepared(read_config(versus.SHAPE), "float32")


def ready(slots: int, **sizes: int):
    import jaxformers as jf

    engine = jf.Engine(prepared(), jf.EngineConfig(slots=slots, **{"max_length": 1024} | sizes))
    engine.warm_up()
    return engine


def prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(seed).integers(0, versus.SHAPE["vocab_size"], (count, length)).tolist()


def engine_arm(batch: int) -> Callable[[], None]:
    import jaxformers as jf

    # Nobody waits for single tokens here, so all prompts are read before any continues. The cache is as long as theirs.
    engine = ready(batch, prefill_chunk=4096, max_length=versus.PROMPT + versus.NEW)
    rounds = iter(range(10**6))

    def run() -> None:
        for prompt in prompts(batch, versus.PROMPT, seed=next(rounds)):  # none that was read before
            engine.submit(jf.Request(prompt=prompt, max_new_tokens=versus.NEW, **GREEDY))
        made = 0
        while engine.has_work():
            made += sum(len(event.tokens) for event in engine.step())
        assert made == batch * versus.NEW

    return run


def make_arms(batch: int) -> dict[str, Callable[[], None]]:
    return {
        "engine": engine_arm(batch),
        "infer.generate": versus.ours_decode(batch),
        "transformers, static cache": versus.theirs_decode(batch, "static"),
    }


def decode(batch: int, new: int, rounds: int) -> None:
    arms, seconds = {}, {}
    for count in (1, 1 + new):
        versus.NEW = count
        arms[count] = make_arms(batch)
    for round_number in range(rounds + 1):
        for name in arms[1]:
            taken = {}
            for count, made in arms.items():
                versus.NEW = count
                start = time.perf_counter()
                made[name]()
                taken[count] = time.perf_counter() - start
            if round_number:  # the first round warms up
                seconds.setdefault(name, []).append(taken[1 + new] - taken[1])
    for statistic in (statistics.median, min):  # neighbours on a shared machine only ever make a run slower
        ours = statistic(seconds["engine"])
        for name, times in seconds.items():
            taken = statistic(times)
            ratio = f"engine is {taken / ours:.2f} x as fast"
            print(f"{statistic.__name__:6s} {name:28s} {batch * new / taken:8.1f} tokens/s   {ratio}")
    for name, times in seconds.items():
        print(f"{name:28s} seconds: {', '.join(f'{taken:.2f}' for taken in times)}")


def first_token(engine, prompt: list[int]) -> float:
    """Seconds from the request to its first token."""
    import jaxformers as jf

    start = time.perf_counter()
    engine.submit(jf.Request(prompt=prompt, max_new_tokens=1, **GREEDY))
    while not any(event.tokens for event in engine.step()):
        pass
    return time.perf_counter() - start


def prefix(length: int) -> None:
    engine = ready(8, max_length=2 * length)
    cold, warm = [], []
    for seed in range(5):
        [shared] = prompts(1, length, seed)
        [one, other] = prompts(2, 16, seed + 100)
        cold.append(first_token(engine, shared + one))
        warm.append(first_token(engine, shared + other))
    cold, warm = statistics.median(cold), statistics.median(warm)
    print(f"first token behind {length} shared ones: {warm:.3f} s known, {cold:.3f} s not: {warm / cold:.3f}")


def interference() -> None:
    import jaxformers as jf

    engine = ready(8)
    running = [engine.submit(jf.Request(prompt=p, max_new_tokens=400, **GREEDY)) for p in prompts(4, 32)]
    gaps: dict[bool, list[float]] = {False: [], True: []}
    last: dict[int, float] = {}
    steps, coming = 0, iter(prompts(8, 600, seed=1))
    while any(number in running for number in [*last, *running]) and engine.has_work():
        steps += 1
        if steps > 20 and steps % 10 == 0 and (prompt := next(coming, None)) is not None:
            engine.submit(jf.Request(prompt=prompt, max_new_tokens=1, **GREEDY))
        events, now = engine.step(), time.perf_counter()
        for event in events:
            if event.request in running and event.tokens:
                if event.request in last:
                    gaps[steps > 20].append((now - last[event.request]) / len(event.tokens))
                last[event.request] = now
            if event.finish is not None and event.request in running:
                running.remove(event.request)
    alone, beside = (statistics.median(gaps[which]) for which in (False, True))
    worst = statistics.quantiles(gaps[True], n=100)[-1]
    print(f"a token every {1000 * alone:.1f} ms alone; beside long prompts median {1000 * beside:.1f} ms, ", end="")
    print(f"p99 {1000 * worst:.1f} ms: {worst / beside:.1f} x the median")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "decode", "prefix", "interference"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int)
    parser.add_argument("--new-tokens", type=int, default=versus.NEW)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.what == "prefix":
        return prefix(options.prompt or 1000)
    if options.what == "interference":
        return interference()
    versus.PROMPT, versus.NEW = options.prompt or versus.PROMPT, options.new_tokens
    if options.what == "decode":
        return decode(options.batch, options.new_tokens, options.rounds)
    return versus.compare(make_arms(options.batch), options.batch * options.new_tokens, options.rounds)


if __name__ == "__main__":
    main()
