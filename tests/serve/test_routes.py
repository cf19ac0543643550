"""What each route answers, field by field as OpenAI's."""

import base64
import json

import numpy as np
import pytest
from talker import Talker


def completion(live, **body):
    response = live.post("/v1/completions", {"model": "standin", **body})
    assert response.status_code == 200, response.text
    return response.json()


def events(response):
    """The chunks of a stream, which ends as OpenAI's do."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, end = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert end == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def chat(live, text, **body):
    messages = [{"role": "user", "content": text}]
    return live.post("/v1/chat/completions", {"model": "standin", "messages": messages, **body})


def test_a_prompt_is_continued_until_it_stops_or_is_long_enough(live):
    answer = completion(live, prompt="say héllo", max_tokens=50)
    [choice] = answer["choices"]
    assert choice == {"index": 0, "text": "héllo", "logprobs": None, "finish_reason": "stop"}
    assert answer["object"] == "text_completion"
    read = 1 + len("say héllo".encode())
    assert answer["usage"]["prompt_tokens"] == read
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["usage"]["total_tokens"] == read + 6
    [short] = completion(live, prompt="say hello", max_tokens=2)["choices"]
    assert (short["text"], short["finish_reason"]) == ("he", "length")
    assert len(completion(live, prompt="on and on")["choices"][0]["text"]) == 16


def test_prompts_come_as_texts_or_ids_one_or_several(live):
    ids = [list(b"say a"), list(b"say b")]
    for prompts, texts in [(["say a", "say b"], ["a", "b"]), (ids, ["a", "b"]), (ids[1], ["b"]), ("say c", ["c"])]:
        choices = completion(live, prompt=prompts)["choices"]
        assert [choice["text"] for choice in choices] == texts
        assert [choice["index"] for choice in choices] == list(range(len(texts)))


def test_n_continuations_draw_apart_and_again_alike(live):
    first, again = (completion(live, prompt=["x", "y"], n=3, seed=7)["choices"] for _ in range(2))
    assert [choice["text"] for choice in first] == [choice["text"] for choice in again]
    assert len({choice["text"] for choice in first}) == 6


def test_echo_with_logprobs_tells_of_the_prompt_and_of_what_follows(live):
    [choice] = completion(live, prompt=list(b"say hi"), echo=True, logprobs=2, max_tokens=1)["choices"]
    told = choice["logprobs"]
    assert choice["text"] == "say hih"
    assert told["tokens"] == list("say hih")
    assert told["token_logprobs"] == [None, *[-0.5] * 6]
    assert told["text_offset"] == list(range(7))
    assert told["top_logprobs"][:2] == [None, {"a": -0.5}]
    assert told["top_logprobs"][6] == {"h": -0.5, "a": -9999.0}


def test_a_prompt_alone_may_be_scored(live):
    [choice] = completion(live, prompt=list(b"abc"), echo=True, logprobs=0, max_tokens=0)["choices"]
    assert choice["text"] == "abc"
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"] is None


def test_parts_of_a_character_are_told_by_their_bytes(live):
    [choice] = completion(live, prompt="say é!", logprobs=1)["choices"]
    assert choice["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it_and_the_work(live, stream):
    body = {"prompt": "say one two three", "stop": ["wo th", "zzz"], "logprobs": 0, "stream": stream}
    response = live.post("/v1/completions", {**body, "max_tokens": 50})
    chunks = events(response) if stream else [response.json()]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one t"
    assert "".join(t for c in chunks for t in c["choices"][0]["logprobs"]["tokens"]) == "one t"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert live.idle()


def test_streamed_text_equals_the_whole_and_never_breaks_a_character(live):
    text = "naïve 🌍 ж€ — done"
    response = live.post("/v1/completions", {"prompt": f"say {text}", "stream": True, "max_tokens": 99})
    pieces = [chunk["choices"][0]["text"] for chunk in events(response)]
    assert "".join(pieces) == text
    assert len(pieces) > 2
    assert not any("\ufffd" in piece for piece in pieces)


def test_min_tokens_come_before_any_stop(live):
    [choice] = completion(live, prompt="say ab ab ab", stop="b", min_tokens=4, max_tokens=50)["choices"]
    assert choice["text"] == "ab a"
    [choice] = completion(live, prompt="say ab", ignore_eos=True, max_tokens=5)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")


def test_a_chat_is_rendered_by_the_template_and_answered(live):
    answer = chat(live, "say hi there", max_tokens=50).json()
    [choice] = answer["choices"]
    assert answer["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": "hi there", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == len("user: say hi there\nsay hi there")
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


def test_parts_of_a_message_are_joined_and_developers_speak_as_the_system(live):
    parts = [{"type": "text", "text": "so,"}, {"type": "text", "text": "say yes"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    answer = live.post("/v1/chat/completions", {"messages": messages}).json()
    assert answer["choices"][0]["message"]["content"] == "yes"
    prompt = bytes(live.engine.seen[-1].prompt).decode()
    assert prompt == "system: be brief\nuser: so,\nsay yes\nso,\nsay yes"


def test_templates_read_arguments_of_earlier_calls_as_objects():
    from jaxformers.serve.asking import _turn
    from jaxformers.serve.protocol import Message

    def turn(arguments):
        call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return _turn(Message(role="assistant", tool_calls=[call]))["tool_calls"][0]

    assert turn('{"x": 1}') == {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert turn("")["function"]["arguments"] == {}
    assert turn("no JSON")["function"]["arguments"] == "no JSON"


@pytest.mark.parametrize(
    "template",
    [
        "{{ '```json\n' + arguments + '\n```' }}",  # DeepSeek V3's way, which fails on an object
        "```json\n{{ arguments }}\n```",
        "```json\n{{ arguments if arguments is string else arguments | tojson }}\n```",
        "```json\n{{ arguments | tojson }}\n```",
    ],
)
@pytest.mark.parametrize("given", ['{"city": "Köln"}', {"city": "Köln"}])
def test_arguments_of_earlier_calls_reach_every_template_as_the_json_they_are(tokenizer, template, given):
    from talker import Talker, served_by

    from jaxformers.serve.asking import render_messages
    from jaxformers.serve.protocol import Message

    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": given}}
    whole = "{% for call in messages[-1].tool_calls %}{% set arguments = call.function.arguments %}" + template
    served = served_by(Talker(), tokenizer=tokenizer.with_chat_template(whole + "{% endfor %}"))
    rendered = render_messages(served, [Message(role="assistant", tool_calls=[call])], variables={})
    assert rendered.text == '```json\n{"city": "Köln"}\n```'


def test_a_streamed_chat_begins_with_its_role_and_ends_with_its_usage(live):
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = chat(live, "say hello", stream=True, stream_options=options, n=2, logprobs=True, top_logprobs=1)
    chunks = events(response)
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:2]] == [{"role": "assistant", "content": ""}] * 2
    for index in range(2):
        own = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in own) == "hello"
        told = [entry for choice in own if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        assert [entry["token"] for entry in told] == list("hello")
        assert told[0]["bytes"] == [104]
        assert told[0]["top_logprobs"] == [{"token": "h", "logprob": -0.5, "bytes": [104]}]
        assert own[-1]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 10
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)


def test_usage_in_a_stream_is_null_before_its_end_and_absent_where_not_asked(live):
    asked = events(chat(live, "say hi", stream=True, stream_options={"include_usage": True}))
    assert [chunk["usage"] is None for chunk in asked] == [True] * (len(asked) - 1) + [False]
    assert not any("usage" in chunk for chunk in events(chat(live, "say hi", stream=True)))


def test_a_body_becomes_the_request_it_describes(live):
    body = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1}
    extras = {"logit_bias": {"65": 5}, "seed": -1, "stop_token_ids": [66], "priority": 3, "min_tokens": 2}
    chat(live, "say hi", max_completion_tokens=9, max_tokens=5, model="tuned", **body, **extras)
    seen = live.engine.seen[-1]
    for name in body:
        assert getattr(seen, name) == body[name]
    assert (seen.max_new_tokens, seen.min_new_tokens, seen.adapter, seen.priority) == (9, 2, "tuned", 3)
    assert (dict(seen.logit_bias), seen.seed, list(seen.stop_ids)) == ({65: 5.0}, 2**32 - 1, [66, 257])


def test_the_models_own_sampling_holds_where_a_body_is_silent(serve):
    own = serve(generation={"temperature": 0.6, "top_k": 20, "eos_token_id": [257, 299]})
    chat(own, "say hi", top_k=-1)
    seen = own.engine.seen[-1]
    assert (seen.temperature, seen.top_k, list(seen.stop_ids)) == (0.6, 0, [257, 299])


def test_embeddings_come_as_numbers_or_as_base64(live):
    texts = ["aab", "b"]
    answer = live.post("/v1/embeddings", {"input": texts, "model": "standin"}).json()
    vectors = np.array([row["embedding"] for row in answer["data"]])
    bos = 256
    assert np.argsort(vectors[0])[-1] == ord("a")
    np.testing.assert_allclose(vectors[1][[ord("b"), bos]], 0.5**0.5, rtol=1e-6)
    packed = live.post("/v1/embeddings", {"input": texts, "encoding_format": "base64"}).json()
    raw = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in packed["data"]]
    np.testing.assert_array_equal(raw, vectors.astype(np.float32))
    assert answer["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    assert live.post("/v1/embeddings", {"input": "a", "dimensions": 3}).status_code == 400


def test_more_texts_are_embedded_than_the_queue_holds(serve):
    small = serve(Talker(queue_requests=64))
    answer = small.post("/v1/embeddings", {"input": ["x"] * 200 + ["y"]}).json()
    assert [row["index"] for row in answer["data"]] == [*range(201)]
    assert answer["data"][0]["embedding"] == answer["data"][199]["embedding"] != answer["data"][200]["embedding"]


def test_embeddings_are_the_adapters_that_is_asked_for(live):
    live.post("/v1/embeddings", {"input": "a", "model": "tuned"})
    assert live.engine.seen[-1].adapter == "tuned"


def test_a_server_without_pooling_says_that_it_makes_no_embeddings(serve):
    answer = serve(pooling=None).post("/v1/embeddings", {"input": "a"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, "this server makes no embeddings")


def test_texts_become_ids_and_come_back(live):
    answer = live.post("/tokenize", {"prompt": "hé"}).json()
    assert answer == {"count": 4, "max_model_len": 512, "tokens": [256, 104, 195, 169]}
    assert live.post("/detokenize", {"tokens": [104, 195, 169]}).json() == {"prompt": "hé"}
    messages = [{"role": "user", "content": "hi"}]
    told = live.post("/tokenize", {"messages": messages, "add_generation_prompt": False}).json()
    assert bytes(told["tokens"]) == b"user: hi\n"


def test_models_version_and_health_are_told(live):
    listed = live.get("/v1/models").json()
    assert [card["id"] for card in listed["data"]] == ["standin", "tuned"]
    assert live.get("/v1/models/standin").json() == listed["data"][0]
    assert live.get("/version").json() == {"version": "1.2.3"}
    assert live.get("/health").json() == {"status": "ok"}
    assert live.get("/ready").status_code == 200


@pytest.mark.parametrize("names, prefix", [("jaxformers", "jaxformers_"), ("vllm", "vllm:")])
def test_metrics_count_what_was_done(serve, names, prefix):
    from jaxformers.serve.served import Settings

    server = serve(settings=Settings(metrics_names=names))
    completion(server, prompt="say abcdefghij", max_tokens=50)
    lines = dict(line.rsplit(" ", 1) for line in server.get("/metrics").text.splitlines() if line[0] != "#")
    ours = names == "jaxformers"
    made = f"{prefix}{'new_tokens' if ours else 'generation_tokens'}_total"
    assert lines[f'{made}{{model_name="standin"}}'] == "10.0"
    first = f"{prefix}time_to_first_token_seconds_count"
    between = f"{prefix}{'inter_token' if ours else 'inter_token_latency'}_seconds_count"
    over = f"{prefix}{'requests_finished' if ours else 'request_success'}_total"
    assert lines[f'{first}{{model_name="standin"}}'] == "1.0"
    assert lines[f'{between}{{model_name="standin"}}'] == "6.0"
    assert lines[f'{over}{{finished_reason="stop",model_name="standin"}}'] == "1.0"
    assert all(name.startswith(prefix) for name in lines)


def test_every_answer_carries_a_request_id_and_leaves_one_line_in_the_log(live, caplog):
    with caplog.at_level("INFO", logger="jaxformers.access"):
        answer = live.post("/v1/completions", {"prompt": "say hi"}, headers={"X-Request-Id": "mine-1"})
        other = live.get("/nowhere", headers={"X-Request-Id": "no spaces allowed"})
        live.get("/health")
    assert answer.headers["x-request-id"] == "mine-1"
    assert len(other.headers["x-request-id"]) == 24
    line = json.loads(next(r.message for r in caplog.records if "mine-1" in r.message))
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert (line["completion_tokens"], line["finish"]) == (2, ["stop"])
