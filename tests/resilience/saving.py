"""Checkpoints of a state too small to train, in which every number follows from the step."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers.train.checkpoint import META_KEYS, Checkpointer, Place
from jaxformers.train.config import CheckpointConfig, GuardConfig
from jaxformers.train.guard import new_guard
from jaxformers.train.state import TrainState

WIDTH = 512


class Position:
    """A place in some data, as a run has one: the row after a step."""

    def __init__(self, step: int | None = None):
        self.step = step

    def get_state(self) -> dict[str, int]:
        assert self.step is not None
        return {"next_row": 8 * self.step}

    def set_state(self, state: dict[str, int]) -> None:
        self.step = state["next_row"] // 8


def numbers(step: int) -> dict[str, np.ndarray]:
    """What a state of this step holds: float32 [WIDTH, 16] and [WIDTH]."""
    draw = np.random.default_rng(step)
    return {"embed": draw.standard_normal((WIDTH, 16), np.float32), "norm": draw.standard_normal(WIDTH, np.float32)}


def state_of(step: int) -> TrainState:
    params = jax.tree.map(jnp.asarray, numbers(step))
    moments = {"mu": jax.tree.map(jnp.asarray, numbers(-step % 2**32)), "count": jnp.asarray(step, jnp.int32)}
    key = jax.random.key_data(jax.random.key(step))
    return TrainState(jnp.asarray(step, jnp.int32), params, moments, key, new_guard(GuardConfig()))


def said_at(step: int) -> dict[str, Any]:
    """Metadata, with the keys that every run's has."""
    return dict.fromkeys(META_KEYS, "none") | {"said at": step}


def save(checkpoints: Checkpointer, step: int, *, place: Place = "store", **said: Any) -> None:
    """Begins to save a step. said: what its metadata says besides."""
    checkpoints.save(state_of(step), Position(step), said_at(step) | said, place=place)


def restored(checkpoints: Checkpointer, step: int) -> tuple[TrainState, int | None, dict[str, Any]]:
    """The state of a step, the step of its place in the data, and its metadata."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), state_of(step))
    position = Position()
    return checkpoints.restore(step, abstract, position), position.step, checkpoints.meta(step)


def assert_right(run: Path, step: int, config: CheckpointConfig | None = None) -> None:
    """A checkpoint is undamaged and holds, bit for bit, what its step should. config: of a run with two places."""
    with Checkpointer(run, config) as checkpoints:
        checkpoints.check(step)
        state, position, meta = restored(checkpoints, step)
    assert (position, meta) == (step, said_at(step))
    ours, truth = jax.tree.leaves(jax.device_get(state)), jax.tree.leaves(jax.device_get(state_of(step)))
    assert [a.tobytes() for a in ours] == [b.tobytes() for b in truth]
