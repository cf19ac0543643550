"""A training run from its config: opens or resumes the run directory, builds the pieces, and hands them to the loop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from jaxformers.adapters import merged_on
from jaxformers.api import TOKENIZER_FOLDER, FoundModel, Model, find_model
from jaxformers.config import RunConfig, dump_yaml, load_config
from jaxformers.data.chat_templates import with_chat_template
from jaxformers.data.config import TokenizerConfig
from jaxformers.data.corpus import build_tokenizer
from jaxformers.data.pipeline import to_global
from jaxformers.data.rows import Row
from jaxformers.data.tokenizer import Tokenizer, check_vocabulary
from jaxformers.environment import give_cpu_devices_threads
from jaxformers.families import read_config
from jaxformers.families.catalog import is_published
from jaxformers.families.common import without_mtp
from jaxformers.feeding import Feed, check_best, describe_corpus, fingerprint, make_feed, open_run_corpus
from jaxformers.generation import generate
from jaxformers.hub.targets import frozen_entries
from jaxformers.models.config import ModelConfig
from jaxformers.models.params import Params, count_params, flops_per_token
from jaxformers.parallel.distributed import differing, is_first, wait_for_all
from jaxformers.parallel.mesh import make_mesh, nearest_multiples
from jaxformers.starting import Start, find_start
from jaxformers.train.build import Trainer
from jaxformers.train.checkpoint import Checkpointer
from jaxformers.train.config import ProfileConfig
from jaxformers.train.goodput import Goodput
from jaxformers.train.guard import after_rollback
from jaxformers.train.loop import Result, Supervision, train
from jaxformers.train.lora import make_adapter
from jaxformers.train.monitor import ABOUT_FILE, SAMPLES_FILE, Display, MetricsFile, Tracker, Trackers
from jaxformers.train.profile import Profiler
from jaxformers.train.provenance import library_versions
from jaxformers.train.requests import Requests
from jaxformers.train.restore import load_state
from jaxformers.train.retention import Metric
from jaxformers.train.state import TrainState
from jaxformers.train.trackers import check_trackers, open_trackers
from jaxformers.train.watchdog import Watchdog

WEIGHTLESS = "a run needs the weights that lora trains an adapter of: a hub id, a directory, a .gguf file or a run"


@dataclass(frozen=True)
class FitResult:
    """How a run ended: the step it reached, the last metrics, the last evaluation, texts it continues its sample
    prompts with, and what stopped it early, a signal or the time limit. `model` holds the trained parameters."""

    run_dir: Path
    model: Model
    step: int
    metrics: dict[str, Any]
    validation: dict[str, float]
    samples: tuple[str, ...] = ()
    stopped: str | None = None


@dataclass(frozen=True)
class Setup:
    """A run's parts as far as they need no data: what `--dry-run` checks and shows."""

    config: RunConfig
    trainer: Trainer
    pretrained: FoundModel | None = None

    @property
    def cfg(self) -> ModelConfig:
        return self.trainer.cfg

    @property
    def mesh(self) -> Mesh:
        return self.trainer.mesh


def prepare_run(config: RunConfig) -> Setup:
    """Checks a config against itself and the devices. ValueError for a combination that cannot run."""
    pretrained = None
    mesh = make_mesh(config.mesh)
    if isinstance(config.model, str) and not is_published(config.model):
        pretrained = find_model(config.model, mtp=True)
        # Of modules that the checkpoint lacks, this run's own checkpoints must not speak.
        cfg = pretrained.config if pretrained.config.mtp_modules else without_mtp(pretrained.config)
    else:
        cfg = read_config(config.model)
    _check_config(config, cfg)
    trainer = trainer_of(config, cfg, mesh)
    trainer.check()
    return Setup(config, trainer, pretrained)


def trainer_of(config: RunConfig, cfg: ModelConfig, mesh: Mesh) -> Trainer:
    """The training of a model on a mesh as a config says."""
    adapter = None if config.lora is None else make_adapter(config.lora, cfg, freeze=config.train.freeze)
    return Trainer(
        cfg,
        mesh,
        config.data.sequence_length,
        train=config.train,
        runtime=config.runtime,
        optimizer=config.optimizer,
        schedule=config.schedule,
        loss=config.loss,
        guard=config.guard,
        adapter=adapter,
        b_rate_ratio=1.0 if config.lora is None else config.lora.b_rate_ratio,
        frozen=frozen_entries(cfg, config.train.freeze) if config.lora is None else {},
        monitor=config.monitor,
        sources=tuple(config.data.sources) if "sources" in config.monitor.values else (),
    )


def _check_config(config: RunConfig, cfg: ModelConfig) -> None:
    check_trackers(config.monitor.trackers)
    if config.sample.prompts and jax.process_count() > 1:
        raise ValueError("sample.prompts are continued by a single process; set sample.prompts=[]")
    if config.data.sequence_length > cfg.context_length:
        raise ValueError(
            f"data.sequence_length is {config.data.sequence_length}, but the model's context is {cfg.context_length}"
        )
    _check_measures_at_saves(config)


def _check_measures_at_saves(config: RunConfig) -> None:
    """Refuses to keep the best of checkpoints that would not all say how good they are."""
    train, checkpoint, metric = config.train, config.checkpoint, Metric.parse(config.checkpoint.best_metric)
    if checkpoint.keep_best is None:
        return
    key, every = ("train.eval_every", train.eval_every) if metric.evaluated else ("train.log_every", train.log_every)
    goes_by = f"checkpoint.keep_best goes by {metric.name}"
    if every is None or (metric.evaluated and not train.eval_batches):
        raise ValueError(f"{goes_by}, which this run does not measure; set train.eval_every and train.eval_batches")
    if checkpoint.every_steps is None:
        raise ValueError(f"{goes_by}, measured every {every} steps; set checkpoint.every_steps to a multiple of that")
    if checkpoint.every_steps % every:
        raise ValueError(
            f"{goes_by}, which has to be measured at every save: checkpoint.every_steps {checkpoint.every_steps} is no "
            f"multiple of {key} {every}; nearest legal: {nearest_multiples(checkpoint.every_steps, of=every)}"
        )


def describe_setup(setup: Setup) -> dict[str, str]:
    """What a run will need, for people: parameters, memory a device, tokens."""
    config, cfg = setup.config, setup.cfg
    state = setup.trainer.abstract_state
    weights, total = _bytes_per_device(state.params) / 2**30, _bytes_per_device(state) / 2**30
    tokens = config.train.rows_before(config.train.steps) * config.data.sequence_length
    batches = sorted(set(config.train.batch_sizes.values()))
    per_step = " to ".join(f"{rows * config.data.sequence_length:,}" for rows in {batches[0]: 0, batches[-1]: 0})
    sizes = ", ".join(f"{axis}={size}" for axis, size in setup.mesh.shape.items() if size > 1)
    count, active = count_params(cfg), count_params(cfg, active=True)
    modules = count_params(cfg, mtp=True) - count
    flops = tokens * flops_per_token(cfg, config.data.sequence_length, mtp=setup.trainer.runs_mtp)
    return {
        "model": cfg.family,
        **_trained(setup, state),
        "parameters": f"{count:,}"
        + (f" ({active:,} active)" if active != count else "")
        + (f" + {modules:,} for multi-token prediction" if modules else ""),
        "devices": f"{setup.mesh.size} ({sizes or 'one'})",
        "memory per device": f"{total:.2f} GiB of state + {weights:.2f} GiB of gradients, plus activations",
        "steps": f"{config.train.steps:,} of {per_step} tokens, {tokens:,} in all",
        "compute": f"{flops:.2e} FLOPs in {config.runtime.dtype}",
    }


def _trained(setup: Setup, state: TrainState) -> dict[str, str]:
    """How much of a model is trained, where it is not all, and what the rest is kept in."""
    if state.frozen is None:
        return {}
    count = sum(math.prod(a.shape) for a in jax.tree.leaves(state.params))
    kept = "" if setup.config.lora is None else f" in {setup.config.lora.base}"
    trained = f"{count:,} parameters over {_bytes_per_device(state.frozen) / 2**30:.2f} GiB{kept} a device"
    return {"trained": trained if setup.config.lora is None or setup.pretrained else f"{trained}; {WEIGHTLESS}"}


def _bytes_per_device(tree: Any) -> int:
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def fit(
    config: RunConfig | str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, console: Console | None = None
) -> FitResult:
    """Runs (or resumes) the training run of a config: a file, a mapping, or a RunConfig.

    overrides are of the form `train.steps=100`. ValueError in one line for a config, data or run directory that
    cannot be used; nothing is lost then.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config, overrides)
    elif overrides:
        config = load_config(config.model_dump(mode="json"), overrides)
    give_cpu_devices_threads()  # for scripts, which do not pass by the command line; too late if they used jax before
    started = time.perf_counter()
    console = console or Console(stderr=True, quiet=not is_first())
    setup = prepare_run(config)
    if config.lora is not None and setup.pretrained is None:
        raise ValueError(f"model: {WEIGHTLESS}")
    _check_same_everywhere(config.model_dump_json(), "config", done="read its config")
    run_dir = Path(config.run_dir).expanduser()
    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(setup.mesh))
        say = partial(_print, console=console)
        checkpoints = stack.enter_context(Checkpointer(run_dir, config.checkpoint, say=say))
        resume_step = _resume_step(config, checkpoints, say)
        tokenizer = _tokenizer(setup)
        _check_samples(config, setup.cfg, tokenizer)
        meta = _meta(setup, tokenizer)
        start = find_start(config.checkpoint, checkpoints, resume_step, stack, say)
        if start is not None and (note := start.check(setup.cfg, tokenizer)):
            say(note)
        if start is not None and config.lora is not None:
            _check_base(start, meta)
        corpus = open_run_corpus(config, tokenizer, console)
        for line in describe_corpus(corpus):
            _print(line, console)
        _check_same_everywhere(fingerprint(corpus), "data", done="open its data")
        feed = make_feed(config, setup.mesh, corpus)
        check_best(config.checkpoint, feed)
        state = _first_state(setup, start, feed.batches, console)
        # Only now is it certain that the run may go on here: what it says of itself is left as it was until then.
        if resume_step is not None:
            checkpoints.set_aside(newer_than=resume_step)
        if is_first():
            tokenizer.save(run_dir / TOKENIZER_FOLDER)
            (run_dir / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
            _write_json(run_dir / ABOUT_FILE, {**describe_setup(setup), "versions": meta["versions"]})
        # What others learned before is worth knowing before it changes; random weights say nothing.
        begins_with_weights = int(state.step) == 0 and (setup.pretrained is not None or start is not None)
        evaluate_first = begins_with_weights and config.train.eval_every is not None
        result = _run(setup, state, feed, checkpoints, meta, run_dir, started, console, evaluate_first)
    params, cfg = result.state.params, setup.cfg
    if config.lora is not None:
        params, cfg = merged_on(setup.mesh, setup.trainer.whole(params, result.frozen), cfg)
    model = Model(cfg, params, tokenizer, setup.mesh, config.runtime.dtype, meta["generation"])
    samples = tuple(_samples(model, config)) if result.stopped is None else ()
    if samples and is_first():
        texts = [{"prompt": prompt, "text": text} for prompt, text in zip(config.sample.prompts, samples, strict=True)]
        _write_json(run_dir / SAMPLES_FILE, texts)
    return FitResult(run_dir, model, result.step, result.metrics, result.validation, samples, result.stopped)


def _check_base(start: Start, meta: Mapping[str, Any]) -> None:
    """ValueError where the adapter in a checkpoint is of other weights than this run's."""
    before, now = start.checkpoints.meta(start.step).get("base"), meta["base"]
    if before is not None and before["fingerprint"] != now["fingerprint"]:
        raise ValueError(
            f"{start.checkpoints.folder} holds an adapter of another base: {before['ref']} had the fingerprint "
            f"{before['fingerprint']}, {now['ref']} has {now['fingerprint']}; {start.remedy}"
        )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def _check_same_everywhere(value: str, name: str, *, done: str) -> None:
    """ValueError where processes, on machines of their own, do not mean the same run."""
    wait_for_all(done)
    if others := differing(value):
        raise ValueError(f"process {', '.join(map(str, others))} has another {name} than process 0; all need the same")


def _resume_step(config: RunConfig, checkpoints: Checkpointer, say: Callable[[str], None]) -> int | None:
    """The step to go on from, None for a fresh start."""
    latest, resume = checkpoints.latest_step, config.checkpoint.resume
    if latest is not None and resume == "never":
        raise ValueError(f"{checkpoints.folder} holds step {latest}; choose another run_dir, or checkpoint.resume=auto")
    if latest is None and resume == "must":
        raise ValueError(f"{checkpoints.folder} holds no checkpoint to resume from")
    return checkpoints.newest_good(say)


def _tokenizer(setup: Setup) -> Tokenizer:
    """The config's tokenizer; where it names none, the pretrained model's own, or one trained on the data."""
    config = setup.config
    if config.tokenizer is not None or setup.pretrained is None:
        tokenizer = build_tokenizer(config.tokenizer or TokenizerConfig(), config.data)
    elif setup.pretrained.tokenizer is None:
        raise ValueError(f"{setup.pretrained.path} holds no tokenizer; set one under the key 'tokenizer'")
    else:
        tokenizer = setup.pretrained.tokenizer
    check_vocabulary(tokenizer, setup.cfg.vocab_size)
    return with_chat_template(tokenizer, config.data)


def _check_samples(config: RunConfig, cfg: ModelConfig, tokenizer: Tokenizer) -> None:
    """Refuses, before hours of training, sample prompts that cannot be continued after them."""
    longest = max((len(tokenizer.encode(prompt)) for prompt in config.sample.prompts), default=0)
    if cfg.learned_positions and longest + config.sample.max_new_tokens > cfg.context_length:
        raise ValueError(
            f"sample: a prompt of {longest} tokens and {config.sample.max_new_tokens} new ones pass the context length "
            f"of {cfg.context_length}"
        )


def _meta(setup: Setup, tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    generation = {key: value for key, value in ids.items() if value is not None}
    if setup.pretrained is not None and setup.pretrained.generation:
        generation = setup.pretrained.generation
    base = {}
    if setup.config.lora is not None and setup.pretrained is not None:
        base = {"base": {"ref": _reference(setup), "fingerprint": setup.pretrained.fingerprint}}
    return base | {
        "model": dict(setup.cfg.source or {}),
        "tokenizer": tokenizer.fingerprint,
        "tokenizer_from": _tokenizer_origin(setup),
        "generation": generation,
        "config": setup.config.model_dump(mode="json"),
        "mesh": dict(setup.mesh.shape),
        "versions": dict(library_versions()),
    }


def _reference(setup: Setup) -> str:
    """The model under `model`, as it can be found from anywhere."""
    ref = str(setup.config.model)
    path = Path(ref).expanduser()
    return str(path.absolute()) if path.exists() else ref


def _tokenizer_origin(setup: Setup) -> str:
    """Where the tokenizer came from, for people; a copy of it lies in the run directory."""
    given = setup.config.tokenizer
    if given is None and setup.pretrained is not None:
        return str(setup.pretrained.path)
    given = given or TokenizerConfig()
    return given.path if given.kind == "file" and given.path else given.kind


def _first_state(
    setup: Setup, start: Start | None, batches: grain.DatasetIterator[Row], console: Console
) -> TrainState:
    """The state to begin with: from a checkpoint (`batches` may then be moved), pretrained or random."""
    config, trainer = setup.config, setup.trainer
    if start is None:
        return _new_state(setup)
    loaded = load_state(
        start.checkpoints,
        start.step,
        trainer.plain_state,
        batches,
        make=partial(_fresh_plain, setup),
        load=start.load,
        allow_missing=config.checkpoint.allow_missing,
    )
    for line in loaded.lines(start.said):
        _print(line, console)
    return trainer.from_plain(loaded.state, _base(setup))


def _fresh_plain(setup: Setup, params: Params | None) -> TrainState:
    """A fresh state in the form that checkpoints hold, around these parameters where there are some."""
    trainer = setup.trainer
    if params is None or setup.config.lora is None:
        return trainer.to_plain(_new_state(setup) if params is None else trainer.from_params(params, setup.config.seed))
    state = trainer.to_plain(_new_state(setup))
    return state.replace(params=params, ema=None if state.ema is None else jax.tree.map(jnp.copy, params))


def _base(setup: Setup) -> Params | None:
    """What a state holds of the model that an adapter is trained on."""
    if setup.config.lora is None or setup.pretrained is None:
        return None
    return setup.trainer.base(_read(setup.pretrained, setup))


def _new_state(setup: Setup) -> TrainState:
    if setup.pretrained is not None:
        return setup.trainer.from_params(_read(setup.pretrained, setup), setup.config.seed)
    return setup.trainer.init(setup.config.seed)


def _read(model: FoundModel, setup: Setup) -> Params:
    """A model's parameters in float32, or as an adapter's base keeps them, and then never all in float32."""
    return model.read_params(setup.mesh, dtype="float32", keep=setup.trainer.keep)


def _print(line: str, console: Console) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _run(
    setup: Setup,
    state: TrainState,
    feed: Feed,
    checkpoints: Checkpointer,
    meta: dict[str, Any],
    run_dir: Path,
    started: float,
    console: Console,
    evaluate_first: bool,
) -> Result:
    """The loop, with all that watches it. started: when the run began, on the clock of `time.perf_counter`."""
    config, first_step = setup.config, int(state.step)
    goodput, limit = Goodput(started=started), config.train.time_limit_minutes
    deadline = None if limit is None else started + 60 * limit
    writers: list[Tracker] = []
    if is_first():
        file = MetricsFile(run_dir, resume_step=first_step)
        goodput.repeat(file.lost_seconds)
        writers.append(file)
        writers += open_trackers(config.monitor.trackers, run_dir, config=meta["config"], resumes=first_step > 0)
    trackers = Trackers(writers)
    display = Display(first_step=first_step, steps=config.train.steps, console=console)
    try:
        return train(
            setup.trainer.program,
            state,
            feed.batches,
            feed.validation,
            config.train,
            place=lambda batch: to_global(batch, setup.mesh, feed.spec, columns=setup.trainer.column_order),
            checkpointer=checkpoints,
            meta=meta,
            supervision=Supervision(
                guard=config.guard,
                watchdog=Watchdog(config.watchdog, run_dir),
                goodput=goodput,
                requests=Requests(deadline),
                go_back=lambda now: _go_back(setup, checkpoints, now, display.say),
                replay=lambda: _replay(setup, checkpoints, feed.batches, display.say),
            ),
            trackers=trackers,
            display=display,
            profile=partial(
                Profiler, config.profile if is_first() else ProfileConfig(), run_dir=run_dir, say=display.say
            ),
            evaluate_first=evaluate_first,
        )
    finally:
        trackers.close()
        display.close()


def _back_to(checkpoints: Checkpointer, say: Callable[[str], None]) -> int | None:
    """The step of the newest good checkpoint; damaged ones behind it are set aside, as their steps may be saved
    again."""
    step = checkpoints.newest_good(say)
    if step is not None:
        checkpoints.set_aside(newer_than=step)
    return step


def _replay(
    setup: Setup, checkpoints: Checkpointer, batches: grain.DatasetIterator[Row], say: Callable[[str], None]
) -> TrainState | None:
    """The newest checkpoint's state, `batches` moved to where they were then."""
    checkpoints.wait()
    step = _back_to(checkpoints, say)
    if step is None:
        return None
    state = checkpoints.restore(step, setup.trainer.plain_state, batches)
    return setup.trainer.from_plain(state, _base(setup))


def _go_back(setup: Setup, checkpoints: Checkpointer, now: TrainState, say: Callable[[str], None]) -> TrainState | None:
    """The newest checkpoint's state at the step of the given one: the steps between count as left out."""
    checkpoints.settle()
    step = _back_to(checkpoints, say)
    if step is None:
        return None
    state = setup.trainer.from_plain(checkpoints.restore(step, setup.trainer.plain_state, None), now.frozen)
    guard = after_rollback(now.guard, state.guard, steps=int(now.step) - step)
    return state.replace(step=now.step, guard=guard)


def _samples(model: Model, config: RunConfig) -> list[str]:
    if not config.sample.prompts:
        return []
    return generate(
        model,
        list(config.sample.prompts),
        max_new_tokens=config.sample.max_new_tokens,
        temperature=config.sample.temperature,
        seed=config.seed,
    )
