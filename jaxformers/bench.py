"""How fast this machine trains and decodes a model, beside what its matmuls and its memory can reach.

Weights and tokens are random: speed does not depend on them. Every report holds plain numbers in seconds, bytes and
floating-point operations; how they are shown is the command line's business.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from jaxformers.families.common import without_mtp
from jaxformers.infer.generate import Generation, Prepared, bucket, prepare_model
from jaxformers.models.cache import init_cache
from jaxformers.models.config import ModelConfig
from jaxformers.models.params import ParamSpec, count_params, flops_per_token, init_params, model_spec
from jaxformers.parallel.hardware import PUBLISHED_PEAKS, measured_bandwidth, measured_matmul_flops
from jaxformers.parallel.mesh import batch_sharding, single_device_mesh
from jaxformers.train.build import Trainer
from jaxformers.train.state import TrainState

# Large enough on an accelerator that starting a kernel takes no part of the time.
ACCELERATOR_MATMUL, ACCELERATOR_MEGABYTES = 8192, 4096


@dataclass(frozen=True)
class Seconds:
    """What repeating one thing took, in seconds: quantiles over `count` repetitions."""

    count: int
    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Seconds:
        p10, median, p90 = np.quantile(values, (0.1, 0.5, 0.9)).tolist()
        return cls(len(values), median, p10, p90)


@dataclass(frozen=True)
class Compile:
    """Seconds from a Python function to a program ready to run. `cold`: compiled anew. `warm`: found in the persistent
    compilation cache, as by the next process; None where it was not tried."""

    cold: float
    warm: float | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes. `arguments` and `temporaries` are of the compiled step on one device (None where there is no single one);
    `process_peak` is the most that this process ever held of main memory, `device_peak` of the first device's own,
    None where that has none."""

    arguments: int | None
    temporaries: int | None
    process_peak: int
    device_peak: int | None


@dataclass(frozen=True)
class Machine:
    """What all devices used reach together: `matmul_flops` in FLOP/s and `bandwidth` in bytes per second are measured,
    in the dtype of the benchmark; `published_flops` is the vendor's figure, None where there is none."""

    platform: str
    device: str
    devices: int
    cpu_cores: int
    matmul_flops: float
    bandwidth: float
    published_flops: float | None


@dataclass(frozen=True)
class Shape:
    """The model that was run."""

    name: str
    family: str
    parameters: int
    active_parameters: int


@dataclass(frozen=True)
class TrainReport:
    """One training step, repeated. `tokens_per_second` is that of the median step, `flops_per_second` what the model
    needs at that rate (recomputation not counted), and `mfu` its share of the measured matmul peak; `published_mfu`
    of the vendor's."""

    model: Shape
    machine: Machine
    batch_size: int
    sequence_length: int
    accumulation: int
    dtype: str
    remat: str
    compile: Compile
    step: Seconds
    memory: Memory
    tokens_per_second: float
    flops_per_token: float
    flops_per_second: float
    mfu: float
    published_mfu: float | None


@dataclass(frozen=True)
class DecodeReport:
    """Greedy cached generation, repeated. `decode` is over whole generations without their prefill, `step` over single
    steps, one token a row each. `tokens_per_second` is all rows' at the median of `decode`; `total_tokens_per_second`
    counts prefill time too. A step reads `weight_bytes`; `bandwidth_share` is their rate over the measured bandwidth.
    """

    model: Shape
    machine: Machine
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    dtype: str
    compile: Compile
    prefill: Seconds
    decode: Seconds
    step: Seconds
    memory: Memory
    prefill_tokens_per_second: float
    tokens_per_second: float
    total_tokens_per_second: float
    flops_per_token: float
    flops_per_second: float
    mfu: float
    weight_bytes: int
    cache_bytes: int
    bytes_per_second: float
    bandwidth_share: float


def as_dict(report: Any) -> dict[str, Any]:
    """A report, a dataclass, as nested mappings of plain numbers, for JSON."""
    return dataclasses.asdict(report)


def bench_train(make_trainer: Callable[[], Trainer], *, steps: int = 10, name: str = "") -> TrainReport:
    """Times `steps` updates on one batch of random tokens, after compiling the step and running it once.

    `make_trainer` is called twice, because a trainer keeps what it compiled: the second one measures a start from the
    persistent cache. ValueError for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    trainer = make_trainer()
    with jax.set_mesh(trainer.mesh):
        state, batch = trainer.init(0), random_batch(trainer)
        with _empty_compilation_cache():
            program, cold = _timed(lambda: _compiled(trainer, state, batch))
            _, warm = _timed(lambda: _compiled(make_trainer(), state, batch))
        step = Seconds.of(_step_seconds(program, state, batch, steps))
    analysis = program.memory_analysis()
    memory = _memory(trainer.mesh, analysis.argument_size_in_bytes, analysis.temp_size_in_bytes)
    return _train_report(trainer, name, step, Compile(cold, warm), memory)


def _compiled(trainer: Trainer, state: TrainState, batch: dict[str, jax.Array]) -> jax.stages.Compiled:
    return trainer.program.step.lower(state, batch).compile()


def _step_seconds(
    program: jax.stages.Compiled, state: TrainState, batch: dict[str, jax.Array], steps: int
) -> list[float]:
    """Seconds of each step behind a first one. Uses the state up."""
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, metrics = program(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    assert np.isfinite(metrics["loss"])
    return seconds[1:]


def _train_report(trainer: Trainer, name: str, step: Seconds, compile: Compile, memory: Memory) -> TrainReport:
    machine = measure_machine(trainer.mesh.devices.flatten().tolist(), trainer.runtime.dtype)
    per_token = flops_per_token(trainer.cfg, trainer.sequence_length, mtp=trainer.runs_mtp)
    tokens_per_second = trainer.program.tokens_after(1) / step.median
    rate = tokens_per_second * per_token
    return TrainReport(
        model=_shape(trainer.cfg, name),
        machine=machine,
        batch_size=trainer.train.batch_size,
        sequence_length=trainer.sequence_length,
        accumulation=trainer.train.accumulation,
        dtype=trainer.runtime.dtype,
        remat=trainer.runtime.remat,
        compile=compile,
        step=step,
        memory=memory,
        tokens_per_second=tokens_per_second,
        flops_per_token=per_token,
        flops_per_second=rate,
        mfu=rate / machine.matmul_flops,
        published_mfu=rate / machine.published_flops if machine.published_flops else None,
    )


def random_batch(trainer: Trainer) -> dict[str, jax.Array]:
    """A batch of random tokens as the trainer takes it: every row one whole document."""
    rows, length = trainer.train.batch_size, trainer.sequence_length
    tokens = np.random.default_rng(0).integers(0, trainer.cfg.vocab_size, (rows, length + 1), dtype=np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((rows, length), np.float32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones((rows, length), np.int32),
    }
    return jax.device_put(batch, batch_sharding((rows, length), trainer.mesh))


def bench_decode(
    cfg: ModelConfig,
    *,
    batch_size: int = 1,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    dtype: str = "float32",
    rounds: int = 3,
    name: str = "",
) -> DecodeReport:
    """Times greedy generation of `new_tokens` after random prompts on the first device, after a run that compiles.

    ValueError for sizes that cannot be run.
    """
    for setting, value, least in (
        ("batch_size", batch_size, 1),
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 2),
        ("rounds", rounds, 1),
    ):
        if value < least:
            raise ValueError(f"{setting} is {value}; it must be at least {least}")
    mesh, model = single_device_mesh(), random_prepared(cfg, dtype)
    prompts = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch_size, prompt_tokens)).tolist()
    with jax.set_mesh(mesh):
        with _empty_compilation_cache():
            first = _generate(model, prompts, new_tokens)
        times = [_generate(model, prompts, new_tokens) for _ in range(rounds)]
    compile = Compile(max(sum(first) - np.median([sum(t) for t in times]).item(), 0.0))
    memory = _memory(mesh, None, None)
    machine = measure_machine([mesh.devices.flat[0]], dtype)
    run = _Decoding(cfg, batch_size, prompt_tokens, new_tokens, dtype)
    return _decode_report(run, times, compile, memory, machine, name)


def random_prepared(cfg: ModelConfig, dtype: str, *, mtp: bool = False) -> Prepared:
    """A model with random weights on the first device, ready to generate; `mtp`: with its modules for multi-token
    prediction."""
    cfg = cfg if mtp else without_mtp(cfg)
    params = jax.jit(lambda key: init_params(cfg, key, dtype=dtype))(jax.random.key(0))
    return prepare_model(params, cfg, single_device_mesh(), dtype=dtype)


@dataclass(frozen=True)
class _Decoding:
    cfg: ModelConfig
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    dtype: str

    @property
    def flops_per_token(self) -> float:
        """Of a new token, on average: what the whole text needs, less what its prompt does."""
        whole = self.prompt_tokens + self.new_tokens
        both, prompt = (n * flops_per_token(self.cfg, n, backward=False) for n in (whole, self.prompt_tokens))
        return (both - prompt) / self.new_tokens


def _decode_report(
    run: _Decoding, times: list[list[float]], compile: Compile, memory: Memory, machine: Machine, name: str
) -> DecodeReport:
    """`times`: of each round, the seconds of its prefill, then of each step."""
    prefill, decode = Seconds.of([t[0] for t in times]), Seconds.of([sum(t[1:]) for t in times])
    whole = Seconds.of([sum(t) for t in times])
    tokens_per_second = run.batch_size * (run.new_tokens - 1) / decode.median
    weights, slots = step_weight_bytes(run.cfg, run.batch_size, run.dtype), bucket(run.prompt_tokens + run.new_tokens)
    bytes_per_second = weights * tokens_per_second / run.batch_size
    return DecodeReport(
        model=_shape(run.cfg, name),
        machine=machine,
        batch_size=run.batch_size,
        prompt_tokens=run.prompt_tokens,
        new_tokens=run.new_tokens,
        dtype=run.dtype,
        compile=compile,
        prefill=prefill,
        decode=decode,
        step=Seconds.of([seconds for t in times for seconds in t[1:]]),
        memory=memory,
        prefill_tokens_per_second=run.batch_size * run.prompt_tokens / prefill.median,
        tokens_per_second=tokens_per_second,
        total_tokens_per_second=run.batch_size * run.new_tokens / whole.median,
        flops_per_token=run.flops_per_token,
        flops_per_second=tokens_per_second * run.flops_per_token,
        mfu=tokens_per_second * run.flops_per_token / machine.matmul_flops,
        weight_bytes=weights,
        cache_bytes=cache_bytes(run.cfg, run.batch_size, slots, run.dtype),
        bytes_per_second=bytes_per_second,
        bandwidth_share=bytes_per_second / machine.bandwidth,
    )


def _generate(model: Prepared, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[float]:
    """Seconds of a prefill, then of each of the steps behind it; steps that one call makes share its time evenly."""
    seconds: list[float] = []
    start = time.perf_counter()
    for step in Generation(model, prompts, max_new_tokens=new_tokens):
        now, count = time.perf_counter(), len(step.tokens[0])
        seconds += [(now - start) / count] * count
        start = now
    assert len(seconds) == new_tokens
    return seconds


def step_weight_bytes(cfg: ModelConfig, rows: int, dtype: str) -> int:
    """Bytes of weights that one decoding step of `rows` rows reads: all but tables that are only looked up in, and of
    a mixture the experts that rows choosing at random would visit on average."""

    def size(spec: ParamSpec) -> float:
        count = float(np.prod(spec.shape))
        if cfg.moe and "experts" in spec.axes:
            count *= 1 - (1 - cfg.moe.top_k / cfg.moe.num_experts) ** rows
        return count

    read = dict(model_spec(cfg))
    read.pop("positions", None)
    read.pop("mtp", None)
    if not cfg.tie_embeddings:
        read.pop("embed")
    return round(sum(map(size, jax.tree.leaves(read))) * jnp.dtype(dtype).itemsize)


def cache_bytes(cfg: ModelConfig, rows: int, slots: int, dtype: str) -> int:
    """Bytes of a key/value cache."""
    cache = jax.eval_shape(lambda: init_cache(cfg, rows, slots, dtype=jnp.dtype(dtype)))
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache))


def measure_machine(devices: Sequence[jax.Device], dtype: str) -> Machine:
    """What these devices reach. CPU devices share one processor, so they are measured once, together."""
    first, on_cpu = devices[0], devices[0].platform == "cpu"
    if on_cpu:
        count, flops, bandwidth = 1, measured_matmul_flops(dtype), measured_bandwidth()
    else:
        count = len(devices)
        flops = measured_matmul_flops(dtype, ACCELERATOR_MATMUL)
        bandwidth = measured_bandwidth(ACCELERATOR_MEGABYTES)
    published = PUBLISHED_PEAKS.get(first.device_kind)
    return Machine(
        platform=first.platform,
        device=first.device_kind,
        devices=len(devices),
        cpu_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        matmul_flops=flops * count,
        bandwidth=bandwidth * count,
        published_flops=None if published is None else published[dtype == "float32"] * count,
    )


def _shape(cfg: ModelConfig, name: str) -> Shape:
    return Shape(name or cfg.family, cfg.family, count_params(cfg), count_params(cfg, active=True))


def _memory(mesh: jax.sharding.Mesh, arguments: int | None, temporaries: int | None) -> Memory:
    unit = 1 if sys.platform == "darwin" else 1024  # what the operating system counts in
    stats = mesh.devices.flat[0].memory_stats() or {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Memory(arguments, temporaries, peak, stats.get("peak_bytes_in_use"))


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


@contextmanager
def _empty_compilation_cache() -> Iterator[None]:
    """A persistent compilation cache of its own, in place of the user's, that keeps everything while it lasts."""
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    with TemporaryDirectory() as folder:
        settings["jax_compilation_cache_dir"] = folder
        before = {name: getattr(jax.config, name) for name in settings}
        try:
            _configure(settings)
            yield
        finally:
            _configure(before)


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it would keep to the folder it began with
