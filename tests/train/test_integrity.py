"""Damage to a folder of files, each kind of it, is found and named."""

import json
import random

import pytest
from tiny import flip

from jaxformers.train.integrity import CHECKSUMS, find_damage, write_checksums


@pytest.fixture
def folder(tmp_path):
    draw = random.Random(0)
    sizes = {"state/d/0a": 9000, "state/d/0b": 9000, "state/manifest": 300, "data/metadata": 41, "meta/empty": 0}
    for name, size in sizes.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw.randbytes(size))
    write_checksums(tmp_path)
    return tmp_path


def test_whole_files_have_no_damage_and_are_listed_with_their_sizes(folder):
    assert find_damage(folder) == []
    listed = json.loads((folder / CHECKSUMS).read_text())["files"]
    assert {name: size for name, (size, _) in listed.items()} == {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and path.name != CHECKSUMS
    }


def test_a_thousand_single_bits_that_flip_are_each_found_and_named(folder):
    draw = random.Random(1)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    for _ in range(1000):
        path = draw.choice(files)
        bit = draw.randrange(8 * path.stat().st_size)
        flip(path, bit)
        damage = find_damage(folder)
        assert damage, f"bit {bit} of {path}"
        assert all(path.name in line for line in damage), damage
        flip(path, bit)
    assert find_damage(folder) == []


@pytest.mark.parametrize(
    "harm, named",
    [
        (lambda f: (f / "state/d/0a").write_bytes(b""), ["state/d/0a has 0 bytes, not 9000"]),
        (lambda f: (f / "data/metadata").unlink(), ["data/metadata is missing"]),
        (lambda f: (f / "state/d/0c").write_bytes(b"new"), ["state/d/0c does not belong there"]),
        (lambda f: (f / CHECKSUMS).unlink(), [f"{CHECKSUMS} is missing"]),
        (lambda f: (f / "meta/empty").write_bytes(b"x"), ["meta/empty has 1 bytes, not 0"]),
    ],
)
def test_files_that_are_short_long_missing_or_foreign_are_named(folder, harm, named):
    harm(folder)
    assert find_damage(folder) == named


def test_two_files_that_changed_places_are_named(folder):
    first, second = folder / "state/d/0a", folder / "state/d/0b"
    first.rename(folder / "between")
    second.rename(first)
    (folder / "between").rename(second)
    assert find_damage(folder) == ["state/d/0a has changed", "state/d/0b has changed"]


@pytest.mark.parametrize(
    "content, reason",
    [
        ("", "Expecting value"),
        ("[]", "it has other keys than it was written with"),
        ('{"algorithm": "xxh3_128_chunks", "files": {}, "list": ""}', "its list of files has changed"),
        ('{"algorithm": "md5", "files": {}, "list": ""}', "its algorithm is 'md5', not xxh3_128"),
    ],
)
def test_a_damaged_list_of_checksums_is_damage(folder, content, reason):
    (folder / CHECKSUMS).write_text(content)
    [line] = find_damage(folder)
    assert line.startswith(f"{CHECKSUMS} is damaged ({reason}")


def test_a_change_in_any_chunk_of_a_large_file_is_found(folder, monkeypatch):
    monkeypatch.setattr("jaxformers.train.integrity._CHUNK_BYTES", 1000)
    write_checksums(folder)
    large = folder / "state/d/0a"
    for bit in range(1, 8 * 9000, 8 * 999):
        flip(large, bit)
        assert find_damage(folder) == ["state/d/0a has changed"]
        flip(large, bit)
    content = large.read_bytes()
    large.write_bytes(content[1000:2000] + content[:1000] + content[2000:])
    assert find_damage(folder) == ["state/d/0a has changed"]
    large.write_bytes(content[:-1])
    assert find_damage(folder) == ["state/d/0a has 8999 bytes, not 9000"]
    large.write_bytes(content)
    assert find_damage(folder) == []
