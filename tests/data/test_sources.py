import gzip
import json
import os
import sys
import sysconfig

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformers.data.sources import BadRecord, Document, Piece, SourceFile, cut, find_files, name_of, read


def _texts(piece: Piece) -> list[str]:
    return [record.text for record in read(piece, text_field="text")]


def test_files_come_sorted_and_once_however_many_globs_name_them(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    files = find_files([f"{tmp_path}/**/*.txt", f"{tmp_path}/a*"])
    assert [os.path.relpath(file.path, tmp_path) for file in files] == ["a.txt", "b.txt", "sub/c.txt"]


def test_stdlib_stands_for_the_running_pythons_own_source():
    (found,) = find_files(["{stdlib}/abc.py"])
    assert found.path == f"{sysconfig.get_paths()['stdlib']}/abc.py"
    assert found.size == os.path.getsize(sys.modules["abc"].__file__)


@pytest.mark.parametrize(
    "pattern, said",
    [
        ("{folder}/*.rst", "no file matches '{folder}/*.rst'"),
        ("{folder}/missing.txt", "no file matches '{folder}/missing.txt'"),
        ("{folder}", "'{folder}' is a directory: name its files by a glob such as '{folder}/**/*.txt'"),
        ("{folder}/skip/*", "every file that '{folder}/skip/*' matches is left out by data.exclude"),
        (
            "{folder}/c.jsonl.bz2",
            "{folder}/c.jsonl.bz2: unknown compression '.bz2'; known are .jsonl.gz",
        ),
        ("{folder}/t.txt.gz", "{folder}/t.txt.gz: unknown compression '.gz'; known are .jsonl.gz, .jsonl.zst"),
        ("{folder}/d.tar", "{folder}/d.tar: '.tar' files are not text; known are .jsonl, "),
    ],
)
def test_a_glob_that_gives_nothing_to_read_is_named(tmp_path, pattern, said):
    (tmp_path / "skip").mkdir()
    for name in ("skip/a.txt", "c.jsonl.bz2", "t.txt.gz", "d.tar"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError) as error:
        find_files([pattern.format(folder=tmp_path)], ["*/skip/*"])
    assert said.format(folder=tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_text_file_is_one_document_without_its_byte_order_mark(tmp_path):
    (tmp_path / "a.py").write_bytes("\ufeffx = 'é'\r\ny = 2\n".encode())
    assert _texts(Piece(str(tmp_path / "a.py"))) == ["x = 'é'\r\ny = 2\n"]


def _frames(content: bytes) -> bytes:
    return zstandard.compress(content[:40]) + zstandard.compress(content[40:])


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress), (".zst", _frames)])
def test_every_compression_of_a_jsonl_gives_the_same_documents(tmp_path, texts, suffix, pack):
    path = tmp_path / f"c.jsonl{suffix}"
    path.write_bytes(pack("".join(json.dumps({"text": text}) + "\n\n" for text in texts).encode()))
    assert _texts(Piece(str(path), format="jsonl")) == texts


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_compressed_file_that_was_cut_short_says_so(tmp_path, suffix, pack):
    path = tmp_path / f"c.jsonl{suffix}"
    content = b"".join(json.dumps({"text": os.urandom(200).hex()}).encode() + b"\n" for _ in range(2000))
    path.write_bytes(pack(content)[:-50_000])
    *documents, last = read(Piece(str(path), format="jsonl"), text_field="text")
    assert documents
    assert all(isinstance(document, Document) for document in documents)
    assert isinstance(last, BadRecord)
    assert name_of(last).startswith(f"{path}:{len(documents) + 1}: damaged compressed data")


def test_bytes_that_are_no_compressed_data_are_one_bad_record(tmp_path):
    for suffix in (".gz", ".zst"):
        (tmp_path / f"c.jsonl{suffix}").write_bytes(b"certainly not compressed")
        (record,) = read(Piece(str(tmp_path / f"c.jsonl{suffix}"), format="jsonl"), text_field="text")
        assert name_of(record).startswith(f"{record.path}:1: damaged compressed data")


def test_without_zstandard_the_line_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "c.jsonl.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"needs zstandard: pip install 'jaxformers\[data\]'"):
        list(read(Piece(str(tmp_path / "c.jsonl.zst"), format="jsonl"), text_field="text"))


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "cut', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"9" * 5000, "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"body": "x"}', "no field 'text'"),
        (b'["text"]', "no field 'text'"),
        (b'{"text": 7}', "field 'text' is not a string"),
        (b'{"text": null}', "field 'text' is not a string"),
        (b'{"text": "\\ud83d"}', "half a surrogate pair, which is not Unicode text"),
    ],
)
def test_a_bad_line_is_named_and_the_lines_after_it_are_read(tmp_path, line, reason):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}')
    first, bad, last = read(Piece(str(path), format="jsonl"), text_field="text")
    assert (first.text, last.text) == ("one", "two")
    assert name_of(bad) == f"{path}:3: {reason}"


def test_a_bad_line_of_a_file_that_has_gone_is_named_by_its_byte(tmp_path):
    gone = BadRecord(f"{tmp_path}/gone.jsonl", 17, "not JSON")
    assert name_of(gone) == f"{tmp_path}/gone.jsonl: not JSON at byte 17"


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        list(read(Piece(str(tmp_path / "gone.txt")), text_field="text"))


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=20), size=st.integers(1, 200))
def test_the_pieces_of_a_jsonl_hold_every_line_once(tmp_path_factory, texts, size):
    path = tmp_path_factory.mktemp("pieces") / "c.jsonl"
    path.write_bytes("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    pieces = cut(SourceFile(str(path), path.stat().st_size, 0, "jsonl"), size)
    assert [text for piece in pieces for text in _texts(piece)] == texts
