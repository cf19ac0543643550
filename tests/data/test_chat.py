"""Chat templates render as `transformers` renders them, within bounds that no template escapes."""

import json
import time

import pytest
import transformers
from data.templates import TEMPLATES
from wheels import unpacked_wheel

from jaxformers.data import chat
from jaxformers.data.chat import ChatTemplateError, render_chat
from jaxformers.data.tokenizer import BOS, EOS, PAD, byte_tokenizer, load_tokenizer

USER = {"role": "user", "content": 'What is 2 < 3 & "4"? 你好 😀'}
ANSWER = {"role": "assistant", "content": "  Yes, it's true.\n"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "abcdef123",
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}},
        }
    ],
}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdef123", "content": '{"sky": "clear", "°C": 21.5}'}
CONVERSATIONS = {
    "one turn": [USER],
    "two turns": [USER, ANSWER, {"role": "user", "content": "Why?"}],
    "a system prompt": [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER],
    "a tool call": [USER, CALL, RESULT],
    "an answer from a tool": [USER, CALL, RESULT, ANSWER, USER],
    "reasoning": [USER, {**ANSWER, "reasoning_content": "Let me think."}, USER],
    "thoughts in the text": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}, USER],
    "roles out of order": [ANSWER, USER, USER],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]}],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city, in °C",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Its name"},
                    "days": {"type": "integer", "enum": [1, 2]},
                },
                "required": ["city"],
            },
        },
    }
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save(path)
    return path


@pytest.fixture(scope="module")
def reference(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def assert_rendered_alike(template, messages, tools, prompt, reference, **variables):
    """Equal texts; or both refuse."""
    try:
        truth = reference.apply_chat_template(
            messages, chat_template=template, tools=tools, add_generation_prompt=prompt, tokenize=False, **variables
        )
    except Exception as error:
        truth = error
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    options = {"tools": tools, "add_generation_prompt": prompt, **named, **variables}
    if isinstance(truth, Exception):
        with pytest.raises(ChatTemplateError):
            render_chat(template, messages, **options)
    else:
        assert render_chat(template, messages, **options) == truth


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "no prompt"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_in_transformers(name, conversation, tools, prompt, reference):
    assert_rendered_alike(TEMPLATES[name], CONVERSATIONS[conversation], tools, prompt, reference)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_renders_a_plain_conversation(name):
    text = render_chat(TEMPLATES[name], [USER], add_generation_prompt=True, bos_token=BOS, eos_token=EOS)
    assert USER["content"] in text


@pytest.mark.slow
def test_published_templates_render_as_in_transformers(reference):
    files = sorted((unpacked_wheel("trl==1.16.0") / "trl" / "chat_templates").glob("*.jinja"))
    assert len(files) > 60
    for file in files:
        template = file.read_text(encoding="utf-8")
        for conversation in CONVERSATIONS.values():
            for tools in (None, TOOLS):
                for prompt in (True, False):
                    for variables in ({}, {"enable_thinking": False}):
                        assert_rendered_alike(template, conversation, tools, prompt, reference, **variables)


def test_the_caller_may_pass_what_the_template_reads():
    assert render_chat("{{ mood }} {{ messages|length }}", [USER], mood="calm") == "calm 1"


def test_a_conversation_is_not_changed_by_its_template():
    messages = [{"role": "user", "content": "a", "parts": [1]}]
    with pytest.raises(ChatTemplateError, match="unsafe"):
        render_chat("{{ messages[0].parts.append(2) }}", messages)
    assert messages == [{"role": "user", "content": "a", "parts": [1]}]


GROWING = "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}%s{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x }}"
HOSTILE = {
    "a loop of loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops over a list": "{% set r = range(9999)|list %}{% for i in r %}{% for j in r %}{% for k in r %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro that doubles": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a long text": "{{ 'a' * 10**10 }}",
    "a long list": "{{ ([1] * 10**10)|length }}",
    "much output": "{% set x = 'a' * 10**6 %}{% for i in range(1000) %}{{ x }}{% endfor %}",
    "a big number": "{{ 9**9**9 }}",
    "padding by a method": "{{ 'a'.center(10**10) }}",
    "padding by a filter": "{{ 'a'|center(10**10) }}",
    "indentation": "{{ messages|tojson(indent=10**10) }}",
    "a wide format": "{{ '%9999999999d'|format(1) }}",
    "a wide format by an operator": "{{ '%9999999999d' % 1 }}",
    "a wide format by an argument": "{{ '%*d' % (10**10, 1) }}",
    "a wide format by a method": "{{ '{:9999999999}'.format(1) }}",
    "replacing": "{% set x = 'a' * 10**6 %}{{ x|replace('a', x)|length }}",
    "replacing by a method": "{% set x = 'a' * 10**6 %}{{ x.replace('a', x)|length }}",
    "joining": "{{ ('a' * 10**5).join(['b'] * 10**6)|length }}",
    "doubling by ~": GROWING % ("'aa'", "", "ns.x ~ ns.x"),
    "doubling by +": GROWING % ("'aa'", "", "ns.x + ns.x"),
    "doubling by join": GROWING % ("'aa'", "", "[ns.x, ns.x]|join"),
    "doubling by a block": GROWING % ("'aa'", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}", "y"),
    "doubling lists": GROWING % ("[1]", "", "[ns.x, ns.x]"),
    "doubling lists in JSON": GROWING.replace("{{ ns.x }}", "{{ ns.x|tojson|length }}") % ("[1]", "", "[ns.x, ns.x]"),
    "doubling dicts": GROWING % ("{}", "", "{'a': ns.x, 'b': ns.x}"),
    "nonsense text": "{{ lipsum(n=10**6) }}",
    "Python's internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "Python's internals by a filter": "{{ (''|attr('__class__')).__mro__ }}",
    "Python's internals by a format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "a module": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "the environment": "{{ self._TemplateReference__context.environment }}",
    "a file": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}",
    "parentheses without end": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_in_one_line_and_soon(name):
    start = time.monotonic()
    with pytest.raises(ChatTemplateError) as caught:
        render_chat(HOSTILE[name], [USER])
    assert time.monotonic() - start < 2 * chat.MAX_SECONDS
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_only_looks_large_is_rendered(reference):
    template = (
        "{% set t = 1700000000 %}{{ t }} {{ t|tojson }} {{ t|string }} {{ '%s' % t }} {{ '%05.1f'|format(t) }} "
        "{{ '{}: {:>8}'.format(t, 'x') }} {{ x|default(t) }} {{ messages|tojson(indent=4) }} {{ t // 86400 }} "
        "{{ messages[0].content|replace('a', 'bb')|length }} {{ messages[0].content.replace('a', '')|length }} "
        "{{ ['a', 'b']|join(', ')|center(20) }} {{ 'a\tb'.expandtabs(8) }} {{ messages[0].content|indent(2)|length }}"
    )
    messages = [{"role": "user", "content": "a long text " * 20_000}]
    assert_rendered_alike(template, messages, None, False, reference)


def test_a_long_conversation_is_well_within_the_bounds():
    messages = [USER, ANSWER] * 2000
    assert render_chat(TEMPLATES["chatml"], messages).count("<|im_start|>") == 1 + 4000


@pytest.mark.parametrize(
    "template, messages, told",
    [
        (
            "{{ raise_exception('Roles must\nalternate') }}",
            [USER],
            "does not take this conversation: Roles must alternate",
        ),
        ("{% if %}", [USER], "malformed: line 1"),
        ("{{ messages[0].nothing.more }}", [USER], "does not take this conversation"),
        ("{{ 1 // 0 }}", [USER], "ZeroDivisionError"),
        ("x", [], "there is no message"),
        ("x", ["hello"], "a message must be a mapping with role and content, not str"),
        ("x", [{"role": "user", "content": object()}], "must be plain JSON data"),
    ],
)
def test_what_cannot_be_rendered_is_told_in_one_line(template, messages, told):
    with pytest.raises(ValueError, match=told.replace("(", r"\(")) as caught:
        render_chat(template, messages)
    assert "\n" not in str(caught.value)


class TestTemplatesOfATokenizer:
    def load(self, folder, tmp_path, config=None, **files):
        tokenizer = load_tokenizer(folder)
        tokenizer.save(tmp_path)
        if config is not None:
            path = tmp_path / "tokenizer_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": config}))
        for name, template in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.with_suffix(".jinja").write_text(template)
        return load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)

    def assert_alike(self, ours, theirs, **options):
        rendered = ours.render_chat([USER], **options)
        assert rendered == theirs.apply_chat_template([USER], tokenize=False, **options)
        return rendered

    def test_come_from_its_settings(self, folder, tmp_path):
        assert self.assert_alike(*self.load(folder, tmp_path, "{{ bos_token }}one")) == f"{BOS}one"

    def test_come_from_a_file_before_the_settings(self, folder, tmp_path):
        pair = self.load(folder, tmp_path, "settings", chat_template="a file")
        assert self.assert_alike(*pair) == "a file"

    def test_may_be_several_by_name_of_which_one_is_for_tools(self, folder, tmp_path):
        several = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
        pair = self.load(folder, tmp_path, several)
        assert self.assert_alike(*pair) == "plain"
        assert self.assert_alike(*pair, tools=TOOLS) == "tools"

    def test_may_be_several_files(self, folder, tmp_path):
        files = {"chat_template": "plain", "additional_chat_templates__tool_use": "tools"}
        pair = self.load(folder, tmp_path, **files)
        assert self.assert_alike(*pair, tools=TOOLS) == "tools"
        pair[0].save(tmp_path / "copy")
        assert load_tokenizer(tmp_path / "copy").chat_templates == {"default": "plain", "tool_use": "tools"}

    def test_may_be_missing_which_is_told(self, folder):
        with pytest.raises(ValueError, match="this model has no chat template"):
            load_tokenizer(folder).render_chat([USER])
