"""Checksums of a folder of files: written into it once it is complete, and compared before it is read.

A flipped bit, a short, missing, foreign or exchanged file is found and named. The checksums tell damage, not malice.
Knows nothing of what the files hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

CHECKSUMS = "checksums.json"
_ALGORITHM = "xxh3_128_chunks"
_CHUNK_BYTES = 1 << 26  # of a file, which threads read at the same time; part of what a checksum means
_BLOCK_BYTES = 1 << 20
_THREADS = 4


def write_checksums(folder: Path) -> None:
    """Writes `checksums.json`: size and XXH3-128 of every file below `folder`, and one of that list itself.

    The file appears complete or not at all. OSError where something cannot be read or written.
    """
    files = _measured(folder, _files_below(folder))
    for found in files.values():
        if isinstance(found, OSError):
            raise found
    content = {"algorithm": _ALGORITHM, "files": files, "list": _list_checksum(files)}
    temporary = folder / f".{CHECKSUMS}.{os.getpid()}"
    with temporary.open("w", encoding="utf-8") as out:
        json.dump(content, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, folder / CHECKSUMS)


def find_damage(folder: Path, *, contents: bool = True) -> list[str]:
    """What is wrong with the files of a folder, each named in a few words; empty where all is as it was written.

    contents: whether the files are read, and not only their names and sizes compared.
    """
    try:
        expected = _read_list(folder / CHECKSUMS)
    except FileNotFoundError:
        return [f"{CHECKSUMS} is missing"]
    except (OSError, ValueError) as error:
        return [f"{CHECKSUMS} is damaged ({error})"]
    try:
        present = set(_files_below(folder))
    except OSError as error:
        return [f"its files cannot be listed ({error.strerror or error})"]
    both = sorted(present & expected.keys())
    found = _measured(folder, both) if contents else {name: _size(folder / name, expected[name][1]) for name in both}
    damage = [f"{name} is missing" for name in sorted(expected.keys() - present)]
    damage += [f"{name} does not belong there" for name in sorted(present - expected.keys())]
    return damage + [f"{name} {said}" for name, now in found.items() if (said := _difference(now, expected[name]))]


def _difference(now: list[Any] | OSError, then: list[Any]) -> str | None:
    """How a measured file differs from what was listed of it."""
    if isinstance(now, OSError):
        return f"cannot be read ({now.strerror or now})"
    if now[0] != then[0]:
        return f"has {now[0]} bytes, not {then[0]}"
    return None if now == then else "has changed"


def _size(path: Path, checksum: str) -> list[Any] | OSError:
    """[size in bytes, the given checksum] of a file that is not read."""
    try:
        return [path.stat().st_size, checksum]
    except OSError as error:
        return error


def _files_below(folder: Path) -> list[str]:
    """Names relative to the folder, sorted, without those of the checksums."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in files if name != CHECKSUMS and not name.startswith(f".{CHECKSUMS}."))


def _measured(folder: Path, names: list[str]) -> dict[str, list[Any] | OSError]:
    """[size in bytes, checksum of its chunks' checksums] of each file, or why it cannot be read."""
    with ThreadPoolExecutor(_THREADS) as threads:
        parts = {name: [threads.submit(_chunk, folder / name, i) for i in _starts(folder / name)] for name in names}
        return {name: _joined(chunks) for name, chunks in parts.items()}


def _starts(path: Path) -> range:
    """Where the chunks of a file begin; there is a first one in any case, which is read to find out why."""
    try:
        return range(0, max(path.stat().st_size, 1), _CHUNK_BYTES)
    except OSError:
        return range(1)


def _chunk(path: Path, start: int) -> tuple[int, bytes]:
    digest, left, buffer = xxhash.xxh3_128(), _CHUNK_BYTES, memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while count := file.readinto(buffer[:left]):
            digest.update(buffer[:count])
            left -= count
    return _CHUNK_BYTES - left, digest.digest()


def _joined(chunks: list[Future[tuple[int, bytes]]]) -> list[Any] | OSError:
    try:
        sizes, digests = zip(*(chunk.result() for chunk in chunks), strict=True)
    except OSError as error:
        return error
    return [sum(sizes), xxhash.xxh3_128(b"".join(digests)).hexdigest()]


def _list_checksum(files: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _read_list(path: Path) -> dict[str, list[Any]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.keys() != {"algorithm", "files", "list"}:
        raise ValueError("it has other keys than it was written with")
    if content["algorithm"] != _ALGORITHM:
        raise ValueError(f"its algorithm is {content['algorithm']!r}, not {_ALGORITHM}")
    if not isinstance(content["files"], dict) or content["list"] != _list_checksum(content["files"]):
        raise ValueError("its list of files has changed")
    return content["files"]
