"""Calls in each lineage's format, however the text is cut; what is no call stays text; forced calls are calls."""

import itertools
import json

import jsonschema
import numpy as np
import pytest
from data.templates import TEMPLATES
from hypothesis import given, settings
from hypothesis import strategies as st
from wheels import unpacked_wheel

from jaxformers.data.tokenizer import TextStream, byte_tokenizer
from jaxformers.serve.constrain import compile_constraint
from jaxformers.serve.tool_choice import constraint_for
from jaxformers.serve.tools import (
    ArgumentsDelta,
    ReasoningDelta,
    TextDelta,
    ToolParser,
    ToolStart,
    format_of,
    parser_for,
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
}
TOOLS = [WEATHER, CLOCK]
PARIS = {"city": 'Paris "é" }{ </tool_call', "days": 2}
ARGUMENTS = json.dumps(PARIS, ensure_ascii=False)

# format -> what a model writes to say "Let me see.", then ask for the weather in Paris, then the time
TWO_CALLS = {
    "hermes": f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
    '<tool_call>\n{"arguments": {}, "name": "now"}\n</tool_call>',
    "mistral": f'Let me see.[TOOL_CALLS] [{{"name": "get_weather", "arguments": {ARGUMENTS}, "id": "abcdefghi"}}, '
    '{"name": "now", "arguments": {}}]',
    "deepseek": "Let me see.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
    f"```json\n{ARGUMENTS}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n"
    "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "glm": "Let me see.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
    f"<arg_value>{PARIS['city']}</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n"
    "<tool_call>now\n</tool_call>",
    "xml": f"Let me see.\n<tool_call>\n<function=get_weather>\n<parameter=city>\n{PARIS['city']}\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "harmony": "<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant<|channel|>commentary "
    f"to=functions.get_weather <|constrain|>json<|message|>{ARGUMENTS}<|call|>"
    "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}<|call|>",
}
VARIANTS = {
    "mistral": "Let me see.[TOOL_CALLS]get_weather[ARGS]" + ARGUMENTS + "[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}",
    "deepseek": f"Let me see.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{ARGUMENTS}"
    "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "glm": f"Let me see.<tool_call>get_weather<arg_key>city</arg_key><arg_value>{PARIS['city']}</arg_value>"
    "<arg_key>days</arg_key><arg_value>2</arg_value></tool_call><tool_call>now</tool_call>",
}
# Llama's calls are a whole answer
BARE = {
    "tagged": f'<|python_tag|>{{"name": "get_weather", "parameters": {ARGUMENTS}}}',
    "bare": f'{{"type": "function", "name": "get_weather", "parameters": {ARGUMENTS}}}',
    "fenced": f'```json\n{{"parameters": {ARGUMENTS}, "name": "get_weather"}}\n```',
}


def parse(pieces, form, tools=TOOLS, **options):
    """(text, reasoning, [(name, arguments as text)]) of an answer that arrives in pieces."""
    ids = iter(range(99))
    parser = ToolParser(form, tools=tools, new_id=lambda: str(next(ids)), **options)
    text, reasoning, calls = [], [], []
    for delta in [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish():
        match delta:
            case TextDelta(piece):
                text.append(piece)
            case ReasoningDelta(piece):
                reasoning.append(piece)
            case ToolStart(index, call_id, name):
                assert (index, call_id) == (len(calls), str(index))
                calls.append([name, ""])
            case ArgumentsDelta(index, piece):
                assert index == len(calls) - 1
                calls[-1][1] += piece
    return "".join(text), "".join(reasoning), [tuple(call) for call in calls]


def cut_everywhere(text):
    yield [text]
    yield list(text)
    yield from ([text[:place], text[place:]] for place in range(len(text) + 1))


def decoded(calls):
    return [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize("form, answer", [*TWO_CALLS.items(), *VARIANTS.items()])
def test_two_calls_behind_a_text_are_found_however_the_text_is_cut(form, answer):
    for pieces in cut_everywhere(answer):
        text, reasoning, calls = parse(pieces, form)
        assert (text, reasoning) == ("Let me see.", "")
        assert decoded(calls) == [("get_weather", PARIS), ("now", {})]


@pytest.mark.parametrize("name", BARE)
def test_a_call_that_is_the_whole_answer_is_found_however_it_is_cut(name):
    for pieces in cut_everywhere(BARE[name]):
        text, _, calls = parse(pieces, "json")
        assert (text, decoded(calls)) == ("", [("get_weather", PARIS)])


def test_several_bare_calls_stand_behind_semicolons():
    one, two = '{"name": "now", "parameters": {}}', '{"name": "get_weather", "parameters": {"city": "a"}}'
    for pieces in cut_everywhere(f"{one}; {two}"):
        assert [name for name, _ in parse(pieces, "json")[2]] == ["now", "get_weather"]


MALFORMED = [
    ("hermes", "a <tool_call>\nnothing here</tool_call> b"),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
    ("hermes", '<tool_call>{"nam'),
    ("hermes", "less < than <tool_ <tool_cal"),
    ("glm", "<tool_call>two words</tool_call>"),
    ("glm", "<tool_call>now<arg_key>a</arg_key>"),
    ("xml", "<tool_call>\n<function=now>\n<parameter=a>\n5"),
    ("mistral", "[TOOL_CALLS] maybe later"),
    ("mistral", "[TOOL_CALLS] []"),
    ("deepseek", "<｜tool▁calls▁begin｜>no"),
    ("json", '{"name": "unknown_tool", "parameters": {}}'),
    ("json", '{"answer": {"name": "now"}}'),
    ("json", "```json\n[1, 2]\n```"),
    ("json", " Hello"),
    ("harmony", "<|channel|>commentary to=functions.now<|mess"),
    (None, '<tool_call>{"name": "now", "arguments": {}}</tool_call>'),
]


@pytest.mark.parametrize("form, answer", MALFORMED)
def test_what_is_no_call_is_text_and_nothing_of_it_is_lost(form, answer):
    for pieces in cut_everywhere(answer):
        assert parse(pieces, form) == (answer, "", [])


def test_a_good_call_behind_a_malformed_one_is_found():
    text, _, calls = parse(['<tool_call>oops<tool_call>{"name": "now", "arguments": {}}</tool_call> ok'], "hermes")
    assert (text, calls) == ("<tool_call>oopsok", [("now", "{}")])


def test_arguments_stream_as_they_come_and_an_answer_cut_short_keeps_what_there_was():
    parser = ToolParser("hermes", tools=TOOLS)
    parser.feed('<tool_call>{"name": "get_weather", "arguments": {"city": ')
    assert parser.feed('"Par') == [ArgumentsDelta(0, '"Par')]
    assert parser.finish() == []


PIECES = ["<tool_call>", "</tool_call>", "{", "}", '"name"', ":", '"now"', ",", '"arguments"', " ", "\n", "x", "\\",
          "<",
          "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
          "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<|channel|>", "<|message|>", "<|end|>",
          "<function=", ">", "now", "<|python_tag|>", "to=functions.", ";", "[", "]", "```json"]  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(
    form=st.sampled_from([*TWO_CALLS, "json", None]),
    pieces=st.lists(st.sampled_from(PIECES), max_size=14),
    thinks=st.booleans(),
    cuts=st.lists(st.integers(0, 80), max_size=4),
)
def test_any_text_reads_alike_in_one_piece_and_in_several(form, pieces, thinks, cuts):
    text = "".join(pieces)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    cut = [text[a:b] for a, b in itertools.pairwise(places)]
    whole = parse([text], form, thinks=thinks)
    assert parse(cut, form, thinks=thinks) == whole
    assert parse(list(text), form, thinks=thinks) == whole


def test_reasoning_is_told_apart_wherever_it_was_opened():
    answer = "So, 2 < 3 </thin.\n</think>\n\nYes."
    for pieces in cut_everywhere(f"<think>\n{answer}"):
        assert parse(pieces, "hermes", thinks=True) == ("Yes.", "So, 2 < 3 </thin.", [])
    for pieces in cut_everywhere(answer):
        assert parse(pieces, "hermes", thinks=True, inside_thought=True) == ("Yes.", "So, 2 < 3 </thin.", [])
    assert parse(["<think>cut short"], None, thinks=True) == ("", "cut short", [])
    assert parse(["No <think>thought</think>"], None, thinks=True) == ("No <think>thought</think>", "", [])
    assert parse(["<think>a</think>b"], None) == ("<think>a</think>b", "", [])


def test_harmonys_channels_are_reasoning_and_text():
    answer = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    for pieces in cut_everywhere(answer):
        assert parse(pieces, "harmony") == ("Yes.", "Hm.", [])


def test_the_templates_tell_the_format():
    told = {name: format_of(template) for name, template in TEMPLATES.items()}
    assert told["qwen2.5"] == "hermes"
    assert told["mistral"] == "mistral"
    assert told["deepseek"] == "deepseek"
    assert told["llama3"] == told["chatml"] == "json"
    assert format_of(None) == "json"


SPECIAL = {
    "mistral": ["[TOOL_CALLS]", "[ARGS]"],
    "deepseek": ["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
                 "<｜tool▁sep｜>"],
    "harmony": ["<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|start|>", "<|call|>"],
    "hermes": ["<think>"],
}  # fmt: skip
SHOWN = {  # the marks by which templates show the format
    "hermes": "<tool_call>",
    "hermes that thinks": "<tool_call> <think>",
    "mistral": "[TOOL_CALLS]",
    "mistral since 2025": "[TOOL_CALLS] [ARGS]",
    "deepseek": "<｜tool▁call▁begin｜> ```json",
    "deepseek since 2025": "<｜tool▁call▁begin｜>",
    "glm": "<tool_call> <arg_key>",
    "xml": "<tool_call> <function=",
    "harmony": "<|channel|>",
    "json": "{{ tools }}",
}


def tokenizer_with(template, special=()):
    tokenizer = byte_tokenizer(special)
    tokenizer.chat_templates = {"default": template}
    return tokenizer


def drawn(tokenizer, spec, parser, seed):
    """The deltas of an answer drawn at random under the constraint, or None for one that grew long. At times a mark
    that may end a text is written as a whole."""
    constraint, draw = compile_constraint(spec, tokenizer), np.random.default_rng(seed)
    stream, deltas, planned = TextStream(tokenizer, keep=parser.marks), [], []
    closing = [[i] for i in (*b'"}],', *range(256, tokenizer.vocab_size))]
    closing += [list(mark.encode()) for mark in ("</arg_value>", "\n</parameter>", "</think>")]
    for _ in range(1500):
        mask = constraint.allowed()
        if mask[tokenizer.eos_id]:
            return deltas + parser.feed(stream.flush()) + parser.finish()
        if not planned and draw.random() < 0.6:
            planned = list(closing[draw.integers(len(closing))])
        if planned and not mask[planned[0]]:
            planned = []
        token = planned.pop(0) if planned else int(draw.choice(np.flatnonzero(mask)))
        constraint.advance(token)
        deltas += parser.feed(stream.push(token))
    return None


def calls_of(deltas):
    assert not [delta for delta in deltas if isinstance(delta, TextDelta)], deltas
    names = [delta.name for delta in deltas if isinstance(delta, ToolStart)]
    pieces = [delta for delta in deltas if isinstance(delta, ArgumentsDelta)]
    return [(name, "".join(p.text for p in pieces if p.index == i)) for i, name in enumerate(names)]


@pytest.mark.parametrize("name", SHOWN)
def test_an_answer_under_a_required_choice_is_calls_whose_arguments_obey_their_schema(name):
    tokenizer = tokenizer_with(SHOWN[name], SPECIAL.get(name.split()[0], ()))
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    spec = constraint_for(tokenizer, TOOLS, "required")
    seen = set()
    for seed in range(12):
        deltas = drawn(tokenizer, spec, parser_for(tokenizer, tools=TOOLS), seed)
        for called, arguments in calls_of(deltas or []):
            jsonschema.validate(json.loads(arguments), schemas[called])
            seen.add(called)
    assert seen == set(schemas)


@pytest.mark.parametrize("name", SHOWN)
def test_an_answer_under_a_named_choice_is_one_call_of_it(name):
    tokenizer = tokenizer_with(SHOWN[name], SPECIAL.get(name.split()[0], ()))
    choice = {"type": "function", "function": {"name": "now"}}
    spec = constraint_for(tokenizer, TOOLS, choice, parallel=False)
    answers = [drawn(tokenizer, spec, parser_for(tokenizer, tools=TOOLS), seed) for seed in range(3)]
    assert [calls_of(deltas)[0][0] for deltas in answers if deltas is not None].count("now") >= 2


def test_choices_that_force_nothing_have_no_constraint_and_wrong_ones_are_refused():
    tokenizer = tokenizer_with("<tool_call>")
    assert [constraint_for(tokenizer, TOOLS, choice) for choice in (None, "none", "auto")] == [None] * 3
    with pytest.raises(ValueError, match="none of the tools"):
        constraint_for(tokenizer, TOOLS, {"type": "function", "function": {"name": "fly"}})
    with pytest.raises(ValueError, match="must be none, auto"):
        constraint_for(tokenizer, TOOLS, "always")
    with pytest.raises(ValueError, match="there are no tools"):
        constraint_for(tokenizer, [], "required")
    bad = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}]
    with pytest.raises(ValueError, match="Unimplemented keys"):
        compile_constraint(constraint_for(tokenizer, bad, "required"), tokenizer)


PUBLISHED = [
    "qwen2_5",
    "qwen3",
    "qwen3_vl",
    "glm4moe",
    "qwen3_6",
    "nemotron_3_nano",
    "deepseekv3",
    "gptoss",
    "llama3_1",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_what_a_published_template_shows_of_a_call_reads_as_that_call(name):
    template = (unpacked_wheel("trl==1.16.0") / "trl" / "chat_templates" / f"{name}.jinja").read_text()
    tokenizer = tokenizer_with(template)
    question = {"role": "user", "content": "How is the weather?"}
    arguments = ARGUMENTS if name.startswith("deepseek") else PARIS  # what its template expects
    call = {"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    prompt = tokenizer.render_chat([question], tools=TOOLS, add_generation_prompt=True)
    whole = tokenizer.render_chat([question, answer], tools=TOOLS)
    shared = next(
        i for i, (a, b) in enumerate(zip(prompt, whole + "\0", strict=False)) if a != b or i == len(prompt) - 1
    )
    shown = whole[shared + 1 :] if prompt == whole[: len(prompt)] else whole[shared:]
    parser = parser_for(tokenizer, tools=TOOLS)
    deltas = parser.feed(shown) + parser.finish()
    names = [delta.name for delta in deltas if isinstance(delta, ToolStart)]
    arguments = "".join(delta.text for delta in deltas if isinstance(delta, ArgumentsDelta))
    assert (names, json.loads(arguments)) == (["get_weather"], PARIS), shown
