"""Settings of a training that do not fit each other, refused before anything is compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxformers.models.runtime import HOST_MEMORY
from jaxformers.parallel.mesh import batch_shards, nearest_multiples
from jaxformers.train.balance import check_expert_bias
from jaxformers.train.qk_clip import check_qk_clip

if TYPE_CHECKING:
    from jaxformers.train.build import Trainer


def check_settings(trainer: Trainer) -> None:
    """ValueError that names the settings, and what is legal in their place."""
    _check_sequence_parallel(trainer)
    _check_offload(trainer)
    _check_one_f_one_b(trainer)
    _check_monitor(trainer)
    check_expert_bias(trainer.cfg, rate=trainer.loss.expert_bias_rate)
    _check_split(trainer)
    _check_qk_clip(trainer)


def _check_split(trainer: Trainer) -> None:
    """ValueError for what needs every weight to be trained."""
    if not trainer.splits:
        return
    if trainer.loss.expert_bias_rate:
        raise ValueError(
            f"loss: expert_bias_rate={trainer.loss.expert_bias_rate} moves biases of experts, which lora and "
            "train.freeze keep as they are; use 0"
        )
    if trainer.pipeline is not None and trainer.pipeline.schedule == "1f1b":
        raise ValueError(
            "runtime.pipeline=1f1b takes the gradient of every weight, of which lora and train.freeze leave most "
            "out; use gpipe or interleaved"
        )


def check_rows(trainer: Trainer) -> None:
    """ValueError for microbatches that devices cannot share."""
    count, shards = trainer.train.accumulation, batch_shards(trainer.mesh.shape)
    for size in trainer.train.batch_sizes.values():
        if size // count % shards:
            raise ValueError(
                f"train: a microbatch of {size // count} rows (batch_size {size} / accumulation {count}) cannot be "
                f"split over {shards} devices; nearest legal batch_size: "
                f"{nearest_multiples(size, of=count * shards)}"
            )


def _check_sequence_parallel(trainer: Trainer) -> None:
    shards = trainer.mesh.shape["tp"] * trainer.mesh.shape["cp"]
    if trainer.runtime.sequence_parallel and trainer.sequence_length % shards:
        raise ValueError(
            f"runtime: sequence_parallel cannot split rows of {trainer.sequence_length} tokens over {shards} devices; "
            f"nearest legal: {nearest_multiples(trainer.sequence_length, of=shards)}"
        )


def _check_offload(trainer: Trainer) -> None:
    offload, device = trainer.runtime.offload, trainer.mesh.local_devices[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if offload != "none" and HOST_MEMORY not in kinds:
        raise ValueError(
            f"runtime: offload={offload} needs memory of the kind {HOST_MEMORY}, which {device.platform} devices "
            f"do not have (only {', '.join(kinds)}); use offload=none"
        )
    if offload in ("residuals", "both") and trainer.runtime.remat == "none":
        raise ValueError(
            f"runtime: offload={offload} moves what remat keeps, but remat is none; use remat=full, dots or "
            "projections, or offload=" + ("optimizer" if offload == "both" else "none")
        )


def _check_one_f_one_b(trainer: Trainer) -> None:
    """ValueError for what cannot run while some microbatches go forward and others backward."""
    if trainer.pipeline is None or trainer.pipeline.schedule != "1f1b":
        return
    if trainer.cfg.moe is not None and trainer.loss.balance_over != "row":
        raise ValueError(
            f"loss: balance_over={trainer.loss.balance_over} needs all rows before any gradient, which "
            "runtime.pipeline=1f1b has not; use balance_over=row, or pipeline=gpipe or interleaved"
        )
    if trainer.mesh.shape["cp"] > 1:
        raise ValueError(
            f"runtime.pipeline=1f1b does not go with mesh.cp={trainer.mesh.shape['cp']}, whose exchanges of both ways "
            "could wait for each other; use gpipe or interleaved"
        )


def _check_monitor(trainer: Trainer) -> None:
    """ValueError for values that this model and mesh do not have."""
    values, every, lines = trainer.monitor.values, trainer.monitor.every, trainer.train.log_every
    if trainer.pipeline is not None and trainer.monitor.in_layers:
        raise ValueError(
            f"monitor.values has {', '.join(sorted(trainer.monitor.in_layers))}, which layers in a pipeline do not "
            f"show (mesh.pp={trainer.pipeline.stages}); leave them out"
        )
    if "experts" in values and trainer.cfg.moe is None:
        raise ValueError(f"monitor.values has experts, but {trainer.cfg.family} has none")
    if "sources" in values and not trainer.sources:
        raise ValueError("monitor.values has sources, but the data is a single one (data.paths)")
    if trainer.monitor.measures and every % lines:
        raise ValueError(
            f"monitor.every is {every}, but only every {lines} steps there is a line of metrics (train.log_every); "
            f"nearest legal: {nearest_multiples(every, of=lines)}"
        )


def _check_qk_clip(trainer: Trainer) -> None:
    """ValueError where logits are not seen, or not bounded by weights that are trained."""
    limit = trainer.optimizer.qk_clip
    if limit is None:
        return
    check_qk_clip(trainer.cfg)
    if trainer.pipeline is not None:
        raise ValueError(
            f"optimizer.qk_clip={limit} needs attention logits, which layers in a pipeline do not show "
            f"(mesh.pp={trainer.pipeline.stages}); use null"
        )
    if trainer.splits:
        raise ValueError(
            f"optimizer.qk_clip={limit} scales weights of attention, which lora and train.freeze keep as they are; "
            "use null"
        )
