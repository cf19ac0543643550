"""Conversations: every form of record as the same messages, bad ones named, and the tokens to learn against
`transformers`' own masks and expectations written out."""

import json
import re

import numpy as np
import pytest
import transformers
from data.templates import TEMPLATES
from wheels import unpacked_wheel

from jaxformers.data.chat import ChatTemplateError, has_marks, render_marked
from jaxformers.data.chat_templates import BUILT_IN
from jaxformers.data.config import ChatConfig
from jaxformers.data.conversations import ROLES, Conversation, ConversationError, conversation_of
from jaxformers.data.dialogues import encode_dialogues, learned_tokens
from jaxformers.data.tokenizer import EOS, Tokenizer, byte_tokenizer
from jaxformers.data.turns import Writer

USER, ANSWER = {"role": "user", "content": "What is 2 < 3? 你好 😀"}, {"role": "assistant", "content": "True. 😀"}
AGAIN, LAST = {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Quite sure."}
TWO_TURNS = [USER, ANSWER, AGAIN, LAST]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "sky", "arguments": {"city": "Zürich"}}}],
}
RESULT = {"role": "tool", "content": "clear"}
TOOLS = [{"type": "function", "function": {"name": "sky", "parameters": {"type": "object", "properties": {}}}}]
MARKERS = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|eot_id|>", "<|user|>")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_tokenizer(MARKERS).with_chat_template(TEMPLATES["qwen2.5"])


@pytest.fixture(scope="module")
def reference(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def read(record, **chat) -> Conversation:
    return conversation_of(record, ChatConfig(format=chat.pop("format", "auto"), **chat))


def learned(tokenizer: Tokenizer, messages, *, tools=None, **chat) -> list[str]:
    """The texts that are learned of a conversation, one for each run of tokens."""
    config = ChatConfig(format="auto", **chat)
    written = Writer(tokenizer, config).write(conversation_of({"messages": messages, "tools": tools}, config))
    ((ids, mask),) = encode_dialogues([written], tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=False) == written.text
    cuts = np.flatnonzero(np.diff(mask.astype(int))) + 1
    runs = zip(np.split(np.array(ids), cuts), np.split(mask, cuts), strict=True)
    return [tokenizer.decode(part, skip_special_tokens=False) for part, wanted in runs if wanted[0]]


# -- forms of records

TURNS = [("user", "Hi"), ("assistant", "Ho"), ("user", "Why?"), ("assistant", "So.")]
OPENAI = [{"role": role, "content": text} for role, text in TURNS]
FORMS = {
    "messages": {"messages": OPENAI},
    "messages in parts": {
        "messages": [{**m, "content": [{"type": "text", "text": part} for part in m["content"]]} for m in OPENAI]
    },
    "messages as JSON, as in CSV": {"messages": json.dumps(OPENAI)},
    "a list": OPENAI,
    "sharegpt": {
        "conversations": [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in TURNS]
    },
    "alpaca": {"instruction": "Why?", "input": "", "output": "So.", "history": [["Hi", "Ho"]]},
    "prompt and completion": {"prompt": OPENAI[:3], "completion": OPENAI[3:]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_record_is_the_same_conversation(form):
    found = read(FORMS[form])
    assert found.messages == tuple(OPENAI)
    assert found.given == ({1} if form == "prompt and completion" else set())
    assert dict(zip(ROLES, found.turns, strict=True)) == {
        "system": 0,
        "developer": 0,
        "user": 2,
        "assistant": 2,
        "tool": 0,
    }


def test_a_system_prompt_an_input_and_names_of_ones_own_are_understood():
    record = {"instruction": "Add.", "input": "1, 2", "output": "3", "system": "Be brief."}
    assert [m["content"] for m in read(record).messages] == ["Be brief.", "Add.\n\n1, 2", "3"]
    fields = {"prompt": "question", "completion": "answer"}
    assert read({"question": "a", "answer": "b"}, fields=fields) == read({"prompt": "a", "completion": "b"})
    bots = {"messages": [{"speaker": "me", "says": "a"}, {"speaker": "bot", "says": "b"}]}
    said = read(bots, fields={"role": "speaker", "content": "says"}, roles={"me": "user", "bot": "assistant"})
    assert said == read({"prompt": "a", "completion": "b"})
    assert read("raw") == read({"text": "raw"}) == "raw"


def test_calls_of_functions_have_objects_as_arguments_in_whatever_form_they_come():
    openai = {**CALL, "tool_calls": [{"id": "x", "function": {"name": "sky", "arguments": '{"city": "Zürich"}'}}]}
    shared = {"from": "function_call", "value": '{"name": "sky", "arguments": {"city": "Zürich"}}'}
    for message in (CALL, openai, shared):
        (_, call, result, _) = read([USER, message, {"role": "function", "content": "clear"}, LAST]).messages
        assert (call["role"], call["content"], result) == ("assistant", "", RESULT)
        assert call["tool_calls"][0]["function"] == {"name": "sky", "arguments": {"city": "Zürich"}}


BAD = {
    "no fields 'messages' or 'conversations' or 'prompt' and 'completion' or 'instruction' and 'output' or 'text'": {
        "question": 1
    },
    "turn 2 has the unknown role 'robot'; known are system, developer,": [USER, {"role": "robot", "content": "x"}],
    "turn 2 (assistant) is empty": [USER, {"role": "assistant", "content": " \n"}],
    "turn 1 (user) is empty": [{"role": "user", "content": None}, ANSWER],
    "no turn of the assistant to learn": [USER],
    "no turns at all": [],
    "turn 1 has a part that is no text (image_url)": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER],
    "turn 1 is of type str, not a mapping with role and content": ["Hi", "Ho"],
    "turn 1 has weight 0.5; a turn's weight is 0 or 1": [{**ANSWER, "weight": 0.5}],
    "turn 2 calls a function without a name": [USER, {**CALL, "tool_calls": [{}]}],
    "something that is not Unicode text": [{"role": "user", "content": "\ud800"}, ANSWER],
    "a record of type int, not of fields": 3,
    "field 'messages' is of type int, not a list": {"messages": 3},
    "field 'tools' is not a list of JSON Schemas": {"messages": [USER, ANSWER], "tools": ["x"]},
}


@pytest.mark.parametrize("reason", BAD)
def test_what_is_no_conversation_is_refused_with_the_reason(reason):
    with pytest.raises(ConversationError) as refused:
        read(BAD[reason])
    assert str(refused.value).startswith(reason)


# -- what is learned


def marked(template: str) -> str:
    """The template of chatml with marks around what the model writes."""
    body = "{{ message['content'] + '<|im_end|>' }}"
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        f"{{% if message['role'] == 'assistant' %}}{{% generation %}}{body}{{% endgeneration %}}"
        f"{{% else %}}{body}{{% endif %}}{{{{ '\\n' }}}}{{% endfor %}}" + template
    )


MARKED = {"chatml": marked(""), "command-r": TEMPLATES["command-r"], **BUILT_IN}


@pytest.mark.parametrize("name", MARKED)
def test_marked_tokens_are_those_of_transformers(name, tokenizer, reference):
    """`transformers` leaves out the last bytes of a mark that ends in a character of several, so marks end in none."""
    messages = [USER, {**ANSWER, "content": "😀 is True."}, AGAIN, LAST]
    truth = reference.apply_chat_template(
        messages, chat_template=MARKED[name], return_assistant_tokens_mask=True, return_dict=True
    )
    config = ChatConfig(format="messages")
    written = Writer(tokenizer.with_chat_template(MARKED[name]), config).write(conversation_of(messages, config))
    ((ids, mask),) = encode_dialogues([written], tokenizer)
    assert ids == truth["input_ids"]
    assert mask.astype(int).tolist() == truth["assistant_masks"]
    assert 0 < mask.sum() < len(mask)


SPANS = {  # what the model is to write after each prompt, its end-of-turn token included
    "chatml": ["True. 😀<|im_end|>", "Quite sure.<|im_end|>"],
    "qwen2.5": ["True. 😀<|im_end|>", "Quite sure.<|im_end|>"],
    "llama2": [f" True. 😀 {EOS}", f" Quite sure. {EOS}"],
    "llama3": ["True. 😀<|eot_id|>", "Quite sure.<|eot_id|>"],
    "gemma": ["True. 😀<end_of_turn>", "Quite sure.<end_of_turn>"],
    "gemma3": ["True. 😀<end_of_turn>", "Quite sure.<end_of_turn>"],
    "phi3": ["True. 😀<|end|>", f"Quite sure.<|end|>\n{EOS}"],
    "zephyr": [f"True. 😀{EOS}", f"Quite sure.{EOS}"],
    "qwen3": ["True. 😀<|im_end|>", "<think>\n\n</think>\n\nQuite sure.<|im_end|>"],
    "olmo": [f"True. 😀{EOS}", f"Quite sure.{EOS}"],
}


@pytest.mark.parametrize("name", SPANS)
def test_without_marks_what_follows_each_prompt_is_learned(name, tokenizer):
    assert learned(tokenizer.with_chat_template(TEMPLATES[name]), TWO_TURNS) == SPANS[name]


@pytest.mark.parametrize("name", ["chatml", "marked"])
def test_the_last_turn_or_everything_may_be_learned_and_turns_of_weight_0_are_not(name, tokenizer):
    ours = tokenizer.with_chat_template(TEMPLATES["chatml"] if name == "chatml" else MARKED["chatml"])
    assert learned(ours, TWO_TURNS, learn="last") == ["Quite sure.<|im_end|>"]
    assert learned(ours, TWO_TURNS, learn="all") == [ours.render_chat(TWO_TURNS)]
    assert learned(ours, [USER, {**ANSWER, "weight": 0}, AGAIN, LAST]) == ["Quite sure.<|im_end|>"]


def test_marks_side_by_side_are_one_turn_and_others_must_be_as_many_as_turns(tokenizer):
    say = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    twice = tokenizer.with_chat_template(say + "{% generation %}|{% endgeneration %}{% endif %}.{% endfor %}")
    assert learned(twice, TWO_TURNS, learn="last") == ["Quite sure.|"]
    apart = tokenizer.with_chat_template(say + "-{% generation %}|{% endgeneration %}{% endif %}.{% endfor %}")
    assert learned(apart, TWO_TURNS) == ["True. 😀", "|", "Quite sure.", "|"]
    with pytest.raises(ConversationError, match="marks 4 texts for 2 turns of the assistant"):
        learned(apart, TWO_TURNS, learn="last")
    with pytest.raises(ConversationError, match="marks nothing"):
        learned(tokenizer.with_chat_template("{% generation %}{% endgeneration %}{{ messages }}"), TWO_TURNS)


def test_a_template_that_joins_arguments_to_its_text_gets_them_as_json(tokenizer):
    joining = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ '@' + c.function.arguments }}{% endfor %}"
    )
    ours = tokenizer.with_chat_template(joining + "<|im_end|>{% endfor %}")
    assert learned(ours, [USER, CALL, RESULT, LAST]) == ['@{"city": "Zürich"}<|im_end|>', "Quite sure.<|im_end|>"]


@pytest.mark.slow
def test_published_templates_without_their_marks_learn_what_they_mark():
    """But for a header that a prompt already holds, and the line behind the end of a turn."""
    thoughtful = [USER, {**ANSWER, "reasoning_content": "hm"}, AGAIN, {**LAST, "reasoning_content": "aha"}]
    compared = 0
    for file in sorted((unpacked_wheel("trl==1.16.0") / "trl" / "chat_templates").glob("*.jinja")):
        template = file.read_text(encoding="utf-8")
        # One takes no text, only lists of parts; one prompts for an answer without the thoughts that it then renders.
        if not has_marks(template) or "llava" in file.name or "nothink" in file.name:
            continue
        bare = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
        bare = re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", bare)
        specials = tuple(
            sorted(set(re.findall(r"<\|[^|>\n]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|<turn\|>", template)))
        )
        tokenizer = byte_tokenizer(specials)
        for messages in (TWO_TURNS, thoughtful):
            config = ChatConfig(format="messages")
            conversation = conversation_of(messages, config)
            by_marks, by_prompts = (
                Writer(tokenizer.with_chat_template(each), config).write(conversation) for each in (template, bare)
            )
            assert by_marks.text == by_prompts.text, file
            for (first, last), (start, stop) in zip(by_marks.learned, by_prompts.learned, strict=True):
                assert first <= start < stop <= last, file
                assert not by_marks.text[stop:last].strip(), file
                compared += 1
    assert compared > 80


def test_calls_of_tools_are_learned_and_their_results_are_not(tokenizer):
    called = '<tool_call>\n{"name": "sky", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>'
    found = learned(tokenizer, [USER, CALL, RESULT, LAST], tools=TOOLS)
    assert found == ["\n" + called, "Quite sure.<|im_end|>"] or found == [called, "Quite sure.<|im_end|>"]


def test_a_turn_that_loses_its_thoughts_once_others_follow_is_learned_as_it_then_reads(tokenizer):
    ours = tokenizer.with_chat_template(TEMPLATES["qwen3"])
    thoughtful = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTrue."}
    found = learned(ours, [USER, thoughtful, AGAIN, {**LAST, "reasoning_content": "Sure of it."}])
    assert found == ["True.<|im_end|>", "<think>\nSure of it.\n</think>\n\nQuite sure.<|im_end|>"]


def test_a_template_that_hides_where_a_turn_lies_is_refused(tokenizer):
    backwards = "{% for m in messages | reverse %}{{ m.content }}{% endfor %}"
    counted = (
        "{{ messages | map(attribute='content') | join | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert learned(tokenizer.with_chat_template(backwards), [USER, ANSWER]) == ["True. 😀"]
    with pytest.raises(ConversationError, match="rewrites turn 2, so which tokens are the model's cannot be told"):
        learned(tokenizer.with_chat_template(counted), TWO_TURNS)


def test_a_template_that_works_on_its_marks_is_refused():
    trimmed = "{% set x %}{% generation %} a {% endgeneration %}{% endset %}{{ x | trim }}"
    with pytest.raises(ChatTemplateError, match="changes what is between its generation marks"):
        render_marked(trimmed, [USER])


def test_a_token_is_learned_if_a_character_of_it_is():
    places = np.array([[0, 2], [2, 5], [5, 6], [5, 6], [6, 6], [9, 9], [9, 12]])
    assert learned_tokens(places, ((4, 6),)).tolist() == [False, True, True, True, False, False, False]
    # A token of spaces [6, 9) that comes out as no characters.
    assert learned_tokens(places, ((6, 9),)).tolist() == [False, False, False, False, False, True, False]
    assert learned_tokens(places, ((9, 12),)).tolist() == [False, False, False, False, False, False, True]
