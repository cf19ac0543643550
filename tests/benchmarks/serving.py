"""What the HTTP server costs beside its engine, how it bears overload and slow readers, and how soon it is ready.

    python tests/benchmarks/serving.py REF [--streams 32] [--new-tokens 64] [--parts start,overhead,overload,readers]

The server is a process of its own, which this one asks over loopback; both, and the engine, share the processors, so
clients' work counts against the server. Each part says what it measures:

start: from the command to `ready`, twice; the first fills the compilation cache.
overhead: tokens a second of the engine alone in a process, and over HTTP, turn by turn.
overload: arrivals at ten times what the server can answer: who is answered waits boundedly, others are told at once;
    then, how long until a lone request is answered as soon as before.
readers: tokens a second of some streams beside 50 others that are read, and beside 50 that are not read at all.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from urllib.parse import urlsplit

from jaxformers.bench_engine import Load
from jaxformers.bench_serve import bench_serve

PARTS = ("start", "overhead", "overload", "readers")
SLOW_READERS = 50
OVERLOAD = 10
# An engine alone, in a process as the server's is; it prints its tokens a second.
ENGINE = """
import sys, json
from jaxformers.environment import set_up
set_up()
import jaxformers as jf
from jaxformers.bench_engine import Load, bench_engine
ref, slots, max_length, load = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
engine = jf.Engine(jf.load(ref), jf.EngineConfig(slots=slots, max_length=max_length))
print(bench_engine(engine, Load(**load)).tokens_per_second)
"""


@contextmanager
def server(ref: str, *options: object) -> Iterator[tuple[str, float]]:
    """A server that is ready: its address, and the seconds that took."""
    command = [sys.executable, "-m", "jaxformers", "serve", ref, "--port", "0", "--no-access-log", *map(str, options)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().split()[-1]
        assert process.stdout.readline() == "ready\n"
        yield url, time.perf_counter() - start
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    assert status == 0, status


def time_starts(ref: str) -> None:
    for what in ("with the cache as it is", "with a warm cache"):
        with server(ref, "--max-length", 2048) as (_, seconds):
            print(f"start: ready after {seconds:.1f} s {what}")


def measure_overhead(ref: str, load: Load, rounds: int) -> None:
    size = load.longest
    alone, served = [], []
    for _ in range(rounds):
        command = [sys.executable, "-c", ENGINE, ref, str(load.concurrency), str(size), json.dumps(asdict(load))]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        alone.append(float(out.splitlines()[-1]))
        with server(ref, "--slots", load.concurrency, "--max-length", size) as (url, _):
            served.append(bench_serve(url, load).tokens_per_second)
    ratio = statistics.median(served) / statistics.median(alone)
    print(f"overhead: engine {alone} tokens/s, server {served}; the server's median is {ratio:.1%} of the engine's")


def measure_overload(ref: str, load: Load) -> None:
    slots = 8
    with server(ref, "--slots", slots, "--max-length", load.longest, "--queue-requests", slots) as (url, _):
        one = Load(requests=5, concurrency=1, prompt_tokens=load.prompt_tokens, new_tokens=4, spread=0)
        quiet = bench_serve(url, one).first_token.median
        calm = bench_serve(url, Load(**asdict(load) | {"requests": 4 * slots, "concurrency": slots}))
        rate = OVERLOAD * calm.requests / calm.seconds
        hard = bench_serve(url, Load(**asdict(load) | {"requests": int(rate * 20), "rate": rate}))
        over = time.perf_counter()
        while bench_serve(url, Load(**asdict(one) | {"requests": 1})).first_token.median > 2 * quiet:
            assert time.perf_counter() - over < 60, "the server does not recover"
        print(
            f"overload: {rate:.1f} requests/s arrive, {hard.refused} of {hard.requests} refused, {hard.failed} failed"
        )
        print(f"overload: first token {calm.first_token} calm, {hard.first_token} under it")
        print(f"overload: refusals {hard.refusal}; recovered after {time.perf_counter() - over:.2f} s")


class Readers:
    """Clients that ask for streams and read them, or do not."""

    def __init__(self, url: str, count: int, new_tokens: int, *, read: bool):
        parts = urlsplit(url)
        body = {"prompt": list(range(32)), "max_tokens": new_tokens, "ignore_eos": True, "stream": True}
        content = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        head += f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n"
        self._sockets = []
        for _ in range(count):
            one = socket.socket()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect((parts.hostname, parts.port))
            one.sendall(head.encode() + content)
            self._sockets.append(one)
            if read:
                threading.Thread(target=self._drain, args=(one,), daemon=True).start()

    @staticmethod
    def _drain(one: socket.socket) -> None:
        try:
            while one.recv(65536):
                pass
        except OSError:
            pass

    def close(self) -> None:
        for one in self._sockets:
            one.close()


def measure_readers(ref: str, load: Load, rounds: int) -> None:
    streams = 8
    rates: dict[bool, list[float]] = {True: [], False: []}
    options = ("--slots", SLOW_READERS + streams, "--max-length", 1024, "--no-prefix-cache")
    with server(ref, *options) as (url, _):
        for _ in range(rounds):
            for read in (True, False):
                others = Readers(url, SLOW_READERS, 900, read=read)
                time.sleep(5)  # until all of them have a slot
                report = bench_serve(url, Load(**asdict(load) | {"requests": streams, "concurrency": streams}))
                rates[read].append(report.tokens_per_second)
                others.close()
                time.sleep(2)
    ratio = statistics.median(rates[False]) / statistics.median(rates[True])
    print(
        f"readers: {rates[True]} tokens/s beside {SLOW_READERS} that read, {rates[False]} beside slow ones: {ratio:.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", help="what to serve, such as a .gguf file of SmolLM2-135M")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default=",".join(PARTS))
    chosen = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    load = Load(
        requests=2 * chosen.streams,
        concurrency=chosen.streams,
        prompt_tokens=64,
        new_tokens=chosen.new_tokens,
        spread=0,
    )
    parts = chosen.parts.split(",")
    if "start" in parts:
        time_starts(chosen.ref)
    if "overhead" in parts:
        measure_overhead(chosen.ref, load, chosen.rounds)
    if "overload" in parts:
        measure_overload(chosen.ref, load)
    if "readers" in parts:
        measure_readers(chosen.ref, load, chosen.rounds)


if __name__ == "__main__":
    main()
