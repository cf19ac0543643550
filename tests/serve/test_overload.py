"""Too many requests, clients that leave or do not read, engines that fail, and the end of the process."""

import asyncio
import json
import socket
import time

import httpx
import pytest
from talker import Talker

from jaxformers.serve.served import Limits, Settings

ENDLESS = {"prompt": "endless", "max_tokens": 400}


def in_parallel(*calls):
    async def gather():
        async with httpx.AsyncClient(timeout=30) as client:
            return await asyncio.gather(*(call(client) for call in calls))

    return asyncio.run(gather())


def posting(live, body, path="/v1/completions"):
    async def call(client):
        return await client.post(f"{live.url}{path}", json=body)

    return call


def test_a_full_queue_is_told_while_it_is_full_and_recovers(serve):
    live = serve(Talker(slots=2, queue_requests=3, pause=0.005))
    live.engine.gate.clear()
    opener = [posting(live, {"prompt": "say hi", "stream": True})] * 5

    async def refused_while_full(client):
        while live.engine.stats().waiting < 3:
            await asyncio.sleep(0.01)
        answers = [await posting(live, {"prompt": "say hi"})(client) for _ in range(20)]
        live.engine.gate.set()
        return answers

    *opened, refused = in_parallel(*opener[:3], refused_while_full)
    for response in refused:
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(response.headers["retry-after"]) >= 1
    assert [response.status_code for response in opened] == [200] * 3
    assert live.post("/v1/completions", {"prompt": "say hi"}).status_code == 200
    assert 'jaxformers_requests_refused_total{model_name="standin"} 20.0' in live.get("/metrics").text


def test_several_continuations_are_taken_all_or_none(serve):
    live = serve(Talker(slots=1, queue_requests=4))
    answer = live.post("/v1/completions", {"prompt": "x", "n": 6})
    assert answer.status_code == 429
    assert live.idle()
    assert live.post("/v1/completions", {"prompt": "x", "n": 3}).status_code == 200


def send_request(live, body, *, receive_buffer=None):
    """A raw connection that has sent one request and reads nothing of itself."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", live.port))
    connection.sendall(head.encode() + b"\r\n\r\n" + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_the_work_of_a_client_that_leaves_ends(serve, stream):
    live = serve(Talker(pause=0.02, max_length=100_000))
    connection = send_request(live, ENDLESS | {"stream": stream, "max_tokens": 10_000})
    while not live.engine.stats().running:
        time.sleep(0.005)
    connection.close()
    assert live.idle(), "the engine goes on for nobody"
    assert live.engine.cancelled == 1


def test_a_reader_that_does_not_read_holds_back_no_other_and_is_given_up_on(serve):
    limits = Limits(write_seconds=0.5)
    live = serve(Talker(slots=4, max_length=200_000, pause=0.01), settings=Settings(limits=limits))
    body = ENDLESS | {"stream": True, "max_tokens": 150_000, "logprobs": 5}
    stalled = [send_request(live, body, receive_buffer=4096) for _ in range(2)]
    while live.engine.stats().running < 2:
        time.sleep(0.005)
    for _ in range(5):
        answer = live.post("/v1/completions", {"prompt": "say hello"})
        assert answer.json()["choices"][0]["text"] == "hello"
    assert live.idle(15)
    assert live.engine.cancelled == 2
    for connection in stalled:
        connection.close()


def test_a_slow_reader_gets_every_character_in_fewer_chunks(live):
    connection = send_request(live, {"prompt": "count", "stream": True, "max_tokens": 400, "seed": 5})
    time.sleep(0.3)
    received = b""
    connection.settimeout(30)
    while b"[DONE]" not in received:
        received += connection.recv(512)
    connection.close()
    pieces = [json.loads(line[6:]) for line in received.splitlines() if line.startswith(b"data: {")]
    text = "".join(piece["choices"][0]["text"] for piece in pieces)
    whole = live.post("/v1/completions", {"prompt": "count", "max_tokens": 400, "seed": 5}).json()
    assert text == whole["choices"][0]["text"]


def test_a_request_that_takes_too_long_is_given_up(serve):
    live = serve(Talker(pause=0.02), settings=Settings(limits=Limits(request_seconds=0.2)))
    answer = live.post("/v1/completions", ENDLESS)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    streamed = live.post("/v1/completions", ENDLESS | {"stream": True})
    *_, last, end = [line for line in streamed.text.split("\n\n") if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    assert end == "data: [DONE]"
    assert live.idle()


def test_before_the_model_is_warm_requests_are_put_off(serve):
    engine = Talker()
    engine.warm.clear()
    live = serve(engine, wait=False)
    assert live.get("/health").status_code == 200
    for answer in (live.get("/ready"), live.post("/v1/completions", {"prompt": "x"})):
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
    engine.warm.set()
    while live.get("/ready").status_code != 200:
        time.sleep(0.05)
    assert live.post("/v1/completions", {"prompt": "say x"}).status_code == 200


def test_an_engine_that_fails_is_told_to_everyone_and_ends_the_server(serve):
    live = serve(Talker())
    live.engine.gate.clear()

    async def breaking(client):
        while not live.engine.stats().waiting:
            await asyncio.sleep(0.01)
        live.engine.broken = RuntimeError("out of memory")
        live.engine.gate.set()

    answer, _ = in_parallel(posting(live, {"prompt": "x"}), breaking)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "memory" not in answer.text  # faults of ours are for the log
    live.thread.join(30)
    assert not live.thread.is_alive()
