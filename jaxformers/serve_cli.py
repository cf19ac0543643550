"""The `serve` verb's options, and nothing else."""

from __future__ import annotations

import os
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer


class Pooling(StrEnum):
    mean = "mean"
    last = "last"


class MetricsNames(StrEnum):
    jaxformers = "jaxformers"
    vllm = "vllm"


class Speculate(StrEnum):
    ngram = "ngram"
    draft = "draft"
    mtp = "mtp"


class CacheDtype(StrEnum):
    int8 = "int8"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def serve(
    ref: Annotated[str, typer.Argument(help="What to serve: a directory, a .gguf file, a hub id, a run.")],
    host: Annotated[str, typer.Option(help="The address to listen at; others than loopback need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    slots: Annotated[int, typer.Option(help="Requests decoded at a time.", min=1)] = 8,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a prompt and its answer at most.", min=1)] = None,
    cache_tokens: Annotated[int | None, typer.Option(help="Tokens that the cache holds in all.", min=1)] = None,
    page_size: Annotated[int, typer.Option(help="Tokens of a page of the cache.", min=1)] = 16,
    prefill_chunk: Annotated[int, typer.Option(help="Prompt tokens read between two decoding steps.", min=1)] = 128,
    decode_steps: Annotated[int, typer.Option(help="Tokens between two looks at the host.", min=1)] = 4,
    prefix_cache: Annotated[bool, typer.Option(help="Keep what was read for prompts that begin alike.")] = True,
    speculate: Annotated[
        Speculate | None,
        typer.Option(
            help="Guess tokens ahead: by what the text said before, a draft model, or the model's own modules."
        ),
    ] = None,
    draft_model: Annotated[
        str | None, typer.Option(help="The smaller model that guesses, of the same vocabulary: a reference.")
    ] = None,
    draft_tokens: Annotated[int, typer.Option(help="Tokens guessed at a time.", min=1)] = 4,
    cache_dtype: Annotated[
        CacheDtype | None, typer.Option(help="Of cached keys and values; none: as the model computes.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIRECTORY", help="A LoRA adapter in peft's format, chosen by its name as a model."),
    ] = None,
    adapter_rank: Annotated[int, typer.Option(help="The largest rank of an adapter.", min=1)] = 16,
    queue_requests: Annotated[int, typer.Option(help="Requests that may wait.", min=1)] = 256,
    queue_tokens: Annotated[int, typer.Option(help="Prompt tokens that may wait.", min=1)] = 1_000_000,
    api_key: Annotated[
        list[str] | None, typer.Option(help="A key that clients must have; may be repeated. Also JAXFORMERS_API_KEY.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file with a key on each line.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Serve everyone who can reach the address.")] = False,
    tls_certificate: Annotated[Path | None, typer.Option(help="A PEM file; the server then speaks https.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's private key.")] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="A web page's origin that may ask; may be repeated.")
    ] = None,
    max_body_mb: Annotated[float, typer.Option(help="MB of a request's body at most.", min=0.001)] = 16.0,
    request_timeout: Annotated[float, typer.Option(help="Seconds of a request at most.", min=0.01)] = 600.0,
    drain_timeout: Annotated[float, typer.Option(help="Seconds that SIGTERM leaves to requests.", min=0.0)] = 30.0,
    metrics_compat: Annotated[MetricsNames, typer.Option(help="Whose names /metrics uses.")] = MetricsNames.jaxformers,
    pooling: Annotated[Pooling, typer.Option(help="How /v1/embeddings makes one vector of many.")] = Pooling.mean,
    access_log: Annotated[bool, typer.Option(help="A line of JSON for each request, on standard error.")] = True,
    dtype: Annotated[Dtype | None, typer.Option(help="Of parameters and computation.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Of a run: the moving average of its parameters.")] = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's API: chats, completions, embeddings, metrics and a chat page."""
    if missing := [library for library in ("starlette", "uvicorn", "prometheus_client") if find_spec(library) is None]:
        raise ValueError(f"serving needs {', '.join(missing)}: pip install 'jaxformers[serve]'")
    from jaxformers.infer.request import EngineConfig
    from jaxformers.serve.security import read_keys
    from jaxformers.serve.served import Access, Limits, Settings
    from jaxformers.serving import KEY_VARIABLE, Address, Options, hosts_to_answer
    from jaxformers.serving import serve as run

    address = Address(host=host, port=port, certificate=tls_certificate, private_key=tls_key)
    keys = read_keys(api_key or [], api_key_file, os.environ.get(KEY_VARIABLE))
    hosts = hosts_to_answer(address, has_key=bool(keys), insecure=insecure)
    adapters = named_adapters(adapter or [])
    engine = EngineConfig(
        slots=slots,
        max_length=max_length,
        cache_tokens=cache_tokens,
        page_size=page_size,
        prefill_chunk=prefill_chunk,
        decode_steps=decode_steps,
        queue_requests=queue_requests,
        queue_tokens=queue_tokens,
        prefix_cache=prefix_cache,
        speculate=None if speculate is None else speculate.value,
        draft_tokens=draft_tokens,
        cache_dtype=None if cache_dtype is None else cache_dtype.value,
        adapters=len(adapters),
        adapter_rank=adapter_rank,
    )
    settings = Settings(
        limits=Limits(
            max_body_bytes=int(max_body_mb * 1e6), request_seconds=request_timeout, drain_seconds=drain_timeout
        ),
        access=Access(keys=keys, hosts=hosts, origins=tuple(cors_origin or ())),
        metrics_names=metrics_compat.value,
    )
    run(
        ref,
        Options(
            address=address,
            engine=engine,
            draft=draft_model,
            adapters=adapters,
            settings=settings,
            name=name,
            pooling=pooling.value,
            dtype=dtype,
            ema=ema,
            access_log=access_log,
        ),
    )


def named_adapters(given: list[str]) -> dict[str, str]:
    """Directories by name, of texts NAME=DIRECTORY. ValueError for anything else, and for a name given twice."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, directory = text.partition("=")
        if not (name and equals and directory):
            raise ValueError(f"--adapter {text!r} is not of the form NAME=DIRECTORY")
        if name in found:
            raise ValueError(f"--adapter {name!r} is given twice")
        found[name] = directory
    return found
