"""What a run does about the updates that its guards left out: it says so, goes back, or stops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxformers.train.config import GuardConfig
from jaxformers.train.guard import Guard


class Diverged(RuntimeError):
    """A run that its guards ended, in one line. Its checkpoints hold no harm."""


class Watch:
    """Follows the guards' counts from one line of metrics to the next, so that none is missed between lines."""

    def __init__(self, config: GuardConfig, guard: Guard, say: Callable[[str], None]):
        self._config, self._say = config, say
        self._skipped, self._spikes = int(guard.skipped), int(guard.spikes)

    def look(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Whether to go back to the newest checkpoint.

        Diverged where the config has the run stop: at the first update that was not finite, or after too many in a row.
        """
        skipped, spikes = metrics["skipped_total"] - self._skipped, metrics["spikes_total"] - self._spikes
        self._skipped, self._spikes = metrics["skipped_total"], metrics["spikes_total"]
        shown = f"loss {metrics['loss']:.4g}, gradient norm {metrics['grad_norm']:.4g}"
        left_out = skipped - (spikes if self._config.spike in ("skip", "rollback") else 0)
        if left_out:
            self._say(f"step {step}: {left_out} updates that are not finite left out ({shown})")
        if spikes:
            done = "the update is made" if self._config.spike == "warn" else "the update is left out"
            self._say(f"step {step}: the loss is far above the last ones; {done} ({shown})")
        if left_out and self._config.nonfinite == "stop":
            raise Diverged(f"step {step}: a loss or gradient is not finite ({shown}), and guard.nonfinite is stop")
        if metrics["skipped_in_a_row"] >= self._config.max_skipped:
            raise Diverged(
                f"step {step}: {metrics['skipped_in_a_row']} updates in a row were left out ({shown}); "
                f"guard.max_skipped is {self._config.max_skipped}"
            )
        return spikes > 0 and self._config.spike == "rollback"

    def went_back(self, guard: Guard) -> None:
        """Counts go on from those of the state that the run went back to."""
        self._skipped, self._spikes = int(guard.skipped), int(guard.spikes)
