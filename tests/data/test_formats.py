"""Every format of sources gives the same cache of the same documents, as text or as ready ids."""

from pathlib import Path

import numpy as np
import pytest
from data.writers import (
    IDS,
    TEXTS,
    bytes_of,
    config_of,
    documents_of,
    ids_of,
    write_csv,
    write_ids_jsonl,
    write_parquet,
    write_saved,
)

from jaxformers.data import shards
from jaxformers.data.cache import open_cache
from jaxformers.data.config import DataConfig, TokenizerConfig
from jaxformers.data.copies import copies
from jaxformers.data.corpus import build_tokenizer, open_corpus
from jaxformers.data.encoding import DOCUMENT
from jaxformers.data.sources import BadRecord, Piece, cut, find_files, name_of, read


@pytest.mark.parametrize("cut_to", [None, 400])
@pytest.mark.parametrize("kind", TEXTS)
def test_the_same_corpus_in_any_format_is_the_same_cache(
    tmp_path, corpus, expected, bytes_tokenizer, monkeypatch, kind, cut_to
):
    """Byte for byte, in one piece and in many."""
    if cut_to is not None:
        monkeypatch.setattr(shards, "_LEAST_BYTES", cut_to)
    cache = open_cache(config_of(tmp_path, TEXTS[kind](tmp_path, corpus)), bytes_tokenizer)
    assert bytes_of(cache) == expected
    assert cache.manifest.skipped == 0


RANDOM_ACCESS = {
    "jsonl",
    "parquet",
    "arrow file",
    "arrow stream",
    "feather",
    "arrayrecord",
    "saved dataset",
    "shuffled dataset",
}


@pytest.mark.parametrize("kind", [kind for kind in TEXTS if kind != "text"])
def test_a_file_is_cut_where_its_format_allows_it(tmp_path, corpus, kind):
    (file,) = find_files([TEXTS[kind](tmp_path, corpus)])
    pieces = cut(file, file.size // 5 + 1)
    assert (len(pieces) > 3) == (kind in RANDOM_ACCESS)
    assert [record.text for piece in pieces for record in read(piece)] == corpus


@pytest.mark.parametrize("kind", ["parquet", "arrayrecord", "shuffled dataset"])
def test_processes_share_a_file_of_any_format(tmp_path, corpus, expected, bytes_tokenizer, monkeypatch, kind):
    monkeypatch.setattr(shards, "_LEAST_BYTES", 700)
    config = config_of(tmp_path, TEXTS[kind](tmp_path, corpus), workers=2)
    assert bytes_of(open_cache(config, bytes_tokenizer)) == expected


@pytest.mark.parametrize("cut_to", [None, 400])
@pytest.mark.parametrize("kind", IDS)
def test_ready_ids_are_taken_as_they_are_and_ended_once(
    tmp_path, corpus, expected, bytes_tokenizer, monkeypatch, kind, cut_to
):
    if cut_to is not None:
        monkeypatch.setattr(shards, "_LEAST_BYTES", cut_to)
    path, field = IDS[kind](tmp_path, ids_of(corpus, bytes_tokenizer))
    cache = open_cache(config_of(tmp_path, path, tokens_field=field), bytes_tokenizer)
    tokens, documents = expected
    facts = np.frombuffer(documents, DOCUMENT)
    assert bytes_of(cache)[0] == tokens
    assert cache.lengths.tolist() == facts["length"].tolist()
    assert cache.sizes.tolist() == facts["bytes"].tolist()


def test_every_format_of_ids_gives_the_same_hashes(tmp_path, corpus, bytes_tokenizer):
    """So that the same documents are held out, whatever they came from."""
    made = set()
    for kind, write in IDS.items():
        folder = tmp_path / kind
        folder.mkdir()
        path, field = write(folder, ids_of(corpus, bytes_tokenizer))
        made.add(bytes_of(open_cache(config_of(folder, path, tokens_field=field), bytes_tokenizer)))
    assert len(made) == 1


def test_rows_of_a_corpus_are_the_same_whatever_its_format(tmp_path, corpus, bytes_tokenizer):
    rows = []
    for kind in ("text", "csv", "parquet", "saved dataset"):
        folder = tmp_path / kind
        folder.mkdir()
        config = config_of(folder, TEXTS[kind](folder, corpus), sequence_length=32, seed=3, validation_fraction=0.2)
        opened = open_corpus(config, bytes_tokenizer)
        assert opened.report.validation_documents > 0
        rows.append([opened.train[n]["tokens"].tolist() for n in range(20)])
    assert rows[1:] == rows[:1] * 3


def test_files_of_many_formats_make_one_corpus_in_path_order(tmp_path, bytes_tokenizer):
    for name in "abcd":
        (tmp_path / name).mkdir()
    write_parquet(tmp_path / "a", ["A"])
    write_saved(tmp_path / "b", ["B"])
    write_csv(tmp_path / "c", ["C"])
    (tmp_path / "d" / "d.txt").write_text("D")
    cache = open_cache(config_of(tmp_path, f"{tmp_path}/[abcd]/**"), bytes_tokenizer)
    assert [bytes_tokenizer.decode(ids) for ids in documents_of(cache)] == ["A", "B", "C", "D"]


def test_a_tokenizer_is_not_trained_on_ready_ids(tmp_path, bytes_tokenizer):
    path, field = write_ids_jsonl(tmp_path, [[1, 2]])
    with pytest.raises(ValueError, match="names ready ids: set"):
        build_tokenizer(TokenizerConfig(), config_of(tmp_path, path, tokens_field=field))


def test_a_tokenizer_is_trained_alike_on_any_format(tmp_path, corpus):
    made = set()
    for kind in ("jsonl", "parquet", "saved dataset"):
        (tmp_path / kind).mkdir()
        config = config_of(tmp_path / kind, TEXTS[kind](tmp_path / kind, corpus))
        made.add(build_tokenizer(TokenizerConfig(vocab_size=300), config).fingerprint)
    assert len(made) == 1


def test_a_format_may_be_said_where_the_name_does_not(tmp_path, corpus, expected, bytes_tokenizer):
    Path(write_parquet(tmp_path, corpus)).rename(tmp_path / "part-0001")
    config = config_of(tmp_path, f"{tmp_path}/part-*", format="parquet")
    assert bytes_of(open_cache(config, bytes_tokenizer)) == expected


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"format": "text", "tokens_field": "ids"}, "tokens_field is for format jsonl, .*, but format is text"),
        ({"format": "jsonl", "split": "train"}, "split is for format huggingface, but format is jsonl"),
        ({"format": "csv", "subset": "en"}, "subset is for format huggingface, but format is csv"),
    ],
)
def test_keys_of_another_format_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        DataConfig(paths="*", **settings)


def test_shards_that_are_there_twice_are_named_in_one_warning(tmp_path, corpus, bytes_tokenizer, caplog):
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
        write_parquet(tmp_path / name, corpus if name in "ac" else [name * 30] * 40)
        (tmp_path / name / "same.txt").write_text("text files may be equal")
    open_cache(config_of(tmp_path, f"{tmp_path}/[abcd]/*"), bytes_tokenizer)
    (warning,) = [record.message for record in caplog.records if "under several names" in record.message]
    assert warning.endswith(f"learnt from as often: {tmp_path}/a/c.parquet = {tmp_path}/c/c.parquet")


def test_every_set_of_copies_is_found(tmp_path):
    """Of one size all; two and three equal, one that differs in its middle alone, one of another size."""
    middle = [b"x" * 100_000 + name + b"x" * 100_000 for name in (b"a", b"a", b"b", b"c", b"c", b"c")]
    for number, content in enumerate([*middle, b"x", b"x", b""]):
        (tmp_path / f"{number}.jsonl").write_bytes(content)
    found = copies(find_files([f"{tmp_path}/*"]))
    assert [[path[-len("0.jsonl")] for path in group] for group in found] == [["0", "1"], ["3", "4", "5"], ["6", "7"]]


def test_a_bad_record_is_named_by_the_place_that_its_unit_says():
    assert name_of(BadRecord("a.parquet", 17, "null", "row")) == "a.parquet:17: null"
    assert name_of(BadRecord("a.txt", 0, "not UTF-8", "file")) == "a.txt: not UTF-8"


def test_pieces_of_a_missing_file_are_one_line(tmp_path):
    for name, format in (("a.parquet", "parquet"), ("a.arrow", "arrow"), ("a.arrayrecord", "arrayrecord")):
        with pytest.raises(ValueError, match=f"{name}: cannot be read: .*No such file"):
            list(read(Piece(f"{tmp_path}/{name}", format=format)))
