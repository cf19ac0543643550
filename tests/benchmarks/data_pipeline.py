"""Tokens per second from a tokenized corpus to batches in memory: ours by kind of packing, of a mixture and with
fill-in-the-middle, and `datasets` + torch's DataLoader, turn by turn.

    python tests/benchmarks/data_pipeline.py [--length 256] [--rounds 5] [--train-tokens-per-second N]

All arms bring batches of 8 rows out of the same ids (the standard library's sources, a token a byte), read from the
page cache. Theirs are rows of a fixed length in file order, in a data set on disk with torch's format and default
settings: no packing, shuffle, targets, weights, positions or segments, which ours make as they go. Each round times
each arm once, so a machine that slows down slows all of them; figures are medians.

A train step consumes what `--train-tokens-per-second` says, or else what `jaxformers bench train` measures here for
configs/quickstart.yaml.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from jaxformers.data.cache import open_cache
from jaxformers.data.config import DataConfig
from jaxformers.data.corpus import open_corpus
from jaxformers.data.pipeline import train_iterator
from jaxformers.data.tokenizer import byte_tokenizer

BATCH = 8
TOKENIZER = byte_tokenizer(["<fim_prefix>", "<fim_middle>", "<fim_suffix>"])
WHOLE = {"paths": "{stdlib}/**/*.py"}
PARTS = {"a": "{stdlib}/*.py", "b": "{stdlib}/[a-j]*/**/*.py", "c": "{stdlib}/[k-z]*/**/*.py"}
ARMS: dict[str, dict[str, Any]] = {
    **{f"ours, {packing}": {**WHOLE, "packing": packing} for packing in ("first_fit", "best_fit", "concat", "none")},
    "ours, three sources": {"sources": {name: {"paths": paths} for name, paths in PARTS.items()}},
    "ours, fill-in-the-middle": {**WHOLE, "fim": {"rate": 0.5}},
}
THEIRS = "datasets + DataLoader"


def ours(config: DataConfig) -> Callable[[], Iterable[Any]]:
    rows = open_corpus(config, TOKENIZER).train
    return lambda: train_iterator(rows, batch_size=BATCH)


def theirs(config: DataConfig, folder: Path) -> Callable[[], Iterable[Any]]:
    from datasets import Dataset, load_from_disk
    from torch.utils.data import DataLoader

    tokens = open_cache(config, TOKENIZER).tokens
    rows = tokens[: len(tokens) // config.sequence_length * config.sequence_length]
    made = Dataset.from_dict({"input_ids": list(rows.reshape(-1, config.sequence_length).astype(np.int32))})
    made.save_to_disk(folder / "datasets")
    loaded = load_from_disk(folder / "datasets").with_format("torch")
    return lambda: DataLoader(loaded, batch_size=BATCH)


def seconds_of(batches: Iterable[Any], count: int) -> float:
    start = time.perf_counter()
    brought = sum(1 for _ in itertools.islice(batches, count))
    assert brought == count, f"the data has only {brought} batches"
    return time.perf_counter() - start


def quickstart_tokens_per_second() -> float:
    from jaxformers.bench import bench_train
    from jaxformers.config import load_config
    from jaxformers.training import prepare_run

    config = load_config(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
    return bench_train(lambda: prepare_run(config).trainer, steps=10).tokens_per_second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=1000, help="in a round")
    parser.add_argument("--train-tokens-per-second", type=float, help="of a train step; none: the quickstart's")
    options = parser.parse_args()
    consumed = options.train_tokens_per_second or quickstart_tokens_per_second()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shared = {"cache_dir": folder / "cache", "sequence_length": options.length}
        arms = {name: ours(DataConfig(**shared, **own)) for name, own in ARMS.items()}
        arms[THEIRS] = theirs(DataConfig(**shared, **WHOLE), folder)
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for number in range(options.rounds + 1):
            for name, batches in arms.items():
                elapsed = seconds_of(batches(), options.batches)
                if number:  # the first round brings files into the page cache
                    seconds[name].append(elapsed)
    tokens = options.batches * BATCH * options.length
    rates = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    load = os.getloadavg()[0]
    print(f"rows of {options.length}, {os.cpu_count()} processors, load {load:.1f}, {options.rounds} rounds")
    print(f"a train step consumes {consumed:,.0f} tokens/s")
    for name, rate in rates.items():
        against = "" if name == THEIRS else f", {rate / rates[THEIRS]:.1f} x {THEIRS}"
        print(f"{name:26}{rate / 1e6:8.2f} M tokens/s, {rate / consumed:.0f} x the train step{against}")


if __name__ == "__main__":
    main()
