"""Tokenizing on CPU: `jaxformers data tokenize` beside the `tokenizers` library alone, turn by turn.

    python tests/benchmarks/tokenizing.py [--megabytes 64] [--rounds 3] [--cores 2] [--tokenizer REF]

The corpus is Python source of this environment, a document a file, in one .jsonl; the tokenizer, unless one is named, a
byte-level BPE of 8,192 ids learned from it. Each round times each arm once, so a machine that slows down slows all of
them; ratios are of medians, and above 1 ours is the faster.

`tokenizers` is `encode_batch_fast` in the library's own threads over texts that are in memory already, a million
characters a core at once: nothing is read, no id leaves the library, nothing is kept. `ours` starts its processes,
reads and parses the .jsonl, hashes every text, and has a checked, mapped cache of ids and of documents at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

BATCH_CHARACTERS = 1 << 20


def python_sources(size: int) -> Iterator[str]:
    """Texts of the standard library, then of what is installed, `size` bytes of them."""
    folders = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    for path in (path for folder in folders for path in sorted(folder.rglob("*.py"))):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        size -= len(text.encode())
        if text.strip():
            yield text
        if size <= 0:
            return


def batches(texts: list[str], characters: int) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def arms(
    corpus: Path, texts: list[str], reference: str | None, cores: int, folder: Path
) -> dict[str, Callable[[], int]]:
    """Each returns how many tokens it made, without the end of each text, which only ours adds."""
    from jaxformers.data.cache import open_cache
    from jaxformers.data.config import DataConfig
    from jaxformers.data.tokenizer import load_tokenizer, train_tokenizer

    if reference is None:
        tokenizer = train_tokenizer(texts[:2000], vocab_size=8192)
    else:
        tokenizer = load_tokenizer(reference)
    tokenizer.save(folder / "tokenizer")
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    library.encode_special_tokens = True  # as ours reads them in text
    made = []

    def theirs() -> int:
        return sum(
            len(encoding)
            for batch in batches(texts, BATCH_CHARACTERS * cores)
            for encoding in library.encode_batch_fast(batch)
        )

    def ours() -> int:
        cache_dir = folder / str(len(made))
        made.append(cache_dir)
        cache = open_cache(DataConfig(paths=str(corpus), cache_dir=cache_dir, workers=cores), tokenizer)
        return cache.manifest.tokens - cache.manifest.documents

    return {"tokenizers": theirs, "ours": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--tokenizer")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    os.environ["RAYON_NUM_THREADS"] = str(options.cores)  # read when the library first runs
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    with TemporaryDirectory() as name:
        folder = Path(name)
        texts = list(python_sources(options.megabytes * 10**6))
        size = sum(len(text.encode()) for text in texts)
        corpus = folder / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        timed = arms(corpus, texts, options.tokenizer, options.cores, folder)
        seconds: dict[str, list[float]] = {arm: [] for arm in timed}
        tokens = {}
        for _ in range(options.rounds):
            for arm, run in timed.items():
                start = time.perf_counter()
                tokens[arm] = run()
                seconds[arm].append(time.perf_counter() - start)
    assert len(set(tokens.values())) == 1, f"the arms disagree: {tokens}"
    print(f"{len(texts):,} documents, {size / 1e6:.1f} MB, {tokens['ours']:,} tokens, {options.cores} cores")
    for arm, times in seconds.items():
        rates = ", ".join(f"{size / t / 1e6:.2f}" for t in times)
        print(
            f"{arm:12s} {size / statistics.median(times) / 1e6:6.2f} MB/s, "
            f"{tokens[arm] / statistics.median(times):12,.0f} tokens/s  (MB/s of each round: {rates})"
        )
    print(f"ours / tokenizers: {statistics.median(seconds['tokenizers']) / statistics.median(seconds['ours']):.3f}")


if __name__ == "__main__":
    main()
