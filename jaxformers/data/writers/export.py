"""A token cache as a directory in another format, written file by file, with a manifest that says what it is.

Each file appears complete and is noted with its checksum in manifest.partial.json, so a killed export goes on behind
the files it finished; manifest.json is there once all are. A directory that holds anything else is never written into.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock

from jaxformers.data.cache import SOURCES, TokenCache
from jaxformers.data.shards import sha256_of
from jaxformers.data.sources import SourceFile
from jaxformers.data.writers.arrayrecord import write_arrayrecord
from jaxformers.data.writers.megatron import megatron_dtype, write_megatron_index, write_megatron_tokens

ExportFormat = Literal["arrayrecord", "megatron"]

_MANIFEST, _JOURNAL, _LOCK = "manifest.json", "manifest.partial.json", ".lock"
_UNFINISHED = ".tmp"  # and no process number: what a kill leaves behind is written over
_VERSION = 1
_RECORD_FILE_TOKENS = 1 << 28  # of an .arrayrecord file, about
_Write = Callable[[Path], None]


@dataclass(frozen=True)
class ExportManifest:
    """What an export holds. `corpus` names the cache it was made from: source files, tokenizer and settings decide it.

    `bytes` counts the documents' text as UTF-8, `files` maps a name to its size and SHA-256. sources.jsonl, beside it,
    lists the source files.
    """

    version: int
    format: ExportFormat
    corpus: str
    tokenizer: str
    vocab_size: int
    eos_id: int
    token_dtype: str
    documents: int
    tokens: int
    bytes: int
    source_files: int
    empty: int
    skipped: int
    skipped_names: tuple[str, ...]
    files: dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Origin:
    """What an export is of: the name of its cache, and, to say what differs, the tokenizer and the files behind it."""

    corpus: str
    tokenizer: str
    sources: Sequence[SourceFile]


def find_export(directory: Path, to: ExportFormat, origin: Origin, *, thorough: bool = False) -> ExportManifest | None:
    """The finished export in a directory, None where there is none yet.

    Its files are checked by their size; by their checksum, which takes long, only where `thorough`.

    Raises:
        ValueError: the directory holds something else, or its files have changed.
    """
    manifest = _read(directory, _MANIFEST) or _read(directory, _JOURNAL)
    if manifest is None:
        found = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
        if foreign := sorted(found - {_LOCK, f"{_JOURNAL}{_UNFINISHED}"}):
            raise ValueError(f"{directory} holds {foreign[0]} and no manifest: choose another --output")
        return None
    _check_same(directory, manifest, to, origin)
    if not (directory / _MANIFEST).exists():
        return None
    for name, fact in manifest.files.items():
        if why := _damage(directory / name, fact, thorough=thorough):
            raise ValueError(f"{directory / name} {why} since it was written: delete {directory} to write it again")
    return manifest


def export(cache: TokenCache, directory: Path, to: ExportFormat, *, vocab_size: int, eos_id: int) -> ExportManifest:
    """Writes the export of a cache, or the rest of one; returns at once where it is whole.

    Raises:
        ValueError: as `find_export`; a document that the format cannot hold; a directory that cannot be written.
    """
    lines = (cache.directory / SOURCES).read_text(encoding="utf-8").splitlines()
    sources = [SourceFile(**json.loads(line)) for line in lines]
    origin = Origin(cache.directory.name, cache.manifest.tokenizer, sources)
    with _writing_to(directory), FileLock(directory / _LOCK):
        whole = find_export(directory, to, origin)
        if whole is None:
            whole = _write(cache, directory, _new_manifest(cache, to, vocab_size, eos_id))
        with contextlib.suppress(OSError):  # some systems keep a file that is open
            (directory / _LOCK).unlink()
    return whole


def _new_manifest(cache: TokenCache, to: ExportFormat, vocab_size: int, eos_id: int) -> ExportManifest:
    known = cache.manifest
    return ExportManifest(
        version=_VERSION,
        format=to,
        corpus=cache.directory.name,
        tokenizer=known.tokenizer,
        vocab_size=vocab_size,
        eos_id=eos_id,
        token_dtype=megatron_dtype(vocab_size) if to == "megatron" else known.token_dtype,
        documents=known.documents,
        tokens=known.tokens,
        bytes=known.bytes,
        source_files=known.source_files,
        empty=known.empty,
        skipped=known.skipped,
        skipped_names=known.skipped_names,
        files={},
    )


def _write(cache: TokenCache, directory: Path, manifest: ExportManifest) -> ExportManifest:
    before = _read(directory, _JOURNAL)
    kept = {} if before is None else before.files
    if before is None:
        _save(directory / _JOURNAL, manifest)  # says whose the files are that will lie here, finished or not
    for name, write in _plan(cache, manifest).items():
        fact = kept.get(name)
        if fact is None or _damage(directory / name, fact, thorough=True):
            fact = _write_file(directory / name, write)
        manifest = replace(manifest, files={**manifest.files, name: fact})
        _save(directory / _JOURNAL, manifest)
    _save(directory / _MANIFEST, manifest)
    (directory / _JOURNAL).unlink()
    return manifest


def _plan(cache: TokenCache, manifest: ExportManifest) -> Mapping[str, _Write]:
    """What to write under which name; the cache alone decides how documents are shared out among files."""
    sources: _Write = lambda path: path.write_bytes((cache.directory / SOURCES).read_bytes())  # noqa: E731
    dtype = manifest.token_dtype
    if manifest.format == "megatron":
        return {
            "tokens.bin": partial(write_megatron_tokens, cache=cache, dtype=dtype),
            "tokens.idx": partial(write_megatron_index, cache=cache, dtype=dtype),
            SOURCES: sources,
        }
    count = -(-len(cache.tokens) // _RECORD_FILE_TOKENS)
    goals = np.arange(1, count) * len(cache.tokens) // count
    bounds = [0, *np.searchsorted(cache.starts, goals).tolist(), len(cache.starts)]
    files: dict[str, _Write] = {}
    for number in range(count):
        name = f"tokens-{number:05d}-of-{count:05d}.arrayrecord"
        first, last = bounds[number], bounds[number + 1]
        files[name] = partial(write_arrayrecord, cache=cache, first=first, last=last, dtype=dtype)
    return {**files, SOURCES: sources}


def _write_file(path: Path, write: _Write) -> tuple[int, str]:
    """Its size and SHA-256."""
    temporary = path.with_name(f"{path.name}{_UNFINISHED}")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    fact = (temporary.stat().st_size, sha256_of(temporary))
    os.replace(temporary, path)
    return fact


def _damage(path: Path, fact: tuple[int, str], *, thorough: bool) -> str | None:
    try:
        if path.stat().st_size != fact[0] or (thorough and sha256_of(path) != fact[1]):
            return "has changed"
    except FileNotFoundError:
        return "has gone"
    return None


def _save(path: Path, manifest: ExportManifest) -> None:
    content = (json.dumps(asdict(manifest), indent=2) + "\n").encode()
    _write_file(path, lambda temporary: temporary.write_bytes(content))


def _read(directory: Path, name: str) -> ExportManifest | None:
    try:
        values = json.loads((directory / name).read_bytes())
        files = {file: (int(fact[0]), str(fact[1])) for file, fact in values.pop("files").items()}
        return ExportManifest(files=files, skipped_names=tuple(values.pop("skipped_names")), **values)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise ValueError(f"{directory / name} is not the manifest of an export: choose another --output") from None


def _check_same(directory: Path, manifest: ExportManifest, to: ExportFormat, origin: Origin) -> None:
    if manifest.version != _VERSION or manifest.format != to:
        found = f"holds {manifest.format} files (version {manifest.version}), not {to} (version {_VERSION})"
    elif manifest.tokenizer != origin.tokenizer:
        found = "was made with another tokenizer"
    elif manifest.corpus != origin.corpus:
        found = _difference(directory, origin.sources)
    else:
        return
    raise ValueError(f"{directory} {found}: choose another --output, or delete it")


def _difference(directory: Path, sources: Sequence[SourceFile]) -> str:
    """Why an export is not of these sources, where it was finished and can say so."""
    try:
        lines = (directory / SOURCES).read_text(encoding="utf-8").splitlines()
        before = {source["path"]: source for source in map(json.loads, lines)}
    except (OSError, ValueError, TypeError, KeyError):
        return "was made from other sources"
    now = {source.path: asdict(source) for source in sources}
    if gone := sorted(before.keys() - now.keys()):
        return f"was made from {gone[0]} too"
    if new := sorted(now.keys() - before.keys()):
        return f"was made without {new[0]}"
    if changed := sorted(path for path in now if now[path] != before[path]):
        return f"was made before {changed[0]} changed"
    return "was made with other settings of how to read its sources"


@contextmanager
def _writing_to(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ValueError(f"cannot write to {directory} ({error.strerror or error}): choose another --output") from error
