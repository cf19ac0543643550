"""The engine and llama.cpp, turn by turn, on the same model and prompts: tokens per second and their ratio.

    python3 -m venv LLAMA && CMAKE_ARGS=-DGGML_NATIVE=ON LLAMA/bin/pip install llama-cpp-python
    python tests/benchmarks/versus_llama_cpp.py MODEL.gguf --llama-python LLAMA/bin/python [--batches 1,8,32]

llama.cpp first writes the model anew, with float32 and with q8_0 weights, into --cache. Each arm is a process of its
own that keeps its model; every round gives all of them the same random prompts, which none has read before, and times
prompts and new tokens together. llama.cpp decodes all sequences in one batch with its own defaults (a float16 cache,
flash attention where it likes), greedily. The engine computes in float32: it has no weights in few bits, so that is
what q8_0 is compared with too. The agreement is of greedy tokens with the engine's, up to where a row first differs:
near 1 says that both did the same work (q8_0 and a float16 cache round otherwise). Other load makes llama.cpp's
threads spin for each other: then only processor time with --threads 1 says something.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

VOCABULARY = 49_152  # SmolLM2's; prompts are drawn from it
ENGINE = "engine, float32"


@dataclass(frozen=True)
class Answer:
    """What an arm made of prompts: seconds in all, until every row had its first token, and of processor time."""

    seconds: float
    first: float
    processor: float
    tokens: list[list[int]]


Arm = Callable[[list[list[int]], int], Answer]  # prompts, and how many tokens each is continued by


def engine_arm(path: str, batch: int, length: int) -> Arm:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jaxformers as jf
    from jaxformers.environment import set_up

    set_up()
    engine = jf.Engine(jf.load(path), jf.EngineConfig(slots=batch, max_length=length))
    engine.warm_up()

    def answer(prompts: list[list[int]], new: int) -> Answer:
        start, start_cpu, first = time.perf_counter(), time.process_time(), None
        requests = [jf.Request(prompt=prompt, max_new_tokens=new, temperature=0.0) for prompt in prompts]
        made: dict[int, list[int]] = {engine.submit(request): [] for request in requests}
        while engine.has_work():
            for event in engine.step():
                made[event.request] += event.tokens
            if first is None and all(made.values()):
                first = time.perf_counter() - start
        return Answer(time.perf_counter() - start, first, time.process_time() - start_cpu, list(made.values()))

    return answer


def llama_library():
    """The bindings, which from now on tell errors alone."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    return llama_cpp


class LlamaCpp:
    """A model in llama.cpp with room for `batch` sequences of `length` tokens, all of which it decodes together."""

    def __init__(self, path: str, batch: int, length: int, threads: int):
        self._lib = llama_cpp = llama_library()
        model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_seq_max = batch
        settings.n_ctx = batch * -(-length // 256) * 256  # llama.cpp pads each sequence to 256 itself
        settings.n_batch = batch * length
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(model, settings)
        self._batch = llama_cpp.llama_batch_init(batch * length, 0, 1)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def __call__(self, prompts: list[list[int]], new: int) -> Answer:
        start, start_cpu = time.perf_counter(), time.process_time()
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        made = [[token] for token in self._decode(prompts, 0)]
        first, position = time.perf_counter() - start, len(prompts[0])
        for step in range(new - 1):
            for row, token in zip(made, self._decode([row[-1:] for row in made], position + step), strict=True):
                row.append(token)
        return Answer(time.perf_counter() - start, first, time.process_time() - start_cpu, made)

    def _decode(self, rows: list[list[int]], position: int) -> list[int]:
        """The likeliest token behind each sequence, after its next tokens, the first of which stands at `position`."""
        batch, last = self._batch, []
        batch.n_tokens = 0
        for sequence, tokens in enumerate(rows):
            for offset, token in enumerate(tokens):
                i = batch.n_tokens
                batch.token[i], batch.pos[i] = token, position + offset
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = offset == len(tokens) - 1
                batch.n_tokens += 1
            last.append(batch.n_tokens - 1)
        status = self._lib.llama_decode(self._context, batch)
        assert status == 0, status
        return [self._likeliest(i) for i in last]

    def _likeliest(self, i: int) -> int:
        import numpy as np

        logits = self._lib.llama_get_logits_ith(self._context, i)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


def write_with(scheme: str, source: str, target: str) -> None:
    """The model with its matrices in float32 or q8_0, by llama.cpp's own tool."""
    llama_cpp = llama_library()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = {"f32": llama_cpp.LLAMA_FTYPE_ALL_F32, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}[scheme]
    settings.allow_requantize = True
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings)
    assert status == 0, status


def written(python: str, source: Path, scheme: str, folder: Path) -> Path:
    target = folder / f"{source.stem}.{scheme}.gguf"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([python, __file__, "--write", scheme, str(source), str(target)], check=True)
    return target


@contextmanager
def process(python: str, kind: str, path: Path, batch: int, length: int, threads: int) -> Iterator[Arm]:
    """An arm in a process of its own, which is ready."""
    command = [python, __file__, "--arm", kind, str(path), str(batch), str(length), str(threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"

        def ask(prompts: list[list[int]], new: int) -> Answer:
            child.stdin.write(json.dumps([prompts, new]) + "\n")
            child.stdin.flush()
            return Answer(**json.loads(child.stdout.readline()))

        yield ask


def answer_lines(kind: str, path: str, batch: int, length: int, threads: int) -> None:
    """The other end of `process`."""
    arm = engine_arm(path, batch, length) if kind == "engine" else LlamaCpp(path, batch, length, threads)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(asdict(arm(*json.loads(line)))), flush=True)


def agreement(ours: Answer, theirs: Answer) -> float:
    same = 0
    for a, b in zip(ours.tokens, theirs.tokens, strict=True):
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return same / sum(map(len, ours.tokens))


def compare(arms: dict[str, Arm], sizes: dict[str, int], options: argparse.Namespace, batch: int) -> None:
    """Prints medians over all rounds but the first, which warms up. sizes: bytes of each arm's weights."""
    draw, rounds = random.Random(batch), []
    for _ in range(options.rounds + 1):
        prompts = [[draw.randrange(VOCABULARY) for _ in range(options.prompt)] for _ in range(batch)]
        rounds.append({name: arm(prompts, options.new_tokens) for name, arm in arms.items()})

    def median(name: str, figure: Callable[[Answer], float]) -> float:
        return statistics.median(figure(answers[name]) for answers in rounds[1:])

    print(f"batch {batch}: {options.prompt} prompt tokens, {options.new_tokens} new ones, {options.rounds} rounds")
    for name in arms:
        seconds, processor = median(name, lambda answer: answer.seconds), median(name, lambda answer: answer.processor)
        step = median(name, lambda answer: answer.seconds - answer.first) / (options.new_tokens - 1)
        ratio = seconds / median(ENGINE, lambda answer: answer.seconds)
        processor_ratio = processor / median(ENGINE, lambda answer: answer.processor)
        same = statistics.mean(agreement(answers[ENGINE], answers[name]) for answers in rounds)
        print(
            f"  {name:18s} {batch * options.new_tokens / seconds:7.1f} tokens/s, "
            f"prompts read in {median(name, lambda answer: answer.first):6.3f} s, then {batch / step:7.1f} tokens/s "
            f"(weights at {sizes[name] / step / 1e9:4.1f} GB/s); engine {ratio:.2f} x as fast "
            f"({processor_ratio:.2f} x by processor time), agreement {same:.2f}"
        )


def main() -> None:
    if sys.argv[1:2] == ["--write"]:
        return write_with(*sys.argv[2:])
    if sys.argv[1:2] == ["--arm"]:
        return answer_lines(*sys.argv[2:4], *map(int, sys.argv[4:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a .gguf file, such as that of SmolLM2-135M")
    parser.add_argument("--llama-python", required=True, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="llama.cpp's")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "jaxformers-tests" / "llama.cpp")
    options = parser.parse_args()
    paths = {scheme: written(options.llama_python, options.model, scheme, options.cache) for scheme in ("f32", "q8_0")}
    kinds = {
        ENGINE: (sys.executable, "engine", paths["f32"]),
        "llama.cpp, f32": (options.llama_python, "llama.cpp", paths["f32"]),
        "llama.cpp, q8_0": (options.llama_python, "llama.cpp", paths["q8_0"]),
    }
    sizes = {name: path.stat().st_size for name, (_, _, path) in kinds.items()}
    length = options.prompt + options.new_tokens
    for batch in map(int, options.batches.split(",")):
        with ExitStack() as running:
            arms = {
                name: running.enter_context(process(*kind, batch, length, options.threads))
                for name, kind in kinds.items()
            }
            compare(arms, sizes, options, batch)
    return None


if __name__ == "__main__":
    main()
