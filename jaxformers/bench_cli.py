"""`jaxformers bench`: which model to measure, and how the figures are shown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from jaxformers.bench import DecodeReport, Machine, Memory, Seconds, Shape, TrainReport
    from jaxformers.bench_engine import EngineReport, Load, Quantiles
    from jaxformers.config import RunConfig
    from jaxformers.models.config import ModelConfig

bench_app = typer.Typer(
    help="Measure training and decoding on this machine, with random weights.", no_args_is_help=True
)

_LLAMA = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": True}
_WIDTH_768 = _LLAMA | {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
PRESETS: dict[str, dict[str, Any]] = {
    "llama-tiny": _LLAMA
    | {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    # The shape that tests/benchmarks/versus_transformers.py compares on.
    "llama-100m": _WIDTH_768 | {"num_key_value_heads": 4},
    # The shape of configs/llama-110m.yaml.
    "llama-110m": _WIDTH_768 | {"num_key_value_heads": 12},
    # The shape of TinyLlama (arXiv:2401.02385), which does not tie its embeddings.
    "llama-1b": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
DEFAULT_PRESET = "llama-100m"

Preset = Annotated[
    Literal[tuple(PRESETS)] | None,  # type: ignore[valid-type]
    typer.Option(help=f"A well-known shape, in place of a target; {DEFAULT_PRESET} where there is neither."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, in seconds, bytes and FLOPs.")]
Dtype = Literal["float32", "bfloat16"]


@bench_app.command()
def train(
    target: Annotated[
        str | None, typer.Argument(help="A YAML config, or a reference whose architecture to take.")
    ] = None,
    preset: Preset = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in an update, in one microbatch.  [default: 4]")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a row.  [default: 256]")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of activations and matmuls.  [default: float32]")] = None,
    remat: Annotated[
        Literal["none", "full", "dots", "projections"] | None,
        typer.Option(help="What the backward pass recomputes.  [default: none]"),
    ] = None,
    layers: Annotated[
        Literal["auto", "scan", "unroll"] | None, typer.Option(help="How layers are compiled.  [default: auto]")
    ] = None,
    steps: Annotated[int, typer.Option(help="Updates to time.")] = 10,
    as_json: Json = False,
) -> None:
    """Time training steps. What a config says is kept where no option says otherwise; it needs no data."""
    given = {
        "train.batch_size": batch_size,
        "train.accumulation": None if batch_size is None else 1,
        "data.sequence_length": sequence_length,
        "runtime.dtype": dtype,
        "runtime.remat": remat,
        "runtime.layers": layers,
    }
    config = train_config(target, preset, [f"{key}={value}" for key, value in given.items() if value is not None])
    from jaxformers.bench import bench_train
    from jaxformers.training import prepare_run

    name = target or preset or DEFAULT_PRESET
    report = bench_train(lambda: prepare_run(config).trainer, steps=steps, name=name)
    _show(report, _train_rows(report), as_json)


@bench_app.command()
def decode(
    target: Annotated[
        str | None, typer.Argument(help="A reference, or a YAML config, whose architecture to take.")
    ] = None,
    preset: Preset = None,
    batch: Annotated[int, typer.Option(help="Rows generated side by side.")] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens in each prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to add to each.")] = 128,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and computation.")] = "float32",
    rounds: Annotated[int, typer.Option(help="Generations to time.")] = 3,
    as_json: Json = False,
) -> None:
    """Time cached greedy generation on the first device."""
    cfg = architecture(target, preset)
    from jaxformers.bench import bench_decode

    report = bench_decode(
        cfg,
        batch_size=batch,
        prompt_tokens=prompt,
        new_tokens=new_tokens,
        dtype=dtype,
        rounds=rounds,
        name=target or preset or DEFAULT_PRESET,
    )
    _show(report, _decode_rows(report), as_json)


@bench_app.command()
def engine(
    target: Annotated[
        str | None, typer.Argument(help="A reference, or a YAML config, whose architecture to take.")
    ] = None,
    preset: Preset = None,
    requests: Annotated[int, typer.Option(help="Requests in all.")] = 64,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second, at random moments; a closed loop where it is left out.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests under way at any time, in a closed loop.")] = 8,
    prompt: Annotated[int, typer.Option(help="Tokens in a prompt, on average.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to add to it, on average.")] = 64,
    spread: Annotated[float, typer.Option(help="By which part of itself a length varies, both ways.")] = 0.5,
    shared: Annotated[int, typer.Option(help="Tokens that all prompts begin with.")] = 0,
    slots: Annotated[int, typer.Option(help="Requests decoded at a time.")] = 8,
    speculate: Annotated[
        Literal["ngram", "draft", "mtp"] | None,
        typer.Option(help="Guess tokens ahead; of random weights, guesses that come say nothing of trained ones."),
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="A reference, or a YAML config, whose architecture guesses for `draft`.")
    ] = None,
    draft_tokens: Annotated[int, typer.Option(help="Tokens guessed at a time.")] = 4,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and computation.")] = "float32",
    as_json: Json = False,
) -> None:
    """Time requests that share one engine on the first device."""
    cfg, smaller = architecture(target, preset), None if draft is None else architecture(draft, None)
    from jaxformers.bench import random_prepared
    from jaxformers.bench_engine import Load, bench_engine
    from jaxformers.infer.engine import Engine
    from jaxformers.infer.request import EngineConfig

    load = Load(
        requests=requests,
        rate=rate,
        concurrency=concurrency,
        prompt_tokens=prompt,
        new_tokens=new_tokens,
        spread=spread,
        shared=shared,
    )
    sizes = EngineConfig(
        slots=slots,
        max_length=load.longest,
        queue_requests=requests,
        queue_tokens=10**9,
        speculate=speculate,
        draft_tokens=draft_tokens,
    )
    model = random_prepared(cfg, dtype, mtp=speculate == "mtp")
    guessing = None if smaller is None else random_prepared(smaller, dtype)
    report = bench_engine(Engine(model, sizes, draft=guessing), load)
    _show(report, _engine_rows(report, load, slots), as_json)


def train_config(target: str | None, preset: str | None, overrides: list[str]) -> RunConfig:
    """The run to time: a config file's, or one around the architecture of a reference or preset."""
    from jaxformers.config import load_config

    if target is not None and preset is None and _is_config(target):
        config = load_config(target, overrides)
        if not isinstance(config.model, str):
            return config
        model = architecture(config.model, None).source
        return config.model_copy(update={"model": dict(model)})
    values = {
        "run_dir": "unused",
        "model": dict(architecture(target, preset).source),
        "data": {"paths": "unused", "sequence_length": 256},
        "train": {"steps": 10_000, "batch_size": 4},
    }
    return load_config(values, overrides)


def architecture(target: str | None, preset: str | None) -> ModelConfig:
    """The architecture of a reference, of the model of a config file, or of a preset. ValueError names what is wrong
    with either."""
    from jaxformers.config import load_config
    from jaxformers.families import read_config
    from jaxformers.families.catalog import is_published
    from jaxformers.hub.resolve import classify, resolve
    from jaxformers.train.checkpoint import Checkpointer

    if target is None:
        return read_config(PRESETS[preset or DEFAULT_PRESET])
    if preset is not None:
        raise ValueError(f"both {target} and --preset {preset} are given; choose one")
    if _is_config(target):
        model = load_config(target).model
        return architecture(model, None) if isinstance(model, str) else read_config(model)
    if is_published(target):
        return read_config(target)
    path = resolve(target)
    kind = classify(path)
    if kind == "huggingface":
        return read_config(path)
    if kind not in ("run", "checkpoint"):
        raise ValueError(f"{target} is a {kind} file, which does not say its architecture; name its directory")
    with Checkpointer(path if kind == "run" else path.parent.parent) as checkpoints:
        step = checkpoints.latest_step if kind == "run" else int(path.name)
        if step is None:
            raise ValueError(f"{target} has no checkpoint yet")
        return read_config(checkpoints.meta(step)["model"])


def _is_config(target: str) -> bool:
    return Path(target).suffix in (".yaml", ".yml")


def _show(
    report: TrainReport | DecodeReport | EngineReport, rows: Iterable[tuple[str, str] | None], as_json: bool
) -> None:
    from rich.console import Console

    from jaxformers.bench import as_dict

    if as_json:
        print(json.dumps(as_dict(report)))
    else:
        Console().print(_table(rows))


def _table(rows: Iterable[tuple[str, str] | None]) -> Table:
    """Names and values; None begins a new section."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    return table


def _train_rows(report: TrainReport) -> list[tuple[str, str] | None]:
    accumulated = f", in {report.accumulation} microbatches" if report.accumulation > 1 else ""
    return [
        *_model_rows(report.model, report.dtype),
        ("batch", f"{report.batch_size} x {report.sequence_length} tokens{accumulated}, remat {report.remat}"),
        None,
        ("tokens per second", f"{report.tokens_per_second:,.1f}"),
        ("step", _seconds(report.step)),
        ("compile", f"{report.compile.cold:.1f} s, {report.compile.warm:.1f} s from the persistent cache"),
        ("memory", _memory(report.memory)),
        None,
        *_machine_rows(report.machine),
        None,
        ("needed by the model", f"{_quantity(report.flops_per_second, 'FLOP/s')}"),
        ("MFU", _mfu(report.mfu, report.published_mfu)),
    ]


def _decode_rows(report: DecodeReport) -> list[tuple[str, str] | None]:
    rows = "row" if report.batch_size == 1 else "rows"
    return [
        *_model_rows(report.model, report.dtype),
        ("batch", f"{report.batch_size} {rows}, {report.new_tokens} tokens after {report.prompt_tokens}"),
        None,
        ("decoding", f"{report.tokens_per_second:,.1f} tokens per second"),
        ("step", _seconds(report.step)),
        ("prefill", f"{report.prefill_tokens_per_second:,.1f} tokens per second, {report.prefill.median * 1e3:.1f} ms"),
        ("both together", f"{report.total_tokens_per_second:,.1f} new tokens per second"),
        ("compile", f"{report.compile.cold:.1f} s"),
        ("memory", _memory(report.memory)),
        ("key/value cache", _bytes(report.cache_bytes)),
        None,
        *_machine_rows(report.machine),
        None,
        ("weights read", f"{_bytes(report.weight_bytes)} a step, {_quantity(report.bytes_per_second, 'B/s')}"),
        ("of the bandwidth", f"{report.bandwidth_share:.1%}"),
        ("MFU", _mfu(report.mfu, None)),
    ]


def _engine_rows(report: EngineReport, load: Load, slots: int) -> list[tuple[str, str] | None]:
    loop = f"{load.concurrency} at any time" if load.rate is None else f"{load.rate:g} a second, at random"
    shared = f", {load.shared} of them shared" if load.shared else ""
    return [
        ("requests", f"{report.requests}, {loop}, over {slots} slots"),
        ("lengths", f"about {load.prompt_tokens} tokens{shared}, and {load.new_tokens} new ones"),
        None,
        (
            "throughput",
            f"{report.tokens_per_second:,.1f} new tokens per second, {report.requests / report.seconds:.2f} "
            f"requests per second",
        ),
        ("first token", _quantiles(report.first_token)),
        ("between tokens", _quantiles(report.between_tokens)),
        ("whole answer", _quantiles(report.whole)),
        None,
        ("prefix cache", f"{report.hit_rate:.1%} of the prompts' tokens found"),
        *_guess_rows(report),
        ("compilations", f"{report.compilations} after {report.warm_up:.1f} s of warming up"),
    ]


def _guess_rows(report: EngineReport) -> list[tuple[str, str]]:
    if not report.drafted_tokens:
        return []
    rate = report.accepted_tokens / report.drafted_tokens
    return [("guesses", f"{report.drafted_tokens:,} tokens, {rate:.1%} of them accepted")]


def _quantiles(seconds: Quantiles) -> str:
    median, p90, p99 = (f"{value * 1e3:,.1f}" for value in (seconds.median, seconds.p90, seconds.p99))
    return f"{median} ms (p90 {p90}, p99 {p99})"


def _model_rows(model: Shape, dtype: str) -> list[tuple[str, str]]:
    active = f" ({model.active_parameters:,} active)" if model.active_parameters != model.parameters else ""
    return [("model", f"{model.name}: {model.family}, {model.parameters:,} parameters{active}, {dtype}")]


def _machine_rows(machine: Machine) -> list[tuple[str, str]]:
    cores = f"{machine.cpu_cores} cores" if machine.platform == "cpu" else f"{machine.devices} x {machine.device}"
    rows = [
        ("machine", f"{machine.platform}, {cores}"),
        ("measured matmul peak", _quantity(machine.matmul_flops, "FLOP/s")),
        ("measured bandwidth", _quantity(machine.bandwidth, "B/s")),
    ]
    if machine.published_flops:
        rows.append(("published matmul peak", _quantity(machine.published_flops, "FLOP/s")))
    return rows


def _seconds(step: Seconds) -> str:
    unit, scale = ("s", 1.0) if step.median >= 10 else ("ms", 1e3)
    median, p10, p90 = (f"{seconds * scale:.1f}" for seconds in (step.median, step.p10, step.p90))
    return f"{median} {unit} (p10 {p10}, p90 {p90}, of {step.count})"


def _memory(memory: Memory) -> str:
    parts = []
    if memory.arguments is not None:
        parts.append(f"{_bytes(memory.arguments)} arguments + {_bytes(memory.temporaries or 0)} temporaries")
    if memory.device_peak is not None:
        parts.append(f"device peak {_bytes(memory.device_peak)}")
    return ", ".join([*parts, f"process peak {_bytes(memory.process_peak)}"])


def _mfu(measured: float, published: float | None) -> str:
    return f"{measured:.1%} of the measured peak" + (f", {published:.1%} of the published" if published else "")


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"


def _quantity(value: float, unit: str) -> str:
    """With the decimal prefix that leaves one to three digits before the point."""
    for prefix in ("", "K", "M", "G", "T"):
        if value < 1000:
            return f"{value:.1f} {prefix}{unit}"
        value /= 1000
    return f"{value:.1f} P{unit}"


@bench_app.command()
def serve(
    url: Annotated[str, typer.Argument(help="Where a server listens, such as http://127.0.0.1:8000.")],
    requests: Annotated[int, typer.Option(help="Requests in all.", min=1)] = 64,
    rate: Annotated[float | None, typer.Option(help="Arrivals a second; none: a new one as one is over.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at a time, without a rate.", min=1)] = 8,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt, about.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, about.", min=1)] = 64,
    api_key: Annotated[str | None, typer.Option(help="The server's key.", envvar="JAXFORMERS_API_KEY")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time requests to a server over HTTP, as `bench engine` times an engine."""
    import dataclasses

    from jaxformers.bench_engine import Load
    from jaxformers.bench_serve import bench_serve

    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    load = Load(requests=requests, rate=rate, concurrency=concurrency, **sizes)
    figures = dataclasses.asdict(bench_serve(url, load, key=api_key))
    if as_json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        print(f"{name.replace('_', ' '):20s}", *(f"{label} {number:.4g}".strip() for label, number in parts))
