"""Tokenizing a corpus in shards: each one a pure function of some pieces of files, written once and found again.

A shard is three files: its token ids, a row of facts per document, and a small JSON with their checksums, written last.
Whoever builds it gets the same bytes, so a killed build goes on where it stopped, with any number of processes.
Run as a module, this file is one such process: shard numbers come in on stdin, finished numbers go out on stdout.
"""

import contextlib
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jaxformers.data.encoding import batches, encode, good_documents, is_empty
from jaxformers.data.records import Fields
from jaxformers.data.sources import BadRecord, Piece, SourceFile, cut
from jaxformers.data.tokenizer import Tokenizer, load_tokenizer

_LEAST_BYTES, _MOST_BYTES, _SHARDS = 1 << 20, 1 << 28, 256  # of text in a shard; how many shards where that allows
_NAMES_KEPT = 100  # bad records that are named rather than only counted


@dataclass(frozen=True)
class Job:
    """Everything a process must know to tokenize a shard; kept as job.json next to the shards."""

    shards: tuple[tuple[Piece, ...], ...]
    text_field: str
    parse_special_tokens: bool
    token_dtype: str
    tokens_field: str | None = None

    def save(self, directory: Path) -> None:
        write_atomically(directory / "job.json", json.dumps(asdict(self)).encode())

    @staticmethod
    def load(directory: Path) -> "Job":
        values = json.loads((directory / "job.json").read_bytes())
        shards = tuple(tuple(Piece(**piece) for piece in shard) for shard in values.pop("shards"))
        return Job(shards=shards, **values)


@dataclass(frozen=True)
class Shard:
    """What a finished shard holds, and the checksums by which it is recognized after a kill."""

    tokens_sha256: str
    documents_sha256: str
    empty: int
    bad: int
    named: tuple[BadRecord, ...]


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


def write_shard(job: Job, index: int, tokenizer: Tokenizer, directory: Path) -> None:
    """Tokenizes one shard. The name of its files appears only once they are complete and on disk."""
    digest = hashlib.sha256()
    documents: list[np.ndarray] = []
    bad: list[BadRecord] = []
    empty = 0
    temporary = directory / f"{index:06d}.{os.getpid()}.tmp"
    with open(temporary, "wb") as out:
        fields = Fields(job.text_field, job.tokens_field)
        for batch in batches(good_documents(job.shards[index], fields, tokenizer, bad)):
            kept = [document for document in batch if not is_empty(document)]
            empty += len(batch) - len(kept)
            made = encode(kept, tokenizer, parse_special_tokens=job.parse_special_tokens, dtype=job.token_dtype)
            documents.append(made.facts)
            content = made.ids.tobytes()
            out.write(content)
            digest.update(content)
        _sync(out)
    os.replace(temporary, tokens_file(directory, index))
    rows = b"".join(batch.tobytes() for batch in documents)
    write_atomically(documents_file(directory, index), rows)
    shard = Shard(digest.hexdigest(), hashlib.sha256(rows).hexdigest(), empty, len(bad), tuple(bad[:_NAMES_KEPT]))
    write_atomically(_facts_file(directory, index), json.dumps(asdict(shard)).encode())


def read_shard(directory: Path, index: int) -> Shard | None:
    """A finished shard whose files are whole, or None where it must be written (again)."""
    try:
        values = json.loads(_facts_file(directory, index).read_bytes())
        shard = Shard(**{**values, "named": tuple(BadRecord(**record) for record in values["named"])})
        whole = (
            sha256_of(tokens_file(directory, index)) == shard.tokens_sha256
            and sha256_of(documents_file(directory, index)) == shard.documents_sha256
        )
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return shard if whole else None


def tokens_file(directory: Path, index: int) -> Path:
    return directory / f"{index:06d}.tokens"


def documents_file(directory: Path, index: int) -> Path:
    return directory / f"{index:06d}.documents"


def _facts_file(directory: Path, index: int) -> Path:
    return directory / f"{index:06d}.json"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Makes the file appear complete, or not at all, whenever the machine stops."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as out:
        out.write(content)
        _sync(out)
    os.replace(temporary, path)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def write_shards(
    directory: Path, indices: Sequence[int], *, workers: int, tokenizer: Tokenizer, done: Callable[[int], None]
) -> None:
    """Writes the shards of the job in `directory` and calls `done` with each one's number, from this thread.

    Raises:
        ValueError: a source that cannot be read.
        RuntimeError: a tokenizing process that died.
    """
    if workers == 1 or len(indices) < 2:
        job = Job.load(directory)
        for index in indices:
            write_shard(job, index, tokenizer, directory)
            done(index)
        return
    tokenizer.save(directory / "tokenizer")
    with _Workers(directory, min(workers, len(indices))) as pool:
        for index in pool.run(indices):
            done(index)


class _Workers:
    """Processes that tokenize, each driven by a thread here.

    They are started as fresh interpreters rather than forked or spawned: a fork would copy the locks of jax's threads,
    and multiprocessing's spawn would run the user's script again where it has no `__main__` guard.
    """

    def __init__(self, directory: Path, count: int):
        # What this process can import, its workers can; one thread each, since the processes are the parallelism.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        command = [sys.executable, "-m", "jaxformers.data.shards", str(directory)]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            for _ in range(count)
        ]

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes:
            process.kill()  # a half-written shard has no name yet, so nothing is lost
        for process in self._processes:
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()

    def run(self, indices: Sequence[int]) -> Iterator[int]:
        """Each number as its shard is finished."""
        waiting = iter(indices)
        lock = threading.Lock()
        finished: queue.Queue[int | Exception] = queue.Queue()

        def drive(process: subprocess.Popen) -> None:
            while True:
                with lock:
                    index = next(waiting, None)
                if index is None:
                    return
                finished.put(_ask(process, index))

        with ThreadPoolExecutor(len(self._processes)) as threads:
            try:
                for process in self._processes:
                    threads.submit(drive, process)
                for _ in indices:
                    result = finished.get()
                    if isinstance(result, Exception):
                        raise result
                    yield result
            except BaseException:
                with lock:
                    waiting = iter(())
                for process in self._processes:
                    process.kill()
                raise


def _ask(process: subprocess.Popen, index: int) -> int | Exception:
    try:
        process.stdin.write(f"{index}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        return RuntimeError(f"a tokenizing process ended early, with exit status {process.wait()}")
    reply = json.loads(answer)
    return ValueError(reply["error"]) if "error" in reply else index


def _serve(directory: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    job = Job.load(directory)
    tokenizer = load_tokenizer(directory / "tokenizer")
    for line in sys.stdin:
        reply = {}
        try:
            write_shard(job, int(line), tokenizer, directory)
        except (ValueError, OSError) as error:
            reply["error"] = str(error)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
