"""Every recipe in configs/: it loads strictly, means the model it says, and fits one device and eight; nothing is
allocated."""

import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jaxformers.config import RunConfig, json_schema, load_config
from jaxformers.families import read_config
from jaxformers.families.catalog import published_config
from jaxformers.models.params import abstract_params, count_params, path_name
from jaxformers.parallel.mesh import MeshConfig, batch_sharding, batch_shards, make_mesh, single_device_mesh
from jaxformers.train.build import Trainer
from jaxformers.training import trainer_of as trainer_of_run

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
TUNING = [path for path in CONFIGS if path.stem.endswith(("-sft", "-lora", "-qlora"))]
RECIPES = [path for path in CONFIGS if path.stem != "quickstart" and path not in TUNING]
# The published sizes that stand in for weights, which recipes of fine-tuning begin with and tests have not.
SHAPES = {"HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m", "Qwen/Qwen3-8B": "qwen3-8b"}
UNITS = {"M": 1e6, "B": 1e9}


def named(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


@functools.cache
def loaded(path: Path) -> RunConfig:
    return load_config(path)


@functools.cache
def model_of(path: Path):
    model = loaded(path).model
    return read_config(published_config(SHAPES[model]) if isinstance(model, str) else model)


def trainer_of(path: Path, mesh: jax.sharding.Mesh) -> Trainer:
    """The recipe's training as accelerators run it, with scanned layers."""
    config = loaded(path)
    runtime = config.runtime.model_copy(update={"layers": "scan"})
    return trainer_of_run(config.model_copy(update={"runtime": runtime}), model_of(path), mesh)


def abstract_batch(config: RunConfig, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (config.train.batch_size, config.data.sequence_length)
    place = batch_sharding(shape, mesh)
    dtypes = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32) | {"weights": jnp.float32}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in dtypes.items()}


def test_there_are_recipes_beside_the_quickstart():
    assert len(RECIPES) >= 5
    assert len(RECIPES) == len(CONFIGS) - len(TUNING) - 1


def test_there_are_recipes_of_full_fine_tuning_lora_and_qlora_for_a_small_and_a_large_model():
    ways = ("sft", "lora", "qlora")
    assert {path.stem for path in TUNING} == {f"{model}-{way}" for model in ("smollm2", "qwen3-8b") for way in ways}
    for path in TUNING:
        config = loaded(path)
        assert config.data.chat.on
        assert (config.lora is None) == path.stem.endswith("-sft")
        assert config.lora is None or (config.lora.base == "nf4") == path.stem.endswith("-qlora")


@named(TUNING)
def test_a_recipe_of_fine_tuning_says_what_it_is_its_command_and_its_memory(path):
    head = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    for told in (f"jaxformers train configs/{path.name}", "parameters", "Planned for", "tokens"):
        assert told in head, f"{path.name} does not say {told!r} in its first comment"
    devices = jax.devices()[: 8 if "eight GPUs" in head else 1]
    state = trainer_of(path, make_mesh(MeshConfig(fsdp=len(devices)), devices=devices)).abstract_state
    leaves = jax.tree.leaves((state, state.params))  # gradients are as large as what is trained
    held = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)
    assert held / 2**30 == pytest.approx(float(re.search(r"([\d.]+) GiB of state and gradients", head)[1]), rel=0.02)


@named(RECIPES + TUNING)
def test_the_model_has_about_as_many_parameters_as_its_comment_and_its_name_say(path):
    count = count_params(model_of(path))
    number, unit = re.search(r"([\d.]+)([MB]) parameters", path.read_text()).groups()
    assert count == pytest.approx(float(number) * UNITS[unit], rel=0.01)
    size = re.search(r"-([\d.]+)([mb])$", path.stem)
    if size:
        assert count == pytest.approx(float(size[1]) * UNITS[size[2].upper()], rel=0.03)


@named(RECIPES)
def test_what_a_token_visits_of_a_mixture_is_as_the_comment_says(path):
    cfg = model_of(path)
    told = re.search(r"a token visits ([\d.]+)([MB])", path.read_text())
    assert (told is not None) == (cfg.moe is not None)
    if told:
        assert count_params(cfg, active=True) == pytest.approx(float(told[1]) * UNITS[told[2]], rel=0.01)


def test_the_quickstart_is_small():
    config = loaded(next(path for path in CONFIGS if path.stem == "quickstart"))
    assert count_params(read_config(config.model)) < 10e6
    assert config.train.steps * config.train.batch_size * config.data.sequence_length < 2e6


@named(CONFIGS)
def test_parameters_have_shapes_that_add_up_to_the_count(path):
    cfg = model_of(path)
    assert sum(math.prod(a.shape) for a in jax.tree.leaves(abstract_params(cfg))) == count_params(cfg, mtp=True)


@named(CONFIGS)
def test_the_batch_divides_into_microbatches_over_one_to_eight_devices(path):
    train = loaded(path).train
    rows = train.batch_size // train.accumulation
    assert train.batch_size == rows * train.accumulation
    for devices in (1, 2, 4, 8):
        assert rows % batch_shards(MeshConfig().sizes(devices)) == 0


@named(CONFIGS)
def test_the_run_fits_its_schedule_its_context_and_its_vocabulary(path):
    config, cfg = loaded(path), model_of(path)
    assert config.schedule.warmup_steps < config.train.steps
    assert config.data.sequence_length <= cfg.context_length
    if config.tokenizer is not None and config.tokenizer.kind == "train":
        assert config.tokenizer.vocab_size <= cfg.vocab_size


@named(CONFIGS)
def test_a_step_on_one_device_keeps_the_state_as_it_is(path):
    trainer, config = trainer_of(path, single_device_mesh()), loaded(path)
    state, metrics = jax.eval_shape(
        trainer.program.step, trainer.abstract_state, abstract_batch(config, single_device_mesh())
    )
    before, after = (
        {path_name(p): (a.shape, a.dtype) for p, a in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (trainer.abstract_state, state)
    )
    assert after == before
    assert {"loss", "grad_norm", "lr", "accuracy"} <= metrics.keys()
    assert all(metric.shape == () for metric in metrics.values())


@named(CONFIGS)
def test_eight_devices_hold_an_eighth_of_the_state_each(path):
    mesh, config = make_mesh(MeshConfig(fsdp=8)), loaded(path)
    trainer = trainer_of(path, mesh)
    leaves = jax.tree.leaves(trainer.abstract_state)
    whole = sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves)
    held = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)
    # Vectors and counters stay whole, and so do the matrices that expand latent attention's keys and values; where
    # there is an adapter, ranks are not split, and blocks of a quantized base need not divide.
    slack = 1.02 if config.lora is None else 4
    assert whole / 8 <= held < whole / 8 * slack
    with jax.set_mesh(mesh):
        jax.eval_shape(trainer.program.step, trainer.abstract_state, abstract_batch(config, mesh))


def keys_of(node: object, schema: dict, root: dict, where: str = ""):
    """(dotted key, its schema) of every key that a config file gives, down to where the schema leaves it free."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
    if not isinstance(node, dict) or "properties" not in schema:
        return
    for key, value in node.items():
        name = f"{where}{key}"
        assert key in schema["properties"], f"{name} is not in the schema"
        yield name, schema["properties"][key]
        yield from keys_of(value, schema["properties"][key], root, f"{name}.")


@named(CONFIGS)
def test_every_key_of_a_config_is_documented_in_the_schema(path):
    root = json_schema()
    values = load_yaml_as_dict(path)
    keys = dict(keys_of(values, root, root))
    assert {"model", "data.paths", "train.steps"} <= keys.keys()
    undocumented = [name for name, schema in keys.items() if "description" not in schema and "$ref" not in schema]
    assert undocumented == []


@named(CONFIGS)
def test_a_misspelled_key_in_a_recipe_is_refused(path):
    with pytest.raises(ValueError, match=r"unknown key 'train.stepz'; did you mean 'steps'"):
        load_config(path, ["train.stepz=3"])


def load_yaml_as_dict(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def test_bytes_of_state_are_counted_by_hand_for_one_recipe():
    """AdamW in float32: parameters and two moments, 12 bytes a parameter, and a few counters."""
    path = next(path for path in RECIPES if path.stem == "llama-110m")
    trainer = trainer_of(path, single_device_mesh())
    total = sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in jax.tree.leaves(trainer.abstract_state))
    assert 0 <= total - 12 * count_params(trainer.cfg) < 100
