"""A conversation: its history, its commands, its end, and what the terminal shows of it."""

import io
import sys

import jax
import pytest
from tiny import LLAMA, random_params

import jaxformers.chat as chat_module
from jaxformers.api import Model
from jaxformers.chat import Conversation, converse
from jaxformers.data.tokenizer import TextStream, Tokenizer, byte_tokenizer
from jaxformers.families import read_config
from jaxformers.generation import Piece
from jaxformers.parallel.mesh import single_device_mesh

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def with_template(template):
    base = byte_tokenizer()
    files = dict(base._files)
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    return Tokenizer(files, origin="test")


@pytest.fixture(scope="module")
def model():
    config = read_config(LLAMA | {"max_position_embeddings": 128})
    params = jax.tree.map(jax.numpy.asarray, random_params(config))
    return Model(config, params, with_template(TEMPLATE), single_device_mesh())


@pytest.fixture
def scripted(monkeypatch):
    """A model that answers with given texts; what it is asked is kept."""
    asked = []

    def stream(model, prompts, **settings):
        asked.append((model.tokenizer.decode(prompts[0]), settings))
        words = f"answer {len(asked)} 😀"
        return (Piece(0, character, None) for character in words)

    monkeypatch.setattr(chat_module, "stream", stream)
    return asked


def held(model, text, monkeypatch, **options):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    converse(Conversation(model, **options))


def test_a_real_model_answers_in_pieces_and_remembers_what_it_said(model):
    conversation = Conversation(model, max_new_tokens=12, temperature=1.0, seed=3)
    pieces = list(conversation.answer("hi"))
    assert conversation.messages == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "".join(pieces)},
    ]
    again = Conversation(model, max_new_tokens=12, temperature=1.0, seed=3)
    assert "".join(again.answer("hi")) == "".join(pieces)


def test_each_turn_is_asked_with_all_turns_before_it(model, scripted, monkeypatch, capsys):
    held(model, "one\n\ntwo\n", monkeypatch, system="be kind")
    first = "[system]be kind[user]one[assistant]"
    assert [prompt for prompt, _ in scripted] == [first, f"{first}answer 1 😀[user]two[assistant]"]
    assert capsys.readouterr().out == "answer 1 😀\nanswer 2 😀\n"


def test_reset_forgets_all_but_the_system_prompt(model, scripted, monkeypatch):
    held(model, "one\n/reset\ntwo\n", monkeypatch, system="be kind")
    assert scripted[1][0] == "[system]be kind[user]two[assistant]"


def test_exit_ends_it_and_help_lists_the_commands(model, scripted, monkeypatch, capsys):
    held(model, "/help\n/exit\nnever\n", monkeypatch)
    assert scripted == []
    assert capsys.readouterr().out.split()[0] == "/reset"


def test_an_unknown_command_is_refused_but_a_path_is_a_turn(model, scripted, monkeypatch):
    held(model, "/usr/bin is what?\n", monkeypatch)
    assert scripted[0][0] == "[user]/usr/bin is what?[assistant]"
    with pytest.raises(ValueError, match=r"/rest is no command; there are /reset, /help, /exit"):
        held(model, "/rest\n", monkeypatch)


def test_an_answer_has_the_room_that_the_context_leaves(model, scripted, monkeypatch):
    held(model, "a" * 80 + "\n", monkeypatch)
    prompt, settings = scripted[0]
    assert settings["max_new_tokens"] == 128 - len(prompt)


def test_a_conversation_that_outgrows_the_context_is_told_and_stays_as_it_was(model, scripted, monkeypatch):
    conversation = Conversation(model)
    list(conversation.answer("short"))
    before = list(conversation.messages)
    with pytest.raises(ValueError, match=r"has grown to \d+ tokens, which leaves no room .* context of 128; /reset"):
        conversation.answer("long" * 40)
    assert conversation.messages == before


def test_at_a_terminal_an_error_is_told_and_the_conversation_goes_on(model, scripted, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    turns = iter(["x" * 200, "/nothing", "fine"])

    def ask(prompt):
        try:
            return next(turns)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", ask)
    converse(Conversation(model))
    shown = capsys.readouterr()
    assert "leaves no room" in shown.err
    assert "/nothing is no command" in shown.err
    assert shown.out == "answer 1 😀\n\n"


@pytest.mark.parametrize(
    "tokenizer, told",
    [(None, "no tokenizer"), (with_template(None), "no chat template")],
)
def test_a_model_that_cannot_converse_says_so(tokenizer, told, model):
    mute = Model(model.config, model.params, tokenizer, model.mesh)
    with pytest.raises(ValueError, match=told):
        Conversation(mute)


def test_settings_are_refused_before_the_first_turn(model):
    with pytest.raises(ValueError, match="seed is -1"):
        Conversation(model, seed=-1)


def test_characters_of_many_bytes_are_never_shown_in_halves():
    tokenizer = byte_tokenizer()
    text = "é ß 你好，世界 👩‍🚀🇨🇭 ｆｕｌｌ ☃️ 𝔘"
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in text.encode()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
