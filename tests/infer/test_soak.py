"""An engine under random load for minutes: nothing leaks, nothing compiles, and no survivor's tokens change.

JAXFORMERS_SOAK_SECONDS says for how long each one runs; 600 where it is silent.
"""

import os
import resource
import time
from dataclasses import dataclass, field

import jax
import numpy as np
import pytest
from infer.engines import Answer, tokens_of
from tiny import LLAMA, random_params

from jaxformers.families import read_config
from jaxformers.infer.engine import Engine
from jaxformers.infer.generate import prepare_model
from jaxformers.infer.request import EngineConfig, QueueFull, Request
from jaxformers.parallel.mesh import single_device_mesh

SECONDS = float(os.environ.get("JAXFORMERS_SOAK_SECONDS", "600"))
VOCAB, LENGTH = 300, 128
CONFIG = EngineConfig(
    slots=4, page_size=4, prefill_chunk=16, prefill_piece=8, decode_steps=3, queue_requests=16, cache_tokens=320
)
KINDS = 48
GROWTH = 32 * 2**20  # bytes of this process that the allocator's own ways may take while nothing leaks


def random_requests():
    """Of every kind and length; some begin alike."""
    draw = np.random.default_rng(0)
    shared = draw.integers(3, VOCAB, 64).tolist()
    for seed in range(KINDS):
        length = int(draw.integers(1, 100))
        prompt = shared[: int(draw.integers(0, min(length, 64)))]
        prompt = prompt + draw.integers(3, VOCAB, length - len(prompt)).tolist()
        settings = {"temperature": float(draw.choice([0.0, 0.5, 1.2])), "seed": seed}
        if draw.random() < 0.5:
            settings |= {"top_k": int(draw.integers(1, 40)), "top_p": float(draw.uniform(0.5, 1.0))}
        if draw.random() < 0.3:
            settings |= {"frequency_penalty": 0.5, "repetition_penalty": 1.2}
        if draw.random() < 0.3:
            settings |= {"stop_ids": draw.integers(3, VOCAB, 20).tolist()}
        if draw.random() < 0.3:
            settings |= {"logprobs": 2, "prompt_logprobs": 1}
        new = int(draw.integers(1, LENGTH - length + 1))
        yield Request(prompt=prompt, max_new_tokens=new, priority=int(draw.integers(-1, 2)), **settings)


@dataclass
class Soak:
    """A random load on an engine. Each answer is compared with that of the quiet engine as it ends."""

    engine: Engine
    requests: list[Request]
    truth: list[list[int]]
    draw: np.random.Generator = field(default_factory=lambda: np.random.default_rng(1))
    under_way: dict[int, tuple[int, Answer]] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    refused: int = 0

    def run(self, seconds: float) -> int:
        """For so long, and until all that came is over; how many steps that took."""
        end, steps = time.monotonic() + seconds, 0
        while time.monotonic() < end or self.engine.has_work():
            if time.monotonic() < end:
                self.come_and_go()
            for event in self.engine.step():
                kind, answer = self.under_way[event.request]
                answer.take(event)
                if event.finish is not None:
                    self.check(event.request, kind, answer)
            self.engine.pages.audit()
            steps += 1
        assert not self.under_way
        return steps

    def come_and_go(self) -> None:
        while self.draw.random() < 0.4:
            kind = int(self.draw.integers(len(self.requests)))
            try:
                self.under_way[self.engine.submit(self.requests[kind])] = kind, Answer()
            except QueueFull:
                self.refused += 1
                break
        if self.under_way and self.draw.random() < 0.15:
            number = int(self.draw.choice(list(self.under_way)))
            self.engine.cancel(number)
            self.cancelled.add(number)

    def check(self, number: int, kind: int, answer: Answer) -> None:
        del self.under_way[number]
        if answer.finish == "cancelled":
            self.cancelled.remove(number)
            assert answer.tokens == self.truth[kind][: len(answer.tokens)]
        else:
            assert answer.finish in ("stop", "length")
            assert answer.tokens == self.truth[kind]


def arrays():
    """How many arrays there are on devices, and their bytes."""
    live = jax.live_arrays()
    return len(live), sum(array.nbytes for array in live)


def most_memory():
    """Bytes that this process had at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.parametrize("speculate", [None, "ngram"])
def test_nothing_leaks_compiles_or_changes_under_random_load(speculate, capsys):
    cfg = read_config(LLAMA | {"vocab_size": VOCAB, "max_position_embeddings": LENGTH})
    model = prepare_model(jax.device_put(random_params(cfg)), cfg, single_device_mesh())
    engine = Engine(model, EngineConfig(**(vars(CONFIG) | {"speculate": speculate})))
    engine.warm_up()
    requests = list(random_requests())
    soak = Soak(engine, requests, [tokens_of(engine, request)[0] for request in requests])
    soak.run(SECONDS / 10)
    before, memory = arrays(), most_memory()
    steps = soak.run(SECONDS)
    stats, grown = engine.stats(), most_memory() - memory
    with capsys.disabled():
        print(f"\n{speculate}: {steps} steps, {grown / 2**20:.1f} MiB grown, {soak.refused} refused, {stats}")
    assert arrays() == before
    assert grown < GROWTH
    assert stats.compilations_after_ready == 0
    assert (stats.pages_used, stats.running, stats.waiting, stats.waiting_tokens) == (0, 0, 0, 0)
    assert min(stats.cancelled, stats.finished, stats.cached_prompt_tokens, soak.refused) > 0
    assert (stats.accepted_tokens > 0) == (speculate is not None)
