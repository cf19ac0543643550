"""The settings of a training run, as far as they are about training."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from jaxformers.parallel.mesh import nearest_multiples
from jaxformers.train.optimizer_config import STRICT
from jaxformers.train.retention import Metric


class RuntimeConfig(BaseModel):
    """How to run the model; nothing here changes a checkpoint."""

    model_config = STRICT

    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of activations and matmuls; parameters stay float32."
    )
    remat: Literal["none", "full", "dots", "projections"] = Field(
        "none",
        description="What the backward pass recomputes: nothing, whole layers, all but matmuls, all but projections.",
    )
    offload: Literal["none", "optimizer", "residuals", "both"] = Field(
        "none",
        description="What waits in the host's memory between uses: the optimizer's state (and the average), what remat "
        "keeps of each layer for the backward pass, or both.",
    )
    layers: Literal["auto", "scan", "unroll"] = Field(
        "auto",
        description="One compiled body for equal layers, or every layer unrolled; auto unrolls up to 32 layers on CPU, "
        "with remat none or dots.",
    )
    attention: Literal["auto", "dot_product", "blockwise"] = Field(
        "auto",
        description="Over whole rows at once, or block by block in memory that grows with the length alone; auto: "
        "block by block from 2048 tokens on.",
    )
    context: Literal["auto", "ring", "ulysses", "hybrid"] = Field(
        "auto",
        description="How mesh.cp splits a sequence: keys travel around a ring; devices trade tokens for heads; or they "
        "trade within groups, as large as kv heads allow, and keys travel from group to group. auto: ring.",
    )
    zero: Literal[0, 1, 2] = Field(
        0,
        description="What replicas (mesh.dp) hold one copy of among them: 1: the optimizer's state (and the average), "
        "2: gradients too (arXiv:1910.02054); parameters are mesh.fsdp's.",
    )
    sequence_parallel: bool = Field(
        False,
        description="Between tensor-parallel blocks, where norms and residuals are, split rows over mesh.tp in time "
        "(arXiv:2205.05198).",
    )
    experts: Literal["auto", "allgather", "alltoall"] = Field(
        "auto",
        description="How tokens reach experts on other devices (mesh.ep): every device sees all tokens, or each token "
        "is sent where it is needed; auto: alltoall where capacity_factor is set, else allgather.",
    )
    capacity_factor: float | None = Field(
        None,
        gt=0,
        description="alltoall: room for a device's tokens on another, relative to an even spread; the rest is dropped "
        "and counted. null: none is dropped, which needs a backend with ragged_all_to_all.",
    )
    pipeline: Literal["gpipe", "interleaved", "1f1b"] = Field(
        "gpipe",
        description="Schedule over the stages of mesh.pp: all microbatches forward, then backward; the same with "
        "several chunks of layers a stage, which idles less; or backward as early as it can be, which needs the least "
        "memory and recomputes layers.",
    )
    microbatches: int | None = Field(
        None, ge=1, description="Parts of a batch on their way through the pipeline; null = 2 x mesh.pp."
    )
    virtual_stages: int = Field(2, ge=1, description="Chunks of layers a stage of the interleaved schedule holds.")
    stages: tuple[int, ...] | None = Field(
        None,
        description="Repeats of the pipelined layers' pattern in each stage (or chunk); null = as many in each.",
    )


class LossConfig(BaseModel):
    """What is minimised besides cross-entropy, and how the head is computed."""

    model_config = STRICT

    chunk: int | Literal["auto", "none"] = Field(
        "auto",
        description="Tokens of each row whose logits exist at once; none: all; auto: as many as fit 1 GiB a device.",
    )
    z_loss: float = Field(0.0, ge=0, description="Weight of logsumexp(logits)^2 (arXiv:2204.02311).")
    balance_loss: float = Field(1e-3, ge=0, description="Weight of the experts' load-balance loss.")
    balance_over: Literal["row", "batch"] = Field(
        "row", description="Balance experts within each row, or over all rows of a microbatch (arXiv:2501.11873)."
    )
    router_z_loss: float = Field(0.0, ge=0, description="Weight of the router's z-loss (arXiv:2202.08906).")
    mtp_loss: float = Field(
        0.3,
        ge=0,
        description="Weight of multi-token prediction (arXiv:2412.19437), the mean over a model's modules for it, of "
        "models that have some; 0: they are not run.",
    )
    expert_bias_rate: float = Field(
        0.0,
        ge=0,
        description="How far an update moves the selection bias of an expert with less (or more) than its share of "
        "tokens (arXiv:2408.15664); for models that have such a bias.",
    )

    @model_validator(mode="after")
    def _positive_chunk(self) -> LossConfig:
        if isinstance(self.chunk, int) and self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}; it must be at least 1, or auto, or none")
        return self


class TrainConfig(BaseModel):
    """The length and rhythm of a run."""

    model_config = STRICT

    steps: int = Field(1000, ge=1, description="Updates in the whole run.")
    batch_size: int = Field(8, ge=1, description="Rows in an update, over all devices and microbatches.")
    batch_ramp: dict[int, int] = Field({}, description="Another batch_size from given steps on.")
    accumulation: int = Field(1, ge=1, description="Microbatches an update is computed in, one after the other.")
    log_every: int = Field(1, ge=1, description="Steps between lines of metrics.jsonl.")
    eval_every: int | None = Field(
        None,
        ge=1,
        description="Steps between evaluations, the first one before step 1 where a run begins with weights; null = "
        "only at the end.",
    )
    eval_batches: int = Field(16, ge=0, description="Validation batches an evaluation reads; 0 = no evaluation.")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="Decay of an exponential moving average of the parameters."
    )
    average: Literal["ema", "sma"] | None = Field(
        None,
        description="What is kept beside the parameters: their exponential average, or their plain mean "
        "(arXiv:1803.05407); null: ema if it has a decay.",
    )
    average_from: int = Field(0, ge=0, description="The update whose parameters are the first in the average.")
    time_limit_minutes: float | None = Field(
        None, gt=0, description="When the run must be over: it saves and stops in time; null = no limit."
    )
    freeze: tuple[str, ...] = Field(
        (),
        description="Patterns of weights that are not trained, by their names in the model's checkpoint, such as "
        "model.embed_tokens or model.layers.[0-3]; with lora: of modules that get no adapter.",
    )

    @model_validator(mode="after")
    def _microbatches(self) -> TrainConfig:
        for step in self.batch_ramp:
            if step < 1:
                raise ValueError(f"batch_ramp has step {step}; steps are at least 1, a run begins with batch_size")
        for step, rows in self.batch_sizes.items():
            if rows < 1 or rows % self.accumulation:
                key = f"batch_ramp.{step}" if step else "batch_size"
                legal = nearest_multiples(rows, of=self.accumulation)
                raise ValueError(
                    f"{key} {rows} is not a multiple of accumulation {self.accumulation}; nearest legal: {legal}"
                )
        return self

    @model_validator(mode="after")
    def _average(self) -> TrainConfig:
        if (self.averages == "ema") != (self.ema_decay is not None):
            raise ValueError(
                f"average={self.average} does not go with ema_decay={self.ema_decay}; ema needs one, sma none"
            )
        if self.averages is None and self.average_from:
            raise ValueError("average_from needs an average; set average=sma, or ema_decay")
        if self.averages is not None and self.average_from > self.steps:
            raise ValueError(f"average_from is {self.average_from}, which a run of {self.steps} steps does not reach")
        return self

    @property
    def averages(self) -> Literal["ema", "sma"] | None:
        """The kind of average that is kept, if any."""
        return "ema" if self.average is None and self.ema_decay is not None else self.average

    @property
    def batch_sizes(self) -> dict[int, int]:
        """Rows of an update from each step on, by step; the first is 0."""
        return {0: self.batch_size} | dict(sorted(self.batch_ramp.items()))

    def rows_before(self, step: int) -> int:
        """Rows that the first `step` updates read."""
        starts = [*self.batch_sizes, step]
        spans = zip(starts, starts[1:], self.batch_sizes.values(), strict=False)
        return sum(max(min(end, step) - start, 0) * rows for start, end, rows in spans)


class LoRAConfig(BaseModel):
    """A low-rank adapter (arXiv:2106.09685), trained in place of the weights of the model that `model` names. Modules
    are named as in that model's checkpoint: by their last name (q_proj), the whole one, or a pattern of it."""

    model_config = STRICT

    rank: int = Field(8, ge=1, description="Of every adapter.")
    alpha: float = Field(16.0, gt=0, description="What an adapter adds is multiplied by alpha / rank.")
    targets: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear", description="Modules that get an adapter; all-linear: every linear layer but the head."
    )
    ranks: dict[str, int] = Field({}, description="Another rank for modules of these names or patterns.")
    alphas: dict[str, float] = Field({}, description="Another alpha for modules of these names or patterns.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of an adapter's inputs that a step leaves out.")
    variants: tuple[Literal["rslora", "dora"], ...] = Field(
        (),
        description="rslora: alpha / sqrt(rank) in place of alpha / rank (arXiv:2312.03732); dora: magnitudes are "
        "trained apart (arXiv:2402.09353).",
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="Biases that are trained too: none, all, or those of modules with an adapter."
    )
    b_rate_ratio: float = Field(
        1.0, gt=0, description="Learning rate of second matrices, relative to all else (LoRA+, arXiv:2402.12354)."
    )
    base: Literal["float32", "bfloat16", "int8", "int4", "nf4"] = Field(
        "float32",
        description="How the model's own linear weights are kept meanwhile; nf4: QLoRA (arXiv:2305.14314).",
    )


class GuardConfig(BaseModel):
    """What happens to updates that would do harm."""

    model_config = STRICT

    nonfinite: Literal["skip", "stop"] = Field(
        "skip", description="An update from a loss or gradient that is not finite: is left out, or ends the run."
    )
    spike: Literal["off", "warn", "skip", "rollback"] = Field(
        "off",
        description="A loss far above the last ones: nothing, a line, the update is left out, or the run goes back to "
        "its newest checkpoint and leaves out the data from there to here.",
    )
    spike_deviations: float = Field(
        8.0, gt=0, description="How far above the median of the last losses is far, in their deviations (MAD x 1.4826)."
    )
    spike_window: int = Field(64, ge=8, le=4096, description="How many losses are the last ones.")
    max_skipped: int = Field(
        10, ge=1, description="Updates left out in a row before the run stops, its newest checkpoint untouched."
    )
    recheck_every: int | None = Field(
        None,
        ge=1,
        description="Steps between one that is computed twice and compared bit for bit; where two results differ, the "
        "device is named and the run goes back to its newest checkpoint. null = never. It holds a second state.",
    )


MonitorValue = Literal["norms", "activations", "attention_logits", "experts", "sources"]
TrackerName = Literal["tensorboard", "wandb", "mlflow"]


class MonitorConfig(BaseModel):
    """What a run says of itself beside its loss, and to whom."""

    model_config = STRICT

    values: tuple[MonitorValue, ...] = Field(
        (),
        description="norms of gradients, parameters and updates by module; activations: root mean square and largest "
        "magnitude by layer; attention_logits: the largest of each head; experts: their load by layer; sources: loss "
        "by source of the mixture.",
    )
    every: int = Field(
        10, ge=1, description="Steps between those that measure them (sources: every line); others cost nothing."
    )
    trackers: tuple[TrackerName, ...] = Field(
        (), description="Where lines of metrics.jsonl go too; each has an extra of that name (tensorboard: `monitor`)."
    )

    @property
    def in_layers(self) -> frozenset[str]:
        """What layers have to show of their inside."""
        return frozenset(self.values) & {"activations", "attention_logits"}

    @property
    def measures(self) -> bool:
        """Whether some steps measure what others do not."""
        return bool(set(self.values) - {"sources"})


class ProfileConfig(BaseModel):
    """A window of steps that the profiler watches: a trace in RUN/profile, for Perfetto or XProf."""

    model_config = STRICT

    start: int | None = Field(
        None,
        ge=0,
        description="Steps that this process takes before the window, counted anew after a resume; the first ones "
        "compile. null = no profile.",
    )
    steps: int = Field(3, ge=1, description="Steps in the window.")


class WatchdogConfig(BaseModel):
    """When a run counts as standing still, and what happens then."""

    model_config = STRICT

    factor: float | None = Field(
        20.0, gt=1, description="A step may take this many times the median of the last ones; null = no watching."
    )
    least_seconds: float = Field(60.0, gt=0, description="What a step may take in any case.")
    action: Literal["log", "end"] = Field(
        "log",
        description="Where all threads are goes to RUN/stalls.log; end: and the process ends, for "
        "`launch --restarts` to start it again.",
    )


class CheckpointConfig(BaseModel):
    """When checkpoints are written, which are kept, and whether a run goes on from them."""

    model_config = STRICT

    every_steps: int | None = Field(
        500, ge=1, description="Steps between checkpoints; null = by time or only at the end."
    )
    every_minutes: float | None = Field(None, gt=0, description="Minutes between checkpoints.")
    keep_last: int = Field(3, ge=1, description="Newest checkpoints kept.")
    keep_every: int | None = Field(None, ge=1, description="Checkpoints of steps divisible by this are never deleted.")
    keep_best: int | None = Field(
        None,
        ge=1,
        description="So many checkpoints stay that are the best by best_metric; needs a value of it at every "
        "every_steps. One without a value, such as one that a signal asked for, is never among them.",
    )
    best_metric: str = Field(
        "validation_loss",
        description="A number in metrics.jsonl: NAME or `min NAME` where the least is the best, `max NAME` where the "
        "largest is.",
    )
    local_dir: str | None = Field(
        None,
        description="A fast disk of this machine, or memory (/dev/shm). Checkpoints are written there and copied to "
        "run_dir behind the run; a restart takes the newest good one of both. For a single process.",
    )
    local_every_steps: int | None = Field(
        None, ge=1, description="Steps between checkpoints that stay in local_dir, of which it keeps the last two."
    )
    verify: bool = Field(
        True,
        description="Whether a resume compares files with their checksums and passes a damaged checkpoint over.",
    )
    on_error: Literal["stop", "continue"] = Field(
        "stop",
        description="A checkpoint that cannot be written: ends the run, or is a line, and the next one is another try "
        "(the last one always has to be written).",
    )
    resume: Literal["auto", "never", "must"] = Field(
        "auto",
        description="auto: go on from the newest checkpoint, if any; never: refuse a run that has one; "
        "must: refuse a run that has none.",
    )
    start_from: str | None = Field(
        None,
        description="Another run, or one of its checkpoints, that a run without checkpoints of its own begins with.",
    )
    load: Literal["all", "params", "params_and_optimizer"] = Field(
        "all",
        description="What is taken from start_from: all, to go on there (step and data position too); parameters; or "
        "parameters and the optimizer's moments, both from step 0.",
    )
    allow_missing: tuple[str, ...] = Field(
        (),
        description="Patterns of parts of the state, such as ema.*, that a checkpoint may lack; they begin anew.",
    )

    @model_validator(mode="after")
    def _loads_from_somewhere(self) -> CheckpointConfig:
        if self.load != "all" and self.start_from is None:
            raise ValueError(f"load={self.load} says what is taken from start_from, which is not set")
        return self

    @model_validator(mode="after")
    def _metric_to_go_by(self) -> CheckpointConfig:
        Metric.parse(self.best_metric)
        return self

    @model_validator(mode="after")
    def _somewhere_to_stay(self) -> CheckpointConfig:
        if self.local_every_steps is not None and self.local_dir is None:
            raise ValueError(f"local_every_steps={self.local_every_steps} is about local_dir, which is not set")
        return self
