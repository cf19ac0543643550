"""Tokenizing a corpus in shards: each one a pure function of some pieces of files, written once and found again.

A shard is three files: its token ids, a row of facts per document, and a small JSON with their checksums, written last;
of conversations two more: which tokens to learn, and the origins of the documents.
Whoever builds it gets the same bytes, so a killed build goes on where it stopped, with any number of processes. Knows
nothing of the processes that build shards, nor of what becomes of them.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jaxformers.data.config import ChatConfig
from jaxformers.data.conversations import wanted_fields
from jaxformers.data.dialogues import origins_of
from jaxformers.data.encoding import batches, encode, good_documents, is_empty
from jaxformers.data.records import Fields
from jaxformers.data.sources import BadRecord, Piece, SourceFile, cut
from jaxformers.data.tokenizer import Tokenizer

_LEAST_BYTES, _MOST_BYTES, _SHARDS = 1 << 20, 1 << 28, 256  # of text in a shard; how many shards where that allows
LEARNED, ORIGINS = CHAT_SUFFIXES = ("learned", "origins")
_NAMES_KEPT = 100  # bad records that are named rather than only counted


@dataclass(frozen=True)
class Job:
    """Everything a process must know to tokenize a shard; kept as job.json next to the shards."""

    shards: tuple[tuple[Piece, ...], ...]
    text_field: str
    parse_special_tokens: bool
    token_dtype: str
    tokens_field: str | None = None
    chat: ChatConfig | None = None

    @property
    def fields(self) -> Fields:
        entries = () if self.chat is None else wanted_fields(self.chat)
        return Fields(self.text_field, self.tokens_field, entries)

    @functools.cached_property
    def file_numbers(self) -> dict[str, int]:
        """The files of the job in order."""
        return {path: n for n, path in enumerate(dict.fromkeys(p.path for shard in self.shards for p in shard))}

    def save(self, directory: Path) -> None:
        chat = None if self.chat is None else self.chat.model_dump(mode="json")
        write_atomically(directory / "job.json", json.dumps({**asdict(self), "chat": chat}).encode())

    @staticmethod
    def load(directory: Path) -> "Job":
        values = json.loads((directory / "job.json").read_bytes())
        shards = tuple(tuple(Piece(**piece) for piece in shard) for shard in values.pop("shards"))
        chat = values.pop("chat")
        return Job(shards=shards, chat=None if chat is None else ChatConfig(**chat), **values)


@dataclass(frozen=True)
class Shard:
    """What a finished shard holds, and the checksums by which it is recognized after a kill; `more_sha256` is of the
    files that only conversations have, by their suffix."""

    tokens_sha256: str
    documents_sha256: str
    empty: int
    bad: int
    named: tuple[BadRecord, ...]
    more_sha256: dict[str, str]


def plan_shards(files: Sequence[SourceFile]) -> tuple[tuple[Piece, ...], ...]:
    """The pieces of each shard: the files in order, cut and grouped by size alone, never by the number of processes."""
    size = min(max(sum(file.size for file in files) // _SHARDS, _LEAST_BYTES), _MOST_BYTES)
    shards: list[list[Piece]] = []
    room = 0
    for file in files:
        pieces = cut(file, size)
        for piece in pieces:
            if room <= 0:
                shards.append([])
                room = size
            shards[-1].append(piece)
            room -= file.size // len(pieces)
    return tuple(map(tuple, shards))


def write_shard(
    job: Job, index: int, tokenizer: Tokenizer, directory: Path, advanced: Callable[[int, int], None] | None = None
) -> None:
    """Tokenizes one shard. The name of its files appears only once they are complete.

    Nothing is forced to the disk: what a power cut leaves half written fails its checksum and is written again.

    Args:
        advanced: called after each batch of texts with their bytes as UTF-8 and their tokens.
    """
    digest = hashlib.sha256()
    documents: list[np.ndarray] = []
    more: dict[str, list[bytes]] = {} if job.chat is None else {suffix: [] for suffix in CHAT_SUFFIXES}
    bad: list[BadRecord] = []
    empty = 0
    temporary = directory / f"{index:06d}.{os.getpid()}.tmp"
    with open(temporary, "wb") as out:
        for batch in batches(good_documents(job.shards[index], job.fields, tokenizer, bad, job.chat)):
            kept = [document for document in batch if not is_empty(document)]
            empty += len(batch) - len(kept)
            made = encode(kept, tokenizer, parse_special_tokens=job.parse_special_tokens, dtype=job.token_dtype)
            documents.append(made.facts)
            content = made.ids.tobytes()
            out.write(content)
            digest.update(content)
            if more:
                more[LEARNED].append(made.learned.tobytes())
                more[ORIGINS].append(origins_of(kept, job.file_numbers).tobytes())
            if advanced is not None:
                advanced(int(made.facts["bytes"].sum()), len(made.ids))
    os.replace(temporary, tokens_file(directory, index))
    rows = b"".join(batch.tobytes() for batch in documents)
    write_atomically(documents_file(directory, index), rows, sync=False)
    joined = {suffix: b"".join(parts) for suffix, parts in more.items()}
    for suffix, content in joined.items():
        write_atomically(chat_file(directory, index, suffix), content, sync=False)
    sums = {suffix: hashlib.sha256(content).hexdigest() for suffix, content in joined.items()}
    shard = Shard(digest.hexdigest(), hashlib.sha256(rows).hexdigest(), empty, len(bad), tuple(bad[:_NAMES_KEPT]), sums)
    write_atomically(_facts_file(directory, index), json.dumps(asdict(shard)).encode(), sync=False)


def read_shard(directory: Path, index: int) -> Shard | None:
    """A finished shard whose files are whole, or None where it must be written (again)."""
    try:
        shard = read_facts(directory, index)
        whole = (
            sha256_of(tokens_file(directory, index)) == shard.tokens_sha256
            and sha256_of(documents_file(directory, index)) == shard.documents_sha256
            and all(sha256_of(chat_file(directory, index, end)) == sum for end, sum in shard.more_sha256.items())
        )
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return shard if whole else None


def read_facts(directory: Path, index: int) -> Shard:
    """What a finished shard says of itself; its other files are not looked at."""
    values = json.loads(_facts_file(directory, index).read_bytes())
    return Shard(**{**values, "named": tuple(BadRecord(**record) for record in values["named"])})


def tokens_file(directory: Path, index: int) -> Path:
    return directory / f"{index:06d}.tokens"


def documents_file(directory: Path, index: int) -> Path:
    return directory / f"{index:06d}.documents"


def chat_file(directory: Path, index: int, suffix: str) -> Path:
    """One of the files that only shards of conversations have; `suffix` is of CHAT_SUFFIXES."""
    return directory / f"{index:06d}.{suffix}"


def _facts_file(directory: Path, index: int) -> Path:
    return directory / f"{index:06d}.json"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Makes the file appear complete or not at all; with `sync`, whenever the machine stops."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as out:
        out.write(content)
        if sync:
            out.flush()
            os.fsync(out.fileno())
    os.replace(temporary, path)
