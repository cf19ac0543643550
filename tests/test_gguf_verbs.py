"""Every verb takes a .gguf file, and tells what is wrong with one in one line."""

import json

import pytest
import transformers
from hub.gguf_files import random_model, write_gguf

from jaxformers.data.tokenizer import byte_tokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A tiny Llama with a byte tokenizer and a chat template."""
    tokens = [token for token, _ in sorted(byte_tokenizer()._text.get_vocab().items(), key=lambda item: item[1])]

    def extra(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([1] * 256 + [3] * 3)
        writer.add_bos_token_id(256)
        writer.add_eos_token_id(257)
        writer.add_chat_template(TEMPLATE)

    model = random_model("llama")
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "llama", model, kind="Q8_0", extra=extra)


def test_inspect_shows_the_model_the_tokenizer_and_the_types(path, command):
    status, out, _ = command("inspect", path)
    assert status == 0
    shown = dict(line.split(None, 1) for line in out.splitlines())
    assert "15 Q8_0" in shown["weights"] or "16 Q8_0" in shown["weights"]
    assert "259 ids" in shown["tokenizer"]


def test_generate_continues_a_text(path, command):
    status, out, _ = command("generate", path, "abc", "--max-new-tokens", "3")
    assert status == 0
    assert out.startswith("abc")


def test_convert_writes_a_directory_that_transformers_opens(path, tmp_path, command):
    status, _, _ = command("convert", path, tmp_path / "hf")
    assert status == 0
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.vocab_size == 320
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.encode("é") == list("é".encode())
    assert tokenizer.eos_token_id == 257
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == {
        "bos_token_id": 256,
        "eos_token_id": 257,
    }


def test_what_is_wrong_with_a_file_is_one_line(path, tmp_path, command):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:-1000])
    for verb in (["generate", cut, "x"], ["chat", cut], ["inspect", cut], ["convert", cut, tmp_path / "hf"]):
        status, out, err = command(*verb)
        assert (status, out) == (2, "")
        assert "is truncated" in err
        assert len(err.splitlines()) == 1


def test_it_is_compared_and_averaged_under_hugging_face_names(path, tmp_path, command):
    command("convert", path, tmp_path / "hf")
    status, out, _ = command("checkpoint", "diff", path, tmp_path / "hf")
    assert (status, out.split(", ")[1]) == (0, "0 different (relative distance up to 0)")
    mean = tmp_path / "mean"
    assert command("checkpoint", "average", path, tmp_path / "hf", "--output", mean)[0] == 0
    status, out, err = command("checkpoint", "diff", path, mean, "--tolerance", "1e-6")
    assert (status, err) == (0, ""), out
