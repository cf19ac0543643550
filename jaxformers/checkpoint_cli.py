"""`jaxformers checkpoint`: the checkpoints of a run, and models as files. Thin: what is asked, and how it is shown."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from jaxformers.hub.compare import Comparison
    from jaxformers.train.shelf import Entry

checkpoint_app = typer.Typer(
    help="List, verify, remove, compare, average, merge, split and cut checkpoints.", no_args_is_help=True
)

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
Run = Annotated[Path, typer.Argument(help="A run directory.")]
AnyRef = "a run or checkpoint, a Hugging Face directory, a .gguf or .safetensors file, or a hub id"
Ref = Annotated[str, typer.Argument(help=f"What to read: {AnyRef}.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@checkpoint_app.command("ls")
def list_(run: Run, as_json: Json = False) -> None:
    """List the checkpoints of a run: step, size, when written, validation loss (or the metric that the run keeps the
    best by), whether they are whole, and which is the best.

    Files are compared by name and size with the list written beside them; `verify` reads them too.
    """
    from jaxformers.train.shelf import list_checkpoints

    entries = list_checkpoints(run)
    if as_json:
        print(json.dumps([dataclasses.asdict(e) | {"path": str(e.path)} for e in entries], indent=2))
        return
    for entry in entries:
        print(_line(entry))
    if not entries:
        print(f"{run} has no checkpoint yet", file=sys.stderr)


def _line(entry: Entry) -> str:
    metric = "loss" if entry.metric == "validation_loss" else entry.metric
    value = "" if entry.value is None else f"{metric} {entry.value:.4f}"
    written = datetime.fromtimestamp(entry.written).strftime("%Y-%m-%d %H:%M")
    name = entry.path.name if entry.step is None else str(entry.step)
    condition = ": ".join([entry.condition, *([", ".join(entry.damage)] if entry.damage else [])])
    best = ", best" if entry.best else ""
    return f"{name:>9}  {_size(entry.nbytes):>9}  {written}  {value:12}  {condition}{best}"


@checkpoint_app.command()
def verify(
    refs: Annotated[list[str], typer.Argument(help="Run directories, for all their checkpoints, or checkpoints.")],
) -> None:
    """Compare the files of checkpoints with their checksums, a line each. Exit status 1 if any is damaged."""
    from jaxformers.train.integrity import find_damage
    from jaxformers.train.shelf import find_checkpoints

    damaged = False
    for ref in refs:
        found = find_checkpoints(ref)
        if not found:
            print(f"{ref} has no checkpoint yet")
        for path in found:
            with _waiting(f"reading {path}"):
                damage = find_damage(path)
            print(f"{path}: {'damaged: ' + ', '.join(damage) if damage else 'whole'}")
            damaged = damaged or bool(damage)
    if damaged:
        raise typer.Exit(1)


@checkpoint_app.command()
def rm(
    run: Run,
    step: Annotated[list[int] | None, typer.Option(help="A step to remove; may be repeated.")] = None,
    keep_last: Annotated[int | None, typer.Option(min=1, help="Remove all but the newest so many.")] = None,
    keep_every: Annotated[
        int | None, typer.Option(min=1, help="With --keep-last: older steps divisible by this stay too.")
    ] = None,
    keep_best: Annotated[
        int | None,
        typer.Option(min=1, help="With --keep-last: so many stay that are the best by the run's best_metric."),
    ] = None,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Remove those with damaged files, and those that a run set aside.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Remove even the last good checkpoint.")] = False,
) -> None:
    """Remove checkpoints of a run that is not running. Refuses to remove the last good one."""
    from jaxformers.train.shelf import check_leaves_a_good_one, choose, remove_chosen

    with _waiting("reading checkpoints"):
        chosen = choose(
            run,
            steps=step or [],
            keep_last=keep_last,
            keep_every=keep_every,
            keep_best=keep_best,
            damaged=damaged,
        )
        if chosen.going and not force:
            check_leaves_a_good_one(run, chosen)
    if not dry_run:
        remove_chosen(chosen)
    for path in chosen.going:
        print(f"{'would remove' if dry_run else 'removed'} {path}")
    if not chosen.going:
        print("nothing to remove", file=sys.stderr)


@checkpoint_app.command()
def diff(
    a: Ref,
    b: Ref,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Largest distance that counts as equal, relative to the largest magnitude in A's tensor; dtypes may "
            "then differ.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two models tensor by tensor, by Hugging Face name. Exit status 0 if they are equal, 1 if not.

    One tensor of each is read at a time; of a run, what several tensors are cut from.
    """
    from jaxformers.checkpoints import tensors_of
    from jaxformers.hub.compare import compare_tensors

    left, right = tensors_of(a), tensors_of(b)
    with _bar("comparing", total=len(left.keys() & right.keys())) as advance:
        found = compare_tensors(left, right, done=lambda _name: advance(1))
    print(_as_json(found, tolerance) if as_json else _as_text(found, tolerance))
    if not found.is_equal(tolerance):
        raise typer.Exit(1)


def _as_json(found: Comparison, tolerance: float | None) -> str:
    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    tensors = [{k: plain(v) for k, v in dataclasses.asdict(t).items()} for t in found.tensors]
    different = [tensor.name for tensor in found.different(tolerance)]
    values = {"equal": found.is_equal(tolerance), "different": different, "missing": found.missing}
    return json.dumps(values | {"extra": found.extra, "tensors": tensors}, indent=2)


def _as_text(found: Comparison, tolerance: float | None) -> str:
    different = found.different(tolerance)
    lines = []
    for t in different:
        kinds = [] if t.same_dtype else [f"{t.dtypes[0]} and {t.dtypes[1]}"]
        kinds += [] if t.same_shape else [f"{list(t.shapes[0])} and {list(t.shapes[1])}"]
        sizes = [f"max {t.max_abs:.3g}, relative {t.relative:.3g}"] if t.same_shape else []
        lines.append(f"{t.name}: {', '.join(sizes + kinds)}")
    lines += [f"{name}: missing in B" for name in found.missing]
    lines += [f"{name}: extra in B" for name in found.extra]
    largest = max((t.relative for t in found.tensors if t.same_shape), default=0.0)
    lines.append(
        f"{len(found.tensors) - len(different)} tensors equal, {len(different)} different (relative distance up to "
        f"{largest:.3g}), {len(found.missing)} missing, {len(found.extra)} extra"
    )
    return "\n".join(lines)


@checkpoint_app.command()
def average(
    refs: Annotated[list[str], typer.Argument(help="Two or more models of one architecture, each a reference.")],
    output: Annotated[Path, typer.Option(help="The Hugging Face directory to write.")],
    weights: Annotated[
        str | None, typer.Option(help="What each counts, such as 1,2,1; none: all alike. Their sum does not matter.")
    ] = None,
    ema: Annotated[
        float | None, typer.Option(help="Exponential moving average of this decay, from the first to the last.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the written weights.")
    ] = "float32",
) -> None:
    """Average models, such as the last checkpoints of a run (arXiv:2505.12082), into a Hugging Face directory.

    Computed in float32, a leaf at a time; config and tokenizer are the first model's.
    """
    from jaxformers.hub.average import average_weights

    shares = average_weights(len(refs), weights=_numbers(weights), ema=ema)
    from jaxformers import checkpoints

    with _bar("averaging") as advance:
        checkpoints.average(refs, output, weights=shares, dtype=dtype, done=advance)
    print(f"{output}: the average of {len(refs)} models", file=sys.stderr)


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--weights {text} is not a list of numbers, such as 1,2,1") from None


@checkpoint_app.command()
def merge(
    ref: Ref,
    out: Annotated[Path, typer.Argument(help="A file to write (NAME.safetensors), or a directory for it.")],
) -> None:
    """Write the weights of a model as one .safetensors file, bit for bit; into a directory: with all beside them."""
    from jaxformers import checkpoints

    with _bar("writing") as advance:
        checkpoints.merge(ref, out, done=advance)
    print(f"wrote {out}", file=sys.stderr)


@checkpoint_app.command()
def split(
    ref: Ref,
    directory: Annotated[Path, typer.Argument(help="The Hugging Face directory to write.")],
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 2GB or 500MB.")] = "5GB",
) -> None:
    """Write a model as a Hugging Face directory of several .safetensors files and their index, bit for bit."""
    limit = parse_size(max_shard_size)
    from jaxformers import checkpoints

    with _bar("writing") as advance:
        checkpoints.split(ref, directory, max_shard_bytes=limit, done=advance)
    print(f"wrote {directory}", file=sys.stderr)


@checkpoint_app.command()
def reshard(
    checkpoint: Annotated[str, typer.Argument(help="A run's checkpoint (or a run: its newest good one).")],
    run: Annotated[Path, typer.Argument(help="The run directory to write it into, which may be new.")],
    mesh: Annotated[str, typer.Option(help="Whose chunks to write, such as fsdp=4,tp=2; axes not named have size 1.")],
) -> None:
    """Write a training checkpoint again, all of it, in the chunks of another mesh, from which that one loads faster.

    This is never needed: a run goes on, and a model loads, from any checkpoint on any mesh that it may have. No
    devices are needed either; one array is in memory at a time.
    """
    config = parse_mesh(mesh)
    from jaxformers.checkpoints import reshard_checkpoint

    with _bar("writing") as advance:
        written = reshard_checkpoint(checkpoint, run, config, starts=advance.total, done=advance)
    print(f"wrote {written}", file=sys.stderr)


def parse_size(text: str) -> int:
    """Bytes of a size such as `2GB`. ValueError for what is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or "B"]) if match else 0
    if size < 1:
        raise ValueError(f"--max-shard-size {text} is not a size, such as 2GB, 500MB or 100000")
    return size


def parse_mesh(text: str) -> Any:
    """The mesh config that `fsdp=4,tp=2` means. ValueError for what is none."""
    from jaxformers.parallel.mesh import AXES, MeshConfig

    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = (piece.strip() for piece in part.partition("="))
        if axis not in AXES or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--mesh: {part!r} is not AXIS=SIZE, such as fsdp=4; axes are {', '.join(AXES)}")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def _size(nbytes: int) -> str:
    unit = next((unit for unit in ("TB", "GB", "MB", "KB") if nbytes >= _UNITS[unit]), "B")
    return f"{nbytes / _UNITS[unit]:.1f} {unit}"


class _Advance:
    """Moves a progress bar on; `total` says how far it goes, where that is known only later."""

    def __init__(self, update: Callable[..., None]):
        self._update = update

    def __call__(self, amount: int) -> None:
        self._update(advance=amount)

    def total(self, amount: int) -> None:
        self._update(total=amount)


@contextmanager
def _bar(what: str, total: int | None = None) -> Iterator[_Advance]:
    """A progress bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield _Advance(lambda **change: progress.update(task, **change))


@contextmanager
def _waiting(what: str) -> Iterator[None]:
    """A bar for something of unknown length."""
    with _bar(what):
        yield
