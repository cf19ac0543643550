"""Corpora in every format, each written by a library that knows nothing of ours."""

import csv
import gzip
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from data.megatron import write_megatron

from jaxformers.data.cache import TokenCache
from jaxformers.data.config import DataConfig


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def _table(texts: list[str]) -> pa.Table:
    return pa.table({"id": list(range(len(texts))), "text": texts})


def write_texts(folder: Path, texts: list[str]) -> str:
    for number, text in enumerate(texts):
        (folder / f"{number:05d}.txt").write_bytes(text.encode())
    return f"{folder}/*.txt"


def write_jsonl(folder: Path, texts: list[str]) -> str:
    (folder / "c.jsonl").write_bytes(lines_of(texts))
    return f"{folder}/c.jsonl"


def write_gzip(folder: Path, texts: list[str]) -> str:
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines_of(texts)))
    return f"{folder}/c.jsonl.gz"


def write_zstandard(folder: Path, texts: list[str]) -> str:
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines_of(texts)))
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
    return write_records(folder, [text.encode() for text in texts])


def write_records(folder: Path, records: list[bytes]) -> str:
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


datasets.disable_progress_bars()


def config_of(folder: Path, paths: str, **settings) -> DataConfig:
    return DataConfig(paths=paths, cache_dir=folder / "cache", **{"workers": 1, **settings})


def bytes_of(cache: TokenCache) -> tuple[bytes, bytes]:
    return tuple((cache.directory / name).read_bytes() for name in ("tokens.bin", "documents.bin"))


def documents_of(cache: TokenCache) -> list[list[int]]:
    return [
        cache.tokens[start : start + length].tolist() for start, length in zip(cache.starts, cache.lengths, strict=True)
    ]


def ids_of(corpus: list[str], tokenizer) -> list[list[int]]:
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
    return write_records(folder, [np.array(row, "<u4").tobytes() for row in ids]), "uint32"


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
