"""`jaxformers data`: tokenizing a corpus, and looking into one; how both are shown."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.progress import Progress

    from jaxformers.config import RunConfig
    from jaxformers.data.cache import Progress as Told
    from jaxformers.data.tokenizer import Tokenizer
    from jaxformers.data.tokenizing import Tokenized
    from jaxformers.data.workers import Pool, Step

data_app = typer.Typer(help="Tokenize a corpus, and look into a tokenized one.", no_args_is_help=True)

_NAMES_SHOWN = 5
_SECONDS_BETWEEN_LINES = 60
_OVERRIDE = re.compile(r"(data|tokenizer)(\.\w+)+=", re.ASCII)

TokenizerRef = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        help="A tokenizer.json, sentencepiece .model or .gguf file, a directory or run that holds one, a hub id; none: "
        "the config's.",
    ),
]


@data_app.command()
def tokenize(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG|PATH... [KEY=VALUE...]",
            help="A YAML config, or files and globs of text; then changes to the config, such as data.workers=4.",
        ),
    ],
    tokenizer: TokenizerRef = None,
    to: Annotated[
        Literal["cache", "arrayrecord", "megatron"],
        typer.Option(help="cache: what `train` opens; the others are written from it, into --output."),
    ] = "cache",
    output: Annotated[
        Path | None, typer.Option(help="A folder for the result; of a cache: the folder of caches, data.cache_dir.")
    ] = None,
    text_field: Annotated[str | None, typer.Option(help="The field of a record that holds the text.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that tokenize; none: one per core.", min=1)] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Tokenize on a Ray cluster (HOST:PORT, auto or local); sources and caches must be on storage that all "
            "of its nodes share.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the checksums of all files that are there already.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list, an object a source.")] = False,
) -> None:
    """Tokenize a corpus once, in parallel; run again after an interruption, it goes on behind the finished shards.

    What comes out is the same for any number of processes. Records that are no text are counted, named and left out, or
    refused with data.on_bad_text=error.
    """
    given = {"data.text_field": text_field, "data.workers": workers}
    if to == "cache" and output is not None:
        given["data.cache_dir"], output = str(output), None
    config = _read(what, tokenizer, [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None])
    from rich.console import Console

    from jaxformers.data import tokenizing

    with _bar(Console(stderr=True)) as bar, _going_on():
        made = tokenizing.tokenize(
            config.data,
            _tokenizer(config, tokenizer),
            to=to,
            output=output,
            pool=_Watched(_pool(config, ray), bar.tokenized),
            progress=bar.begin,
            verify=verify,
        )
    if as_json:
        print(json.dumps([_as_dict(corpus) for corpus in made]))
    else:
        _show(made, Console())


def _read(what: Sequence[str], tokenizer: str | None, given: Sequence[str]) -> RunConfig:
    """The config that the arguments name, or one around the paths that they are."""
    from jaxformers.config import load_config

    is_config = Path(what[0]).suffix in (".yaml", ".yml")
    paths = [] if is_config else [part for part in what if not _OVERRIDE.match(part)]
    overrides = list(what[1:]) if is_config else [part for part in what if _OVERRIDE.match(part)]
    if tokenizer is not None and Path(tokenizer).suffix != ".gguf":
        overrides.insert(0, f"tokenizer={json.dumps({'kind': 'file', 'path': str(_tokenizer_path(tokenizer))})}")
    overrides += given
    if is_config:
        return load_config(what[0], overrides)
    if not paths:
        raise ValueError("name a config, or the files of a corpus")
    config = load_config({"run_dir": "unused", "model": {}, "data": {"paths": paths}}, overrides)
    if tokenizer is None and config.tokenizer is None:
        raise ValueError("name a tokenizer: --tokenizer REF, or tokenizer.kind=train to learn one from these files")
    return config


def _tokenizer_path(ref: str) -> Path:
    """Where the tokenizer of a reference lies: a run keeps it in a folder of its own."""
    from jaxformers.hub.resolve import resolve

    path = resolve(ref)
    if path.parent.name == "checkpoints":
        path = path.parent.parent
    return path / "tokenizer" if (path / "tokenizer").is_dir() else path


def _tokenizer(config: RunConfig, ref: str | None) -> Tokenizer:
    """The tokenizer that training by this config would use, unless a .gguf file is named."""
    from jaxformers.data.config import TokenizerConfig
    from jaxformers.data.corpus import build_tokenizer
    from jaxformers.families.catalog import is_published

    if ref is not None and Path(ref).suffix == ".gguf":
        return _tokenizer_of_model(ref)
    if config.tokenizer is None and isinstance(config.model, str) and not is_published(config.model):
        return _tokenizer_of_model(config.model)
    return build_tokenizer(config.tokenizer or TokenizerConfig(), config.data)


def _tokenizer_of_model(ref: str) -> Tokenizer:
    from jaxformers.api import find_model  # brings jax

    found = find_model(ref)
    if found.tokenizer is None:
        raise ValueError(f"{found.path} holds no tokenizer; name one by --tokenizer")
    return found.tokenizer


def _pool(config: RunConfig, ray: str | None) -> Pool:
    from jaxformers.data.workers import LocalPool, usable_cores

    if ray is None:
        return LocalPool(config.data.workers or usable_cores())
    from jaxformers.data.ray_workers import RayPool

    return RayPool(ray, config.data.workers)


@dataclass(frozen=True)
class _Watched:
    """A pool whose steps someone else sees too."""

    pool: Pool
    seen: Callable[[Step], None]

    def run(
        self, directory: Path, indices: Sequence[int], tokenizer: Tokenizer, stepped: Callable[[Step], None]
    ) -> None:
        def step(step: Step) -> None:
            self.seen(step)
            stepped(step)

        self.pool.run(directory, indices, tokenizer, step)


class _Bar:
    """A line for each corpus that is being tokenized: how much of its files is done, tokens a second, time left. Where
    there is no terminal, as in the log of a job, a plain line a minute."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._task = None
        self._tokens, self._start, self._said = 0, 0.0, 0.0

    def begin(self, name: str) -> Told:
        self._tokens, self._start = 0, time.monotonic()
        self._said = self._start
        task = self._task = self._progress.add_task(name or "tokenizing", total=None, visible=False, rate="")

        def told(done: int, total: int) -> None:
            self._progress.update(task, completed=done, total=total, visible=True)
            if self._progress.disable and time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES:
                self._said = time.monotonic()
                line = f"{name or 'tokenizing'}: {done / max(total, 1):.1%} of {total / 1e6:,.1f} MB, {self._rate()}"
                print(line, file=sys.stderr, flush=True)

        return told

    def tokenized(self, step: Step) -> None:
        self._tokens += step.tokens
        assert self._task is not None
        self._progress.update(self._task, rate=self._rate())

    def _rate(self) -> str:
        return f"{self._tokens / max(time.monotonic() - self._start, 1e-3):,.0f} tokens/s"


@contextmanager
def _going_on() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        raise


@contextmanager
def _bar(console: Console) -> Iterator[_Bar]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _Bar(progress)


def _as_dict(corpus: Tokenized) -> dict[str, Any]:
    manifest = dataclasses.asdict(corpus.manifest)
    return {
        "name": corpus.name,
        "directory": str(corpus.directory),
        "existed": corpus.existed,
        "seconds": corpus.seconds,
        **{key: value for key, value in manifest.items() if key != "files"},
    }


def _show(made: Sequence[Tokenized], console: Console) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE)
    named = any(corpus.name for corpus in made)
    if named:
        table.add_column("source")
    for title in ("files", "documents", "tokens", "bytes per token", "skipped", "empty", "seconds"):
        table.add_column(title, justify="right")
    for corpus in made:
        known = corpus.manifest
        counts = [f"{n:,}" for n in (known.source_files, known.documents, known.tokens)]
        rest = [f"{corpus.bytes_per_token:.2f}", f"{known.skipped:,}", f"{known.empty:,}", f"{corpus.seconds:.1f}"]
        table.add_row(*([corpus.name] if named else []), *counts, *rest)
    console.print(table)
    for corpus in made:
        for name in corpus.manifest.skipped_names[:_NAMES_SHOWN]:
            print(f"skipped {name}")
        if corpus.manifest.skipped > _NAMES_SHOWN:
            print(
                f"skipped {corpus.manifest.skipped - _NAMES_SHOWN:,} more, the first 100 of which are in manifest.json"
            )
        print(f"{corpus.directory}{' (was there already)' if corpus.existed else ''}")


@data_app.command()
def inspect(
    what: Annotated[str, typer.Argument(metavar="CONFIG|CACHE", help="A YAML config, or the folder of a token cache.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to the config, such as data.sequence_length=512.")
    ] = None,
    tokenizer: TokenizerRef = None,
    rows: Annotated[int, typer.Option(help="Training rows to show.", min=0)] = 2,
    row: Annotated[int, typer.Option(help="The first of them.", min=0)] = 0,
    top: Annotated[int, typer.Option(help="Frequent tokens to show.", min=0)] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a tokenized corpus holds: documents, lengths, tokens, packing, and rows as a model sees them.

    Documents of a row have colours; tokens that the loss leaves out are dim. Without a terminal, [2| begins the second
    document of a row, and {...} is left out by the loss.
    """
    from jaxformers.corpus_inspection import inspect_cache, inspect_config, show

    numbers = range(row, row + rows)
    if Path(what).suffix in (".yaml", ".yml"):
        config = _read([what, *(overrides or ())], tokenizer, ())
        found = inspect_config(
            config.data,
            _tokenizer(config, tokenizer),
            top=top,
            rows=numbers,
            name=what,
            rows_before=config.train.rows_before,
        )
    else:
        if tokenizer is not None:
            raise ValueError("a cache holds its tokenizer: --tokenizer is for configs")
        config = _read(["unused", *(overrides or ()), "tokenizer.kind=bytes"], None, ())
        found = inspect_cache(Path(what).expanduser(), config.data, top=top, rows=numbers)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), default=str))
        return
    from rich.console import Console

    show(found, Console())
