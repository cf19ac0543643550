"""Tools and forms through HTTP: what the body asks for reaches the engine, and what the model writes comes back in
OpenAI's words."""

import json

import openai
import pytest
from talker import talkative_tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
# Reads as the chat template of a model that writes calls as Hermes does.
HERMES = "{# <tool_call> of one of the tools #}{{ messages[-1].content }}"


@pytest.fixture(scope="module")
def hermes(serve, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hermes")
    talkative_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(HERMES)
    from jaxformers.data.tokenizer import load_tokenizer

    return serve(tokenizer=load_tokenizer(folder))


@pytest.fixture(scope="module")
def client(hermes):
    with openai.OpenAI(base_url=f"{hermes.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def asked(client, text, **options):
    return client.chat.completions.create(model="standin", messages=[{"role": "user", "content": text}], **options)


def test_tools_that_the_template_would_not_tell_of_are_refused_unless_one_must_be_called(serve, tokenizer):
    silent = serve(tokenizer=tokenizer.with_chat_template("{{ messages[-1].content }}"))
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER], "max_tokens": 1}
    refused = silent.post("/v1/chat/completions", body)
    assert refused.status_code == 400
    assert "chat template does not mention tools" in refused.json()["error"]["message"]
    assert silent.post("/v1/chat/completions", body | {"tool_choice": "required"}).status_code == 200
    assert silent.post("/v1/chat/completions", body | {"tool_choice": "none"}).status_code == 200


def test_a_call_is_told_apart_from_the_text_before_it(client):
    [choice] = asked(client, f"say Let me look. {CALL}", tools=[WEATHER]).choices
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"city": "Köln"}
    assert choice.message.content.strip() == "Let me look."
    assert choice.finish_reason == "tool_calls"


def test_a_call_streams_its_name_first_and_then_its_arguments(client):
    chunks = [chunk.choices[0] for chunk in asked(client, f"say {CALL}", tools=[WEATHER], stream=True)]
    calls = [call for choice in chunks for call in choice.delta.tool_calls or ()]
    assert calls[0].function.name == "weather"
    assert calls[0].id
    assert not any(call.id or call.function.name for call in calls[1:])
    assert json.loads("".join(call.function.arguments for call in calls)) == {"city": "Köln"}
    assert chunks[-1].finish_reason == "tool_calls"


def test_arguments_of_a_forced_call_are_those_that_the_function_names(tokenizer):
    from jaxformers.serve.tool_choice import constraint_for

    def written(**more):
        function = {"name": "f", "parameters": WEATHER["function"]["parameters"] | more}
        tools = [{"type": "function", "function": function}]
        return constraint_for(tokenizer, tools, "required").value

    assert '"additionalProperties": false' in written()
    assert '"additionalProperties": true' in written(additionalProperties=True)


def test_calls_may_be_held_to_one(client):
    both = asked(client, f"say {CALL}\n{CALL}", tools=[WEATHER]).choices[0].message
    one = asked(client, f"say {CALL}\n{CALL}", tools=[WEATHER], parallel_tool_calls=False).choices[0].message
    assert (len(both.tool_calls), len(one.tool_calls)) == (2, 1)


def test_without_tools_what_reads_like_a_call_is_text(client):
    for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        message = asked(client, f"say {CALL}", **options).choices[0].message
        assert (message.content, message.tool_calls) == (CALL, None)


FORMS = {
    "json_object": {"response_format": {"type": "json_object"}},
    "json_schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1]}}}},
    "regex": {"guided_regex": "[0-9]+"},
    "structured regex": {"structured_outputs": {"regex": "[0-9]+"}},
    "choice": {"guided_choice": ["yes", "no"]},
    "grammar": {"structured_outputs": {"grammar": 'start: "a" | "b"'}},
    "a tool": {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
    "any tool": {"tools": [WEATHER], "tool_choice": "required"},
}
BEGINS = {"json_object": "{", "json_schema": "1", "regex": "0123456789", "structured regex": "0123456789"}
BEGINS |= {"choice": "yn", "grammar": "ab", "a tool": "<", "any tool": "<"}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_reaches_the_engine_as_a_constraint_for_each_continuation(hermes, form):
    body = {"messages": [{"role": "user", "content": "hi"}], "n": 2, "max_tokens": 1, **FORMS[form]}
    assert hermes.post("/v1/chat/completions", body).status_code == 200
    first, second = (request.constraint for request in hermes.engine.seen[-2:])
    assert first is not second
    begins = {chr(token) for token in range(256) if first.allowed()[token]}
    assert begins == set(BEGINS[form])


@pytest.mark.parametrize(
    "form",
    [
        {"guided_regex": "(["},
        {"guided_regex": "(a{1000}){1000}"},
        {"guided_grammar": "start: nothing"},
        {"guided_choice": []},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "alien"}}}},
        {"structured_outputs": {"json": '{"type": 5}'}},
        {"tools": [WEATHER | {"function": {"name": "f", "parameters": {"type": 7}}}], "tool_choice": "required"},
        {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}},
    ],
)
def test_a_form_that_cannot_be_met_is_refused(hermes, form):
    answer = hermes.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **form})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
