"""Exports of a token cache: read back by readers that are not ours, bit-equal however often they were interrupted."""

import itertools
import json
import os
import struct
from dataclasses import replace

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from filelock import FileLock

from jaxformers.data import shards
from jaxformers.data.cache import open_cache
from jaxformers.data.tokenizing import tokenize
from jaxformers.data.workers import LocalPool
from jaxformers.data.writers import export as exporting
from jaxformers.data.writers.export import export, find_export
from jaxformers.data.writers.megatron import megatron_dtype, write_megatron_index


@pytest.fixture
def cache(config, bytes_tokenizer):
    return open_cache(config, bytes_tokenizer)


@pytest.fixture
def write(cache, tmp_path):
    """`write("megatron")`: the export of the corpus of 40 texts, and where it lies."""

    def call(to, folder="out", vocab_size=259, of=cache):
        return export(of, tmp_path / folder, to, vocab_size=vocab_size, eos_id=257), tmp_path / folder

    return call


def _files(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


# What https://github.com/NVIDIA/Megatron-LM says of its files in megatron/core/datasets/indexed_dataset.py, in
# code of its own: "<f" strings where ours has numpy's, documents found through the third table.
_MEGATRON_DTYPES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 6: "d", 7: "f", 8: "H"}


def read_megatron(directory) -> tuple[str, list[list[int]]]:
    """(struct code of the dtype, ids of each document) by the description of the format alone."""
    index, content = (directory / "tokens.idx").read_bytes(), (directory / "tokens.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, entries = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    offset = 9 + 8 + 1 + 8 + 8
    lengths = struct.unpack_from(f"<{sequences}i", index, offset)
    offset += 4 * sequences
    pointers = struct.unpack_from(f"<{sequences}q", index, offset)
    offset += 8 * sequences
    documents = struct.unpack_from(f"<{entries}q", index, offset)
    assert offset + 8 * entries == len(index)
    letter = _MEGATRON_DTYPES[code]
    read = [struct.unpack_from(f"<{n}{letter}", content, at) for n, at in zip(lengths, pointers, strict=True)]
    assert sum(lengths) * struct.calcsize(letter) == len(content)
    assert documents[0] == 0
    return letter, [
        [i for sequence in read[first:last] for i in sequence] for first, last in itertools.pairwise(documents)
    ]


def test_megatron_files_hold_each_document_with_its_end(write, texts):
    manifest, directory = write("megatron")
    letter, documents = read_megatron(directory)
    assert documents == [[256, *text.encode(), 257] for text in texts]
    assert (letter, manifest.token_dtype) == ("H", "uint16")


@pytest.mark.parametrize("vocab_size, letter", [(65499, "H"), (65500, "i"), (100_000, "i")])
def test_megatron_ids_take_the_dtype_that_megatron_chooses(write, texts, vocab_size, letter):
    manifest, directory = write("megatron", vocab_size=vocab_size)
    assert read_megatron(directory) == (letter, [[256, *text.encode(), 257] for text in texts])
    assert manifest.token_dtype == megatron_dtype(vocab_size) == {"H": "uint16", "i": "int32"}[letter]


def test_a_document_that_megatrons_index_cannot_count_is_refused(cache, tmp_path):
    lengths = cache.lengths.copy()
    lengths[3] = 2**31
    with pytest.raises(ValueError, match=r"a document of 2147483648 tokens cannot be written: .* counts to 2147483647"):
        write_megatron_index(tmp_path / "tokens.idx", replace(cache, lengths=lengths), dtype="uint16")


def read_records(directory) -> list[list[int]]:
    """The documents of all ArrayRecord files, through the package's own reader, in the dtype the manifest names."""
    dtype = np.dtype(json.loads((directory / "manifest.json").read_text())["token_dtype"]).newbyteorder("<")
    read = []
    for path in sorted(directory.glob("*.arrayrecord")):
        reader = ArrayRecordReader(str(path))
        assert "group_size:1" in reader.writer_options_string()
        # One by one and backwards: each is found without the others.
        records = [reader.read([n])[0] for n in reversed(range(reader.num_records()))]
        reader.close()
        read += [np.frombuffer(record, dtype).tolist() for record in reversed(records)]
    return read


def test_a_record_is_a_document(write, texts):
    manifest, directory = write("arrayrecord")
    assert read_records(directory) == [[256, *text.encode(), 257] for text in texts]
    assert manifest.token_dtype == "uint16"


def test_record_files_share_out_documents_in_order(write, texts, monkeypatch):
    monkeypatch.setattr(exporting, "_RECORD_FILE_TOKENS", 1000)
    _, directory = write("arrayrecord")
    sizes = [path.name for path in sorted(directory.glob("*.arrayrecord"))]
    assert len(sizes) > 3
    assert sizes[0] == f"tokens-00000-of-{len(sizes):05d}.arrayrecord"
    assert read_records(directory) == [[256, *text.encode(), 257] for text in texts]


def test_wide_ids_are_four_bytes_in_records(write, cache):
    wide = replace(cache, tokens=cache.tokens.astype(np.uint32) + 70_000)
    wide = replace(wide, manifest=replace(wide.manifest, token_dtype="uint32"))
    _, directory = write("arrayrecord", vocab_size=80_000, of=wide)
    assert [i for document in read_records(directory) for i in document] == wide.tokens.tolist()


def test_the_manifest_names_what_is_there(write, jsonl, bytes_tokenizer, cache):
    _, directory = write("megatron")
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["files"].keys() == {"tokens.bin", "tokens.idx", "sources.jsonl"}
    for name, (size, digest) in manifest["files"].items():
        assert (size, digest) == ((directory / name).stat().st_size, shards.sha256_of(directory / name))
    assert manifest["tokenizer"] == bytes_tokenizer.fingerprint
    assert (manifest["documents"], manifest["tokens"]) == (40, len(cache.tokens))
    (source,) = map(json.loads, (directory / "sources.jsonl").read_text().splitlines())
    assert source["path"] == str(jsonl)
    assert source["size"] == jsonl.stat().st_size


@pytest.mark.parametrize("to", ["megatron", "arrayrecord"])
def test_any_number_of_processes_leads_to_the_same_files(config, bytes_tokenizer, tmp_path, monkeypatch, to):
    monkeypatch.setattr(shards, "_LEAST_BYTES", 500)
    made = []
    for workers in (1, 3):
        own = config.model_copy(update={"cache_dir": tmp_path / str(workers)})
        output = tmp_path / f"out{workers}"
        tokenize(own, bytes_tokenizer, to=to, output=output, pool=LocalPool(workers))
        made.append(_files(output))
    assert made[0] == made[1]


class _Killed(BaseException):
    """Stands for the end of the process: nothing catches it, and nothing is cleaned up."""


@pytest.mark.parametrize("to, point", [("megatron", 0), ("megatron", 1), ("arrayrecord", 0), ("arrayrecord", 2)])
def test_a_killed_export_goes_on_behind_the_files_it_finished(write, monkeypatch, to, point):
    monkeypatch.setattr(exporting, "_RECORD_FILE_TOKENS", 1500)
    whole = _files(write(to, "whole")[1])
    replace_file, renamed = os.replace, []

    def dies(source, target):
        if str(target).endswith((".bin", ".idx", ".arrayrecord")):
            if len(renamed) == point:
                raise _Killed
            renamed.append(os.path.basename(target))
        replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(exporting.os, "replace", dies)
        with pytest.raises(_Killed):
            write(to)
    written, write_file = [], exporting._write_file

    def noted(path, how):
        written.append(path.name)
        return write_file(path, how)

    monkeypatch.setattr(exporting, "_write_file", noted)
    _, directory = write(to)
    assert _files(directory) == whole
    assert not set(written) & set(renamed)


def test_a_finished_file_that_was_damaged_is_written_again(write, monkeypatch, tmp_path):
    whole = _files(write("megatron", "whole")[1])
    save = exporting._save

    def dies(path, manifest):
        if path.name == "manifest.json":
            raise _Killed
        save(path, manifest)

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "_save", dies)
        with pytest.raises(_Killed):
            write("megatron")
    content = bytearray((tmp_path / "out" / "tokens.bin").read_bytes())
    content[7] ^= 1
    (tmp_path / "out" / "tokens.bin").write_bytes(content)
    assert _files(write("megatron")[1]) == whole


def test_a_whole_export_is_left_alone(write, monkeypatch):
    made, directory = write("megatron")
    before = _files(directory)
    monkeypatch.setattr(exporting, "_write_file", None)
    assert write("megatron")[0] == made
    assert _files(directory) == before


def test_exports_wait_for_one_another(write, tmp_path, monkeypatch):
    class Impatient(FileLock):
        def __init__(self, path):
            super().__init__(path, timeout=0.05)

    monkeypatch.setattr(exporting, "FileLock", Impatient)
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(ValueError, match="could not be acquired"):
        write("megatron")
    write("megatron")


# -- what does not match


def _tokenized(config, tokenizer, output, to="megatron", **options):
    return tokenize(config, tokenizer, to=to, output=output, **options)


@pytest.mark.parametrize(
    "change, said",
    [
        ("tokenizer", "was made with another tokenizer"),
        ("format", r"holds megatron files \(version 1\), not arrayrecord \(version 1\)"),
        ("content", "was made before .*corpus.jsonl changed"),
        ("more", "was made without .*another.jsonl"),
        ("fewer", "was made from .*corpus.jsonl too"),
        ("settings", "was made with other settings of how to read its sources"),
    ],
)
def test_an_export_of_something_else_is_not_written_over(config, jsonl, bytes_tokenizer, tmp_path, change, said):
    from jaxformers.data.tokenizer import byte_tokenizer

    _tokenized(config, bytes_tokenizer, tmp_path / "out")
    before = _files(tmp_path / "out")
    tokenizer, to = bytes_tokenizer, "megatron"
    if change == "tokenizer":
        tokenizer = byte_tokenizer(["<|more|>"])
    elif change == "format":
        to = "arrayrecord"
    elif change == "content":
        jsonl.write_text('{"text": "other"}\n')
    elif change in ("more", "fewer"):
        (tmp_path / "another.jsonl").write_text('{"text": "other"}\n')
        paths = [f"{tmp_path}/*.jsonl"] if change == "more" else [f"{tmp_path}/another.jsonl"]
        config = config.model_copy(update={"paths": tuple(paths)})
    else:
        config = config.model_copy(update={"parse_special_tokens": True})
    with pytest.raises(ValueError, match=said) as error:
        _tokenized(config, tokenizer, tmp_path / "out", to)
    assert str(error.value).endswith("choose another --output, or delete it")
    assert _files(tmp_path / "out") == before


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"files": {"a": 1}}', b"\xff", b'{"files": {}, "version": 1}']
)
def test_a_manifest_that_is_none_is_named(write, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json is not the manifest of an export"):
        write("megatron")


def test_a_folder_that_holds_something_else_is_not_written_into(write, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"out holds thesis.tex and no manifest: choose another --output"):
        write("megatron")


@pytest.mark.parametrize("damage, thorough", [("truncate", False), ("remove", False), ("flip", True)])
def test_files_that_changed_since_are_named(config, bytes_tokenizer, tmp_path, damage, thorough):
    _tokenized(config, bytes_tokenizer, tmp_path / "out")
    victim = tmp_path / "out" / "tokens.bin"
    content = bytearray(victim.read_bytes())
    if damage == "remove":
        victim.unlink()
    else:
        content[3] ^= 1
        victim.write_bytes(content[:-1] if damage == "truncate" else content)
    said = "has gone" if damage == "remove" else "has changed"
    with pytest.raises(ValueError, match=f"tokens.bin {said} since it was written: delete .*out to write it again"):
        _tokenized(config, bytes_tokenizer, tmp_path / "out", verify=thorough)


def test_a_full_disk_is_one_line_and_loses_nothing(write, monkeypatch):
    whole = _files(write("megatron", "whole")[1])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "write_megatron_index", full)
        with pytest.raises(
            ValueError, match=r"cannot write to .*out \(No space left on device\): choose another --outp"
        ):
            write("megatron")
    assert _files(write("megatron")[1]) == whole


def test_a_full_disk_under_records_is_one_line(cache, tmp_path):
    from jaxformers.data.writers.arrayrecord import write_arrayrecord

    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write_arrayrecord(tmp_path.joinpath("/dev/full"), cache, 0, 40, dtype="uint16")


def test_a_folder_that_cannot_be_made_is_named(cache, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match=r"cannot write to .*file/out \(Not a directory\): choose another --output"):
        export(cache, tmp_path / "file" / "out", "megatron", vocab_size=259, eos_id=257)


def test_nothing_is_found_where_nothing_is(tmp_path):
    assert find_export(tmp_path / "none", "megatron", None) is None
