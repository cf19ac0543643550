"""Which checkpoint a training run begins with: its own newest one, or another run's, and whether it may."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxformers.data.tokenizer import Tokenizer
from jaxformers.families import read_config
from jaxformers.hub.resolve import classify, resolve
from jaxformers.models.config import ModelConfig
from jaxformers.train.checkpoint import Checkpointer, CheckpointError
from jaxformers.train.config import CheckpointConfig
from jaxformers.train.provenance import version_note
from jaxformers.train.restore import Load


@dataclass(frozen=True)
class Start:
    """A checkpoint, what is taken from it, how a run says so, and what to do if it is another model's."""

    checkpoints: Checkpointer
    step: int
    load: Load
    said: str
    remedy: str

    def check(self, cfg: ModelConfig, tokenizer: Tokenizer) -> str | None:
        """A note, if other versions of libraries wrote it. ValueError for another model's or tokenizer's."""
        saved, folder = self.checkpoints.meta(self.step), self.checkpoints.folder
        if names := saved_model(saved, folder / str(self.step)).differences(cfg):
            raise ValueError(
                f"{folder} holds another model's checkpoint (it differs in {', '.join(names)}); {self.remedy}"
            )
        if saved["tokenizer"] != tokenizer.fingerprint:
            raise ValueError(f"{folder} was trained with another tokenizer; {self.remedy}")
        return version_note(saved.get("versions", {}))


def saved_model(meta: Mapping[str, Any], checkpoint: Path) -> ModelConfig:
    """The model of a checkpoint with this metadata. CheckpointError where this version does not know it."""
    try:
        return read_config(meta["model"])
    except ValueError as error:
        raise CheckpointError(f"{checkpoint} holds a model that this version cannot read: {error}") from None


def find_start(
    config: CheckpointConfig, own: Checkpointer, resume_step: int | None, stack: ExitStack, say: Callable[[str], None]
) -> Start | None:
    """What a run begins with: its own checkpoint of `resume_step`, else what `start_from` names, else None.

    `say` hears of damaged checkpoints that are passed over; `stack` closes what is opened. ValueError where
    `start_from` holds no training state that can be used.
    """
    if resume_step is not None:
        return Start(own, resume_step, "all", f"resuming from step {resume_step}", "choose another run_dir")
    if config.start_from is None:
        return None
    path = resolve(Path(config.start_from).expanduser())
    kind = classify(path)
    if kind not in ("run", "checkpoint"):
        raise ValueError(
            f"checkpoint.start_from: {path} is of the kind {kind}, which holds no training state; "
            "name it under the key 'model' to begin with its weights"
        )
    run, step = (path, None) if kind == "run" else (path.absolute().parent.parent, int(path.absolute().name))
    others = stack.enter_context(Checkpointer(run))
    if step is None:
        step = others.newest_good(say)
    elif config.verify:
        others.check(step)
    if step is None:
        raise ValueError(f"checkpoint.start_from: {run} has no checkpoint yet")
    said = f"starting from step {step} of {run}"
    return Start(others, step, config.load, said, "choose another checkpoint.start_from")
