"""The token cache: a corpus as one memory-mapped file of ids and one row of facts per document; of conversations, with
a byte a token that says whether it is learned, and the origin of each.

It is built once, keyed by what decides its content, and appears under its final name only when it is complete. The key
takes each file's path, size and time of modification instead of a hash of its content, because hashing would read a
whole corpus at every start; a copy with new times is tokenized anew, which costs time and never correctness.
Knows no rows: how documents are packed, shuffled or split is decided when the cache is opened, not when it is built.
"""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from jaxformers.data import shards
from jaxformers.data.chat_templates import with_chat_template
from jaxformers.data.config import DataConfig
from jaxformers.data.copies import copies
from jaxformers.data.dialogues import ORIGIN, UNITS
from jaxformers.data.encoding import DOCUMENT
from jaxformers.data.home import cache_root
from jaxformers.data.shards import Job
from jaxformers.data.sources import BadRecord, SourceFile, files_of, name_of
from jaxformers.data.tokenizer import Tokenizer
from jaxformers.data.workers import LocalPool, Pool, Step, usable_cores

Progress = Callable[[int, int], None]  # (done, total), in bytes of source files

_VERSION = 2  # of the layout on disk and of everything that decides the ids
_NAMES_KEPT = 100
TOKENS, DOCUMENTS, SOURCES = "tokens.bin", "documents.bin", "sources.jsonl"
MANIFEST, TOKENIZER = "manifest.json", "tokenizer"
LEARNED, ORIGINS = "learned.bin", "origins.bin"  # of conversations only
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Manifest:
    """What a cache holds; `bytes` counts the documents' text as UTF-8, `files` maps a name to its size and SHA-256.

    Beside it, sources.jsonl says which files the documents are from, and tokenizer/ holds what made their ids.
    """

    version: int
    tokenizer: str
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
class TokenCache:
    """Documents as ids: document d is `tokens[starts[d] : starts[d] + lengths[d]]`; the last id of a text is the
    end-of-text id, that of a conversation what its chat template ends with.

    Attributes:
        tokens: uint16 or uint32 [tokens], memory-mapped.
        starts, lengths, sizes: int64 [documents]; where each begins, its tokens, and the bytes of its text.
        hashes: uint64 [documents]; of each document's text, or of its ids where it came as ids.
        learned: uint8 [tokens], memory-mapped; 1 where a token is to be learned. None: all are, as there is no
            conversation.
        origins: rows of `dialogues.ORIGIN` [documents], None likewise.
    """

    directory: Path
    manifest: Manifest
    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    hashes: np.ndarray
    learned: np.ndarray | None = None
    origins: np.ndarray | None = None

    @property
    def settings(self) -> str:
        """Equal where equal hashes and lengths of documents mean equal ids, and equal tokens to learn."""
        # A conversation's hash says nothing of the template and of what is learned: the checksums of both files do.
        if self.learned is None:
            return self.manifest.tokenizer
        return " ".join([self.manifest.tokenizer, *(self.manifest.files[name][1] for name in (TOKENS, LEARNED))])

    def name_of(self, document: int) -> str:
        """`path:row` of the record that a conversation was in."""
        assert self.origins is not None
        origin = self.origins[document]
        lines = (self.directory / SOURCES).read_text(encoding="utf-8").splitlines()
        path = json.loads(lines[int(origin["file"])])["path"]
        unit = UNITS[int(origin["unit"])]
        return name_of(BadRecord(path, int(origin["offset"]), "", unit)).removesuffix(": ")


def open_cache(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    progress: Progress | None = None,
    pool: Pool | None = None,
    thorough: bool = False,
) -> TokenCache:
    """The tokenized corpus of a config, built first where there is none yet or where its files are damaged.

    Processes that open the same corpus wait for the one that builds it; `progress` is called only there. `pool` is who
    tokenizes, by default `config.workers` processes of this machine; it has no part in what comes out. `thorough` is
    whether to read the ids, too, to see that they have not changed.

    Raises:
        ValueError: no such files, no document in them, a record that `on_bad_text: error` refuses, a tokenizer with no
            end-of-text token, a cache folder that cannot be written.
    """
    files = files_of(config)
    tokenizer = with_chat_template(tokenizer, config)
    directory = locate_cache(config, tokenizer, files)
    if damage_of(directory, thorough=thorough) is not None:
        with writing_to(directory.parent), FileLock(directory.with_suffix(".lock")):
            damage = damage_of(directory, thorough=thorough)  # another process may have built it while this one waited
            if damage is not None:
                _report_damage(directory, damage)
                pool = pool or LocalPool(config.workers or usable_cores())
                _build(directory, files, config, tokenizer, progress, pool)
    cache = map_cache(directory)
    if config.on_bad_text == "error" and cache.manifest.skipped:
        raise ValueError(cache.manifest.skipped_names[0])
    return cache


def locate_cache(config: DataConfig, tokenizer: Tokenizer, files: Sequence[SourceFile] | None = None) -> Path:
    """Where the tokenized corpus of a config is, or would be; its name tells it from any other.

    Raises:
        ValueError: no such files, a tokenizer with no end-of-text token.
    """
    if tokenizer.eos_id is None:
        known = ", ".join(tokenizer.special_tokens) or "none"
        raise ValueError(f"the tokenizer names no end-of-text token: set tokenizer.eos_token to one of: {known}")
    files = files_of(config) if files is None else files
    settings = _settings(config, with_chat_template(tokenizer, config))
    return cache_root(config.cache_dir) / "corpora" / content_key(files, tokenizer.fingerprint, *settings)


def content_key(files: Sequence[SourceFile], *settings: object) -> str:
    """A name for what is made from these files, as they are now, under these settings."""
    described = json.dumps([_VERSION, [asdict(file) for file in files], settings])
    return hashlib.sha256(described.encode()).hexdigest()[:32]


@contextmanager
def writing_to(directory: Path) -> Iterator[None]:
    """Creates a cache folder; what goes wrong in writing to it becomes one line that names it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ValueError(
            f"cannot write to the cache folder {directory} ({error.strerror or error}): set data.cache_dir"
        ) from error


def _settings(config: DataConfig, tokenizer: Tokenizer) -> tuple[object, ...]:
    plain = (config.text_field, config.tokens_field, config.parse_special_tokens)
    if not config.chat.on:
        return plain
    # What a template says counts, not its name; and how long a conversation may be is decided when rows are made.
    chat = config.chat.model_dump(mode="json", exclude={"template", "too_long"})
    return (*plain, chat, tokenizer.chat_templates, tokenizer.named_tokens)


def _report_damage(directory: Path, damage: str) -> None:
    if directory.exists():
        _log.warning("token cache %s is damaged (%s): building it again", directory, damage)


def _report_copies(files: Sequence[SourceFile]) -> None:
    same = copies(files)
    if same:
        more = f", and {len(same) - 1} more such sets" if len(same) > 1 else ""
        _log.warning("equal content under several names is learnt from as often: %s%s", " = ".join(same[0]), more)


def damage_of(directory: Path, *, thorough: bool = False) -> str | None:
    """What is wrong with a cache on disk, or None. The ids are checked by their size; by their checksum, which takes
    long, only where `thorough`."""
    try:
        for name, (size, digest) in read_manifest(directory).files.items():
            if (directory / name).stat().st_size != size:
                return f"{name} has {(directory / name).stat().st_size} bytes, not {size}"
            if (thorough or name not in (TOKENS, LEARNED)) and shards.sha256_of(directory / name) != digest:
                return f"{name} has changed"
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return f"{Path(error.filename).name} {'is missing' if missing else 'cannot be read'}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return "manifest.json cannot be read"
    return None


def read_manifest(directory: Path) -> Manifest:
    """What a cache says of itself."""
    values = json.loads((directory / MANIFEST).read_bytes())
    files = {name: tuple(entry) for name, entry in values.pop("files").items()}
    return Manifest(files=files, skipped_names=tuple(values.pop("skipped_names")), **values)


def map_cache(directory: Path) -> TokenCache:
    """The cache in a directory, which must be whole."""
    manifest = read_manifest(directory)
    # A plain view of the mapping: slicing np.memmap itself costs a Python call every time.
    tokens = np.asarray(np.memmap(directory / TOKENS, manifest.token_dtype, mode="r"))
    facts = np.fromfile(directory / DOCUMENTS, DOCUMENT)
    lengths = np.ascontiguousarray(facts["length"])
    return TokenCache(
        directory=directory,
        manifest=manifest,
        tokens=tokens,
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        sizes=np.ascontiguousarray(facts["bytes"]),
        hashes=np.ascontiguousarray(facts["hash"]),
        learned=np.asarray(np.memmap(directory / LEARNED, np.uint8, mode="r")) if LEARNED in manifest.files else None,
        origins=np.fromfile(directory / ORIGINS, ORIGIN) if ORIGINS in manifest.files else None,
    )


def _build(
    directory: Path,
    files: Sequence[SourceFile],
    config: DataConfig,
    tokenizer: Tokenizer,
    progress: Progress | None,
    pool: Pool,
) -> None:
    """Shards first, each kept as soon as it is finished; then one file of all; then the final name."""
    _report_copies(files)
    partial = directory.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    job = Job(
        shards=shards.plan_shards(files),
        text_field=config.text_field,
        tokens_field=config.tokens_field,
        parse_special_tokens=config.parse_special_tokens,
        token_dtype="uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        chat=config.chat if config.chat.on else None,
    )
    job.save(partial)
    _write_shards(partial, job, files, config, tokenizer, progress, pool)
    merged = partial / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir()
    manifest = _merge(partial, merged, job, tokenizer, files)
    if not manifest.documents:
        counted = f"{manifest.skipped} skipped, {manifest.empty} empty"
        if config.chat.on and manifest.skipped:  # most often one fault of all of them, such as the template's
            counted += f"; the first is {manifest.skipped_names[0]}"
        raise ValueError(f"no document in {', '.join(map(repr, config.paths))}: {counted}")
    shutil.rmtree(directory, ignore_errors=True)  # a damaged one
    os.replace(merged, directory)
    _sync_directory(directory.parent)
    shutil.rmtree(partial, ignore_errors=True)


def _write_shards(
    partial: Path,
    job: Job,
    files: Sequence[SourceFile],
    config: DataConfig,
    tokenizer: Tokenizer,
    progress: Progress | None,
    pool: Pool,
) -> None:
    done = _Done(job, files, progress)

    def stepped(step: Step) -> None:
        done.advance(step)
        if step.finished and config.on_bad_text == "error":
            _refuse_bad_text(partial, step.shard)

    missing = []
    for index in range(len(job.shards)):
        if shards.read_shard(partial, index) is None:
            missing.append(index)
        else:
            stepped(Step(index, finished=True))
    pool.run(partial, missing, tokenizer, stepped)


class _Done:
    """How many bytes of the source files are behind us. Inside a shard it is a guess, from the text seen of it."""

    def __init__(self, job: Job, files: Sequence[SourceFile], progress: Progress | None):
        sizes = {file.path: file.size for file in files}
        left = Counter(piece.path for shard in job.shards for piece in shard)
        self._sizes = []
        for shard in job.shards:
            self._sizes.append(0)
            for piece in shard:
                share = sizes[piece.path] // left[piece.path]  # the pieces of a file are about equal
                sizes[piece.path] -= share
                left[piece.path] -= 1
                self._sizes[-1] += share
        self._done = [0] * len(job.shards)
        self._sum, self._total = 0, sum(self._sizes)
        self._progress = progress

    def advance(self, step: Step) -> None:
        size, before = self._sizes[step.shard], self._done[step.shard]
        self._done[step.shard] = size if step.finished else min(before + step.size, size)
        self._sum += self._done[step.shard] - before
        if self._progress is not None:
            self._progress(self._sum, self._total)


def _refuse_bad_text(partial: Path, index: int) -> None:
    named = shards.read_facts(partial, index).named
    if named:
        raise ValueError(name_of(named[0]))


def _merge(partial: Path, merged: Path, job: Job, tokenizer: Tokenizer, sources: Sequence[SourceFile]) -> Manifest:
    """Joins the shards in order, which makes the bytes independent of who wrote them and when."""
    numbers = range(len(job.shards))
    made = [shards.read_facts(partial, index) for index in numbers]
    digest = _join([shards.tokens_file(partial, index) for index in numbers], merged / TOKENS)
    _join([shards.documents_file(partial, index) for index in numbers], merged / DOCUMENTS)
    digests = {merged / TOKENS: digest}
    if job.chat is not None:
        assert list(job.file_numbers) == [source.path for source in sources]
        for suffix, name in ((shards.LEARNED, LEARNED), (shards.ORIGINS, ORIGINS)):
            parts = [shards.chat_file(partial, index, suffix) for index in numbers]
            digests[merged / name] = _join(parts, merged / name)
    lines = "".join(json.dumps(asdict(source)) + "\n" for source in sources)
    shards.write_atomically(merged / SOURCES, lines.encode())
    tokenizer.save(merged / TOKENIZER)
    facts = np.fromfile(merged / DOCUMENTS, DOCUMENT)
    named: list[BadRecord] = [record for shard in made for record in shard.named]
    manifest = Manifest(
        version=_VERSION,
        tokenizer=tokenizer.fingerprint,
        token_dtype=job.token_dtype,
        documents=len(facts),
        tokens=int(facts["length"].sum()),
        bytes=int(facts["bytes"].sum()),
        source_files=len(sources),
        empty=sum(shard.empty for shard in made),
        skipped=sum(shard.bad for shard in made),
        skipped_names=tuple(map(name_of, named[:_NAMES_KEPT])),
        files={
            path.relative_to(merged).as_posix(): (
                path.stat().st_size,
                digests.get(path) or shards.sha256_of(path),
            )
            for path in sorted(merged.rglob("*"))
            if path.is_file()
        },
    )
    shards.write_atomically(merged / MANIFEST, json.dumps(asdict(manifest), indent=2).encode())
    return manifest


def _join(parts: Sequence[Path], whole: Path) -> str:
    """Writes the parts one after the other; the SHA-256 of them all."""
    digest = hashlib.sha256()
    with open(whole, "wb") as out:
        for part in parts:
            with open(part, "rb") as piece:
                while block := piece.read(1 << 20):
                    out.write(block)
                    digest.update(block)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def _sync_directory(directory: Path) -> None:
    """Makes a rename survive a power cut, where the system lets directories be opened."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
