"""Tokenizing as a task of its own: every corpus of a config into its training cache, and from there into another format
where one is asked for. Finds what is there already. Knows no command line.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxformers.data.cache import (
    Manifest,
    Progress,
    damage_of,
    locate_cache,
    open_cache,
    read_manifest,
)
from jaxformers.data.config import DataConfig
from jaxformers.data.sources import files_of
from jaxformers.data.tokenizer import Tokenizer
from jaxformers.data.workers import Pool
from jaxformers.data.writers.export import ExportFormat, ExportManifest, Origin, export, find_export

Target = Literal["cache", "arrayrecord", "megatron"]


@dataclass(frozen=True)
class Tokenized:
    """A corpus as it now lies in `directory`; `existed` where it already did, whole. `name` is its name in the config,
    "" for a single one; `seconds` is what it took, not what it once cost."""

    name: str
    directory: Path
    manifest: Manifest | ExportManifest
    existed: bool
    seconds: float

    @property
    def bytes_per_token(self) -> float:
        return self.manifest.bytes / self.manifest.tokens


def tokenize(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    to: Target = "cache",
    output: Path | None = None,
    pool: Pool | None = None,
    progress: Callable[[str], Progress] | None = None,
    verify: bool = False,
) -> list[Tokenized]:
    """Tokenizes each corpus of a config that has not been, and says where it is and what it holds.

    Args:
        to: "cache" is what training opens; the others are written from it, into `output`.
        output: the folder of an export; with several sources, each has its own under its name.
        pool: who tokenizes; None: `config.workers` processes.
        progress: called with the name of a corpus for what is then told of it.
        verify: compare the checksum of every file with what is there already, instead of its size.

    Raises:
        ValueError: whatever is wrong with sources, tokenizer or folders, in one line.
    """
    if (output is None) != (to == "cache"):
        raise ValueError(
            f"--to {to} needs --output" if output is None else "the cache has its place: set data.cache_dir"
        )
    made = []
    for name, source in config.by_source().items():
        start = time.monotonic()
        told = progress(name) if progress is not None else None
        if output is None:
            found = _into_cache(source, tokenizer, pool, told, verify)
        else:
            found = _into_export(source, tokenizer, to, output / name, pool, told, verify)
        made.append(Tokenized(name, *found, seconds=time.monotonic() - start))
    return made


def _into_cache(
    config: DataConfig, tokenizer: Tokenizer, pool: Pool | None, progress: Progress | None, verify: bool
) -> tuple[Path, Manifest, bool]:
    directory = locate_cache(config, tokenizer)
    existed = damage_of(directory, thorough=verify) is None
    cache = open_cache(config, tokenizer, progress=progress, pool=pool, thorough=verify and not existed)
    return cache.directory, read_manifest(cache.directory), existed


def _into_export(
    config: DataConfig,
    tokenizer: Tokenizer,
    to: ExportFormat,
    output: Path,
    pool: Pool | None,
    progress: Progress | None,
    verify: bool,
) -> tuple[Path, ExportManifest, bool]:
    if config.chat.on:
        raise ValueError(f"--to {to} cannot say which tokens of conversations are learned: use --to cache")
    files = files_of(config)
    origin = Origin(locate_cache(config, tokenizer, files).name, tokenizer.fingerprint, files)
    there = find_export(output, to, origin, thorough=verify)
    if there is not None:
        return output, there, True
    cache = open_cache(config, tokenizer, progress=progress, pool=pool)
    assert tokenizer.eos_id is not None
    return output, export(cache, output, to, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id), False
