"""Parameters whose updates differ from the others': groups by name, and rates that fall from layer to layer.

Layers are stacked, so one array may hold parameters of several groups: what is said here of an array is said of each of
its rows, in whatever order they lie.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np
import optax

from jaxformers.hub.layout import parts
from jaxformers.models.config import ModelConfig, longest_stack, plan_stacks
from jaxformers.models.params import Params, path_name
from jaxformers.train.optimizer_config import GroupConfig, OptimizerConfig
from jaxformers.train.schedules import make_schedule

BELOW_LAYERS = ("embed", "positions", "embed_norm")
OTHERS = GroupConfig(match="*")  # what is in no group


@dataclass(frozen=True, eq=False)
class Share:
    """A number for every row of an array: float32 [rows], or one for all. A leaf, so trees of it follow parameters."""

    values: np.ndarray

    @property
    def is_zero(self) -> bool:
        return not self.values.any()

    def of(self, a: jax.Array) -> jax.Array:
        """a [rows, ...] with each row multiplied by its number."""
        if self.values.min() == self.values.max():
            number = float(self.values.flat[0])
            return a if number == 1 else number * a
        return self.values.reshape(-1, *(1,) * (a.ndim - 1)) * a


@dataclass(frozen=True, eq=False)
class Rates:
    """The schedules that an array's rows follow, each with what multiplies it; 0 for rows of another one."""

    shares: Mapping[optax.Schedule, Share]

    @property
    def schedules(self) -> Iterable[optax.Schedule]:
        return self.shares

    def times(self, u: jax.Array, now: Mapping[optax.Schedule, jax.Array]) -> jax.Array:
        """u with each row multiplied by its rate."""
        (first, *others) = (share.of(now[schedule] * u) for schedule, share in self.shares.items())
        return sum(others, first)


@dataclass(frozen=True, eq=False)
class LeafSetting:
    """What is one array's own in an update."""

    rates: Rates
    decay: Share


@dataclass(frozen=True)
class _Row:
    """What one layer's part of an array is updated by."""

    schedule: optax.Schedule
    scale: float
    decay: float


def leaf_settings(
    config: OptimizerConfig,
    schedule: optax.Schedule,
    decayed: Params,
    *,
    cfg: ModelConfig | None = None,
    steps: int | None = None,
    slots: np.ndarray | None = None,
) -> Params:
    """A `LeafSetting` for every parameter of the tree `decayed`, which says whether weight decay is for it.

    The tree is the plain one, `layout.unstack`'s or a pipeline's, of which slots says which repeat each place of the
    longest stack holds. cfg and steps are needed for groups and layer-wise rates. ValueError for a group that matches
    nothing, or nothing that an earlier one has not taken.
    """
    if not config.groups and config.layer_decay is None:
        rates = Rates({schedule: _share([1.0])})
        return jax.tree.map(lambda on: LeafSetting(rates, _share([config.weight_decay * on])), decayed)
    assert cfg is not None
    assert steps is not None
    names = _Names(cfg, slots)
    members = _members(config.groups, {name for path, _ in _leaves(decayed) for name in names.of(path)}, names)
    schedules = {
        key: make_schedule(group.schedule, peak=config.learning_rate, steps=steps)
        for key, group in config.groups.items()
        if group.schedule is not None
    }

    def row(name: str, on: bool) -> _Row:
        key = members.get(name)
        group = OTHERS if key is None else config.groups[key]
        scale = group.learning_rate / config.learning_rate if group.learning_rate is not None else group.scale
        decay = config.weight_decay * on if group.weight_decay is None else group.weight_decay
        depth = 1.0 if config.layer_decay is None else config.layer_decay ** (cfg.num_layers + 1 - _height(name, cfg))
        return _Row(schedules.get(key, schedule), (1.0 if scale is None else scale) * depth, decay)

    return jax.tree_util.tree_map_with_path(
        lambda path, on: _setting([row(name, on) for name in names.of(path)]), decayed
    )


def _setting(rows: Sequence[_Row]) -> LeafSetting:
    schedules = dict.fromkeys(row.schedule for row in rows)
    shares = {s: _share([row.scale * (row.schedule is s) for row in rows]) for s in schedules}
    return LeafSetting(Rates(shares), _share([row.decay for row in rows]))


def _share(values: Sequence[float]) -> Share:
    return Share(np.asarray(values, np.float32))


def _height(name: str, cfg: ModelConfig) -> int:
    """0 of embeddings, then the layers, then the head and whatever else reads the last one."""
    first, _, rest = name.partition(".")
    if first == "layers":
        return int(rest.partition(".")[0]) + 1
    return 0 if first in BELOW_LAYERS else cfg.num_layers + 1


class _Names:
    """What parameters are called: `layers.3.attn.q` of layer 3, and as the family's checkpoints name them."""

    def __init__(self, cfg: ModelConfig, slots: np.ndarray | None):
        self._stacks = plan_stacks(cfg.layers)
        self._slots = slots
        self._theirs: dict[str, list[str]] = defaultdict(list)
        for part in parts(cfg):
            own = self._plain(part.path)
            self._theirs[own[part.index[0]] if len(own) > 1 else own[0]].append(part.source.name)

    def of(self, path: Sequence[Any]) -> list[str]:
        """Ours for each row of an array at this path of a tree; one for an array that holds no stacked layers."""
        if path_name(path[:1]) == "blocks":
            return [f"layers.{path_name(path[1:])}"]
        return self._plain(path, self._slots)

    def theirs(self, name: str) -> list[str]:
        """The checkpoint's for one of ours; several where it has a tensor for each expert. A part of a weight (a pair
        of factors) is called as the weight with its own name behind."""
        own, rest = name, ""
        while own not in self._theirs and "." in own:
            own, _, last = own.rpartition(".")
            rest = f".{last}{rest}"
        return [f"{their}{rest}" for their in self._theirs.get(own, ())]

    def _plain(self, path: Sequence[Any], slots: np.ndarray | None = None) -> list[str]:
        if path_name(path[:1]) != "layers":
            return [path_name(path)]
        k, j, rest = path[1].idx, path[2].idx, path_name(path[3:])
        stack = self._stacks[k]
        held = range(stack.repeats) if slots is None or k != longest_stack(self._stacks) else slots
        return [f"layers.{stack.layer(j, int(repeat))}.{rest}" for repeat in held]


def _leaves(tree: Params) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _members(groups: Mapping[str, GroupConfig], ours: set[str], names: _Names) -> dict[str, str]:
    """The group of each parameter that is in one, by our name for it."""
    members: dict[str, str] = {}
    for key, group in groups.items():
        for pattern in group.patterns:
            matched = [name for name in sorted(ours) if _matches(pattern, name, names)]
            if not matched:
                raise ValueError(f"optimizer.groups.{key}: {pattern!r} matches no parameter; {_examples(ours, names)}")
            taken = {members[name] for name in matched if name in members and members[name] != key}
            if taken and all(members.get(name, key) != key for name in matched):
                raise ValueError(
                    f"optimizer.groups.{key}: all that {pattern!r} matches is already in {', '.join(sorted(taken))}, "
                    "and the first group counts"
                )
            members |= {name: key for name in matched if name not in members}
    return members


def _matches(pattern: str, ours: str, names: _Names) -> bool:
    """Whether a pattern is for a parameter. ValueError where it is for some of a layer's experts: they lie together."""
    if fnmatchcase(ours, pattern):
        return True
    found = [fnmatchcase(their, pattern) for their in names.theirs(ours)]
    if any(found) and not all(found):
        raise ValueError(f"optimizer.groups: {pattern!r} matches some experts of {ours}; a layer's experts go together")
    return any(found)


def _examples(ours: set[str], names: _Names) -> str:
    """A layer's parameters and those outside layers, by the checkpoint's names where it has some."""
    shown = [name for name in sorted(ours) if not name.startswith("layers.") or name.startswith("layers.0.")]
    spelled = dict.fromkeys((names.theirs(name) or [name])[0] for name in shown)
    return f"there are {', '.join(list(spelled)[:24])}, and so on for further layers"
