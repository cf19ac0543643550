"""The checkpoints people use, by short names such as `qwen3-0.6b`: their `config.json`, size and place on the hub.

Data only, from `published.json`: for each lineage the keys its checkpoints share, and for each checkpoint the rest.
Nothing here knows whether a family can read them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Published:
    """One checkpoint. `config` holds the keys of its config.json that matter, a tied embedding counts once in
    `parameters`.

    parameters: an exact count, or a figure as rounded as its authors gave it (`"671B"`), or None where the name is all
    there is. hub_id: None where there are no weights to be had.
    """

    name: str
    lineage: str
    config: Mapping[str, Any]
    parameters: int | str | None
    hub_id: str | None

    @property
    def model_type(self) -> str:
        return self.config["model_type"]


@functools.cache
def published() -> Mapping[str, Published]:
    """Every checkpoint by name, those of a lineage side by side."""
    lineages = json.loads(resources.files(__package__).joinpath("published.json").read_text(encoding="utf-8"))
    found = {
        name: Published(name, lineage, shared["config"] | own["config"], own["parameters"], own["hub"])
        for lineage, shared in lineages.items()
        for name, own in shared["checkpoints"].items()
    }
    return MappingProxyType(found)


def is_published(ref: object) -> bool:
    """Whether `ref` is the name of a published size, and of nothing on disk, which always wins."""
    return isinstance(ref, str) and ref in published() and not Path(ref).exists()


def nearest_published(name: str) -> str | None:
    """The published size that was likely meant."""
    return next(iter(get_close_matches(name.lower(), published(), n=1)), None)


def published_config(name: str) -> dict[str, Any]:
    """The config.json of a published size. ValueError names the nearest one."""
    if name not in published():
        near = nearest_published(name)
        hint = f"did you mean {near!r}?" if near else "`jaxformers models` lists them"
        raise ValueError(f"{name!r} is neither an existing path nor a published size; {hint}")
    return dict(published()[name].config)
