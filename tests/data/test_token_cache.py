import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tokenizers

from jaxformers.data import shards
from jaxformers.data.cache import open_cache
from jaxformers.data.config import DataConfig
from jaxformers.data.sources import Piece, SourceFile
from jaxformers.data.tokenizer import load_tokenizer, train_tokenizer
from jaxformers.data.workers import LocalPool


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of some hundred bytes, here and in every process that is started."""
    monkeypatch.setattr(shards, "_LEAST_BYTES", 500)


def _files(directory) -> dict[str, bytes]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def _documents(cache) -> list[list[int]]:
    return [
        cache.tokens[start : start + length].tolist() for start, length in zip(cache.starts, cache.lengths, strict=True)
    ]


def test_a_document_is_begun_as_the_tokenizer_does_and_ended_once(config, texts, bytes_tokenizer):
    cache = open_cache(config, bytes_tokenizer)
    assert _documents(cache) == [[256, *text.encode(), 257] for text in texts]
    assert cache.sizes.tolist() == [len(text.encode()) for text in texts]
    assert cache.manifest.bytes == sum(len(text.encode()) for text in texts)
    assert cache.manifest.tokens == len(cache.tokens) == cache.lengths.sum()


def test_a_text_that_already_ends_in_the_end_token_is_not_ended_twice(config, jsonl, bytes_tokenizer):
    jsonl.write_text(json.dumps({"text": "a<|eos|>"}))
    parsing = config.model_copy(update={"parse_special_tokens": True})
    assert _documents(open_cache(parsing, bytes_tokenizer)) == [[256, 97, 257]]
    assert _documents(open_cache(config, bytes_tokenizer)) == [[256, 97, *b"<|eos|>", 257]]


def test_ids_take_two_bytes_where_they_fit_and_four_where_they_do_not(config, bytes_tokenizer, tmp_path):
    assert open_cache(config, bytes_tokenizer).tokens.dtype == np.uint16
    many = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(65537)}, unk_token="0"))
    many.save(str(tmp_path / "tokenizer.json"))
    wide = load_tokenizer(tmp_path, eos_token="65536")
    cache = open_cache(config, wide)
    assert cache.tokens.dtype == np.uint32
    assert cache.tokens.max() == 65536


def test_trees_of_text_and_lines_of_json_come_in_path_order(tmp_path, bytes_tokenizer):
    (tmp_path / "b.py").write_text("B")
    (tmp_path / "a.jsonl").write_text('{"text": "A1"}\n{"text": "A2"}\n')
    config = DataConfig(paths=[f"{tmp_path}/b.py", f"{tmp_path}/*.jsonl"], cache_dir=tmp_path / "cache")
    texts = [bytes_tokenizer.decode(ids) for ids in _documents(open_cache(config, bytes_tokenizer))]
    assert texts == ["A1", "A2", "B"]


def test_an_opened_cache_is_not_built_again(config, bytes_tokenizer, monkeypatch):
    first = open_cache(config, bytes_tokenizer)
    monkeypatch.setattr(shards, "write_shard", None)
    assert open_cache(config, bytes_tokenizer).directory == first.directory


@pytest.mark.parametrize("change", ["content", "tokenizer", "field", "special"])
def test_whatever_decides_the_ids_makes_another_cache(config, jsonl, bytes_tokenizer, change):
    jsonl.write_text('{"text": "one", "body": "other"}')
    first = open_cache(config, bytes_tokenizer)
    tokenizer = bytes_tokenizer
    if change == "content":
        jsonl.write_text('{"text": "two", "body": "other"}')
    elif change == "tokenizer":
        tokenizer = train_tokenizer(["abc"], vocab_size=300)
    elif change == "field":
        config = config.model_copy(update={"text_field": "body"})
    else:
        config = config.model_copy(update={"parse_special_tokens": True})
    assert open_cache(config, tokenizer).directory != first.directory


def test_settings_that_only_decide_rows_share_the_cache(config, bytes_tokenizer):
    first = open_cache(config, bytes_tokenizer)
    rows = {"sequence_length": 7, "packing": "concat", "seed": 9, "validation_fraction": 0.5, "shuffle": False}
    assert open_cache(config.model_copy(update=rows), bytes_tokenizer).directory == first.directory


@pytest.mark.usefixtures("small_shards")
def test_any_number_of_processes_writes_the_same_bytes(config, bytes_tokenizer, tmp_path):
    seen = []
    made = {}
    for workers in (1, 2, 3):
        own = config.model_copy(update={"workers": workers, "cache_dir": tmp_path / str(workers)})
        cache = open_cache(own, bytes_tokenizer, progress=lambda *state: seen.append(state))
        made[workers] = _files(cache.directory)
    assert made[1] == made[2] == made[3]
    total = os.path.getsize(config.paths[0])
    assert seen.count((total, total)) == 3
    assert len(seen) > 9  # several shards each


def test_shards_are_cut_by_size_alone():
    files = [SourceFile("a.txt", 10, 0), SourceFile("b.jsonl", 5 << 20, 0, "jsonl"), SourceFile("c.txt", 3 << 20, 0)]
    planned = shards.plan_shards(files)
    assert planned[0] == (Piece("a.txt"), Piece("b.jsonl", 0, 1 << 20, "jsonl"))
    assert [piece for shard in planned for piece in shard][-1] == Piece("c.txt")
    assert len(planned) == 6


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("point", [0, 1, 3, "merging"])
def test_a_killed_build_goes_on_where_it_stopped(config, bytes_tokenizer, tmp_path, monkeypatch, point):
    whole = open_cache(config.model_copy(update={"cache_dir": tmp_path / "whole"}), bytes_tokenizer)
    written = _killed_at(point, config, bytes_tokenizer, monkeypatch)
    again = []
    write = shards.write_shard
    monkeypatch.setattr(
        shards, "write_shard", lambda job, index, *rest: (again.append(index), write(job, index, *rest))
    )
    resumed = open_cache(config, bytes_tokenizer)
    assert _files(resumed.directory) == _files(whole.directory)
    assert not set(again) & set(written)
    assert [path.name for path in resumed.directory.parent.iterdir() if path.suffix == ".partial"] == []


class _Killed(BaseException):
    """Stands for the end of the process: nothing catches it, and nothing is cleaned up."""


def _killed_at(point, config, tokenizer, monkeypatch) -> list[int]:
    """Stops a build after `point` shards, in the middle of the next, or while the shards are merged."""
    write, written = shards.write_shard, []

    def stops(job, index, *rest):
        if len(written) == point:
            monkeypatch.setattr(shards.os, "replace", _raise)
        write(job, index, *rest)
        written.append(index)

    def _raise(*_):
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_shard", stops)
        if point == "merging":
            patch.setattr("jaxformers.data.cache.os.replace", _raise_for_directories(_Killed))
        with pytest.raises(_Killed):
            open_cache(config, tokenizer)
    monkeypatch.undo()
    monkeypatch.setattr(shards, "_LEAST_BYTES", 500)
    return written


def _raise_for_directories(error):
    replace = os.replace

    def guarded(source, target):
        if os.path.isdir(source):
            raise error
        replace(source, target)

    return guarded


def test_a_build_that_is_really_killed_goes_on_with_the_same_bytes(tmp_path, bytes_tokenizer, make_texts):
    """kill -9 of the whole process group, workers and all, as soon as the first shards are there."""
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text("".join(make_texts(300, seed=number)) * 8)
    config = DataConfig(paths=f"{tmp_path}/*.txt", cache_dir=tmp_path / "cache", workers=2)
    program = (
        "import sys; from jaxformers.data.cache import open_cache; from jaxformers.data.config import DataConfig; "
        "from jaxformers.data.tokenizer import byte_tokenizer; "
        "open_cache(DataConfig.model_validate_json(sys.argv[1]), byte_tokenizer())"
    )
    process = subprocess.Popen([sys.executable, "-c", program, config.model_dump_json()], start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("cache/corpora/*.partial/*.json")) or _only_the_job(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    resumed = open_cache(config, bytes_tokenizer)
    whole = open_cache(config.model_copy(update={"cache_dir": tmp_path / "whole", "workers": 1}), bytes_tokenizer)
    assert _files(resumed.directory) == _files(whole.directory)


def _only_the_job(tmp_path) -> bool:
    return {path.name for path in tmp_path.glob("cache/corpora/*.partial/*.json")} == {"job.json"}


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", ["tokens", "documents", "json"])
def test_a_finished_shard_that_was_damaged_is_written_again(config, bytes_tokenizer, tmp_path, monkeypatch, damage):
    whole = open_cache(config.model_copy(update={"cache_dir": tmp_path / "whole"}), bytes_tokenizer)
    _killed_at(3, config, bytes_tokenizer, monkeypatch)
    (victim,) = config.cache_dir.glob(f"corpora/*.partial/000001.{damage}")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content[:-1] if damage == "json" else content)
    assert _files(open_cache(config, bytes_tokenizer).directory) == _files(whole.directory)


@pytest.mark.usefixtures("small_shards")
def test_two_builds_at_the_same_time_share_one_cache(config, bytes_tokenizer, tmp_path):
    whole = open_cache(config.model_copy(update={"cache_dir": tmp_path / "whole"}), bytes_tokenizer)
    made, failed = [], []

    def build():
        try:
            made.append(_files(open_cache(config, bytes_tokenizer).directory))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert made == [_files(whole.directory)] * 4


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[5] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name, damage, said",
    [
        ("tokens.bin", _truncate, r"tokens.bin has \d+ bytes, not \d+"),
        ("documents.bin", _truncate, r"documents.bin has \d+ bytes, not \d+"),
        ("documents.bin", _flip, "documents.bin has changed"),
        ("manifest.json", _truncate, "manifest.json cannot be read"),
        ("tokens.bin", os.remove, "tokens.bin is missing"),
        ("manifest.json", os.remove, "manifest.json is missing"),
    ],
)
def test_a_damaged_cache_is_said_to_be_so_and_built_again(config, bytes_tokenizer, caplog, name, damage, said):
    directory = open_cache(config, bytes_tokenizer).directory
    before = _files(directory)
    damage(directory / name)
    caplog.clear()
    assert _files(open_cache(config, bytes_tokenizer).directory) == before
    (record,) = [record for record in caplog.records if record.name == "jaxformers.data.cache"]
    assert "is damaged" in record.message
    assert re.search(said, record.message)


def test_a_whole_cache_opens_where_nothing_can_be_written(config, bytes_tokenizer, monkeypatch):
    open_cache(config, bytes_tokenizer)
    monkeypatch.setattr("jaxformers.data.cache.FileLock", None)
    assert open_cache(config, bytes_tokenizer).manifest.documents == 40


def test_a_cache_folder_that_cannot_be_written_is_named(config, bytes_tokenizer, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match=r"cannot write to the cache folder .*file/cache/corpora \(Not a directory\)"):
        open_cache(config.model_copy(update={"cache_dir": tmp_path / "file" / "cache"}), bytes_tokenizer)


def test_a_full_disk_is_one_line_and_loses_nothing(config, bytes_tokenizer, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_atomically", full)
        with pytest.raises(ValueError, match=r"cannot write to the cache folder .*No space left on device"):
            open_cache(config, bytes_tokenizer)
    assert open_cache(config, bytes_tokenizer).manifest.documents == 40


BAD_LINES = b'{"text": "good"}\nnot json\n{"text": "\xff"}\n{"body": 1}\n{"text": " \\n"}\n{"text": "fine"}\n'


def test_bad_records_are_counted_and_named_and_the_rest_is_kept(config, jsonl, bytes_tokenizer):
    jsonl.write_bytes(BAD_LINES)
    manifest = open_cache(config, bytes_tokenizer).manifest
    assert (manifest.documents, manifest.skipped, manifest.empty) == (2, 3, 1)
    assert manifest.skipped_names == (
        f"{jsonl}:2: not JSON",
        f"{jsonl}:3: not UTF-8",
        f"{jsonl}:4: no field 'text'",
    )


def test_only_the_first_hundred_bad_records_are_named(config, jsonl, bytes_tokenizer):
    jsonl.write_bytes(b"x\n" * 250 + b'{"text": "good"}\n')
    manifest = open_cache(config, bytes_tokenizer).manifest
    assert manifest.skipped == 250
    assert manifest.skipped_names[-1] == f"{jsonl}:100: not JSON"
    assert len(manifest.skipped_names) == 100


@pytest.mark.parametrize("built", [False, True])
def test_bad_records_are_refused_on_request_even_from_a_cache_that_skipped_them(config, jsonl, bytes_tokenizer, built):
    jsonl.write_bytes(BAD_LINES)
    if built:
        open_cache(config, bytes_tokenizer)
    with pytest.raises(ValueError) as error:
        open_cache(config.model_copy(update={"on_bad_text": "error"}), bytes_tokenizer)
    assert str(error.value) == f"{jsonl}:2: not JSON"


def test_a_file_that_is_not_utf8_is_skipped_or_refused_by_name(tmp_path, bytes_tokenizer):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    config = DataConfig(paths=f"{tmp_path}/*.txt", cache_dir=tmp_path / "cache")
    said = f"{tmp_path}/latin.txt: not UTF-8 (byte 3)"
    assert open_cache(config, bytes_tokenizer).manifest.skipped_names == (said,)
    with pytest.raises(ValueError) as error:
        open_cache(config.model_copy(update={"on_bad_text": "error"}), bytes_tokenizer)
    assert str(error.value) == said


def test_a_corpus_without_a_document_is_refused(config, jsonl, bytes_tokenizer):
    jsonl.write_bytes(b'{"text": ""}\nnot json\n')
    with pytest.raises(ValueError, match=r"no document in '.*corpus.jsonl': 1 skipped, 1 empty"):
        open_cache(config, bytes_tokenizer)


def test_a_tokenizer_without_an_end_of_text_is_refused(config, tmp_path, bytes_tokenizer):
    bytes_tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    lone = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"names no end-of-text token: set tokenizer.eos_token to one of: <\|bos\|>, "):
        open_cache(config, lone)


@pytest.mark.usefixtures("small_shards")
def test_a_tokenizing_process_that_dies_is_reported(config, bytes_tokenizer, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="a tokenizing process ended early, with exit status 1"):
        open_cache(config.model_copy(update={"workers": 2}), bytes_tokenizer)


@pytest.mark.usefixtures("small_shards")
def test_a_source_that_vanishes_while_processes_read_it_is_named(config, bytes_tokenizer, monkeypatch, jsonl):
    run = LocalPool.run

    def vanishing(*arguments):
        jsonl.unlink()
        run(*arguments)

    monkeypatch.setattr(LocalPool, "run", vanishing)
    with pytest.raises(ValueError, match=f"{jsonl}: cannot be read: No such file"):
        open_cache(config.model_copy(update={"workers": 2}), bytes_tokenizer)
