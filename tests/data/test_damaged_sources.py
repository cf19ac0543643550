"""Sources damaged in every way that a file can be: one line that names the place."""

import gzip
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from data.writers import (
    TEXTS,
    config_of,
    documents_of,
    write_arrayrecord,
    write_arrow_file,
    write_arrow_stream,
    write_csv,
    write_feather,
    write_ids_csv,
    write_ids_jsonl,
    write_parquet,
    write_records,
    write_saved,
    write_tsv,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformers.data import shards
from jaxformers.data.cache import open_cache
from jaxformers.data.sources import cut, find_files, read


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _foreign(path: Path) -> None:
    path.write_bytes(b"certainly something else\n" * 100)


BINARY = {
    "parquet": (write_parquet, "damaged or no Parquet file"),
    "arrow file": (write_arrow_file, "damaged or no Arrow file"),
    "feather": (write_feather, "damaged or no Arrow file"),
    "arrow stream": (write_arrow_stream, "damaged or no Arrow file"),
    "arrayrecord": (write_arrayrecord, "damaged or no ArrayRecord file"),
}


@pytest.mark.parametrize("damage", [_empty, _cut_short, _foreign])
@pytest.mark.parametrize("cut_to", [None, 400])
@pytest.mark.parametrize("kind", BINARY)
def test_a_file_that_is_damaged_as_a_whole_is_one_line(
    tmp_path, corpus, bytes_tokenizer, monkeypatch, kind, damage, cut_to
):
    if cut_to is not None:
        monkeypatch.setattr(shards, "_LEAST_BYTES", cut_to)
    write, said = BINARY[kind]
    path = write(tmp_path, corpus)
    damage(Path(path))
    with pytest.raises(ValueError, match=f"^{path}: {said}") as error:
        open_cache(config_of(tmp_path, path), bytes_tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "feather", "arrow stream", "arrayrecord"])
def test_no_flipped_byte_brings_down_the_process(tmp_path, corpus, kind):
    """A reader says that the file is damaged, or gives what it finds: no crash, no other kind of error."""
    path = Path(BINARY[kind][0](tmp_path, corpus))
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    (file,) = find_files([str(path)])
    for _ in range(60):
        content = bytearray(whole)
        for position in draw.integers(0, len(content) if kind != "arrayrecord" else 4096, 3):
            content[position] ^= 1 << draw.integers(8)
        path.write_bytes(content)
        said = ""
        try:
            found = [record for piece in cut(file, 700) for record in read(piece)]
        except ValueError as error:
            said, found = str(error), []
        assert "\n" not in said
        assert len(found) < 1000


def _parquet_of(folder: Path, **columns) -> str:
    pq.write_table(pa.table(columns), folder / "c.parquet")
    return f"{folder}/c.parquet"


def _arrow_of(folder: Path, **columns) -> str:
    table = pa.table(columns)
    with pa.ipc.new_stream(folder / "c.arrow", table.schema) as writer:
        writer.write_table(table)
    return f"{folder}/c.arrow"


def _saved_of(folder: Path, **columns) -> str:
    datasets.Dataset(pa.table(columns)).save_to_disk(folder / "saved")
    return f"{folder}/saved"


TABLES: dict[str, Callable[..., str]] = {"parquet": _parquet_of, "arrow": _arrow_of, "saved dataset": _saved_of}


@pytest.mark.parametrize("kind", TABLES)
def test_a_missing_column_lists_those_there_are(tmp_path, bytes_tokenizer, kind):
    path = TABLES[kind](tmp_path, id=[1], body=["x"])
    with pytest.raises(ValueError, match=f"^{path}: no column 'text'; there are id, body$"):
        open_cache(config_of(tmp_path, path), bytes_tokenizer)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize(
    "column, tokens_field, said",
    [
        ([1, 2], None, "column 'text' holds int64, not text"),
        ([["a"]], None, "column 'text' holds list<.*string>, not text"),
        (["a"], "text", "column 'text' holds string, not lists of whole numbers"),
        ([[0.5]], "text", "column 'text' holds list<.*double>, not lists of whole numbers"),
    ],
)
def test_a_column_of_another_type_is_refused(tmp_path, bytes_tokenizer, kind, column, tokens_field, said):
    path = TABLES[kind](tmp_path, text=column)
    with pytest.raises(ValueError, match=f"^{path}: {said}$"):
        open_cache(config_of(tmp_path, path, tokens_field=tokens_field), bytes_tokenizer)


def test_a_column_named_twice_is_refused(tmp_path, bytes_tokenizer):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pa.ipc.new_stream(tmp_path / "c.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "c.csv").write_text("text,text\na,b\n")
    for name in ("c.arrow", "c.csv"):
        with pytest.raises(ValueError, match=f"{name}: 2 columns 'text'; "):
            open_cache(config_of(tmp_path, f"{tmp_path}/{name}"), bytes_tokenizer)


@pytest.mark.parametrize("kind", TABLES)
def test_rows_that_are_no_document_are_named_by_their_number_and_the_rest_is_kept(tmp_path, bytes_tokenizer, kind):
    text = pa.array([b"good", None, b"\xff\xfe", b" \n", b"fine"], pa.binary()).view(pa.string())
    path = TABLES[kind](tmp_path, text=text)
    manifest = open_cache(config_of(tmp_path, path), bytes_tokenizer).manifest
    assert (manifest.documents, manifest.skipped, manifest.empty) == (2, 2, 1)
    assert manifest.skipped_names == (f"{path}:1: 'text' is null, not text", f"{path}:2: not UTF-8 (byte 0)")
    with pytest.raises(ValueError, match=f"^{path}:1: 'text' is null, not text$"):
        open_cache(config_of(tmp_path, path, on_bad_text="error"), bytes_tokenizer)


@pytest.mark.parametrize("cut_to", [None, 100])
def test_a_rows_number_is_the_files_whatever_the_pieces(tmp_path, bytes_tokenizer, monkeypatch, cut_to):
    if cut_to is not None:
        monkeypatch.setattr(shards, "_LEAST_BYTES", cut_to)
    table = pa.table({"text": [None if number % 10 == 9 else "some text" for number in range(50)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    with pa.ipc.new_stream(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    manifest = open_cache(config_of(tmp_path, f"{tmp_path}/[ab].*"), bytes_tokenizer).manifest
    rows = [f"{tmp_path}/{name}:{row}:" for name in ("a.parquet", "b.arrow") for row in range(9, 50, 10)]
    assert [name.split(" ")[0] for name in manifest.skipped_names] == rows


IDS_FIELDS = [[5, 6], None, [5, None], [], [5, 259], [-1], [7]]


@pytest.mark.parametrize("kind", [*TABLES, "jsonl", "csv"])
def test_ids_that_the_tokenizer_does_not_have_are_named(tmp_path, bytes_tokenizer, kind):
    if kind == "jsonl":
        path, _ = write_ids_jsonl(tmp_path, IDS_FIELDS)
    elif kind == "csv":
        path, _ = write_ids_csv(tmp_path, IDS_FIELDS)
    else:
        path = TABLES[kind](tmp_path, input_ids=IDS_FIELDS)
    cache = open_cache(config_of(tmp_path, path, tokens_field="input_ids"), bytes_tokenizer)
    first = {"jsonl": 1, "csv": 2}.get(kind, 0)  # lines count from 1 on, and the header is one
    assert documents_of(cache) == [[5, 6, 257], [7, 257]]
    assert cache.manifest.empty == 1
    places = [name.removeprefix(path) for name in cache.manifest.skipped_names]
    assert places[0] == f":{first + 1}: 'input_ids' is null, not a list of whole numbers"
    assert places[1].startswith(f":{first + 2}: 'input_ids' ")
    assert places[2:] == [
        f":{first + 4}: id 259 is not one of the tokenizer's 259 ids",
        f":{first + 5}: id -1 is not one of the tokenizer's 259 ids",
    ]


def test_ids_in_array_records_must_be_whole_and_of_a_named_type(tmp_path, bytes_tokenizer):
    path = write_records(tmp_path, [np.array([5, 6], "<u2").tobytes(), b"odd", np.array([5, 999], "<u2").tobytes()])
    cache = open_cache(config_of(tmp_path, path, tokens_field="uint16"), bytes_tokenizer)
    assert documents_of(cache) == [[5, 6, 257]]
    assert cache.manifest.skipped_names == (
        f"{path}:1: 3 bytes are no whole number of 2-byte ids",
        f"{path}:2: id 999 is not one of the tokenizer's 259 ids",
    )
    with pytest.raises(ValueError, match=r"no field 'input_ids'; .*: uint16, uint32, int32, int64$"):
        open_cache(config_of(tmp_path, path, tokens_field="input_ids"), bytes_tokenizer)


def test_text_files_have_no_field_of_ids(tmp_path, bytes_tokenizer):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="a text file has no field 'input_ids'"):
        open_cache(config_of(tmp_path, f"{tmp_path}/a.txt", tokens_field="input_ids"), bytes_tokenizer)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"id,body\n1,x\n", "c.csv: no column 'text'; the header has id, body"),
        (b'"text\nnever closed', r"c.csv: its header row cannot be read \(unexpected end of data\)"),
    ],
)
def test_a_csv_without_the_column_is_refused(tmp_path, bytes_tokenizer, content, said):
    (tmp_path / "c.csv").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        open_cache(config_of(tmp_path, f"{tmp_path}/c.csv"), bytes_tokenizer)


def test_rows_of_csv_that_are_no_document_are_named_by_their_line(tmp_path, bytes_tokenizer):
    path = tmp_path / "c.csv"
    path.write_bytes(
        b'\xef\xbb\xbfid,text\n1,"two\nlines"\n\n2\n3,a,b\n4,caf\xe9\n5,"x"y\n6,fine\n7,"never closed\n8,z\n'
    )
    cache = open_cache(config_of(tmp_path, str(path)), bytes_tokenizer)
    assert [bytes_tokenizer.decode(ids) for ids in documents_of(cache)] == ["two\nlines", "fine"]
    assert cache.manifest.skipped_names == (
        f"{path}:5: fields: 1, but the header has 2",
        f"{path}:6: fields: 3, but the header has 2",
        f"{path}:7: not UTF-8",
        f"{path}:8: not CSV (',' expected after '\"')",
        f"{path}:10: not CSV (unexpected end of data)",
    )


def test_a_field_of_csv_may_be_as_long_as_a_book(tmp_path, bytes_tokenizer):
    cache = open_cache(config_of(tmp_path, write_csv(tmp_path, ["word " * 100_000])), bytes_tokenizer)
    assert cache.lengths.tolist() == [500_002]


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=8))
@pytest.mark.parametrize("write", [write_csv, write_tsv])
def test_any_text_survives_quoting(tmp_path_factory, write, texts):
    (file,) = find_files([write(tmp_path_factory.mktemp("quoted"), texts)])
    assert [record.text for piece in cut(file, 100) for record in read(piece)] == texts


def test_a_compressed_csv_that_was_cut_short_keeps_what_came_before(tmp_path, corpus, bytes_tokenizer):
    draw = np.random.default_rng(0)
    path = write_csv(tmp_path, [draw.bytes(300).hex() for _ in range(200)])
    packed = tmp_path / "cut.csv.gz"
    packed.write_bytes(gzip.compress(Path(path).read_bytes())[:-20_000])
    manifest = open_cache(config_of(tmp_path, str(packed)), bytes_tokenizer).manifest
    assert manifest.documents > 20
    (name,) = manifest.skipped_names
    assert name.startswith(f"{packed}:{manifest.documents + 2}: damaged compressed data")


@pytest.mark.parametrize("name", ["c.csv", "c.jsonl", "c.txt"])
def test_an_empty_file_has_no_document(tmp_path, bytes_tokenizer, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"no document in '.*{name}'"):
        open_cache(config_of(tmp_path, f"{tmp_path}/{name}"), bytes_tokenizer)


@pytest.mark.parametrize(
    "name, content",
    [("state.json", b"{"), ("dataset_info.json", b"{"), ("data-00000-of-00001.arrow", b"short")],
)
def test_a_damaged_saved_dataset_is_one_line(tmp_path, corpus, bytes_tokenizer, name, content):
    path = write_saved(tmp_path, corpus)
    (Path(path) / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: ") as error:
        open_cache(config_of(tmp_path, path), bytes_tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "library, kind",
    [
        ("pyarrow", "parquet"),
        ("pyarrow", "arrow file"),
        ("datasets", "saved dataset"),
        ("array_record.python.array_record_module", "arrayrecord"),
    ],
)
def test_without_a_library_the_line_says_how_to_get_it(tmp_path, corpus, bytes_tokenizer, monkeypatch, library, kind):
    path = TEXTS[kind](tmp_path, corpus)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf"^{path}: reading it needs .*: pip install 'jaxformers\[data\]'$"):
        open_cache(config_of(tmp_path, path), bytes_tokenizer)


def test_without_fsspec_a_url_says_how_to_get_it(tmp_path, bytes_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ValueError, match=r"^s3://b/x.txt: reading it needs fsspec: pip install 'jaxformers\[data\]'$"):
        open_cache(config_of(tmp_path, "s3://b/x.txt"), bytes_tokenizer)
