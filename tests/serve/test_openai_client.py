"""The `openai` Python client, as people use it, against a real engine; and what it is told against the model itself."""

import asyncio
import json
import re
from pathlib import Path
from typing import Literal

import numpy as np
import openai
import pytest
from pydantic import BaseModel, Field
from real_model import NAME, log_probabilities

import jaxformers as jf

pytestmark = pytest.mark.xdist_group("real server")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def client(real):
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def user(text):
    return [{"role": "user", "content": text}]


def ask(client, text, **options):
    return client.chat.completions.create(model=NAME, messages=user(text), **{"max_tokens": 12} | options)


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "jaxformers"


def test_a_chat_without_chance_is_what_the_model_says_by_itself(client, model):
    prompt = model.tokenizer.render_chat(user("hello"), add_generation_prompt=True)
    ids = model.tokenizer.encode(prompt, add_special_tokens=False)
    answer = ask(client, "hello", temperature=0, user="someone")
    assert answer.choices[0].message.content == jf.generate(model, [ids], max_new_tokens=12, temperature=0)[0]
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)


def test_several_answers_differ_and_come_again_with_their_seed(client):
    first, again = (ask(client, "hello", n=3, seed=7) for _ in range(2))
    assert len({choice.message.content for choice in first.choices}) == 3
    assert [choice.message for choice in first.choices] == [choice.message for choice in again.choices]
    alone = [ask(client, "hello", seed=7 + index).choices[0].message.content for index in range(3)]
    assert [choice.message.content for choice in first.choices] == alone


def test_a_stream_adds_up_to_the_whole_and_ends_with_its_usage(client):
    whole = ask(client, "grüße 🌍", seed=5, max_tokens=40)
    stream = ask(client, "grüße 🌍", seed=5, max_tokens=40, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len(chunks) > 3
    assert last.usage == whole.usage.model_copy(update={"prompt_tokens_details": last.usage.prompt_tokens_details})


def test_what_many_ask_at_once_is_answered_as_if_each_were_alone(client, real):
    texts = [f"question {number} " * (1 + number % 5) for number in range(16)]
    alone = [ask(client, text, seed=3).choices[0].message.content for text in texts]

    async def together():
        async with openai.AsyncOpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, text, seed=3) for text in texts))

    assert [answer.choices[0].message.content for answer in asyncio.run(together())] == alone


class Mood(BaseModel):
    mood: Literal["good", "bad"]
    score: int = Field(ge=0, le=9)
    tags: list[Literal["a", "b"]] = Field(max_length=2)


def test_an_answer_parses_as_the_type_that_was_asked_for(client):
    options = {"response_format": Mood, "max_tokens": 300, "seed": 1}
    [choice] = client.chat.completions.parse(model=NAME, messages=user("hi"), **options).choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Mood)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Köln", "Lisboa"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


def test_a_tool_is_called_and_its_result_taken_up(client):
    options = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200}
    [choice] = ask(client, "hi", seed=2, **options).choices
    [call] = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "weather")
    assert (arguments["city"] in ("Köln", "Lisboa"), 1 <= arguments["days"] <= 7) == (True, True)

    streamed = [chunk.choices[0].delta for chunk in ask(client, "hi", seed=2, stream=True, **options)]
    pieces = [call.function.arguments for delta in streamed for call in delta.tool_calls or ()]
    assert "".join(pieces) == call.function.arguments

    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    messages = [*user("hi"), choice.message, result]
    after = client.chat.completions.create(model=NAME, messages=messages, tools=[WEATHER], max_tokens=4)
    assert after.usage.completion_tokens == 4


def test_log_probabilities_of_an_answer_are_those_of_the_forward_pass(client, model):
    answer = ask(client, "hi", logprobs=True, top_logprobs=3, temperature=0, max_completion_tokens=6)
    told = answer.choices[0].logprobs.content
    prompt = model.tokenizer.render_chat(user("hi"), add_generation_prompt=True)
    ids = model.tokenizer.encode(prompt, add_special_tokens=False)
    for entry in told:
        truth = log_probabilities(model, ids)[-1]
        best = np.sort(truth)[::-1][:3]
        seen = [entry.logprob, *(top.logprob for top in entry.top_logprobs)]
        np.testing.assert_allclose(seen, [best[0], *best], atol=1e-5)
        ids.append(int(truth.argmax()))
    assert len(told) == 6


def test_a_prompt_of_ids_is_scored_as_the_forward_pass_scores_it(client, model):
    ids = list(b"the quick brown fox")
    echoed = client.completions.create(model=NAME, prompt=[ids], max_tokens=1, logprobs=1, echo=True, temperature=0)
    told = echoed.choices[0].logprobs
    truth = log_probabilities(model, ids)
    of_ids = truth[np.arange(len(ids) - 1), ids[1:]]
    assert told.token_logprobs[0] is None
    np.testing.assert_allclose(told.token_logprobs[1:], [*of_ids, truth[-1].max()], atol=1e-5)


def test_completions_and_embeddings(client, model):
    answer = client.completions.create(model=NAME, prompt=["one", "two"], max_tokens=5, temperature=0)
    truth = jf.generate(model, ["one", "two"], max_new_tokens=5, temperature=0)
    assert [choice.text for choice in answer.choices] == truth
    vector = client.embeddings.create(model=NAME, input="hello").data[0].embedding
    assert np.linalg.norm(vector) == pytest.approx(1)


def test_errors_are_the_clients_own_classes(client):
    with pytest.raises(openai.NotFoundError) as found:
        client.chat.completions.create(model="gpt-4", messages=user("hi"))
    assert (found.value.code, found.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as found:
        ask(client, "hi", max_tokens=100_000)
    assert found.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="Unknown parameter: 'frobnicate'") as found:
        ask(client, "hi", extra_body={"frobnicate": 1})
    assert (found.value.code, found.value.type) == ("unknown_parameter", "invalid_request_error")


def test_leaving_a_stream_ends_its_work(client, real):
    stream = client.completions.create(model=NAME, prompt="endless", max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    assert real.idle()


def test_nothing_was_compiled_after_the_engine_was_ready(client, real):
    ask(client, "hello", n=2, logprobs=True, frequency_penalty=1, top_p=0.5, logit_bias={"65": -100})
    assert real.engine.stats().compilations_after_ready == 0


def test_the_client_that_the_readme_shows_gets_an_answer(real, capsys):
    [shown] = re.findall(r"```py\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(shown.replace("http://localhost:8000", real.url).replace('model="smollm2"', f'model="{NAME}", max_tokens=8'))
    assert capsys.readouterr().out.strip()
