"""What only shows with a real engine behind HTTP: strangers' bodies beside a golden request, a constraint that breaks
half-way, and metrics of what was computed."""

import json
import random
import threading

import httpx
import pytest
from real_model import NAME
from test_hostile import BROKEN, CASES, COMPLETION, MESSAGES, PATHS, mangled

pytestmark = pytest.mark.xdist_group("real server")
GOLDEN = {
    "messages": [{"role": "user", "content": "gold"}],
    "seed": 11,
    "n": 2,
    "max_tokens": 24,
    "logprobs": True,
    "top_logprobs": 3,
}


def golden(real) -> bytes:
    answer = real.post("/v1/chat/completions", GOLDEN).json()
    assert answer.pop("id").startswith("chatcmpl-")
    del answer["created"], answer["usage"]  # which tells what was cached
    return json.dumps(answer).encode()


def send(real, path, content) -> int:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    return real.client.post(f"{real.url}{path}", content=content, headers=headers).status_code


def test_a_golden_request_is_answered_by_the_same_bytes_before_amid_and_after_hostile_ones(real):
    before, draw = golden(real), random.Random(5)
    bodies = [(path, body) for path in PATHS for body in BROKEN.values()]
    bodies += [("/v1/completions", json.dumps(COMPLETION | {name: value}).encode()) for name, value in CASES]
    bodies += [("/v1/chat/completions", json.dumps({"messages": messages}).encode()) for messages in MESSAGES]
    bodies += [(path, mangled(draw, valid)) for path, valid in draw.choices(list(PATHS.items()), k=150)]
    draw.shuffle(bodies)
    amid: list[bytes] = []
    asking = threading.Thread(target=lambda: amid.extend(golden(real) for _ in range(5)))
    asking.start()
    statuses = [send(real, path, body) for path, body in bodies]
    asking.join()
    assert max(statuses) < 500
    assert {before, golden(real)} | set(amid) == {before}
    assert len(amid) == 5
    assert real.idle()
    assert real.engine.stats().compilations_after_ready == 0


def test_clients_that_leave_in_the_middle_give_all_their_pages_back(real):
    free = real.engine.stats()
    for number in range(12):
        body = {"prompt": f"leave {number}", "max_tokens": 300, "stream": True, "ignore_eos": True}
        with real.client.stream("POST", f"{real.url}/v1/completions", json=body) as response:
            next(response.iter_bytes())
    assert real.idle()
    stats = real.engine.stats()
    assert stats.cancelled >= free.cancelled + 12
    assert (stats.pages_used, stats.pages_cached + stats.pages_free) == (0, stats.pages_total)


class Breaks:
    """A constraint that is met three times, and then cannot go on."""

    def __init__(self, allowed):
        self._allowed, self._left = allowed, 3

    def allowed(self):
        return self._allowed()

    def advance(self, token):
        self._left -= 1
        if not self._left:
            raise ValueError("the constraint cannot be followed further")


@pytest.mark.parametrize("stream", [False, True])
def test_a_constraint_that_breaks_half_way_ends_its_own_request_alone(real, monkeypatch, stream):
    from jaxformers.serve import completions

    compiled = completions.compile_constraints

    def compile_breaking(*arguments, **named):
        return [Breaks(constraint.allowed) for constraint in compiled(*arguments, **named)]

    before = golden(real)
    monkeypatch.setattr(completions, "compile_constraints", compile_breaking)
    amid: list[bytes] = []
    asking = threading.Thread(target=lambda: amid.append(golden(real)))
    asking.start()
    body = {"prompt": "x", "max_tokens": 50, "structured_outputs": {"regex": "[a-z]{40}"}, "stream": stream}
    response = real.post("/v1/completions", body)
    asking.join()
    assert response.status_code == (200 if stream else 400)
    *_, event = response.text.removesuffix("data: [DONE]\n\n").split("data: ")
    error = json.loads(event)["error"]
    assert "the constraint cannot be followed further" in error["message"]
    assert error["type"] == "invalid_request_error"
    assert amid == [before]
    assert real.idle()


def test_the_metrics_are_those_of_the_engine(real):
    def read():
        lines = real.get("/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def name_of(metric):
        return f'jaxformers_{metric}{{model_name="{NAME}"}}'

    before = read()
    body = {"prompt": "z" * 70, "max_tokens": 9, "ignore_eos": True}
    for _ in range(2):
        assert real.post("/v1/completions", body).status_code == 200
    after = read()
    grown = {
        metric: after[name_of(metric)] - before[name_of(metric)] for metric in ("new_tokens_total", "prefix_hits_total")
    }
    assert grown == {"new_tokens_total": 18, "prefix_hits_total": 64}  # two pieces of 32 ids, read once
    assert after[name_of("compilations_total")] == after[name_of("preemptions_total")] == 0


def test_a_full_queue_refuses_and_what_was_taken_is_answered(real):
    body = {"prompt": ["a"] * 40, "max_tokens": 40, "ignore_eos": True}
    statuses: list[int] = []

    def ask():
        with httpx.Client(timeout=60) as client:
            statuses.append(client.post(f"{real.url}/v1/completions", json=body).status_code)

    clients = [threading.Thread(target=ask) for _ in range(6)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert set(statuses) == {200, 429}
    assert real.idle()
