"""`jaxformers data tokenize`: the cache that training opens, whoever made it and however often it was killed."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import types

import pytest
import yaml

from jaxformers import data_cli
from jaxformers.data import encoding, shards
from jaxformers.data.cache import open_cache
from jaxformers.data.config import DataConfig
from jaxformers.data.corpus import build_tokenizer
from jaxformers.data.tokenizer import load_tokenizer
from jaxformers.data.workers import LocalPool, Step


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFORMERS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer(tmp_path, bytes_tokenizer):
    bytes_tokenizer.save(tmp_path / "bytes")
    return tmp_path / "bytes"


@pytest.fixture
def write_config(tmp_path, jsonl):
    """A config file of a run over the corpus of 40 texts."""

    def call(**sections):
        values = {"run_dir": str(tmp_path / "run"), "model": {}, "tokenizer": {"kind": "bytes"}} | sections
        values["data"] = {"paths": str(jsonl), "sequence_length": 32, "workers": 1} | sections.get("data", {})
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return call


def _files(directory) -> dict[str, bytes]:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def _caches(root) -> list[str]:
    return sorted(path.name for path in (root / "corpora").iterdir() if path.is_dir())


def test_a_config_is_tokenized_into_the_cache_that_training_opens(run, write_config, tmp_path, monkeypatch):
    from jaxformers.config import load_config

    path = write_config(tokenizer={"kind": "train", "vocab_size": 300})
    done = run("data", "tokenize", path)
    assert done.code == 0, done
    config = load_config(path)
    monkeypatch.setattr(shards, "write_shard", None)
    cache = open_cache(config.data, build_tokenizer(config.tokenizer, config.data))
    assert str(cache.directory) in done.out
    assert cache.manifest.documents == 40


def test_the_table_says_what_was_made(run, jsonl, tokenizer, texts):
    jsonl.write_bytes(jsonl.read_bytes() + b'{"body": 1}\n\n{"text": " "}\n')
    done = run("data", "tokenize", jsonl, "--tokenizer", tokenizer)
    header, line = (next(line for line in done.out.splitlines() if mark in line) for mark in ("documents", " 40 "))
    figures = dict(zip(header.replace("bytes per token", "rate").split(), line.split(), strict=True))
    size, tokens = sum(len(text.encode()) for text in texts), sum(len(text.encode()) + 2 for text in texts)
    assert figures.pop("seconds")
    assert figures == {
        "files": "1",
        "documents": "40",
        "tokens": f"{tokens:,}",
        "rate": f"{size / tokens:.2f}",
        "skipped": "1",
        "empty": "1",
    }
    assert f"skipped {jsonl}:41: no field 'text'" in done.out
    assert done.err == ""


def test_a_corpus_that_is_there_is_said_to_be_there(run, jsonl, tokenizer, monkeypatch):
    first = run("data", "tokenize", jsonl, "--tokenizer", tokenizer)
    monkeypatch.setattr(shards, "write_shard", None)
    second = run("data", "tokenize", jsonl, "--tokenizer", tokenizer)
    assert first.out.splitlines()[-1] + " (was there already)" == second.out.splitlines()[-1]


def test_json_is_for_scripts(run, jsonl, tokenizer, tmp_path):
    (made,) = json.loads(run("data", "tokenize", jsonl, "--tokenizer", tokenizer, "--json").out)
    assert (made["name"], made["documents"], made["existed"], made["token_dtype"]) == ("", 40, False, "uint16")
    assert made["directory"] == str(tmp_path / "cache" / "corpora" / _caches(tmp_path / "cache")[0])


@pytest.mark.parametrize("to", ["megatron", "arrayrecord"])
def test_other_formats_go_where_they_are_told(run, jsonl, tokenizer, tmp_path, to, monkeypatch):
    arguments = ("data", "tokenize", jsonl, "--tokenizer", tokenizer, "--to", to, "--output", tmp_path / "out")
    first = run(*arguments)
    assert first.code == 0, first
    assert first.out.splitlines()[-1] == str(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["format"] == to
    before = _files(tmp_path)
    monkeypatch.setattr("jaxformers.data.tokenizing.open_cache", None)
    second = run(*arguments)
    assert second.out.splitlines()[-1] == f"{tmp_path / 'out'} (was there already)"
    assert _files(tmp_path) == before


def test_the_output_of_a_cache_is_the_folder_of_caches(run, write_config, tmp_path):
    assert run("data", "tokenize", write_config(), "--output", tmp_path / "elsewhere").code == 0
    assert len(_caches(tmp_path / "elsewhere")) == 1
    assert not (tmp_path / "cache").exists()


def test_options_and_overrides_change_the_config(run, write_config, jsonl, tokenizer, tmp_path):
    jsonl.write_text('{"body": "b", "text": "t"}\n{"body": "bb"}\n')
    (by_option,) = json.loads(run("data", "tokenize", write_config(), "--text-field", "body", "--json").out)
    assert (by_option["documents"], by_option["bytes"]) == (2, 3)
    by_override = run("data", "tokenize", jsonl, "--tokenizer", tokenizer, "data.text_field=body", "--json")
    assert json.loads(by_override.out)[0]["directory"] == by_option["directory"]


def test_each_source_has_a_line_and_a_place_of_its_own(run, write_config, tmp_path, jsonl, texts):
    (tmp_path / "notes.txt").write_text("a note")
    sources = {"texts": {"paths": str(jsonl)}, "notes": {"paths": f"{tmp_path}/*.txt"}}
    path = write_config(data={"paths": [], "sources": sources})
    made = {source["name"]: source for source in json.loads(run("data", "tokenize", path, "--json").out)}
    assert {name: source["documents"] for name, source in made.items()} == {"texts": 40, "notes": 1}
    done = run("data", "tokenize", path, "--to", "megatron", "--output", tmp_path / "out")
    lines = [line.split()[:3] for line in done.out.splitlines()]
    assert ["texts", "1", "40"] in lines
    assert ["notes", "1", "1"] in lines
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["notes", "texts"]


@pytest.mark.parametrize("kind", ["file", "directory", "run", "checkpoint"])
def test_a_tokenizer_is_named_in_any_form(run, jsonl, tokenizer, tmp_path, kind):
    named = {"file": tokenizer / "tokenizer.json", "directory": tokenizer}
    if kind in ("run", "checkpoint"):
        load_tokenizer(tokenizer).save(tmp_path / "run" / "tokenizer")
        (tmp_path / "run" / "checkpoints" / "7").mkdir(parents=True)
        named |= {"run": tmp_path / "run", "checkpoint": tmp_path / "run" / "checkpoints" / "7"}
    (made,) = json.loads(run("data", "tokenize", jsonl, "--tokenizer", named[kind], "--json").out)
    assert made["tokenizer"] == load_tokenizer(tokenizer).fingerprint


def test_an_end_token_can_be_named_for_a_tokenizer_that_names_none(run, jsonl, tokenizer):
    (tokenizer / "tokenizer_config.json").unlink()
    arguments = ("data", "tokenize", jsonl, "--tokenizer", tokenizer, "--json")
    assert "set tokenizer.eos_token to one of: <|bos|>, <|eos|>, <|pad|>" in run(*arguments).mistake
    assert run(*arguments, "tokenizer.eos_token=<|pad|>").code == 0


def test_verifying_finds_an_id_that_changed_and_makes_it_anew(run, write_config, tmp_path, caplog):
    path = write_config()
    run("data", "tokenize", path)
    before = _files(tmp_path / "cache")
    (tokens,) = (tmp_path / "cache").rglob("tokens.bin")
    content = bytearray(tokens.read_bytes())
    content[9] ^= 1
    tokens.write_bytes(content)
    assert "was there already" in run("data", "tokenize", path).out
    assert "was there already" not in run("data", "tokenize", path, "--verify").out
    assert "is damaged (tokens.bin has changed)" in caplog.text
    assert _files(tmp_path / "cache") == before
    assert "was there already" in run("data", "tokenize", path, "--verify").out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["{jsonl}"], "name a tokenizer: --tokenizer REF, or tokenizer.kind=train to learn one from these files"),
        (["{jsonl}", "--tokenizer", "{tmp}/none"], "{tmp}/none: no such file or directory"),
        (["{jsonl}", "--tokenizer", "{tmp}"], "{tmp} holds no tokenizer.json"),
        (["{tmp}/none", "--tokenizer", "{tokenizer}"], "no file matches '{tmp}/none'"),
        (["{tmp}/none.yaml"], "{tmp}/none.yaml: no such config file"),
        (["data.workers=2", "--tokenizer", "{tokenizer}"], "name a config, or the files of a corpus"),
        (["{jsonl}", "--tokenizer", "{tokenizer}", "--to", "megatron"], "--to megatron needs --output"),
        (
            ["{jsonl}", "--tokenizer", "{tokenizer}", "data.text_feild=a"],
            "config: unknown key 'data.text_feild'; did you mean 'text_field'?",
        ),
        (
            ["{jsonl}", "--tokenizer", "{tokenizer}", "--output", "{jsonl}"],
            "cannot write to the cache folder {jsonl}/corpora (Not a directory): set data.cache_dir",
        ),
        (
            ["{jsonl}", "--tokenizer", "{tokenizer}", "--to", "megatron", "--output", "{jsonl}/out"],
            "cannot write to {jsonl}/out (Not a directory): choose another --output",
        ),
    ],
)
def test_a_mistake_is_one_line(run, jsonl, tokenizer, tmp_path, arguments, said):
    places = {"jsonl": jsonl, "tmp": tmp_path, "tokenizer": tokenizer}
    done = run("data", "tokenize", *(argument.format(**places) for argument in arguments))
    assert done.mistake == said.format(**places)


def test_the_bar_shows_bytes_and_tokens_a_second(jsonl, tokenizer):
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with data_cli._bar(console) as bar:
        told = bar.begin("corpus")
        bar.tokenized(Step(0, size=2000, tokens=500))
        told(2000, 4000)
        bar._progress.refresh()
        shown = console.file.getvalue()
    assert "corpus" in shown
    assert "2.0/4.0 kB" in shown
    assert "tokens/s" in shown


def test_without_a_terminal_a_line_comes_now_and_then(run, jsonl, tokenizer, monkeypatch):
    monkeypatch.setattr(data_cli, "_SECONDS_BETWEEN_LINES", 0)
    done = run("data", "tokenize", jsonl, "--tokenizer", tokenizer)
    assert re.fullmatch(r"tokenizing: 100.0% of 0.0 MB, [\d,]+ tokens/s", done.err.splitlines()[-1])


def test_an_interrupted_command_says_how_to_go_on(run, jsonl, tokenizer, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "write_shard", interrupted)
    done = run("data", "tokenize", jsonl, "--tokenizer", tokenizer)
    assert (done.code, done.out, done.err) == (130, "", "stopped; the same command goes on from there\n")


def test_steps_inside_a_shard_move_the_bar(config, bytes_tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 200)
    seen = []
    open_cache(config, bytes_tokenizer, progress=lambda *state: seen.append(state), pool=LocalPool(1))
    done, totals = zip(*seen, strict=True)
    size = os.path.getsize(config.paths[0])
    assert set(totals) == {size}
    assert list(done) == sorted(done)
    assert len(set(done)) > 5
    assert done[-1] == size


# -- killed, again and again


def _command(*arguments) -> list[str]:
    return [sys.executable, "-m", "jaxformers", "data", "tokenize", *map(str, arguments)]


@pytest.mark.parametrize("to, times", [("cache", 3), ("megatron", 1)])
def test_a_corpus_whose_making_is_killed_again_and_again_is_the_same(tmp_path, tokenizer, make_texts, to, times):
    """kill -9 of the command and its workers at random moments, each after some more shards are finished."""
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text("".join(make_texts(300, seed=number)) * 24)
    arguments = [f"{tmp_path}/*.txt", "--tokenizer", tokenizer, "--workers", 2, "--to", to]
    arguments += ["--output", tmp_path / "out"] if to != "cache" else []
    draw, kept = random.Random(0), []
    for _ in range(times):
        process = subprocess.Popen(_command(*arguments), start_new_session=True, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while len(_finished(tmp_path)) <= len(kept) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.1))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if any(path.is_dir() and not path.suffix for path in (tmp_path / "cache" / "corpora").iterdir()):
            break  # the kill came too late: all shards are joined already
        assert set(kept) <= _finished(tmp_path)
        kept = _finished(tmp_path)
    subprocess.run(_command(*arguments), check=True, capture_output=True)
    config = DataConfig(paths=f"{tmp_path}/*.txt", cache_dir=tmp_path / "whole", workers=1)
    whole = open_cache(config, load_tokenizer(tokenizer))
    assert _files(tmp_path / "cache" / "corpora" / whole.directory.name) == _files(whole.directory)
    if to != "cache":
        assert (tmp_path / "out" / "tokens.bin").read_bytes() == whole.tokens.tobytes()


def test_a_disk_that_takes_no_more_is_one_line(tmp_path, tokenizer, make_texts):
    """A limit on the size of files stands for the full disk: it, too, is met in the middle of a write of a worker."""
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("".join(make_texts(300, seed=number)) * 24)
    command = shlex.join(_command(f"{tmp_path}/*.txt", "--tokenizer", tokenizer, "--workers", 2))
    limited = ["sh", "-c", f"ulimit -f 400; exec {command}"]  # blocks of 512 bytes
    done = subprocess.run(limited, check=False, capture_output=True, text=True)
    folder = tmp_path / "cache" / "corpora"
    said = f"jaxformers: cannot write to the cache folder {folder} (File too large): set data.cache_dir\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def _finished(tmp_path) -> set[str]:
    return {path.name for path in tmp_path.glob("cache/corpora/*.partial/*.json")} - {"job.json"}


# -- on a cluster


# Ray's start forks this process, in which tests before may have begun to use JAX; what is forked only starts programs.
forks = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@forks
@pytest.mark.slow
def test_a_ray_cluster_makes_the_same_cache(config, bytes_tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from jaxformers.data.ray_workers import RayPool

    monkeypatch.setattr(shards, "_LEAST_BYTES", 500)
    made = {}
    for name, pool in (("ray", RayPool("local", 2)), ("local", LocalPool(2))):
        own = config.model_copy(update={"cache_dir": tmp_path / name})
        made[name] = _files(open_cache(own, bytes_tokenizer, pool=pool).directory)
    assert made["ray"] == made["local"]


@forks
@pytest.mark.slow
def test_a_source_that_vanishes_under_a_ray_cluster_is_named(config, jsonl, bytes_tokenizer, monkeypatch):
    pytest.importorskip("ray")
    from jaxformers.data.ray_workers import RayPool

    monkeypatch.setattr(shards, "_LEAST_BYTES", 500)

    class Vanishing(RayPool):
        def run(self, *arguments):
            jsonl.unlink()
            super().run(*arguments)

    with pytest.raises(ValueError, match=f"{jsonl}: cannot be read: No such file"):
        open_cache(config, bytes_tokenizer, pool=Vanishing("local", 1))


@pytest.mark.parametrize(
    "address, said",
    [
        ("127.0.0.1:1", r"no Ray cluster can be reached at '127.0.0.1:1' \(.*refused.*\)"),
        ("ray://127.0.0.1:1", r"no Ray cluster can be reached at 'ray://127.0.0.1:1' \(.*refused.*\)"),
        ("127.0.0.1:head", "no Ray cluster can be reached at '127.0.0.1:head'"),
        ("head", "'head' is no address of a Ray cluster: HOST:PORT, ray://HOST:PORT, auto or local"),
    ],
)
def test_a_ray_address_that_nobody_answers_at_is_refused_at_once(run, jsonl, tokenizer, address, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    assert re.match(said, run("data", "tokenize", jsonl, "--tokenizer", tokenizer, "--ray", address).mistake)


def test_ray_is_asked_for_where_it_is_missing(run, jsonl, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    done = run("data", "tokenize", jsonl, "--tokenizer", tokenizer, "--ray", "auto")
    assert done.mistake == "--ray needs Ray: pip install 'jaxformers[ray]'"
