"""Bodies and connections that nobody means well: never a 5xx, never a slot that stays taken, and a golden request is
answered by the same bytes before and after."""

import json
import random
import socket
import time

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from jaxformers.serve.errors import ApiError
from jaxformers.serve.protocol import ChatBody, CompletionBody, parse_body
from jaxformers.serve.served import Limits, Settings

JSON = {"Content-Type": "application/json"}
CHAT = {"messages": [{"role": "user", "content": "say hi"}]}
COMPLETION = {"prompt": "say hi", "max_tokens": 4}
PATHS = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT, "/v1/embeddings": {"input": "x"}}
PATHS |= {"/tokenize": {"prompt": "x"}, "/detokenize": {"tokens": [65]}}
DEEP = 3000


@pytest.fixture(scope="module")
def target(serve):
    limits = Limits(max_body_bytes=300_000, header_seconds=0.5, body_seconds=0.5)
    return serve(settings=Settings(limits=limits))


@pytest.fixture(scope="module", autouse=True)
def _golden_request_is_unchanged(target):
    before = golden(target)
    yield
    assert golden(target) == before
    assert target.idle()


def golden(target):
    body = CHAT | {"seed": 11, "logprobs": True, "top_logprobs": 3, "max_tokens": 40, "n": 2, "temperature": 1.0}
    answer = target.post("/v1/chat/completions", body).json()
    for name in ("id", "created"):
        del answer[name]
    return json.dumps(answer)


def raw(target, path, content):
    return target.client.post(f"{target.url}{path}", content=content, headers=JSON)


def assert_refused(response):
    assert 400 <= response.status_code < 500, (response.status_code, response.text)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400


BROKEN = {
    "nothing": b"",
    "no JSON": b"{'prompt': 1}",
    "cut off": b'{"prompt": "a',
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "overflow": b'{"prompt": "a", "temperature": 1e999}',
    "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "lone surrogate in a name": b'{"prompt": "a", "\\udfff": 1}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "deep lists": b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"prompt": ' + b'{"a":' * DEEP + b"1" + b"}" * (DEEP + 1),
    "endless number": b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}",
    "two values": b'{"prompt": "a"} {"prompt": "b"}',
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", BROKEN)
def test_a_body_that_is_no_request_is_refused(target, path, case):
    assert_refused(raw(target, path, BROKEN[case]))


WRONG = {
    "prompt": [[], [[]], {}, 1, True, [None], ["a", 1], [1, "a"], [-1], [10**30], [1.5], [[1], "a"], "x" * 20_000],
    "max_tokens": ["5", 1.5, -1, 10**20, True, [], 0, 100_000],
    "temperature": ["1", -1, 2.1, 10**400, [], {}],
    "top_p": [0, 1.1, -1],
    "top_k": [-2, 1.5, 10**20],
    "n": [0, -1, 129, 10**20, "1"],
    "seed": [2**63, 1.5, "1", 10**400],
    "stop": ["", [""], [1], {}, ["a"] * 1 + ["b", ""], [str(i) for i in range(5000)], "x" * 2000],
    "logit_bias": [{"a": 1}, {"-1": 1}, {"1": 101}, {"1": "1"}, [], {"9" * 5000: 1}, {"299999": 1}, {"١": 1}],
    "stop_token_ids": [[-1], [10**30], ["1"], [299999], list(range(1000))],
    "logprobs": [-1, 21, "1", True],
    "stream": [1, "true"],
    "stream_options": [{"include_usage": True}, 1, {"x": 1}],
    "suffix": ["def"],
    "best_of": [3, 0],
    "min_tokens": [-1, "1", 10**30],
    "model": [1, "other", "x" * 10_000, "../../etc/passwd", "\x00"],
    "response_format": [{"type": "xml"}, {"type": "json_schema"}, "json", {"type": "text", "json_schema": {}}],
    "structured_outputs": [{"unknown": 1}, {"regex": 1}, {"json": "[1"}, {"regex": "a", "choice": ["a"]}],
    "unknown": [1, {}, "x"],
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]


@pytest.mark.parametrize("name", WRONG)
def test_a_field_that_is_wrong_is_refused_by_its_name(target, name):
    for value in WRONG[name]:
        response = raw(target, "/v1/completions", json.dumps(COMPLETION | {name: value}))
        assert_refused(response)
        error = response.json()["error"]
        assert name in f"{error['param']} {error['message']}", (value, error)


MESSAGES = [
    [],
    {},
    "hi",
    [1],
    [{}],
    [{"role": "user", "content": 1}],
    [{"role": "robot", "content": "x"}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": ["text"]}],
    [{"role": "assistant", "tool_calls": [{}]}],
    [{"role": "user", "content": "x"}] * 20_000,
    [{"role": "user", "content": "x" * 5000}],
]


def test_conversations_that_are_none_are_refused(target):
    for messages in MESSAGES:
        assert_refused(raw(target, "/v1/chat/completions", json.dumps({"messages": messages})))
    bad = [
        {"chat_template_kwargs": {"messages": []}},
        {"chat_template_kwargs": {"self": 1}},
        {"tool_choice": "required"},
        {"tools": [{"function": {"name": "no spaces"}}]},
        {"tools": [{"function": {"name": "f"}}], "tool_choice": {"function": {"name": "g"}}},
        {"top_logprobs": 2},
        {"max_completion_tokens": 0},
    ]
    for extra in bad:
        assert_refused(raw(target, "/v1/chat/completions", json.dumps(CHAT | extra)))


def test_bodies_larger_than_allowed_are_refused_with_or_without_a_stated_length(target):
    large = b'{"prompt": "' + b"x" * 400_000 + b'"}'
    assert raw(target, "/v1/completions", large).status_code == 413
    parts = (large[i : i + 50_000] for i in range(0, len(large), 50_000))
    assert target.client.post(f"{target.url}/v1/completions", content=parts, headers=JSON).status_code == 413


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def assert_request_or_refusal(content, kind):
    refusal = None
    try:
        body = parse_body(content, kind)
    except ApiError as error:
        refusal = error
    if refusal is None:
        assert isinstance(body, kind)
    else:
        assert refusal.status == 400
        assert "\n" not in refusal.body["error"]["message"]
        json.dumps(refusal.body, ensure_ascii=False).encode()


def mangled(draw, valid):
    """A valid body with one field that is wrong and up to three bytes that are."""
    content = bytearray(json.dumps(valid | dict([draw.choice(CASES)])).encode()[:5000])
    for _ in range(draw.randint(0, 3)):
        content[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(content)


def test_thousands_of_mangled_bodies_are_requests_or_refused():
    draw = random.Random(3)
    for _ in range(4000):
        kind, valid = draw.choice([(CompletionBody, COMPLETION), (ChatBody, CHAT)])
        assert_request_or_refusal(mangled(draw, valid), kind)


@pytest.mark.parametrize("kind, valid", [(CompletionBody, COMPLETION), (ChatBody, CHAT)])
def test_whatever_a_body_holds_it_is_a_request_or_refused(kind, valid):
    fields = st.sampled_from([field.alias or name for name, field in kind.model_fields.items()])

    @examples(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(fields, VALUES, max_size=4))
    def check(changes):
        assert_request_or_refusal(json.dumps(valid | changes).encode(), kind)

    check()


def test_hundreds_of_mangled_requests_leave_the_server_whole(target):
    draw = random.Random(4)
    for _ in range(400):
        path, valid = draw.choice(list(PATHS.items()))
        assert raw(target, path, mangled(draw, valid)).status_code < 500


def exchange(target, *parts, pause=0.0):
    """What a server answers to raw bytes, sent in parts, until it closes the connection or ten seconds passed."""
    received = b""
    with socket.create_connection(("127.0.0.1", target.port)) as connection:
        connection.settimeout(10)
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            while chunk := connection.recv(65536):
                received += chunk
        except (ConnectionError, TimeoutError) as error:
            return received + (b"<open>" if isinstance(error, TimeoutError) else b"")
    return received


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
BODY = json.dumps(COMPLETION).encode()


def test_heads_that_never_end_are_given_up_on(target):
    assert exchange(target, b"POST /v1/comp", *[b"l"] * 20, pause=0.05) == b""
    assert exchange(target) == b""


def test_a_second_head_that_never_ends_is_given_up_on_too(target):
    with socket.create_connection(("127.0.0.1", target.port), timeout=30) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        closed, start = False, time.monotonic()
        while not closed and time.monotonic() - start < 30:
            try:
                connection.sendall(b"G")
            except ConnectionError:
                closed = True
            time.sleep(0.05)
    assert closed


def test_bodies_that_never_arrive_are_given_up_on(target):
    answer = exchange(target, HEAD + b"Content-Length: 100\r\n\r\n", b'{"prompt"')
    assert answer.startswith(b"HTTP/1.1 408")
    assert not answer.endswith(b"<open>")


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00" * 100,
        b"GET\r\n\r\n",
        b"GET /version HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nabcde",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        b"GET /%ff%fe%00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /version HTTP/1.1\r\nHost: \xff\xfe\r\nAuthorization: Bearer \xff\r\nConnection: close\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ],
)
def test_bytes_that_are_no_request_do_no_harm(target, garbage):
    answer = exchange(target, garbage)
    assert not answer.startswith(b"HTTP/1.1 5"), answer


def test_connections_that_close_early_leave_nothing_behind(target):
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    for cut in range(1, len(whole) + 1, 7):
        with socket.create_connection(("127.0.0.1", target.port)) as connection:
            connection.sendall(whole[:cut])
    assert target.idle()
    assert target.get("/health").status_code == 200


def test_requests_sent_ahead_are_answered_in_order(target):
    one = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    last = b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = exchange(target, one * 3 + last)
    assert answer.count(b'"text":"hi"') == 3
    assert answer.endswith(b'{"version":"1.2.3"}')
