"""The `openai` Python client, as people use it, against a server on loopback."""

import openai
import pytest


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def user(text):
    return [{"role": "user", "content": text}]


def test_models(client):
    assert [model.id for model in client.models.list()] == ["standin", "tuned"]
    assert client.models.retrieve("standin").owned_by == "jaxformers"


def test_chat(client):
    answer = client.chat.completions.create(model="standin", messages=user("say hello"), n=2, seed=1, user="someone")
    assert [choice.message.content for choice in answer.choices] == ["hello", "hello"]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 10


def test_a_stream_of_a_chat(client):
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model="standin", messages=user("say grüße 🌍"), stream=True, stream_options=options
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "grüße 🌍"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage.total_tokens > 0


def test_log_probabilities(client):
    answer = client.chat.completions.create(
        model="standin", messages=user("say hi"), logprobs=True, top_logprobs=2, max_completion_tokens=1
    )
    [entry] = answer.choices[0].logprobs.content
    assert (entry.token, entry.logprob, entry.bytes) == ("h", -0.5, [104])
    assert [top.token for top in entry.top_logprobs] == ["h", "a"]
    told = client.completions.create(model="standin", prompt="say hi", logprobs=1, echo=True).choices[0].logprobs
    assert told.token_logprobs[0] is None


def test_completions_and_embeddings(client):
    answer = client.completions.create(model="standin", prompt=["say a", "say b"], stop=["zz"], suffix=None)
    assert [choice.text for choice in answer.choices] == ["a", "b"]
    assert len(client.embeddings.create(model="standin", input="hello").data[0].embedding) == 300


def test_errors_are_the_clients_own_classes(client):
    with pytest.raises(openai.NotFoundError) as found:
        client.chat.completions.create(model="gpt-4", messages=user("hi"))
    assert (found.value.code, found.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model="standin", messages=user("hi"), max_tokens=100_000)
    assert found.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="Unknown parameter: 'frobnicate'") as found:
        client.chat.completions.create(model="standin", messages=user("hi"), extra_body={"frobnicate": 1})
    assert (found.value.code, found.value.type) == ("unknown_parameter", "invalid_request_error")


def test_leaving_a_stream_ends_its_work(client, live):
    stream = client.completions.create(model="standin", prompt="endless", max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    assert live.idle()
