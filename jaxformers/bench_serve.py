"""How a server answers under load: the requests of `bench_engine`, over HTTP, as any client would send them.

Each request is a thread and a connection, so figures hold the client's own work too; against a server on the same
machine that is a part of them.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from jaxformers.infer.request import Request

if TYPE_CHECKING:
    from jaxformers.bench_engine import Load, Quantiles

VOCABULARY = 256  # ids of prompts: every model has these
MOST_THREADS = 1024


@dataclass(frozen=True)
class ServeReport:
    """What came of a load. Times count from when a request was due. refused: those that were told to come back later;
    failed: any others that were not answered; refusal: how long it took to be told so."""

    requests: int
    refused: int
    failed: int
    seconds: float
    new_tokens: int
    tokens_per_second: float
    first_token: Quantiles
    between_tokens: Quantiles
    whole: Quantiles
    refusal: Quantiles


@dataclass
class _Answer:
    """One request, as its client saw it; moments are of `time.perf_counter`."""

    due: float
    status: int = 0
    ended: float = 0.0
    heard: list[tuple[float, int]] = field(default_factory=list)  # moments, and tokens so far


def bench_serve(url: str, load: Load, *, key: str | None = None) -> ServeReport:
    """Puts a load on the server at `url`. ValueError where no server answers there."""
    coming = list(load.draw(VOCABULARY))
    _check(url, key)
    at_a_time = min(load.requests, MOST_THREADS) if load.rate else load.concurrency
    start = time.perf_counter()
    answers: list[_Answer] = []
    free = threading.Semaphore(at_a_time)

    def ask(due: float | None, request: Request) -> None:
        try:
            answers.append(_ask(url, request, key, due=time.perf_counter() if due is None else due))
        finally:
            free.release()

    with ThreadPoolExecutor(at_a_time) as threads:
        for at, request in coming:
            free.acquire()
            if load.rate:
                time.sleep(max(0.0, start + at - time.perf_counter()))
            threads.submit(ask, start + at if load.rate else None, request)
    return _report(answers, time.perf_counter() - start)


def _connection(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no address of a server, such as http://127.0.0.1:8000")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname, parts.port, timeout=600)


def _check(url: str, key: str | None) -> None:
    connection = _connection(url)
    try:
        connection.request("GET", "/ready", headers=_headers(key))
        status = connection.getresponse().status
    except OSError as error:
        raise ValueError(f"no server answers at {url}: {error}") from None
    finally:
        connection.close()
    if status != 200:
        raise ValueError(f"the server at {url} is not ready: it answers {status}")


def _headers(key: str | None) -> dict[str, str]:
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def _ask(url: str, request: Request, key: str | None, *, due: float) -> _Answer:
    """Sends a request and reads its stream to the end."""
    body = {
        "prompt": list(request.prompt),
        "max_tokens": request.max_new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    answer, connection = _Answer(due), _connection(url)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), _headers(key))
        response = connection.getresponse()
        answer.status = response.status
        if response.status == 200:
            answer.heard = [(time.perf_counter(), tokens) for tokens in _tokens_so_far(response)]
        else:
            response.read()
    except (OSError, http.client.HTTPException):
        answer.status = 0
    finally:
        connection.close()
    answer.ended = time.perf_counter()
    return answer


def _tokens_so_far(response: http.client.HTTPResponse) -> Iterator[int]:
    """How many tokens there are, each time the stream tells of more."""
    last = 0
    for line in response:
        if line.startswith(b"data: {"):
            told = json.loads(line[len(b"data: ") :]).get("usage") or {}
            if (tokens := told.get("completion_tokens", 0)) > last:
                last = tokens
                yield tokens


def _report(answers: list[_Answer], seconds: float) -> ServeReport:
    from jaxformers.bench_engine import Quantiles

    done = [answer for answer in answers if answer.heard]
    refused = [answer for answer in answers if answer.status in (429, 503)]
    between = [gap for answer in done for gap in _gaps(answer)]
    made = sum(answer.heard[-1][1] for answer in done)
    return ServeReport(
        requests=len(answers),
        refused=len(refused),
        failed=len(answers) - len(done) - len(refused),
        seconds=seconds,
        new_tokens=made,
        tokens_per_second=made / seconds,
        first_token=Quantiles.of([answer.heard[0][0] - answer.due for answer in done]),
        between_tokens=Quantiles.of(between),
        whole=Quantiles.of([answer.ended - answer.due for answer in done]),
        refusal=Quantiles.of([answer.ended - answer.due for answer in refused]),
    )


def _gaps(answer: _Answer) -> list[float]:
    """The time between two pieces, shared by the tokens of the later one."""
    pairs = zip(answer.heard, answer.heard[1:], strict=False)
    return [(then - now) / (more - few) for (now, few), (then, more) in pairs for _ in range(more - few)]
