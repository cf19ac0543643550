"""A file of prompts is answered line by line, and a run that was killed goes on as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import pytest
from tiny import LLAMA, random_params

import jaxformers as jf
from jaxformers import batch
from jaxformers.api import Model
from jaxformers.data.tokenizer import byte_tokenizer
from jaxformers.families import read_config
from jaxformers.infer.engine import Engine
from jaxformers.parallel.mesh import single_device_mesh

BYTES = byte_tokenizer()
SETTINGS = {"max_new_tokens": 9, "temperature": 1.2, "seed": 3}


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model():
    cfg = read_config(LLAMA)
    return Model(cfg, jax.device_put(random_params(cfg)), BYTES, single_device_mesh())


@pytest.fixture
def files(tmp_path):
    return tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"


def write(path, *lines):
    path.write_text(
        "".join((line if isinstance(line, bytes) else json.dumps(line).encode()).decode() + "\n" for line in lines)
    )


def answers(path):
    """All lines by index; no two have the same."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    by_index = {line["index"]: line for line in lines}
    assert len(by_index) == len(lines)
    return [by_index[index] for index in sorted(by_index)]


def run(model, files, **settings):
    return batch.generate_file(model, *files, slots=4, **SETTINGS | settings)


PROMPTS = [f"prompt {i} " + "é" * (i % 5) for i in range(11)]


def test_every_prompt_gets_the_text_that_generate_gives_it(model, files):
    write(files[0], *PROMPTS[:5], *({"prompt": prompt, "id": f"n{i}"} for i, prompt in enumerate(PROMPTS[5:], start=5)))
    summary = run(model, files)
    found = answers(files[1])
    assert [line["text"] for line in found] == jf.generate(model, PROMPTS, **SETTINGS)
    assert [line["id"] for line in found] == [0, 1, 2, 3, 4, *(f"n{i}" for i in range(5, 11))]
    assert {line["finish_reason"] for line in found} <= {"stop", "length"}
    assert [line["prompt_tokens"] for line in found] == [1 + len(prompt.encode()) for prompt in PROMPTS]
    assert all(len(line["tokens"]) == 9 for line in found if line["finish_reason"] == "length")
    assert (summary.total, summary.earlier, summary.answered, summary.errors) == (11, 0, 11, 0)


def test_a_line_has_settings_of_its_own_and_may_be_ids(model, files):
    own = {"max_new_tokens": 4, "seed": 77, "top_k": 5, "repetition_penalty": 1.3}
    text = jf.generate(model, "a", **SETTINGS)
    write(
        files[0],
        "a",
        {"prompt": "abc"} | own,
        {"prompt": BYTES.encode("abc")} | own,
        {"prompt": "a", "seed": 3, "stop": text[2:4]},
    )
    run(model, files)
    found = [line["text"] for line in answers(files[1])]
    expected = jf.generate(model, "abc", **SETTINGS | own)
    assert found == [text, expected, expected, text[:2]]


def test_messages_are_read_by_the_chat_template(model, files):
    write(files[0], {"messages": [{"role": "user", "content": "hi"}]}, "a")
    summary = run(model, files)
    assert summary.first_error == "line 1: it has messages, but this model has no chat template"


BAD = [
    (b"{", "it is not JSON: Expecting property name"),
    (b"[1, 2]", "it is neither a JSON object nor a JSON string"),
    (b"[" * 100_000, "it is nested too deeply"),
    ({"prompt": "a", "temprature": 1}, "'temprature' is no key; the keys are prompt, messages, id, max_new_tokens"),
    ({"id": 4}, "it needs either a prompt or messages"),
    ({"prompt": "a", "messages": []}, "it needs either a prompt or messages"),
    ({"prompt": ["a"]}, "its prompt is neither a text nor a list of token ids"),
    ({"messages": [5]}, "its messages are no list of objects that have a role"),
    ({"prompt": [5, 300]}, "prompt has the id 300, but the model's ids are 0 to 299"),
    ({"prompt": [-1]}, "prompt has the id -1"),
    ({"prompt": [2**32]}, "prompt has the id 4294967296"),
    ({"prompt": [10**30]}, "prompt must be token ids"),
    ({"prompt": "a" * 60}, "together; this engine's max_length is 64"),
    ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"prompt": "a", "max_new_tokens": 2.5}, "max_new_tokens is 2.5; it must be an integer"),
    ({"prompt": "a", "temperature": "hot"}, "temperature is 'hot'"),
    ({"prompt": "a", "temperature": 10**400}, "temperature is 1000"),
    ({"prompt": "a", "top_k": 10**400}, "top_k is 1000"),
    ({"prompt": "a", "temperature": [0.5]}, "temperature is [0.5]; it must be a number"),
    ({"prompt": "a", "max_new_tokens": True}, "max_new_tokens is True; it must be a number"),
    ({"prompt": "a", "presence_penalty": "1"}, "presence_penalty is '1'; it must be a number"),
    ({"prompt": "a", "stop": {"a": 1}}, "stop is {'a': 1}; it must be a text, or several"),
    ({"prompt": "a", "stop": [""]}, "stop is"),
    ({"prompt": "\ud800", "id": "\ud801"}, ""),
]


def test_a_bad_line_is_told_of_and_ends_no_other(model, files):
    good = ["alpha", "beta"]
    write(files[0], good[0], *(line for line, _ in BAD), good[1])
    summary = run(model, files, seed=None, temperature=0.0)
    found = answers(files[1])
    assert [found[0]["text"], found[-1]["text"]] == jf.generate(model, good, max_new_tokens=9)
    for line, (_, told) in zip(found[1:-1], BAD, strict=True):
        assert told in line.get("error", "")
        assert "\n" not in line.get("error", "")
    assert [line["finish_reason"] for line in found[1:-2]] == ["error"] * (len(BAD) - 1)
    assert (found[3]["id"], found[5]["id"], found[-2]["id"]) == (3, 4, "\ud801")
    assert summary.first_error.startswith("line 2: it is not JSON")


def test_a_run_goes_on_behind_whole_lines_and_tries_errors_again(model, files):
    write(files[0], *PROMPTS)
    run(model, files)
    whole, text = answers(files[1]), files[1].read_bytes()
    lines = text.splitlines(keepends=True)
    error = json.dumps({"index": json.loads(lines[4])["index"], "error": "was bad", "request": "x"}).encode() + b"\n"
    files[1].write_bytes(b"".join(lines[:4]) + error + lines[5][:-7])
    summary = run(model, files)
    assert answers(files[1]) == whole
    assert files[1].read_bytes().startswith(b"".join(lines[:4]))
    assert (summary.earlier, summary.answered) == (4, 7)


def test_a_mark_at_the_beginning_is_no_part_of_the_first_line_and_no_prompts_have_no_answers(model, files):
    files[0].write_bytes(b'\xef\xbb\xbf"alpha"\n')
    assert run(model, files).errors == 0
    files[0].write_bytes(b"\n")
    files[1].unlink()
    assert run(model, files).total == 0
    assert files[1].read_bytes() == b""


def test_nothing_runs_where_all_is_answered(model, files, monkeypatch):
    write(files[0], *PROMPTS[:2])
    run(model, files)
    monkeypatch.setattr(Engine, "warm_up", lambda self: pytest.fail("there is nothing to be done"))
    before = files[1].read_bytes()
    assert run(model, files).earlier == 2
    assert files[1].read_bytes() == before


def test_other_answers_are_never_added_to(model, files):
    write(files[0], *PROMPTS[:3])
    run(model, files)
    before = files[1].read_bytes()
    with pytest.raises(ValueError, match=r"by other settings, than line 1 of .*prompts\.jsonl; name another output"):
        run(model, files, temperature=0.0)
    write(files[0], *PROMPTS[:2])
    with pytest.raises(ValueError, match=r"answers prompt 2, but .* has 2"):
        run(model, files)
    write(files[0], PROMPTS[0], "another")
    with pytest.raises(ValueError, match="answers another line"):
        run(model, files)
    with pytest.raises(ValueError, match="cannot be both"):
        run(model, (files[0], files[0]))
    assert files[1].read_bytes() == before
    files[1].write_text('{"mine": 1}\n')
    with pytest.raises(ValueError, match=r"line 1 of .* is no answer of this command"):
        run(model, files)
    files[0].write_bytes(b'"\xff"\n')
    files[1].unlink()
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        run(model, files)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("batch") / "model"
    jf.save_pretrained(model, directory)
    return directory


def test_the_command_counts_and_names_what_it_could_not_answer(exported, files, command):
    write(files[0], "a", b"{", "b")
    arguments = ("generate", exported, "--input", files[0], "--output", files[1], "--slots", 4, "--max-new-tokens", 9)
    done = command(*arguments)
    assert (done.code, done.out) == (2, "")
    told = (
        f"{files[1]}: 2 of 3 prompts are answered\njaxformers: 1 of 3 prompts of {files[0]} have errors, the first in"
    )
    assert done.err.startswith(f"{told} line 2: it is not JSON")
    write(files[0], "a", "c", "b")
    done = command(*arguments)
    assert (done.code, done.err) == (0, f"{files[1]}: 3 of 3 prompts are answered, 2 of them by earlier runs\n")
    assert command(*arguments[:4]).mistake == "--input and --output go together"
    assert "not from both" in command(*arguments, "prompt").mistake
    assert command(*arguments[:3], files[0].with_name("none"), *arguments[4:]).mistake.endswith(
        "No such file or directory"
    )


def test_a_killed_run_ends_as_one_that_was_not(model, exported, files):
    write(files[0], *(f"prompt {i}" for i in range(100)))
    run(model, files, max_new_tokens=30)
    truth = answers(files[1])
    files[1].unlink()
    settings = ("--slots", "4", "--max-new-tokens", "30", "--temperature", "1.2", "--seed", "3")
    arguments = ("generate", exported, "--input", files[0], "--output", files[1], *settings)
    process = subprocess.Popen([sys.executable, "-m", "jaxformers", *map(str, arguments)], env=os.environ)
    deadline = time.monotonic() + 200
    while not (files[1].exists() and files[1].stat().st_size > 500):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    summary = run(model, files, max_new_tokens=30)
    assert 0 < summary.earlier < 100
    assert [line["index"] for line in answers(files[1])] == list(range(100))
    assert answers(files[1]) == truth
