"""The config file of a training run: YAML with typed keys, dotted overrides, and a JSON Schema for editors."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jaxformers.data.config import DataConfig, TokenizerConfig
from jaxformers.parallel.mesh import MeshConfig
from jaxformers.train.config import (
    CheckpointConfig,
    GuardConfig,
    LoRAConfig,
    LossConfig,
    MonitorConfig,
    ProfileConfig,
    RuntimeConfig,
    TrainConfig,
    WatchdogConfig,
)
from jaxformers.train.optimizer_config import OptimizerConfig, ScheduleConfig


class SampleConfig(BaseModel):
    """What a finished run shows of what it learned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: tuple[str, ...] = Field((), description="Texts to continue when the run is done.")
    max_new_tokens: int = Field(64, ge=1, description="Tokens to add to each.")
    temperature: float = Field(0.8, ge=0, description="0 = the likeliest token each time.")


class RunConfig(BaseModel):
    """Everything `jaxformers train` is told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_dir: str = Field(description="Where the run lives: config.yaml, metrics.jsonl, checkpoints/, tokenizer/.")
    model: dict[str, Any] | str = Field(
        description="A config.json written out (model_type, hidden_size, ...) or the name of a published size "
        "(`jaxformers models` lists them) to start from random weights, or a reference (Hugging Face directory, hub "
        "id, run directory) to go on from its weights.",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of the initial parameters.")
    tokenizer: TokenizerConfig | None = Field(
        None, description="null: the pretrained model's own, or without one the default, which is trained on the data."
    )
    data: DataConfig
    mesh: MeshConfig = MeshConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    lora: LoRAConfig | None = Field(
        None, description="Train a low-rank adapter of the model in place of its weights; null: the weights."
    )
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    monitor: MonitorConfig = MonitorConfig()
    profile: ProfileConfig = ProfileConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: SampleConfig = SampleConfig()


class _Loader(yaml.SafeLoader):
    """YAML with the plain scalars of version 1.2 (`3e-4` is a float, `no` a text) and no key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if not key.tag.endswith(":merge")]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if text.startswith(("0x", "0o")) else int(text)


# The core schema (https://yaml.org/spec/1.2.2/#103-core-schema), with `_` between digits as in Python.
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?\d+(_\d+)*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.\d+|\d+(_\d+)*(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
_Loader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole_number)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that either version of YAML would read as something else."""


for _name, (_pattern, _first) in _SCALARS.items():
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


def parse_yaml(text: str, *, name: str) -> Any:
    """The content of YAML text; tags that would run code are refused. ValueError in one line that says where."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise ValueError(f"{name} is not YAML{where}: {getattr(error, 'problem', None) or error}") from None


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a file (or a mapping), with overrides such as `train.steps=100` applied.

    ValueError names the first unknown key with the nearest known one, or the first value that does not fit.
    """
    if isinstance(source, Mapping):
        name, values = "config", _copied(source)
    else:
        name, path = str(source), Path(source)
        if not path.is_file():
            raise ValueError(f"{name}: no such config file")
        try:
            values = parse_yaml(path.read_text(encoding="utf-8"), name=name)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{name} holds {type(values).__name__}, not the keys of a config")
    for override in overrides:
        _override(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{name}: {explain(error)}") from None


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy whose mappings overrides may change."""
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ValueError(f"override {override!r} is not of the form key=value, such as train.steps=100")
    node = values
    for part in path[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ValueError(f"override {override!r}: {part} is {node!r}, which has no keys")
    node[path[-1]] = parse_yaml(text, name=f"override {override!r}") if text else ""


def explain(error: ValidationError) -> str:
    """A validation error's first complaint in one line."""
    errors = error.errors(include_url=False)
    first, place = errors[0], _place(errors[0]["loc"])
    match first["type"]:
        case "extra_forbidden":
            known = sorted(_model_at(first["loc"][:-1]).model_fields)
            near = get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            return f"unknown key {place!r}; {hint}"
        case "missing":
            return f"the required key {place!r} is missing"
        case "value_error":
            return f"{place}: {first['ctx']['error']}" if place else str(first["ctx"]["error"])
        case "model_type":
            example = min(_model_at(first["loc"]).model_fields)
            return f"{place} is {first['input']!r}; it must hold keys, such as {example}"
    # A key that may be of several kinds has a complaint from each.
    reasons = dict.fromkeys(e["msg"][0].lower() + e["msg"][1:] for e in errors if _place(e["loc"]) == place)
    return f"{place} is {first['input']!r}; {', or '.join(reasons)}"


def _place(path: tuple[int | str, ...]) -> str:
    """An error's location as the config file spells it: behind a key come indices, and pydantic's names of types."""
    place: list[str] = []
    kind: Any = RunConfig
    for part in path:
        if kind is not None or isinstance(part, int):
            place.append(str(part))
        kind = _below(kind, part)
    return ".".join(place)


def _model_at(path: tuple[int | str, ...]) -> type[BaseModel]:
    """The section of the config at a path of keys."""
    found = _section(functools.reduce(_below, path, RunConfig))
    assert found is not None
    return found


def _below(kind: Any, part: int | str) -> Any:
    """The type of what stands under a key of a section, or under a name where sections have names; else None."""
    if get_origin(kind) is dict:
        return _section(get_args(kind)[1])
    section = _section(kind)
    field = section.model_fields.get(str(part)) if section is not None else None
    kept = field is not None and (get_origin(field.annotation) is dict or _section(field.annotation) is not None)
    return field.annotation if kept else None


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, also where it may be null; None for a key that holds a value."""
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), None)


def dump_yaml(config: RunConfig) -> str:
    """The config with every default written out; loading it gives the config back."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a config file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
