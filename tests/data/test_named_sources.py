"""Sources that are no local files: Hugging Face datasets, Python functions and URLs."""

import sys
from pathlib import Path
from typing import ClassVar

import datasets
import fsspec
import pytest
from data.writers import (
    TEXTS,
    bytes_of,
    config_of,
    documents_of,
    ids_of,
    lines_of,
    write_ids_megatron,
    write_saved,
)
from fsspec.spec import AbstractBufferedFile

from jaxformers.data import shards
from jaxformers.data.cache import open_cache


def _splits(folder: Path) -> str:
    made = {name: datasets.Dataset.from_dict({"text": [f"{name} {n}" for n in range(3)]}) for name in ("train", "test")}
    datasets.DatasetDict(made).save_to_disk(folder / "splits")
    return f"{folder}/splits"


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_of_a_saved_dictionary_is_read_row_by_row_as_datasets_does(tmp_path, bytes_tokenizer, split):
    path = _splits(tmp_path)
    cache = open_cache(config_of(tmp_path, path, split=split), bytes_tokenizer)
    rows = datasets.load_from_disk(path)[split]
    assert [bytes_tokenizer.decode(ids) for ids in documents_of(cache)] == [row["text"] for row in rows]


def test_a_saved_dataset_of_several_files_is_read_row_by_row_as_datasets_does(tmp_path, texts, bytes_tokenizer):
    made = datasets.Dataset.from_dict({"text": texts}).shuffle(seed=1).filter(lambda row: len(row["text"]) > 20)
    made.save_to_disk(tmp_path / "saved", num_shards=3)
    cache = open_cache(config_of(tmp_path, f"{tmp_path}/saved"), bytes_tokenizer)
    again = datasets.load_from_disk(tmp_path / "saved")
    assert [bytes_tokenizer.decode(ids) for ids in documents_of(cache)] == [row["text"] for row in again]


def test_a_named_dataset_is_what_datasets_loads_by_that_name(tmp_path, texts, bytes_tokenizer, monkeypatch):
    """A folder of data files stands for the hub, as it does for `datasets`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
    (tmp_path / "mine").mkdir()
    for split in ("train", "test"):
        (tmp_path / "mine" / f"{split}.jsonl").write_bytes(lines_of(texts if split == "train" else ["held out"]))
    config = config_of(tmp_path, f"{tmp_path}/mine", format="huggingface", split="train")
    rows = datasets.load_dataset(f"{tmp_path}/mine", split="train")
    cache = open_cache(config, bytes_tokenizer)
    assert [bytes_tokenizer.decode(ids) for ids in documents_of(cache)] == [row["text"] for row in rows] == texts
    with pytest.raises(ValueError, match=r"mine: set data.split to one of its splits: (train, test|test, train)$"):
        open_cache(config.model_copy(update={"split": None}), bytes_tokenizer)
    with pytest.raises(ValueError, match=r"data.split is 'train\[:2\]', which is not the name of a whole split$"):
        open_cache(config.model_copy(update={"split": "train[:2]"}), bytes_tokenizer)


def test_a_name_that_cannot_be_reached_is_one_line(tmp_path, bytes_tokenizer):
    with pytest.raises(ValueError, match="nobody/nothing: `datasets` cannot load it: ") as error:
        open_cache(config_of(tmp_path, "nobody/nothing", format="huggingface"), bytes_tokenizer)
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
        open_cache(config_of(tmp_path, _splits(tmp_path), split=split), bytes_tokenizer)


@pytest.mark.parametrize("format", ["auto", "huggingface"])
def test_a_glob_that_enters_a_saved_dictionary_still_reads_one_split(tmp_path, bytes_tokenizer, format):
    _splits(tmp_path)
    cache = open_cache(config_of(tmp_path, f"{tmp_path}/spl*/**", split="test", format=format), bytes_tokenizer)
    assert [bytes_tokenizer.decode(ids) for ids in documents_of(cache)] == ["test 0", "test 1", "test 2"]


def test_a_dataset_alone_has_no_other_split(tmp_path, bytes_tokenizer):
    path = write_saved(tmp_path, ["a"])
    with pytest.raises(ValueError, match="'test', but this is the dataset of one split alone"):
        open_cache(config_of(tmp_path, path, split="test"), bytes_tokenizer)


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
    config = config_of(tmp_path, f"{module}:{function}", format="python", workers=workers)
    assert bytes_of(open_cache(config, bytes_tokenizer)) == expected


@pytest.mark.parametrize("function, field", [("ids", None), ("fields", "input_ids")])
def test_a_function_may_give_ids(tmp_path, module, expected, bytes_tokenizer, function, field):
    config = config_of(tmp_path, f"{module}:{function}", format="python", tokens_field=field)
    assert bytes_of(open_cache(config, bytes_tokenizer))[0] == expected[0]


def test_items_that_are_no_documents_are_named_by_their_number(tmp_path, module, bytes_tokenizer):
    name = f"{module}:mixed"
    manifest = open_cache(config_of(tmp_path, name, format="python"), bytes_tokenizer).manifest
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
        open_cache(config_of(tmp_path, name.format(module=module), format="python"), bytes_tokenizer)
    assert name.format(module=module) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_functions_file_and_its_version_decide_whether_a_cache_is_still_good(tmp_path, module, bytes_tokenizer):
    config = config_of(tmp_path, f"{module}:stream", format="python")
    first = open_cache(config, bytes_tokenizer).directory
    assert open_cache(config, bytes_tokenizer).directory == first
    function = sys.modules[module].stream
    function.version = 2
    second = open_cache(config, bytes_tokenizer).directory
    (tmp_path / f"{module}.py").write_text((tmp_path / f"{module}.py").read_text() + "# changed\n")
    assert len({first, second, open_cache(config, bytes_tokenizer).directory}) == 3


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
        assert bytes_of(open_cache(config_of(tmp_path, url), bytes_tokenizer)) == expected
    finally:
        memory.rm("/remote", recursive=True)


def test_megatron_files_behind_a_url_are_read_as_local_ones(tmp_path, corpus, expected, bytes_tokenizer):
    (tmp_path / "local").mkdir()
    write_ids_megatron(tmp_path / "local", ids_of(corpus, bytes_tokenizer))
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/local/", "/remote/", recursive=True)
    try:
        cache = open_cache(config_of(tmp_path, "memory://remote/c.bin"), bytes_tokenizer)
        assert bytes_of(cache)[0] == expected[0]
    finally:
        memory.rm("/remote", recursive=True)


def test_a_remote_file_that_changes_makes_another_cache(tmp_path, bytes_tokenizer):
    memory = fsspec.filesystem("memory")
    made = set()
    for text in ("one", "two"):
        memory.pipe("/changing/a.txt", text.encode())
        made.add(open_cache(config_of(tmp_path, "memory://changing/*.txt"), bytes_tokenizer).directory)
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
    assert bytes_of(open_cache(config_of(tmp_path, f"blocks://{path.name}"), bytes_tokenizer)) == expected


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
        open_cache(config_of(tmp_path, url), bytes_tokenizer)
    assert "\n" not in str(error.value)
