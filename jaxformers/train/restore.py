"""What of a checkpoint a run begins with: all of it, or parts, each said by name; what does not fit is listed whole.

A state has the groups `params`, `opt_state`, `ema`, `step`, `key` and `guard`; the data position lies beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import grain
import jax
import optax

from jaxformers.models.params import Params
from jaxformers.train.checkpoint import Checkpointer, CheckpointError
from jaxformers.train.state import TrainState
from jaxformers.train.stored import StoredArray, named_leaves

Load = Literal["all", "params", "params_and_optimizer"]
GROUPS = {
    "params": "parameters",
    "opt_state": "optimizer",
    "ema": "moving average",
    "step": "step",
    "guard": "guard",
    "key": "random key",
}
DATA = "data position"
_LOADED = {"all": tuple(GROUPS), "params": ("params",), "params_and_optimizer": ("params", "opt_state")}


@dataclass(frozen=True)
class Loaded:
    """A state in the form that checkpoints hold, what of it came from the checkpoint, what did not though it is part
    of a state, and the arrays that were allowed to be missing and are new."""

    state: TrainState
    restored: tuple[str, ...]
    not_restored: tuple[str, ...]
    fresh: tuple[str, ...] = ()

    def lines(self, source: str) -> list[str]:
        """The same for people."""
        lines = [
            f"{source}: restored {_listed(self.restored)}; not restored: {_listed(self.not_restored) or 'nothing'}"
        ]
        return lines + ([f"missing there and initialized freshly: {', '.join(self.fresh)}"] if self.fresh else [])


def load_state(
    checkpoints: Checkpointer,
    step: int,
    abstract: TrainState,
    data: grain.DatasetIterator | None,
    *,
    make: Callable[[Params | None], TrainState],
    load: Load = "all",
    allow_missing: Sequence[str] = (),
) -> Loaded:
    """What `load` names of a checkpoint, in the shardings of `abstract`; `data` is moved only by `all`.

    make(parameters) is a fresh state in the form that checkpoints hold, around these parameters (which are used up) or
    random ones: what is not loaded comes from it. allow_missing: patterns (`ema.*`) of arrays that may be.

    CheckpointError that lists every array that is missing, extra, or of another shape or dtype.
    """
    groups, wanted = _LOADED[load], named_leaves(abstract)
    _check_patterns(allow_missing, list(wanted))
    wanted = {name: leaf for name, leaf in wanted.items() if _group(name) in groups}
    stored = {name: array for name, array in checkpoints.stored(step).items() if _group(name) in groups}
    missing = check_fits(stored, wanted, where=checkpoints.folder / str(step), allow_missing=allow_missing)
    if load == "all" and not missing:
        state, names = checkpoints.restore(step, abstract, data), frozenset(wanted)
    else:
        arrays = checkpoints.restore_arrays(step, {n: a for n, a in wanted.items() if n not in missing})
        state, names = _completed(abstract, arrays, make), frozenset(arrays)
        if load == "all" and data is not None:
            checkpoints.restore_data(step, data)
    if load == "params_and_optimizer":
        state = state.replace(opt_state=_at_first_step(state.opt_state))
    present = {_group(name): None for name in named_leaves(abstract)}  # a run need not keep a moving average
    restored = [words for group, words in GROUPS.items() if group in {_group(name) for name in names}]
    others = [words for group, words in GROUPS.items() if group in present and words not in restored]
    (restored if load == "all" else others).append(DATA)
    return Loaded(state, tuple(restored), tuple(others), tuple(missing))


def check_fits(
    stored: Mapping[str, StoredArray],
    wanted: Mapping[str, Any],
    *,
    where: object,
    allow_missing: Sequence[str] = (),
) -> list[str]:
    """Names of wanted arrays (anything with shape and dtype) that are missing and may be.

    CheckpointError that lists every other difference.
    """
    missing = sorted(wanted.keys() - stored.keys())
    allowed = [name for name in missing if any(fnmatchcase(name, pattern) for pattern in allow_missing)]
    both = sorted(wanted.keys() & stored.keys())
    problems = {
        "missing": [name for name in missing if name not in allowed],
        "extra": sorted(stored.keys() - wanted.keys()),
        "of another shape": [
            f"{name} is {list(stored[name].shape)}, not {list(wanted[name].shape)}"
            for name in both
            if stored[name].shape != tuple(wanted[name].shape)
        ],
        "of another dtype": [
            f"{name} is {stored[name].dtype}, not {wanted[name].dtype}"
            for name in both
            if stored[name].dtype != wanted[name].dtype
        ],
    }
    found = [f"{len(names)} {what}: {', '.join(names)}" for what, names in problems.items() if names]
    if found:
        hint = "; checkpoint.allow_missing lets named parts begin anew" if problems["missing"] else ""
        raise CheckpointError(f"the checkpoint {where} does not fit this run's state: {'; '.join(found)}{hint}")
    return allowed


def groups_of(names: Iterable[str]) -> list[str]:
    """What a checkpoint with arrays of these names holds, in words."""
    present = {_group(name) for name in names}
    return [words for group, words in GROUPS.items() if group in present] + [DATA]


def _check_patterns(allow_missing: Sequence[str], names: Sequence[str]) -> None:
    idle = [pattern for pattern in allow_missing if not any(fnmatchcase(name, pattern) for name in names)]
    if idle:
        raise CheckpointError(
            f"checkpoint.allow_missing: {', '.join(idle)} names no part of this run's state; its parts are named like "
            f"{', '.join(list(names)[:3])}"
        )


def _completed(
    abstract: TrainState, arrays: Mapping[str, jax.Array], make: Callable[[Params | None], TrainState]
) -> TrainState:
    """A fresh state around the loaded parameters, with all else that was loaded in its place."""
    params = _with_arrays(abstract.params, arrays, "params")
    if any(not isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params)):
        params = _with_arrays(make(None).params, arrays, "params")
    # `make` uses its parameters up, which may be the same buffers as the loaded ones.
    others = {name: array for name, array in arrays.items() if _group(name) != "params"}
    return _with_arrays(make(params), others)


def _with_arrays(tree: Any, arrays: Mapping[str, jax.Array], prefix: str = "") -> Any:
    def placed(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return arrays.get(f"{prefix}.{name}" if prefix else name, leaf)

    return jax.tree_util.tree_map_with_path(placed, tree)


def _at_first_step(opt_state: Any) -> Any:
    """The schedule begins anew with the step; moments keep the count that corrects their bias."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda node: jax.tree.map(lambda count: count * 0, node) if is_schedule(node) else node,
        opt_state,
        is_leaf=is_schedule,
    )


def _group(name: str) -> str:
    return name.partition(".")[0]


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)
