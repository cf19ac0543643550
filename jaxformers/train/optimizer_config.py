"""The settings of an optimizer and of its learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

STRICT = ConfigDict(extra="forbid", frozen=True)


class ScheduleConfig(BaseModel):
    """The learning rate over the run."""

    model_config = STRICT

    name: Literal["cosine", "linear", "wsd", "constant", "inverse_sqrt", "polynomial"] = Field(
        "cosine", description="Shape after warm-up."
    )
    warmup_steps: int = Field(100, ge=0, description="Steps of linear growth from zero.")
    final_fraction: float = Field(
        0.1, ge=0, le=1, description="Rate at the end, as a fraction of the peak (cosine, linear, polynomial, wsd)."
    )
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd: share of the run spent decaying at its end.")
    cycles: int = Field(1, ge=1, description="cosine: decays of equal length, each from the peak (hard restarts).")
    power: float = Field(
        1.0,
        gt=0,
        description="What is left of the peak at a share x of the decay: polynomial: (1 - x)^power; wsd: 1 - x^power, "
        "whose 0.5 is the 1-sqrt decay (arXiv:2405.18392).",
    )

    @model_validator(mode="after")
    def _read_by_name(self) -> ScheduleConfig:
        check_read(self, SCHEDULE_READS, always=("warmup_steps", "final_fraction", "decay_fraction"))
        return self


class GroupConfig(BaseModel):
    """Parameters, by name, whose updates differ from the others'."""

    model_config = STRICT

    match: str | tuple[str, ...] = Field(
        description="Patterns (* and ?) of names: a checkpoint's (model.layers.0.mlp.*, *q_proj*) or "
        "ours (layers.0.ffn.*, embed)."
    )
    learning_rate: float | None = Field(None, gt=0, description="Their own peak learning rate.")
    scale: float | None = Field(None, ge=0, description="Or: what multiplies the learning rate; 0: they stay.")
    weight_decay: float | None = Field(
        None, ge=0, description="Decay of all of them, norms and biases too; null: as of the others."
    )
    schedule: ScheduleConfig | None = Field(None, description="Their own schedule; null: the run's.")

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.match,) if isinstance(self.match, str) else self.match

    @model_validator(mode="after")
    def _one_rate(self) -> GroupConfig:
        if self.learning_rate is not None and self.scale is not None:
            raise ValueError(f"learning_rate={self.learning_rate} and scale={self.scale} exclude each other")
        if not self.patterns:
            raise ValueError("match holds no pattern")
        return self


class OptimizerConfig(BaseModel):
    """What makes an update of a gradient, and for which parameters it is another."""

    model_config = STRICT

    name: Literal["adamw", "adafactor", "ademamix", "adopt", "lion", "sgd", "muon", "soap"] = Field(
        "adamw",
        description="AdamW (arXiv:1711.05101), Adafactor (arXiv:1804.04235, by the given rate alone), AdEMAMix "
        "(arXiv:2409.03137), ADOPT (arXiv:2411.02853), Lion (arXiv:2302.06675), SGD with momentum, or of hidden "
        "matrices, with AdamW of all else, Muon (arXiv:2502.16982) or SOAP (arXiv:2409.11321).",
    )
    learning_rate: float = Field(3e-4, gt=0, description="Peak learning rate.")
    b1: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="Decay of the first moment (adamw, muon's adamw, soap, adopt; ademamix: of the fast one); lion: of "
        "the sign.",
    )
    b2: float = Field(
        0.95,
        ge=0,
        lt=1,
        description="Decay of the second moment (adamw, muon's adamw, soap and its factors, adopt, ademamix); lion: of "
        "the momentum.",
    )
    eps: float = Field(
        1e-8,
        gt=0,
        description="Added to the root of the second moment (adamw, muon's adamw, soap, ademamix); adopt: the least "
        "root.",
    )
    momentum: float | None = Field(
        None, ge=0, lt=1, description="sgd, muon: decay of the momentum; null: 0.9 (sgd), 0.95 (muon)."
    )
    nesterov: bool | None = Field(
        None, description="sgd, muon: Nesterov's momentum; null: not with sgd, but with muon."
    )
    weight_decay: float = Field(
        0.1, ge=0, description="Decoupled decay of matrices and embeddings; norms and biases are spared."
    )
    clip_norm: float | None = Field(1.0, gt=0, description="Largest global norm of the gradient; null = no clipping.")
    state: Literal["float32", "int8"] = Field(
        "float32", description="Moments between updates: whole, or a byte each in blocks (arXiv:2110.02861)."
    )
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="What a layer's rate is of the layer's above it; embeddings lie below the first layer, the head "
        "and final norm above the last.",
    )
    qk_clip: float | None = Field(
        None,
        gt=0,
        description="The largest attention logit: where a head's passes it in a batch, its query and key weights are "
        "scaled down after the update (MuonClip, arXiv:2507.20534), usually to 100; null: no bound.",
    )
    groups: dict[str, GroupConfig] = Field(
        {}, description="Parameters with a rate, decay or schedule of their own; of two that match, the first counts."
    )

    @model_validator(mode="after")
    def _read_by_name(self) -> OptimizerConfig:
        check_read(
            self,
            OPTIMIZER_READS,
            always=("learning_rate", "weight_decay", "clip_norm", "layer_decay", "qk_clip", "groups"),
        )
        if self.name == "sgd" and self.state == "int8" and not self.decay_of_momentum:
            raise ValueError("state=int8 needs moments, which sgd without momentum has none of")
        return self

    @property
    def decay_of_momentum(self) -> float:
        """Of sgd and muon."""
        return {"sgd": 0.9, "muon": 0.95}[self.name] if self.momentum is None else self.momentum

    @property
    def is_nesterov(self) -> bool:
        """Of sgd and muon."""
        return self.name == "muon" if self.nesterov is None else self.nesterov


OPTIMIZER_READS = {
    "adamw": ("b1", "b2", "eps", "state"),
    "adafactor": (),
    "ademamix": ("b1", "b2", "eps"),  # in 8 bits, its slow mean would stand still
    "adopt": ("b1", "b2", "eps", "state"),
    "lion": ("b1", "b2", "state"),
    "sgd": ("momentum", "nesterov", "state"),
    "muon": ("b1", "b2", "eps", "momentum", "nesterov", "state"),
    "soap": ("b1", "b2", "eps"),  # in 8 bits, no basis is orthogonal
}
SCHEDULE_READS = {"cosine": ("cycles",), "polynomial": ("power",), "wsd": ("power",)}


def check_read(config: BaseModel, reads: Mapping[str, tuple[str, ...]], *, always: tuple[str, ...]) -> None:
    """ValueError for a key with another value than its default that what the config names does not read.

    A config that was written out holds every default, so a key that is merely there says nothing.
    """
    own = reads.get(config.name, ())
    for key, field in type(config).model_fields.items():
        value = getattr(config, key)
        if key not in ("name", *always, *own) and value != field.default:
            readers = ", ".join(name for name, keys in reads.items() if key in keys)
            raise ValueError(f"{config.name} does not read {key} (here {value}); it is for {readers}")
