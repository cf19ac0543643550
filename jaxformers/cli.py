"""The `jaxformers` command: one thin function a verb.

Exit status: 0 on success, 2 with one clear line for a user's mistake, 1 for a failure of ours.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxformers.bench_cli import bench_app
from jaxformers.checkpoint_cli import checkpoint_app
from jaxformers.data_cli import data_app
from jaxformers.serve_cli import serve

app = typer.Typer(
    name="jaxformers",
    help="Pre-train, fine-tune, evaluate and serve large language models on JAX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench_app, name="bench")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(data_app, name="data")
app.command()(serve)

Ref = Annotated[
    str,
    typer.Argument(
        help="A Hugging Face directory, a .gguf file, a hub id (ORG/NAME or ORG/NAME@REVISION), a run or a checkpoint."
    ),
]


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


MaxNewTokens = Annotated[int | None, typer.Option(help="Tokens to add at most.")]
Temperature = Annotated[float | None, typer.Option(help="0 = the likeliest token each time.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this total probability.")]
MinP = Annotated[float | None, typer.Option(help="Draw from tokens of this share of the likeliest one's.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1: make tokens seen before less likely.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]
Ema = Annotated[bool, typer.Option("--ema", help="Of a run: the moving average of its parameters.")]
Adapter = Annotated[
    list[str] | None, typer.Option(help="An adapter in peft's format to add to the model; may be repeated.")
]
AdapterWeight = Annotated[
    list[float] | None, typer.Option(help="What each adapter is multiplied by, in their order; none: 1.")
]
ComputeDtype = Annotated[Dtype | None, typer.Option(help="Of parameters and computation.")]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML config, such as configs/quickstart.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, such as train.steps=100.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the config, show what it needs, and stop.")] = False,
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT of process 0, where several processes train together.")
    ] = None,
    process_id: Annotated[int | None, typer.Option(help="This process among them, from 0.")] = None,
    num_processes: Annotated[int | None, typer.Option(help="How many they are.")] = None,
) -> None:
    """Train a model from a config; go on from the newest checkpoint where there is one."""
    from jaxformers.config import dump_yaml, load_config

    resolved = load_config(config, overrides or [])
    from jaxformers.parallel import distributed
    from jaxformers.parallel.processes import find_processes

    distributed.start(find_processes(coordinator=coordinator, index=process_id, count=num_processes))
    from jaxformers import training

    if dry_run:
        setup = training.prepare_run(resolved)
        print(dump_yaml(resolved), end="")
        for name, value in training.describe_setup(setup).items():
            print(f"# {name}: {value}")
        return
    result = training.fit(resolved)
    if not distributed.is_first():
        return
    for prompt, text in zip(resolved.sample.prompts, result.samples, strict=False):
        print(f"--- sample\n{prompt}{text}\n---")
    if result.stopped:
        print(
            f"stopped by {result.stopped} at step {result.step}; the same command goes on from there", file=sys.stderr
        )
    else:
        print(f"done: {result.run_dir} holds step {result.step}", file=sys.stderr)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def launch(
    context: typer.Context,
    processes: Annotated[int, typer.Option(help="Processes to start on this machine.")] = 2,
    restarts: Annotated[int, typer.Option(help="How often to start all again after one has failed.")] = 0,
) -> None:
    """Run a command in several processes that work as one: launch --processes 2 -- train CONFIG."""
    from jaxformers.launch.local import launch as run

    raise typer.Exit(run(context.args, processes=processes, restarts=restarts))


@app.command()
def generate(
    ref: Ref,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Texts to continue; none: standard input is one prompt.")
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="A file with a prompt on each line.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: Annotated[float, typer.Option(help="Subtracted from logits of tokens generated before.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="Subtracted for each time a token was generated.")] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be repeated.")] = None,
    seed: Seed = None,
    num_beams: Annotated[int, typer.Option(help="Above 1: beam search, which keeps so many alive.", min=1)] = 1,
    length_penalty: Annotated[float, typer.Option(help="Of beams: above 0 favours long ones.")] = 1.0,
    num_return_sequences: Annotated[int, typer.Option(help="Continuations of a prompt, the best first.", min=1)] = 1,
    best_of: Annotated[int | None, typer.Option(help="Draws of a prompt, of which the best are kept.", min=1)] = None,
    input: Annotated[
        Path | None, typer.Option(help="Lines of JSON, each a prompt: a string, or an object with prompt or messages.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where the answers to --input go; a run that was killed goes on there.")
    ] = None,
    slots: Annotated[int, typer.Option(help="Prompts of --input continued at a time.", min=1)] = 16,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a prompt of --input and its answer; none: up to 8192.", min=1)
    ] = None,
    dtype: ComputeDtype = None,
    ema: Ema = False,
    adapter: Adapter = None,
    adapter_weight: AdapterWeight = None,
) -> None:
    """Continue texts. One prompt is streamed as it grows; several are printed as they are done.

    With --input and --output, a line of JSON a prompt is written as each is done, whatever their order.
    """
    if (input is None) != (output is None):
        raise ValueError("--input and --output go together")
    if input is not None and (prompts or prompts_file):
        raise ValueError("prompts come from --input, or as arguments and from --prompts-file, not from both")
    search = {
        "num_beams": num_beams,
        "length_penalty": length_penalty,
        "num_return_sequences": num_return_sequences,
        "best_of": best_of,
    }
    searches = num_beams > 1 or num_return_sequences > 1 or best_of is not None or length_penalty != 1
    if input is not None and searches:
        raise ValueError("beams and draws to choose from are for prompts that are no file's, not for --input")
    texts = [] if input is not None else _prompts(prompts or [], prompts_file)
    import jaxformers as jf
    from jaxformers.api import load_to_generate

    model = load_to_generate(ref, dtype=dtype, ema=ema, adapter=adapter or (), adapter_weights=adapter_weight or None)
    settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "stop": tuple(stop or ()),
        "seed": seed,
    }
    if input is not None:
        _generate_file(model, input, output, slots=slots, max_length=max_length, **settings)
        return
    if len(texts) == 1 and not searches:
        pieces = jf.stream(model, texts, **settings)  # refuses settings before anything is printed
        print(texts[0], end="", flush=True)
        for piece in pieces:
            print(piece.text, end="", flush=True)
        print()
        return
    for prompt, found in zip(texts, jf.generate(model, texts, **search, **settings), strict=True):
        for text in [found] if isinstance(found, str) else found:
            print(f"{prompt}{text}\n")


def _generate_file(model: Any, source: Path, target: Path, **options: Any) -> None:
    """Answers to a file of prompts, with a progress bar where standard error is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from jaxformers.batch import generate_file

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("generating", total=None)
        done = generate_file(
            model,
            source,
            target,
            on_progress=lambda s: bar.update(task, total=s.total, completed=s.earlier + s.answered + s.errors),
            **options,
        )
    earlier = f", {done.earlier} of them by earlier runs" if done.earlier else ""
    print(f"{target}: {done.earlier + done.answered} of {done.total} prompts are answered{earlier}", file=sys.stderr)
    if done.errors:
        raise ValueError(
            f"{done.errors} of {done.total} prompts of {source} have errors, the first in {done.first_error}"
        )


def _prompts(given: list[str], file: Path | None) -> list[str]:
    """Prompts from arguments and a file, else all of standard input."""
    texts = list(given)
    if file is not None:
        try:
            texts += [line for line in file.read_text(encoding="utf-8").splitlines() if line]
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not texts and not sys.stdin.isatty():
        texts = [text] if (text := sys.stdin.read().removesuffix("\n")) else []
    if not texts:
        raise ValueError("no prompt: give one as an argument, by --prompts-file, or on standard input")
    return texts


@app.command()
def chat(
    ref: Ref,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    dtype: ComputeDtype = None,
    ema: Ema = False,
    adapter: Adapter = None,
    adapter_weight: AdapterWeight = None,
) -> None:
    """Talk with a model. Each line of standard input is a turn; /help lists the commands."""
    from jaxformers.api import load_to_generate
    from jaxformers.chat import Conversation, converse

    settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    model = load_to_generate(ref, dtype=dtype, ema=ema, adapter=adapter or (), adapter_weights=adapter_weight or None)
    converse(Conversation(model, system=system, **settings))


@app.command()
def convert(
    source: Ref,
    destination: Annotated[Path, typer.Argument(help="The Hugging Face directory to write.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Of the written weights; none: as they are.")] = None,
    max_shard_size: Annotated[float, typer.Option(help="GB of weights in a file at most.", min=0.001)] = 5.0,
    ema: Ema = False,
    adapter: Adapter = None,
    adapter_weight: AdapterWeight = None,
    merge_adapter: Annotated[
        bool,
        typer.Option("--merge-adapter", help="Write the weights with the adapter in them; else the adapter alone."),
    ] = False,
) -> None:
    """Write a model as a Hugging Face directory, which transformers opens, or an adapter as peft opens it."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists and is not an empty directory; choose another destination")
    import jaxformers as jf
    from jaxformers.api import find_model

    found = find_model(source, mtp=True, adapters=adapter or (), adapter_weights=adapter_weight or None)
    if found.adapter is not None and not merge_adapter:
        from jaxformers.adapters import save_adapter

        print(f"{destination}: {save_adapter(found, destination, ema=ema)}", file=sys.stderr)
        return
    if merge_adapter and found.adapter is None:
        raise ValueError(f"--merge-adapter: {source} has no adapter; name one by --adapter")
    model = jf.load(source, ema=ema, mtp=True, adapter=adapter or (), adapter_weights=adapter_weight or None)
    jf.save_pretrained(model, destination, dtype=dtype, max_shard_bytes=int(max_shard_size * 1e9))
    print(f"{destination}: {model.config.family}, {jf.count_params(model.config):,} parameters", file=sys.stderr)


@app.command()
def models(
    only: Annotated[str | None, typer.Argument(help="A part of the types, lineages or sizes to show.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List model types, what is proved of each, and the sizes that a config's `model` may name."""
    from jaxformers.listing import describe_types, list_types

    types = list_types(only)
    print(json.dumps([dataclasses.asdict(row) for row in types], indent=2) if as_json else describe_types(types))


@app.command()
def inspect(ref: Ref) -> None:
    """Show what a reference holds: the architecture, its size, and the state of a run. Loads no weights."""
    from jaxformers.inspection import describe

    for name, value in describe(ref).items():
        print(f"{name:20s} {value}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; also of runs in progress.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """Write a page with the plots of a run, or of several compared; it needs nothing beside itself."""
    from jaxformers.report.page import write_report

    write_report(runs, output)
    print(f"{output}: {len(runs)} run{'s' if len(runs) > 1 else ''}", file=sys.stderr)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a config file, for editors."""
    from jaxformers.config import json_schema

    print(json.dumps(json_schema(), indent=2))


def _version(shown: bool) -> None:
    if shown:
        from jaxformers import __version__

        print(f"jaxformers {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Settings of every verb."""


def main() -> None:
    """Runs the command line. A user's mistake is one line on standard error; JAXFORMERS_DEBUG=1 shows where it was
    found."""
    try:
        _set_up_unless_help()
        app()
    except KeyboardInterrupt:
        _leave(130)
    except Exception as error:
        mistake = isinstance(error, (ValueError, OSError))
        if (mistake or _is_divergence(error)) and not os.environ.get("JAXFORMERS_DEBUG"):
            print(f"jaxformers: {_one_line(error)}", file=sys.stderr)
        else:
            traceback.print_exc()
        _leave(2 if mistake else 1)


def _is_divergence(error: Exception) -> bool:
    """Whether the run's own guards ended it; nothing of it is loaded for other verbs."""
    watch = sys.modules.get("jaxformers.train.watch")
    return watch is not None and isinstance(error, watch.Diverged)


def _leave(status: int) -> None:
    """Ends the process, which may be one of several; without jax where it has not been needed."""
    if (distributed := sys.modules.get("jaxformers.parallel.distributed")) is not None:
        distributed.leave(status)
    sys.exit(status)


def _set_up_unless_help() -> None:
    verbs_with_jax = ("train", "generate", "chat", "serve", "convert", "bench", "checkpoint")
    if len(sys.argv) > 1 and sys.argv[1] in verbs_with_jax and not {"-h", "--help"} & set(sys.argv):
        from jaxformers.environment import set_up

        set_up()


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split())
