"""Megatron's indexed datasets: written here from the format's description, read by ours, in order and in pieces."""

from pathlib import Path

import numpy as np
import pytest
from data.megatron import CODES, index_bytes, write_megatron

from jaxformers.data.cache import open_cache
from jaxformers.data.config import DataConfig
from jaxformers.data.records import SourceFile
from jaxformers.data.sources import cut, find_files, read

DOCUMENTS = [[[1, 2, 3]], [[4], [5, 6], [7]], [], [[]], [[8, 9], []], [[100, 101, 102, 103]]]
JOINED = [[1, 2, 3], [4, 5, 6, 7], [], [], [8, 9], [100, 101, 102, 103]]


def _documents(path: Path | str, *, size: int | None = None) -> list[list[int]]:
    (file,) = find_files([str(path)])
    pieces = cut(file if size is None else SourceFile(file.path, 1000, 0, file.format), size or 1 << 20)
    return [record.ids.tolist() for piece in pieces for record in read(piece)]


@pytest.mark.parametrize("dtype", [name for name in CODES if "float" not in name])
def test_ids_of_every_type_come_back_by_document(tmp_path, dtype):
    write_megatron(tmp_path / "c", DOCUMENTS, dtype=dtype)
    assert _documents(tmp_path / "c.bin") == JOINED


@pytest.mark.parametrize("size", [100, 300, 1000])
def test_pieces_are_ranges_of_documents(tmp_path, size):
    write_megatron(tmp_path / "c", DOCUMENTS)
    assert _documents(tmp_path / "c.bin", size=size) == JOINED


def test_many_documents_are_read_over_several_reads_of_the_index(tmp_path):
    documents = [[[n % 251], [n // 251] * (n % 3)] for n in range(10_000)]
    write_megatron(tmp_path / "c", documents, dtype="uint8")
    assert _documents(tmp_path / "c.bin") == [[*first, *second] for first, second in documents]


def test_sequences_may_lie_anywhere_in_the_file(tmp_path):
    (tmp_path / "c.bin").write_bytes(np.arange(10, dtype="<i4").tobytes())
    content = index_bytes(lengths=[2, 3, 2], pointers=[20, 0, 20], boundaries=[0, 2, 3])
    (tmp_path / "c.idx").write_bytes(content)
    assert _documents(tmp_path / "c.bin") == [[5, 6, 0, 1, 2], [5, 6]]


@pytest.mark.parametrize("name", ["c.bin", "c.idx", "c.*"])
def test_either_file_names_the_pair(tmp_path, name):
    write_megatron(tmp_path / "c", DOCUMENTS)
    (file,) = find_files([f"{tmp_path}/{name}"])
    assert (file.path, file.format) == (f"{tmp_path}/c.bin", "megatron")


def test_a_prefix_names_the_pair_where_the_format_is_said(tmp_path):
    write_megatron(tmp_path / "c_text_document", DOCUMENTS)
    (file,) = find_files([f"{tmp_path}/c_text_document"], format="megatron")
    assert file.path == f"{tmp_path}/c_text_document.bin"


def test_a_changed_index_makes_another_cache(tmp_path, bytes_tokenizer):
    write_megatron(tmp_path / "c", [[[1, 2, 3, 4]]])
    config = DataConfig(paths=f"{tmp_path}/c.bin", cache_dir=tmp_path / "cache", workers=1)
    assert open_cache(config, bytes_tokenizer).lengths.tolist() == [5]
    (tmp_path / "c.idx").write_bytes(index_bytes(lengths=[2, 2], pointers=[0, 8], boundaries=[0, 1, 2]))
    assert open_cache(config, bytes_tokenizer).lengths.tolist() == [3, 3]


@pytest.mark.parametrize("dtype, ids", [("int32", [5, -1]), ("int64", [5, 2**62]), ("uint16", [5, 259])])
def test_ids_outside_of_the_vocabulary_are_named_by_their_document(tmp_path, bytes_tokenizer, dtype, ids):
    write_megatron(tmp_path / "c", [[[7]], [[5], ids], [[]], [[8]]], dtype=dtype)
    config = DataConfig(paths=f"{tmp_path}/c.bin", cache_dir=tmp_path / "cache", workers=1)
    manifest = open_cache(config, bytes_tokenizer).manifest
    assert (manifest.documents, manifest.empty) == (2, 1)
    (name,) = manifest.skipped_names
    assert name == f"{tmp_path}/c.bin:1: id {ids[1]} is not one of the tokenizer's 259 ids"


GOOD = {"lengths": [2, 3, 1], "pointers": [0, 8, 20], "boundaries": [0, 1, 3]}
BAD = {
    "empty": (b"", r"not a Megatron index: it begins with b'', not b'MMIDIDX"),
    "another file": (b"PAR1" * 20, r"not a Megatron index: it begins with b'PAR1PAR1P', not b'MMIDIDX"),
    "an older magic": (
        index_bytes(**GOOD, magic=b"TNTIDX\x00\x00\x00"),
        "not a Megatron index: it begins with b'TNTIDX",
    ),
    "half a magic": (b"MMIDI", "a Megatron index of 5 bytes, fewer than the 34 of its header"),
    "half a header": (index_bytes(**GOOD)[:20], "a Megatron index of 20 bytes, fewer than the 34 of its header"),
    "version": (index_bytes(**GOOD, version=2), "version 2 of Megatron's index; only version 1 is known"),
    "type": (index_bytes(**GOOD, code=9), "unknown code 9 for the type of its ids; known are 1 uint8, 2 int8"),
    "floats": (index_bytes(**GOOD, code=7), "holds float32, not ids of tokens"),
    "doubles": (index_bytes(**GOOD, code=6), "holds float64, not ids of tokens"),
    "cut short": (
        index_bytes(**GOOD)[:-3],
        "3 sequences and 3 document boundaries take 94 bytes, but the file has 91$",
    ),
    "more than it says": (index_bytes(**GOOD) + b"x", "take 94 bytes, but the file has 95$"),
    "modes": (index_bytes(**GOOD) + b"\x00\x01\x00", r"has 97 \(an index of several modalities is not read\)"),
    "absurd counts": (
        index_bytes(**GOOD, counts=(2**63, 2**62)),
        f"{2**63} sequences and {2**62} document boundaries take {34 + 12 * 2**63 + 8 * 2**62} bytes, but the file has",
    ),
    "no boundaries": (
        index_bytes(lengths=[2], pointers=[0], boundaries=[]),
        "its document boundaries do not go from 0 to its 1 sequences",
    ),
    "boundaries end early": (
        index_bytes(**{**GOOD, "boundaries": [0, 1, 2]}),
        "its document boundaries do not go from 0 to its 3 sequences",
    ),
    "boundaries begin late": (
        index_bytes(**{**GOOD, "boundaries": [1, 2, 3]}),
        "its document boundaries do not go from 0 to its 3 sequences",
    ),
    "boundaries fall": (
        index_bytes(**{**GOOD, "boundaries": [0, 2, 1, 3]}),
        "document boundaries 0 to 3 do not rise within its sequences",
    ),
    "boundaries fall by more than an integer holds": (
        index_bytes(**{**GOOD, "boundaries": [0, 2**63 - 1, -2, 3]}),
        "document boundaries 0 to 3 do not rise within its sequences",
    ),
    "boundaries beyond": (
        index_bytes(**{**GOOD, "boundaries": [0, 2**62, 3]}),
        "document boundaries 0 to 2 do not rise within its sequences",
    ),
    "negative length": (
        index_bytes(**{**GOOD, "lengths": [2, -3, 1]}),
        "sequence 1 has -3 ids from byte 8 on, in a file of 24 bytes",
    ),
    "absurd length": (
        index_bytes(**{**GOOD, "lengths": [2, 3, 2**31 - 1]}),
        "sequence 2 has 2147483647 ids from byte 20 on, in a file of 24 bytes",
    ),
    "negative pointer": (
        index_bytes(**{**GOOD, "pointers": [0, -8, 20]}),
        "sequence 1 has 3 ids from byte -8 on, in a file of 24 bytes",
    ),
    "absurd pointer": (
        index_bytes(**{**GOOD, "pointers": [0, 8, 2**63 - 1]}),
        "sequence 2 has 1 ids from byte 9223372036854775807 on, in a file of 24 bytes",
    ),
}


def test_the_index_that_is_damaged_below_is_good_before(tmp_path):
    (tmp_path / "c.bin").write_bytes(np.arange(6, dtype="<i4").tobytes())
    (tmp_path / "c.idx").write_bytes(index_bytes(**GOOD))
    assert _documents(tmp_path / "c.bin") == [[0, 1], [2, 3, 4, 5]]


@pytest.mark.parametrize("content, said", BAD.values(), ids=BAD.keys())
def test_a_damaged_index_is_one_line(tmp_path, content, said):
    (tmp_path / "c.bin").write_bytes(np.arange(6, dtype="<i4").tobytes())
    (tmp_path / "c.idx").write_bytes(content)
    with pytest.raises(ValueError, match=f"c.idx: .*{said}") as error:
        _documents(tmp_path / "c.bin")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [0, 10, 23])
def test_ids_that_were_cut_short_are_one_line(tmp_path, kept):
    write_megatron(tmp_path / "c", [[[1, 2]], [[3, 4, 5], [6]]])
    (tmp_path / "c.bin").write_bytes((tmp_path / "c.bin").read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"sequence \d has \d ids from byte \d+ on, in a file of {kept} bytes"):
        _documents(tmp_path / "c.bin")


@pytest.mark.parametrize("there, missing", [("bin", "idx"), ("idx", "bin")])
def test_one_file_without_the_other_is_named(tmp_path, there, missing):
    write_megatron(tmp_path / "c", DOCUMENTS)
    (tmp_path / f"c.{missing}").unlink()
    said = f"c.{there}: a Megatron dataset is a .bin and an .idx, but {tmp_path}/c.{missing} cannot be read"
    with pytest.raises(ValueError, match=said):
        find_files([f"{tmp_path}/c.{there}"])
