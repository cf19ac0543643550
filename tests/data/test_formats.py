"""Every format of sources: read as an independent writer wrote it, and damaged in every way that a file can be."""

import csv
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from data.megatron import write_megatron
from fsspec.spec import AbstractBufferedFile
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformers.data import shards
from jaxformers.data.cache import TokenCache, open_cache
from jaxformers.data.config import DataConfig, TokenizerConfig
from jaxformers.data.copies import copies
from jaxformers.data.corpus import build_tokenizer, open_corpus
from jaxformers.data.encoding import DOCUMENT
from jaxformers.data.sources import BadRecord, Piece, cut, find_files, name_of, read

datasets.disable_progress_bars()


def _lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def _table(texts: list[str]) -> pa.Table:
    return pa.table({"id": list(range(len(texts))), "text": texts})


def write_texts(folder: Path, texts: list[str]) -> str:
    for number, text in enumerate(texts):
        (folder / f"{number:05d}.txt").write_bytes(text.encode())
    return f"{folder}/*.txt"


def write_jsonl(folder: Path, texts: list[str]) -> str:
    (folder / "c.jsonl").write_bytes(_lines(texts))
    return f"{folder}/c.jsonl"


def write_gzip(folder: Path, texts: list[str]) -> str:
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(_lines(texts)))
    return f"{folder}/c.jsonl.gz"


def write_zstandard(folder: Path, texts: list[str]) -> str:
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(_lines(texts)))
    return f"{folder}/c.jsonl.zst"


def write_csv(folder: Path, texts: list[str], *, name: str = "c.csv", dialect: str = "excel") -> str:
    with open(folder / name, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, dialect)
        writer.writerows([["id", "text"], *enumerate(texts)])
    return f"{folder}/{name}"


def write_tsv(folder: Path, texts: list[str]) -> str:
    return write_csv(folder, texts, name="c.tsv", dialect="excel-tab")


def write_parquet(folder: Path, texts: list[str]) -> str:
    pq.write_table(_table(texts), folder / "c.parquet", row_group_size=7)
    return f"{folder}/c.parquet"


def write_arrow_file(folder: Path, texts: list[str]) -> str:
    table = _table(texts)
    with pa.ipc.new_file(folder / "c.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return f"{folder}/c.arrow"


def write_arrow_stream(folder: Path, texts: list[str]) -> str:
    table = _table(texts)
    with pa.ipc.new_stream(folder / "c.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return f"{folder}/c.arrow"


def write_feather(folder: Path, texts: list[str]) -> str:
    pyarrow.feather.write_feather(_table(texts), str(folder / "c.feather"), compression="lz4", chunksize=7)
    return f"{folder}/c.feather"


def write_arrayrecord(folder: Path, texts: list[str]) -> str:
    return _write_records(folder, [text.encode() for text in texts])


def _write_records(folder: Path, records: list[bytes]) -> str:
    writer = ArrayRecordWriter(f"{folder}/c.arrayrecord", "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return f"{folder}/c.arrayrecord"


def write_saved(folder: Path, texts: list[str]) -> str:
    datasets.Dataset(_table(texts)).save_to_disk(folder / "saved")
    return f"{folder}/saved"


def write_shuffled(folder: Path, texts: list[str]) -> str:
    """Saved through a mapping of its indices."""
    reversed_ = datasets.Dataset(_table(texts[::-1]))
    reversed_.select(range(len(texts) - 1, -1, -1)).save_to_disk(folder / "saved")
    return f"{folder}/saved"


TEXTS = {
    "text": write_texts,
    "jsonl": write_jsonl,
    "jsonl.gz": write_gzip,
    "jsonl.zst": write_zstandard,
    "csv": write_csv,
    "tsv": write_tsv,
    "parquet": write_parquet,
    "arrow file": write_arrow_file,
    "arrow stream": write_arrow_stream,
    "feather": write_feather,
    "arrayrecord": write_arrayrecord,
    "saved dataset": write_saved,
    "shuffled dataset": write_shuffled,
}


def _config(folder: Path, paths: str, **settings) -> DataConfig:
    return DataConfig(paths=paths, cache_dir=folder / "cache", **{"workers": 1, **settings})


def _bytes(cache: TokenCache) -> tuple[bytes, bytes]:
    return tuple((cache.directory / name).read_bytes() for name in ("tokens.bin", "documents.bin"))


def _documents(cache: TokenCache) -> list[list[int]]:
    return [
        cache.tokens[start : start + length].tolist() for start, length in zip(cache.starts, cache.lengths, strict=True)
    ]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """Documents with what a format might lose: quotes, line breaks of three kinds, tabs, commas, non-ASCII."""
    odd = [
        'a "quoted", text\r\nof two lines',
        "tab\there\rand there",
        " spaces around ",
        "'",
        '"',
        "ends in \\",
        "é🙂\0x",
    ]
    return [f"{number}: {text}\n{'word ' * (number % 5)}" for number, text in enumerate(odd * 6)]


@pytest.fixture(scope="module")
def expected(corpus, bytes_tokenizer, tmp_path_factory) -> tuple[bytes, bytes]:
    folder = tmp_path_factory.mktemp("reference")
    return _bytes(open_cache(_config(folder, write_jsonl(folder, corpus)), bytes_tokenizer))


@pytest.mark.parametrize("cut_to", [None, 400])
@pytest.mark.parametrize("kind", TEXTS)
def test_the_same_corpus_in_any_format_is_the_same_cache(
    tmp_path, corpus, expected, bytes_tokenizer, monkeypatch, kind, cut_to
):
    """Byte for byte, in one piece and in many."""
    if cut_to is not None:
        monkeypatch.setattr(shards, "_LEAST_BYTES", cut_to)
    cache = open_cache(_config(tmp_path, TEXTS[kind](tmp_path, corpus)), bytes_tokenizer)
    assert _bytes(cache) == expected
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


def _ids(corpus: list[str], tokenizer) -> list[list[int]]:
    """Every other document already ended, as `tokens.bin` has all of them."""
    made = [tokenizer.encode(text) for text in corpus]
    return [ids + [tokenizer.eos_id] * (number % 2) for number, ids in enumerate(made)]


def write_ids_jsonl(folder: Path, ids: list[list[int]]) -> tuple[str, str]:
    (folder / "c.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return f"{folder}/c.jsonl", "input_ids"


def write_ids_csv(folder: Path, ids: list[list[int]]) -> tuple[str, str]:
    with open(folder / "c.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "input_ids"], *((1, json.dumps(row)) for row in ids)])
    return f"{folder}/c.csv", "input_ids"


def write_ids_parquet(folder: Path, ids: list[list[int]]) -> tuple[str, str]:
    table = pa.table({"input_ids": pa.array(ids, pa.list_(pa.uint16()))})
    pq.write_table(table, folder / "c.parquet", row_group_size=9)
    return f"{folder}/c.parquet", "input_ids"


def write_ids_arrow(folder: Path, ids: list[list[int]]) -> tuple[str, str]:
    table = pa.table({"input_ids": pa.array(ids, pa.large_list(pa.int64()))})
    with pa.ipc.new_file(folder / "c.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    return f"{folder}/c.arrow", "input_ids"


def write_ids_saved(folder: Path, ids: list[list[int]]) -> tuple[str, str]:
    datasets.Dataset.from_dict({"input_ids": ids, "labels": ids}).save_to_disk(folder / "saved")
    return f"{folder}/saved", "input_ids"


def write_ids_arrayrecord(folder: Path, ids: list[list[int]]) -> tuple[str, str]:
    return _write_records(folder, [np.array(row, "<u4").tobytes() for row in ids]), "uint32"


def write_ids_megatron(folder: Path, ids: list[list[int]]) -> tuple[str, None]:
    write_megatron(folder / "c", [[row] for row in ids], dtype="uint16")
    return f"{folder}/c.*", None


IDS = {
    "jsonl": write_ids_jsonl,
    "csv": write_ids_csv,
    "parquet": write_ids_parquet,
    "arrow": write_ids_arrow,
    "saved dataset": write_ids_saved,
    "arrayrecord": write_ids_arrayrecord,
    "megatron": write_ids_megatron,
}


@pytest.mark.parametrize("cut_to", [None, 400])
@pytest.mark.parametrize("kind", IDS)
def test_ready_ids_are_taken_as_they_are_and_ended_once(
    tmp_path, corpus, expected, bytes_tokenizer, monkeypatch, kind, cut_to
):
    if cut_to is not None:
        monkeypatch.setattr(shards, "_LEAST_BYTES", cut_to)
    path, field = IDS[kind](tmp_path, _ids(corpus, bytes_tokenizer))
    cache = open_cache(_config(tmp_path, path, tokens_field=field), bytes_tokenizer)
    tokens, documents = expected
    facts = np.frombuffer(documents, DOCUMENT)
    assert _bytes(cache)[0] == tokens
    assert cache.lengths.tolist() == facts["length"].tolist()
    assert cache.sizes.tolist() == facts["bytes"].tolist()


def test_every_format_of_ids_gives_the_same_hashes(tmp_path, corpus, bytes_tokenizer):
    """So that the same documents are held out, whatever they came from."""
    made = set()
    for kind, write in IDS.items():
        folder = tmp_path / kind
        folder.mkdir()
        path, field = write(folder, _ids(corpus, bytes_tokenizer))
        made.add(_bytes(open_cache(_config(folder, path, tokens_field=field), bytes_tokenizer)))
    assert len(made) == 1


def test_rows_of_a_corpus_are_the_same_whatever_its_format(tmp_path, corpus, bytes_tokenizer):
    rows = []
    for kind in ("text", "csv", "parquet", "saved dataset"):
        folder = tmp_path / kind
        folder.mkdir()
        config = _config(folder, TEXTS[kind](folder, corpus), sequence_length=32, seed=3, validation_fraction=0.2)
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
    cache = open_cache(_config(tmp_path, f"{tmp_path}/[abcd]/**"), bytes_tokenizer)
    assert [bytes_tokenizer.decode(ids) for ids in _documents(cache)] == ["A", "B", "C", "D"]


# Hugging Face datasets ------------------------------------------------------------------------------------------------


def _splits(folder: Path) -> str:
    made = {name: datasets.Dataset.from_dict({"text": [f"{name} {n}" for n in range(3)]}) for name in ("train", "test")}
    datasets.DatasetDict(made).save_to_disk(folder / "splits")
    return f"{folder}/splits"


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_of_a_saved_dictionary_is_read_row_by_row_as_datasets_does(tmp_path, bytes_tokenizer, split):
    path = _splits(tmp_path)
    cache = open_cache(_config(tmp_path, path, split=split), bytes_tokenizer)
    rows = datasets.load_from_disk(path)[split]
    assert [bytes_tokenizer.decode(ids) for ids in _documents(cache)] == [row["text"] for row in rows]


def test_a_saved_dataset_of_several_files_is_read_row_by_row_as_datasets_does(tmp_path, texts, bytes_tokenizer):
    made = datasets.Dataset.from_dict({"text": texts}).shuffle(seed=1).filter(lambda row: len(row["text"]) > 20)
    made.save_to_disk(tmp_path / "saved", num_shards=3)
    cache = open_cache(_config(tmp_path, f"{tmp_path}/saved"), bytes_tokenizer)
    again = datasets.load_from_disk(tmp_path / "saved")
    assert [bytes_tokenizer.decode(ids) for ids in _documents(cache)] == [row["text"] for row in again]


def test_a_named_dataset_is_what_datasets_loads_by_that_name(tmp_path, texts, bytes_tokenizer, monkeypatch):
    """A folder of data files stands for the hub, as it does for `datasets`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
    (tmp_path / "mine").mkdir()
    for split in ("train", "test"):
        (tmp_path / "mine" / f"{split}.jsonl").write_bytes(_lines(texts if split == "train" else ["held out"]))
    config = _config(tmp_path, f"{tmp_path}/mine", format="huggingface", split="train")
    rows = datasets.load_dataset(f"{tmp_path}/mine", split="train")
    cache = open_cache(config, bytes_tokenizer)
    assert [bytes_tokenizer.decode(ids) for ids in _documents(cache)] == [row["text"] for row in rows] == texts
    with pytest.raises(ValueError, match=r"mine: set data.split to one of its splits: (train, test|test, train)$"):
        open_cache(config.model_copy(update={"split": None}), bytes_tokenizer)
    with pytest.raises(ValueError, match=r"data.split is 'train\[:2\]', which is not the name of a whole split$"):
        open_cache(config.model_copy(update={"split": "train[:2]"}), bytes_tokenizer)


def test_a_name_that_cannot_be_reached_is_one_line(tmp_path, bytes_tokenizer):
    with pytest.raises(ValueError, match="nobody/nothing: `datasets` cannot load it: ") as error:
        open_cache(_config(tmp_path, "nobody/nothing", format="huggingface"), bytes_tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "split, said",
    [
        (None, "splits: set data.split to one of its splits: train, test"),
        ("valid", "splits: has no split 'valid'; its splits are: train, test"),
    ],
)
def test_a_split_must_be_chosen_among_those_there(tmp_path, bytes_tokenizer, split, said):
    with pytest.raises(ValueError, match=said):
        open_cache(_config(tmp_path, _splits(tmp_path), split=split), bytes_tokenizer)


def test_a_dataset_alone_has_no_other_split(tmp_path, bytes_tokenizer):
    path = write_saved(tmp_path, ["a"])
    with pytest.raises(ValueError, match="'test', but this is the dataset of one split alone"):
        open_cache(_config(tmp_path, path, split="test"), bytes_tokenizer)


# A Python function ----------------------------------------------------------------------------------------------------

MODULE = """
import numpy as np
TEXTS = {texts!r}
class Rows:
    def __len__(self): return len(TEXTS)
    def __getitem__(self, number): return {{"text": TEXTS[number]}}
def rows(): return Rows()
def texts(): return list(TEXTS)
def stream(): return iter(TEXTS)
def ids(): return [np.array([256, *text.encode()]) for text in TEXTS]
def fields(): return ({{"input_ids": [256, *text.encode()]}} for text in TEXTS)
def mixed(): return ["good", None, 7, {{"body": 1}}, [1.5], {{"text": None}}, "last"]
def broken():
    yield "first"
    raise KeyError("gone")
def raising(): raise OSError("no disk")
def nothing(): return 7
versioned = rows
"""


@pytest.fixture
def module(tmp_path, monkeypatch, corpus) -> str:
    """The name of a module of its own for every test."""
    name = f"documents_of_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE.format(texts=corpus))
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize("function", ["rows", "texts", "stream"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_function_gives_the_corpus_that_files_give(
    tmp_path, module, expected, bytes_tokenizer, monkeypatch, function, workers
):
    monkeypatch.setattr(shards, "_LEAST_BYTES", 20_000)
    config = _config(tmp_path, f"{module}:{function}", format="python", workers=workers)
    assert _bytes(open_cache(config, bytes_tokenizer)) == expected


@pytest.mark.parametrize("function, field", [("ids", None), ("fields", "input_ids")])
def test_a_function_may_give_ids(tmp_path, module, expected, bytes_tokenizer, function, field):
    config = _config(tmp_path, f"{module}:{function}", format="python", tokens_field=field)
    assert _bytes(open_cache(config, bytes_tokenizer))[0] == expected[0]


def test_items_that_are_no_documents_are_named_by_their_number(tmp_path, module, bytes_tokenizer):
    name = f"{module}:mixed"
    manifest = open_cache(_config(tmp_path, name, format="python"), bytes_tokenizer).manifest
    assert manifest.documents == 2
    assert manifest.skipped_names == (
        f"{name}:1: 'text' is null, not text",
        f"{name}:2: 'text' is of type int, not text",
        f"{name}:3: no field 'text'",
        f"{name}:4: 'the item' is a list with something else in it, not a list of whole numbers",
        f"{name}:5: 'text' is null, not text",
    )


@pytest.mark.parametrize(
    "name, said",
    [
        ("{module}:broken", "fails with KeyError: 'gone'"),
        ("{module}:raising", "fails with OSError: no disk"),
        ("{module}:nothing", "returns a value of type int, which gives no documents"),
        ("{module}:missing", "has no function 'missing'"),
        ("{module}:TEXTS", "has no function 'TEXTS'"),
        ("{module}", "names no function: write it as package.module:function"),
        ("no.such.module:f", r"cannot import no.such.module \(ModuleNotFoundError: No module named 'no'\)"),
    ],
)
def test_a_function_that_fails_is_one_line_that_names_it(tmp_path, module, bytes_tokenizer, name, said):
    with pytest.raises(ValueError, match=said) as error:
        open_cache(_config(tmp_path, name.format(module=module), format="python"), bytes_tokenizer)
    assert name.format(module=module) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_functions_file_and_its_version_decide_whether_a_cache_is_still_good(tmp_path, module, bytes_tokenizer):
    config = _config(tmp_path, f"{module}:stream", format="python")
    first = open_cache(config, bytes_tokenizer).directory
    assert open_cache(config, bytes_tokenizer).directory == first
    function = sys.modules[module].stream
    function.version = 2
    second = open_cache(config, bytes_tokenizer).directory
    (tmp_path / f"{module}.py").write_text((tmp_path / f"{module}.py").read_text() + "# changed\n")
    assert len({first, second, open_cache(config, bytes_tokenizer).directory}) == 3


# Remote paths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["text", "jsonl", "jsonl.gz", "jsonl.zst", "csv", "parquet", "arrow file", "arrow stream", "feather"]
)
def test_files_behind_a_url_are_read_as_local_ones(tmp_path, corpus, expected, bytes_tokenizer, kind):
    (tmp_path / "local").mkdir()
    pattern = TEXTS[kind](tmp_path / "local", corpus)
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/local/", "/remote/", recursive=True)
    try:
        url = f"memory://remote/{Path(pattern).name}"
        assert _bytes(open_cache(_config(tmp_path, url), bytes_tokenizer)) == expected
    finally:
        memory.rm("/remote", recursive=True)


def test_megatron_files_behind_a_url_are_read_as_local_ones(tmp_path, corpus, expected, bytes_tokenizer):
    (tmp_path / "local").mkdir()
    write_ids_megatron(tmp_path / "local", _ids(corpus, bytes_tokenizer))
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/local/", "/remote/", recursive=True)
    try:
        cache = open_cache(_config(tmp_path, "memory://remote/c.bin"), bytes_tokenizer)
        assert _bytes(cache)[0] == expected[0]
    finally:
        memory.rm("/remote", recursive=True)


def test_a_remote_file_that_changes_makes_another_cache(tmp_path, bytes_tokenizer):
    memory = fsspec.filesystem("memory")
    made = set()
    for text in ("one", "two"):
        memory.pipe("/changing/a.txt", text.encode())
        made.add(open_cache(_config(tmp_path, "memory://changing/*.txt"), bytes_tokenizer).directory)
    memory.rm("/changing", recursive=True)
    assert len(made) == 2


class _Blocks(fsspec.AbstractFileSystem):
    """Files read by ranges of bytes, as object stores give them; everything else of a file is fsspec's own."""

    protocol = "blocks"
    files: ClassVar[dict[str, bytes]] = {}

    def ls(self, path, detail=True, **_):
        found = [{"name": name, "size": len(content), "type": "file"} for name, content in self.files.items()]
        found = [entry for entry in found if entry["name"].startswith(path)]
        return found if detail else [entry["name"] for entry in found]

    def _open(self, path, mode="rb", **options):
        return _Block(self, path, mode, **options)


class _Block(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        return self.fs.files[self.path][start:end]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "csv", "parquet", "arrow file", "arrow stream"])
def test_files_that_are_fetched_by_ranges_are_read_as_local_ones(
    tmp_path, corpus, expected, bytes_tokenizer, monkeypatch, kind
):
    monkeypatch.setattr(shards, "_LEAST_BYTES", 700)
    fsspec.register_implementation("blocks", _Blocks, clobber=True)
    path = Path(TEXTS[kind](tmp_path, corpus))
    monkeypatch.setattr(_Blocks, "files", {path.name: path.read_bytes()})
    assert _bytes(open_cache(_config(tmp_path, f"blocks://{path.name}"), bytes_tokenizer)) == expected


@pytest.mark.parametrize("kind", ["parquet", "arrayrecord", "shuffled dataset"])
def test_processes_share_a_file_of_any_format(tmp_path, corpus, expected, bytes_tokenizer, monkeypatch, kind):
    monkeypatch.setattr(shards, "_LEAST_BYTES", 700)
    config = _config(tmp_path, TEXTS[kind](tmp_path, corpus), workers=2)
    assert _bytes(open_cache(config, bytes_tokenizer)) == expected


@pytest.mark.parametrize(
    "url, said",
    [
        ("memory://nowhere/*.txt", "no file matches 'memory://nowhere/\\*.txt'"),
        ("gopher://host/*.txt", "cannot be read: Protocol not known: gopher"),
        ("dropbox://folder/*.txt", "cannot be read: .*dropbox"),
    ],
)
def test_a_url_that_leads_nowhere_is_one_line(tmp_path, bytes_tokenizer, url, said):
    with pytest.raises(ValueError, match=said) as error:
        open_cache(_config(tmp_path, url), bytes_tokenizer)
    assert "\n" not in str(error.value)


# Bad input ------------------------------------------------------------------------------------------------------------


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
        open_cache(_config(tmp_path, path), bytes_tokenizer)
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
        open_cache(_config(tmp_path, path), bytes_tokenizer)


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
        open_cache(_config(tmp_path, path, tokens_field=tokens_field), bytes_tokenizer)


def test_a_column_named_twice_is_refused(tmp_path, bytes_tokenizer):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pa.ipc.new_stream(tmp_path / "c.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "c.csv").write_text("text,text\na,b\n")
    for name in ("c.arrow", "c.csv"):
        with pytest.raises(ValueError, match=f"{name}: 2 columns 'text'; "):
            open_cache(_config(tmp_path, f"{tmp_path}/{name}"), bytes_tokenizer)


@pytest.mark.parametrize("kind", TABLES)
def test_rows_that_are_no_document_are_named_by_their_number_and_the_rest_is_kept(tmp_path, bytes_tokenizer, kind):
    text = pa.array([b"good", None, b"\xff\xfe", b" \n", b"fine"], pa.binary()).view(pa.string())
    path = TABLES[kind](tmp_path, text=text)
    manifest = open_cache(_config(tmp_path, path), bytes_tokenizer).manifest
    assert (manifest.documents, manifest.skipped, manifest.empty) == (2, 2, 1)
    assert manifest.skipped_names == (f"{path}:1: 'text' is null, not text", f"{path}:2: not UTF-8 (byte 0)")
    with pytest.raises(ValueError, match=f"^{path}:1: 'text' is null, not text$"):
        open_cache(_config(tmp_path, path, on_bad_text="error"), bytes_tokenizer)


@pytest.mark.parametrize("cut_to", [None, 100])
def test_a_rows_number_is_the_files_whatever_the_pieces(tmp_path, bytes_tokenizer, monkeypatch, cut_to):
    if cut_to is not None:
        monkeypatch.setattr(shards, "_LEAST_BYTES", cut_to)
    table = pa.table({"text": [None if number % 10 == 9 else "some text" for number in range(50)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    with pa.ipc.new_stream(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    manifest = open_cache(_config(tmp_path, f"{tmp_path}/[ab].*"), bytes_tokenizer).manifest
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
    cache = open_cache(_config(tmp_path, path, tokens_field="input_ids"), bytes_tokenizer)
    first = {"jsonl": 1, "csv": 2}.get(kind, 0)  # lines count from 1 on, and the header is one
    assert _documents(cache) == [[5, 6, 257], [7, 257]]
    assert cache.manifest.empty == 1
    places = [name.removeprefix(path) for name in cache.manifest.skipped_names]
    assert places[0] == f":{first + 1}: 'input_ids' is null, not a list of whole numbers"
    assert places[1].startswith(f":{first + 2}: 'input_ids' ")
    assert places[2:] == [
        f":{first + 4}: id 259 is not one of the tokenizer's 259 ids",
        f":{first + 5}: id -1 is not one of the tokenizer's 259 ids",
    ]


def test_ids_in_array_records_must_be_whole_and_of_a_named_type(tmp_path, bytes_tokenizer):
    path = _write_records(tmp_path, [np.array([5, 6], "<u2").tobytes(), b"odd", np.array([5, 999], "<u2").tobytes()])
    cache = open_cache(_config(tmp_path, path, tokens_field="uint16"), bytes_tokenizer)
    assert _documents(cache) == [[5, 6, 257]]
    assert cache.manifest.skipped_names == (
        f"{path}:1: 3 bytes are no whole number of 2-byte ids",
        f"{path}:2: id 999 is not one of the tokenizer's 259 ids",
    )
    with pytest.raises(ValueError, match=r"no field 'input_ids'; .*: uint16, uint32, int32, int64$"):
        open_cache(_config(tmp_path, path, tokens_field="input_ids"), bytes_tokenizer)


def test_text_files_have_no_field_of_ids(tmp_path, bytes_tokenizer):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="a text file has no field 'input_ids'"):
        open_cache(_config(tmp_path, f"{tmp_path}/a.txt", tokens_field="input_ids"), bytes_tokenizer)


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
        open_cache(_config(tmp_path, f"{tmp_path}/c.csv"), bytes_tokenizer)


def test_rows_of_csv_that_are_no_document_are_named_by_their_line(tmp_path, bytes_tokenizer):
    path = tmp_path / "c.csv"
    path.write_bytes(
        b'\xef\xbb\xbfid,text\n1,"two\nlines"\n\n2\n3,a,b\n4,caf\xe9\n5,"x"y\n6,fine\n7,"never closed\n8,z\n'
    )
    cache = open_cache(_config(tmp_path, str(path)), bytes_tokenizer)
    assert [bytes_tokenizer.decode(ids) for ids in _documents(cache)] == ["two\nlines", "fine"]
    assert cache.manifest.skipped_names == (
        f"{path}:5: fields: 1, but the header has 2",
        f"{path}:6: fields: 3, but the header has 2",
        f"{path}:7: not UTF-8",
        f"{path}:8: not CSV (',' expected after '\"')",
        f"{path}:10: not CSV (unexpected end of data)",
    )


def test_a_field_of_csv_may_be_as_long_as_a_book(tmp_path, bytes_tokenizer):
    cache = open_cache(_config(tmp_path, write_csv(tmp_path, ["word " * 100_000])), bytes_tokenizer)
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
    manifest = open_cache(_config(tmp_path, str(packed)), bytes_tokenizer).manifest
    assert manifest.documents > 20
    (name,) = manifest.skipped_names
    assert name.startswith(f"{packed}:{manifest.documents + 2}: damaged compressed data")


@pytest.mark.parametrize("name", ["c.csv", "c.jsonl", "c.txt"])
def test_an_empty_file_has_no_document(tmp_path, bytes_tokenizer, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"no document in '.*{name}'"):
        open_cache(_config(tmp_path, f"{tmp_path}/{name}"), bytes_tokenizer)


@pytest.mark.parametrize(
    "name, content",
    [("state.json", b"{"), ("dataset_info.json", b"{"), ("data-00000-of-00001.arrow", b"short")],
)
def test_a_damaged_saved_dataset_is_one_line(tmp_path, corpus, bytes_tokenizer, name, content):
    path = write_saved(tmp_path, corpus)
    (Path(path) / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: ") as error:
        open_cache(_config(tmp_path, path), bytes_tokenizer)
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
        open_cache(_config(tmp_path, path), bytes_tokenizer)


def test_without_fsspec_a_url_says_how_to_get_it(tmp_path, bytes_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ValueError, match=r"^s3://b/x.txt: reading it needs fsspec: pip install 'jaxformers\[data\]'$"):
        open_cache(_config(tmp_path, "s3://b/x.txt"), bytes_tokenizer)


def test_a_tokenizer_is_not_trained_on_ready_ids(tmp_path, bytes_tokenizer):
    path, field = write_ids_jsonl(tmp_path, [[1, 2]])
    with pytest.raises(ValueError, match="names ready ids: set"):
        build_tokenizer(TokenizerConfig(), _config(tmp_path, path, tokens_field=field))


def test_a_tokenizer_is_trained_alike_on_any_format(tmp_path, corpus):
    made = set()
    for kind in ("jsonl", "parquet", "saved dataset"):
        (tmp_path / kind).mkdir()
        config = _config(tmp_path / kind, TEXTS[kind](tmp_path / kind, corpus))
        made.add(build_tokenizer(TokenizerConfig(vocab_size=300), config).fingerprint)
    assert len(made) == 1


def test_a_format_may_be_said_where_the_name_does_not(tmp_path, corpus, expected, bytes_tokenizer):
    Path(write_parquet(tmp_path, corpus)).rename(tmp_path / "part-0001")
    config = _config(tmp_path, f"{tmp_path}/part-*", format="parquet")
    assert _bytes(open_cache(config, bytes_tokenizer)) == expected


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
    open_cache(_config(tmp_path, f"{tmp_path}/[abcd]/*"), bytes_tokenizer)
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
