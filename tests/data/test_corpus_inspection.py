"""`jaxformers data inspect`: its figures against counts made by hand, and rows shown token by token."""

import collections
import io
import json

import numpy as np
import pytest
import yaml
from rich.console import Console

from jaxformers import corpus_inspection
from jaxformers.corpus_inspection import Inspection, Piece, ShownRow, show
from jaxformers.data import figures
from jaxformers.data.cache import open_cache
from jaxformers.data.corpus import open_corpus
from jaxformers.data.figures import histogram_of, lengths_of, segments_of


@pytest.fixture
def config_file(tmp_path, config):
    """A config file of the corpus of 40 texts."""

    def call(**data):
        path = tmp_path / "config.yaml"
        values = config.model_dump(mode="json", include={"paths", "cache_dir", "sequence_length", "packing_window"})
        tokenizer = {"kind": "bytes"}
        path.write_text(
            yaml.safe_dump({"run_dir": "unused", "model": {}, "tokenizer": tokenizer, "data": values | data})
        )
        return path

    return call


def test_lengths_are_those_of_the_documents(config, bytes_tokenizer, texts):
    lengths = sorted(len(text.encode()) + 2 for text in texts)
    found = lengths_of(open_cache(config, bytes_tokenizer), sequence_length=100)
    assert (found.shortest, found.longest, found.mean) == (lengths[0], lengths[-1], sum(lengths) / 40)
    # The smallest length that at least p percent of the documents do not exceed.
    assert found.percentiles == tuple(
        next(n for n in lengths if sum(m <= n for m in lengths) * 100 >= p * 40) for p in figures.PERCENTILES
    )
    assert found.longer_than_a_row == sum(n > 100 for n in lengths) / 40


def test_every_token_is_counted(config, bytes_tokenizer, texts):
    counts = collections.Counter(i for text in texts for i in [256, *text.encode(), 257])
    found = histogram_of(open_cache(config, bytes_tokenizer), top=5, vocab_size=259)
    assert (found.counted, found.used) == (counts.total(), len(counts))
    assert found.frequent == tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5])


def test_of_a_large_corpus_even_samples_are_counted(config, bytes_tokenizer, monkeypatch):
    cache = open_cache(config, bytes_tokenizer)
    monkeypatch.setattr(figures, "_AT_ONCE", 100)
    monkeypatch.setattr(figures, "_COUNTED", 500)
    assert len(cache.tokens) > 1000
    found = histogram_of(cache, top=3, vocab_size=259)
    assert found.counted == 500
    parts = -(-len(cache.tokens) // 100)
    sample = np.concatenate([cache.tokens[n * parts // 5 * 100 :][:100] for n in range(5)])
    assert found.frequent[0][1] == np.bincount(sample).max()


def test_a_row_is_cut_where_a_document_begins_or_learning_stops():
    row = {
        "tokens": np.array([9, 1, 2, 3, 9, 4, 5, 0, 0], np.int32),
        "targets": np.array([1, 2, 3, 0, 4, 5, 0, 0, 0], np.int32),
        "weights": np.array([0, 1, 1, 0, 1, 1, 0, 0, 0], np.float32),
        "positions": np.array([0, 1, 2, 3, 0, 1, 2, 0, 0], np.int32),
        "segment_ids": np.array([1, 1, 1, 1, 2, 2, 2, 0, 0], np.int32),
    }
    assert [(s.segment, s.start, s.ids, s.learned) for s in segments_of(row)] == [
        (1, 0, (9, 1), False),  # nothing predicts the first, and the loss leaves out what predicts the second
        (1, 2, (2, 3), True),
        (2, 4, (9,), False),
        (2, 5, (4, 5), True),
        (0, 7, (0, 0), False),
    ]


def test_pieces_of_a_row_are_its_tokens(run, config, config_file, bytes_tokenizer):
    run("data", "tokenize", config_file())
    found = json.loads(run("data", "inspect", config_file(), "--rows", 3, "--row", 1, "--json").out)
    rows = open_corpus(config, bytes_tokenizer).train
    assert [row["number"] for row in found["rows"]] == [1, 2, 3]
    for shown in found["rows"]:
        row = rows[shown["number"]]
        assert sum(piece["tokens"] for piece in shown["pieces"]) == 32
        text = "".join(piece["text"] for piece in shown["pieces"])
        expected = bytes_tokenizer.decode(row["tokens"][row["segment_ids"] > 0], skip_special_tokens=False)
        assert text.replace("\ufffd", "") == expected.replace("\ufffd", "")


def test_the_figures_of_a_config(run, config, config_file, texts, bytes_tokenizer):
    run("data", "tokenize", config_file())
    (source,) = json.loads(run("data", "inspect", config_file(), "--json").out)["sources"]
    report = open_corpus(config, bytes_tokenizer).report
    assert (source["documents"], source["tokens"]) == (40, sum(len(text.encode()) + 2 for text in texts))
    assert source["efficiency"] == report.train_efficiency
    assert source["directory"] == str(report.cache)
    assert source["frequent"][0][:2] == [32, " "]


def test_the_figures_for_people(run, config_file, jsonl):
    jsonl.write_bytes(jsonl.read_bytes() + b"not json\n")
    run("data", "tokenize", config_file())
    done = run("data", "inspect", config_file(), "--rows", 1)
    assert (done.code, done.err) == (0, "")
    for said in (
        "40 of 1 files",
        "vocabulary used",
        "% full",
        "1 records that are no text",
        f"skipped {jsonl}:41: not JSON",
        "row 0",
        "[1|",
    ):
        assert said in done.out


def test_a_cache_is_inspected_without_its_config(run, config_file, config, bytes_tokenizer):
    run("data", "tokenize", config_file())
    directory = open_cache(config, bytes_tokenizer).directory
    found = json.loads(run("data", "inspect", directory, "data.sequence_length=64", "--json").out)
    assert found["sources"][0]["sequence_length"] == 64
    assert sum(piece["tokens"] for piece in found["rows"][0]["pieces"]) == 64
    assert found["sources"][0]["frequent"][0][1] == " "


def test_each_source_has_figures_of_its_own(run, config_file, tmp_path, jsonl):
    (tmp_path / "note.txt").write_text("a note")
    path = config_file(paths=[], sources={"texts": {"paths": str(jsonl)}, "notes": {"paths": f"{tmp_path}/*.txt"}})
    run("data", "tokenize", path)
    found = json.loads(run("data", "inspect", path, "--rows", 0, "--json").out)["sources"]
    assert {source["name"]: source["documents"] for source in found} == {"texts": 40, "notes": 1}


def _shown(console_options, *pieces) -> str:
    console = Console(file=io.StringIO(), width=100, **console_options)
    show(Inspection((), (ShownRow(3, pieces),)), console)
    return console.file.getvalue()


PIECES = (
    Piece(1, 0, 1, False, "<|bos|>"),
    Piece(1, 1, 4, True, "[red]one[/red]"),
    Piece(2, 5, 2, True, "two"),
    Piece(0, 7, 9, False, ""),
)


def test_without_a_terminal_marks_tell_documents_apart():
    shown = _shown({}, *PIECES)
    assert shown.splitlines()[:2] == ["row 3", "[1|{<|bos|>}[red]one[/red][2|two[9 of padding]"]


def test_at_a_terminal_documents_have_colours_and_what_is_not_learned_is_dim():
    shown = _shown({"force_terminal": True, "color_system": "standard"}, *PIECES)
    assert (
        "\x1b[2;36m<|bos|>\x1b[0m\x1b[36m[red]one[/red]\x1b[0m\x1b[33mtwo\x1b[0m\x1b[2m  9 of padding\x1b[0m" in shown
    )


def test_rows_of_a_mixture_whose_weights_change_at_a_step_are_shown(run, config_file, tmp_path, jsonl):
    (tmp_path / "note.txt").write_text("a note")
    sources = {"texts": {"paths": str(jsonl)}, "notes": {"paths": f"{tmp_path}/*.txt", "validation_fraction": 0.0}}
    path = config_file(paths=[], sources=sources, weights_at_step={1: {"notes": 9.0}})
    assert run("data", "tokenize", path).code == 0
    found = json.loads(run("data", "inspect", path, "--rows", 2, "--json").out)
    assert {source["name"] for source in found["sources"]} == {"texts", "notes"}
    assert [row["number"] for row in found["rows"]] == [0, 1]


@pytest.mark.parametrize(
    "case, said",
    [
        ("fresh", "this corpus is not tokenized yet: run `jaxformers data tokenize {path}` first"),
        ("source", "source 'notes' is not tokenized yet: run `jaxformers data tokenize {path}` first"),
        ("damaged", "this corpus is damaged (documents.bin is missing): run `jaxformers data tokenize {path}` first"),
        ("row", "there is no row 5: there are 5 rows"),
        ("folder", "{tmp} is neither a config (.yaml) nor the folder of a token cache"),
    ],
)
def test_a_mistake_is_one_line(run, config_file, config, bytes_tokenizer, tmp_path, jsonl, case, said):
    path = config_file(epochs=1, sequence_length=2048)
    arguments = ["data", "inspect", path]
    if case != "fresh":
        directory = open_cache(config, bytes_tokenizer).directory
    if case == "source":
        (tmp_path / "note.txt").write_text("a note")
        config_file(paths=[], sources={"texts": {"paths": str(jsonl)}, "notes": {"paths": f"{tmp_path}/*.txt"}})
    elif case == "damaged":
        (directory / "documents.bin").unlink()
    elif case == "row":
        arguments += ["--row", "5"]
        rows = open_corpus(config.model_copy(update={"sequence_length": 2048}), bytes_tokenizer).train.rows_per_epoch
        assert rows == 5
    elif case == "folder":
        arguments[2] = tmp_path
    assert run(*arguments).mistake == said.format(path=path, tmp=tmp_path)


def test_a_damaged_cache_is_named(config, bytes_tokenizer):
    directory = open_cache(config, bytes_tokenizer).directory
    (directory / "sources.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"is damaged \(sources.jsonl has 0 bytes, not \d+\)"):
        corpus_inspection.inspect_cache(directory, config)


CONVERSATIONS = [
    [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}],
    [
        {"role": "system", "content": "Be."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
    ],
    [{"role": "user", "content": "long " * 30}, {"role": "assistant", "content": "No."}],
]


def test_of_conversations_it_shows_what_is_trained_on_and_counts_it(run, config_file, tmp_path):
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(said) + "\n" for said in CONVERSATIONS))
    chat = {"format": "auto", "template": "zephyr"}
    data = {"paths": f"{tmp_path}/chat.jsonl", "chat": chat, "sequence_length": 90, "packing": "none"}
    path = config_file(**data, shuffle=False, validation_fraction=0.0)
    assert run("data", "tokenize", path).code == 0
    shown = run("data", "inspect", path, "--rows", 1).out
    assert "[1|{<|user|>\nHi?<|eos|>\n<|assistant|>\n}Ho.<|eos|>{\n}" in shown
    assert "8 of the 83 tokens of these rows, 9.6%" in " ".join(shown.split())
    assert "system: 1, user: 3, assistant: 3" in shown
    assert f"longer than a row: {tmp_path}/chat.jsonl:3" in shown
    (source,) = json.loads(run("data", "inspect", path, "--json").out)["sources"]
    assert (source["learned"], source["conversations"], source["too_long"]) == (8, 3, 1)
    assert source["turns"] == {"system": 1, "developer": 0, "user": 3, "assistant": 3, "tool": 0}
    alone = run("data", "inspect", source["directory"], "data.sequence_length=90", "--json").out
    assert json.loads(alone)["sources"][0]["learned"] == 8
    refused = run("data", "tokenize", path, "--to", "megatron", "--output", tmp_path / "out").mistake
    assert refused == "--to megatron cannot say which tokens of conversations are learned: use --to cache"
