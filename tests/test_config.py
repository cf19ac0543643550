"""The config file: strict keys, YAML as people mean it, overrides, and the schema that editors read."""

import json
from pathlib import Path
from typing import get_origin

import pytest
import yaml
from pydantic import BaseModel
from tiny import LLAMA, run_config

from jaxformers.config import RunConfig, dump_yaml, json_schema, load_config, parse_yaml

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
MINIMAL = {"run_dir": "runs/x", "model": LLAMA, "data": {"paths": "*.txt"}}


def refusal(values, *overrides) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(values, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def changed(key: str, value) -> dict:
    """The minimal config with one dotted key set."""
    values = json.loads(json.dumps(MINIMAL))
    *sections, last = key.split(".")
    node = values
    for section in sections:
        node = node.setdefault(section, {})
    node[last] = value
    return values


# -- keys


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("optimiser", "optimizer"),
        ("datas", "data"),
        ("train.stpes", "steps"),
        ("train.batchsize", "batch_size"),
        ("data.sequence_len", "sequence_length"),
        ("tokenizer.knd", "kind"),
        ("mesh.fdsp", "fsdp"),
        ("runtime.rematt", "remat"),
        ("optimizer.learningrate", "learning_rate"),
        ("schedule.warmup", "warmup_steps"),
        ("loss.zloss", "z_loss"),
        ("checkpoint.keeplast", "keep_last"),
        ("sample.prompt", "prompts"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key, nearest):
    assert refusal(changed(key, 1)) == f"config: unknown key {key!r}; did you mean {nearest!r}?"


def test_an_unknown_key_like_no_other_is_refused_with_all_that_are_known():
    message = refusal(changed("mesh.zzz", 1))
    assert message == "config: unknown key 'mesh.zzz'; known are cp, dp, ep, fsdp, pp, tp"


@pytest.mark.parametrize("key", ["run_dir", "model", "data"])
def test_a_missing_key_is_named(key):
    values = {name: value for name, value in MINIMAL.items() if name != key}
    assert refusal(values) == f"config: the required key {key!r} is missing"


@pytest.mark.parametrize(
    "data, message",
    [
        ({}, "data: give either paths, for one corpus, or sources, for several, each with paths of its own"),
        ({"sources": {"code": {}}}, "data: the required key sources.code.paths is missing"),
        ({"sources": {"code": "*.py"}}, "data.sources.code is '*.py'; it must hold keys, such as chat"),
        (
            {"sources": {"code": {"paths": "*.py", "text_feild": "x"}}},
            "unknown key 'data.sources.code.text_feild'; did you mean 'text_field'?",
        ),
        (
            {"sources": {"code": {"paths": "*.py", "validation_fraction": 2}}},
            "data.sources.code.validation_fraction is 2; input should be less than 1",
        ),
    ],
)
def test_what_is_wrong_with_a_corpus_is_named_with_its_place(data, message):
    assert refusal(MINIMAL | {"data": data}) == f"config: {message}"


def test_a_source_takes_what_it_lacks_from_the_keys_beside_it_and_is_written_out():
    data = {
        "sources": {"a": {"paths": "a.jsonl"}, "b": {"paths": "b.jsonl", "text_field": "b"}},
        "text_field": "shared",
    }
    config = load_config(MINIMAL | {"data": data}, ["data.sources.a.validation_fraction=0.5"])
    assert [source.text_field for source in config.data.sources.values()] == ["shared", "b"]
    assert [source.validation_fraction for source in config.data.by_source().values()] == [0.5, 0.01]
    assert load_config(parse_yaml(dump_yaml(config), name="written")) == config


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("train.steps", "many", "train.steps is 'many'; input should be a valid integer"),
        ("train.steps", 0, "train.steps is 0; input should be greater than or equal to 1"),
        ("train.steps", 1.5, "train.steps is 1.5; input should be a valid integer"),
        ("mesh.fsdp", "all", "mesh.fsdp is 'all'; input should be a valid integer"),
        ("runtime.dtype", "float64", "runtime.dtype is 'float64'; input should be 'float32' or 'bfloat16'"),
        ("schedule.name", "cosin", "schedule.name is 'cosin'; input should be 'cosine', 'linear', 'wsd'"),
        ("optimizer.b1", 1.0, "optimizer.b1 is 1.0; input should be less than 1"),
        ("loss.chunk", 0, "loss: chunk is 0; it must be at least 1, or auto, or none"),
        (
            "mesh.fsdp",
            "al",
            "mesh.fsdp is 'al'; input should be a valid integer, unable to parse string as an integer, or ",
        ),
        ("model", 3, "model is 3; input should be a valid dictionary, or input should be a valid string"),
        ("sample.prompts", ["a", 3], "sample.prompts.1 is 3; input should be a valid string"),
        ("data", "x.txt", "data is 'x.txt'; it must hold keys, such as attend_across_documents"),
        ("train", None, "train is None; it must hold keys, such as accumulation"),
        ("tokenizer", "bytes", "tokenizer is 'bytes'; it must hold keys, such as bos_token"),
        ("sample.prompts", 3, "sample.prompts is 3; input should be"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_its_key(key, value, message):
    assert refusal(changed(key, value)).startswith(f"config: {message}")


def test_a_batch_that_accumulation_does_not_divide_is_refused():
    values = MINIMAL | {"train": {"batch_size": 6, "accumulation": 4}}
    assert refusal(values) == "config: train: batch_size 6 is not a multiple of accumulation 4; nearest legal: 4 and 8"


# -- YAML


@pytest.mark.parametrize(
    "text, value",
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000", 1000),
        ("012", 12),
        ("0o17", 15),
        ("0xff", 255),
        ("-7", -7),
        ("1:30", "1:30"),
        ("2024-05-01", "2024-05-01"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("'3e-4'", "3e-4"),
        (".inf", float("inf")),
    ],
)
def test_plain_scalars_are_read_as_yaml_1_2(text, value):
    found = parse_yaml(f"key: {text}", name="x")["key"]
    assert found == value
    assert type(found) is type(value)


def test_an_empty_value_is_null():
    assert parse_yaml("key:", name="x") == {"key": None}


def test_a_learning_rate_written_as_people_write_it_is_a_number():
    assert load_config(MINIMAL, ["optimizer.learning_rate=3e-4"]).optimizer.learning_rate == 3e-4


@pytest.mark.parametrize("text", ["a: 1\na: 2", "a:\n  b: 1\n  c: 3\n  b: 2"])
def test_a_key_given_twice_is_refused(text):
    with pytest.raises(ValueError, match=r"^x is not YAML \(line \d\): the key '[ab]' is given twice$"):
        parse_yaml(text, name="x")


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!python/module:os", "!mine 3"]
)
def test_a_tag_that_would_run_code_is_refused(tag):
    with pytest.raises(ValueError, match=r"^x is not YAML \(line 1\): could not determine a constructor for the tag"):
        parse_yaml(f"a: {tag}", name="x")


@pytest.mark.parametrize("text", ["a: [1, 2", "a: b: c", "\ta: 1", "a: &x [*y]", "{a: 1}}"])
def test_text_that_is_not_yaml_is_refused_in_one_line_with_its_line(text):
    with pytest.raises(ValueError, match=r"^x is not YAML \(line \d\): ") as caught:
        parse_yaml(text, name="x")
    assert "\n" not in str(caught.value)


def test_anchors_and_merges_work():
    text = "base: &b {x: 1, y: 2}\nother: {<<: *b, y: 3}"
    assert parse_yaml(text, name="x")["other"] == {"x": 1, "y": 3}


@pytest.mark.parametrize("content, kind", [("- 1\n- 2", "list"), ("", "NoneType"), ("just text", "str")])
def test_a_file_that_holds_no_keys_is_refused(tmp_path, content, kind):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    assert refusal(path) == f"{path} holds {kind}, not the keys of a config"


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert refusal(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such config file"
    assert refusal(tmp_path) == f"{tmp_path}: no such config file"


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"run_dir: caf\xe9")
    assert refusal(path) == f"{path} is not UTF-8 text: unexpected end of data at byte 12"


# -- overrides


def test_overrides_set_keys_at_any_depth_and_the_last_one_counts():
    overrides = ["train.steps=5", "model.hidden_size=64", "mesh.tp=2", "train.steps=1e1", "data.paths=[a, b]"]
    config = load_config(MINIMAL, overrides)
    assert config.train.steps == 10
    assert config.model["hidden_size"] == 64
    assert config.mesh.tp == 2
    assert config.data.paths == ("a", "b")
    assert MINIMAL["model"]["hidden_size"] == 32, "the caller's mapping is left alone"


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("checkpoint.every_steps=null", "checkpoint.every_steps", None),
        ("run_dir=a=b", "run_dir", "a=b"),
        ("run_dir='5'", "run_dir", "5"),
        ("runtime.sequence_parallel=true", "runtime.sequence_parallel", True),
        ("model=org/name@main", "model", "org/name@main"),
        ("sample.prompts=[]", "sample.prompts", ()),
        (" train.steps = 7", "train.steps", 7),
        ("data.text_field=", "data.text_field", ""),
    ],
)
def test_an_override_is_read_as_yaml(override, key, value):
    node = load_config(MINIMAL, [override])
    for part in key.split("."):
        node = getattr(node, part)
    assert node == value


@pytest.mark.parametrize("override", ["train.steps", "=5", "train..steps=5", ".steps=5", "train.=5", "--steps"])
def test_an_override_of_another_form_is_refused(override):
    message = refusal(MINIMAL, override)
    assert message == f"override {override!r} is not of the form key=value, such as train.steps=100"


def test_an_override_below_a_value_is_refused():
    assert refusal(MINIMAL, "run_dir.x=1") == "override 'run_dir.x=1': run_dir is 'runs/x', which has no keys"
    assert refusal(MINIMAL | {"data": {"paths": ["a"]}}, "data.paths.0=b").endswith("paths is ['a'], which has no keys")


def test_an_override_that_is_not_yaml_or_no_known_key_is_refused():
    assert refusal(MINIMAL, "train.steps=[1").startswith("override 'train.steps=[1' is not YAML")
    assert refusal(MINIMAL, "train.setps=1") == "config: unknown key 'train.setps'; did you mean 'steps'?"


# -- round trips, and the set of keys


def sections(model: type[BaseModel], path: str = ""):
    """Every key of the config with its dotted name and its field."""
    from jaxformers.config import _section

    for name, field in model.model_fields.items():
        section = None if get_origin(field.annotation) is dict else _section(field.annotation)
        if section is not None:
            yield from sections(section, f"{path}{name}.")
        else:
            yield f"{path}{name}", field


def test_a_dumped_config_loads_as_the_same_config(tmp_path):
    config = load_config(run_config(tmp_path), ["loss.z_loss=1e-4", "checkpoint.every_minutes=0.5", "mesh.tp=auto"])
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(path) == config
    assert dump_yaml(load_config(path)) == path.read_text(encoding="utf-8")


def test_a_dumped_config_spells_out_every_default():
    dumped = yaml.safe_load(dump_yaml(load_config(changed("tokenizer.kind", "bytes"), ["lora.rank=8"])))
    for key, _ in sections(RunConfig):
        node = dumped
        for part in key.split("."):
            assert part in node, key
            node = node[part]


def test_text_survives_a_dump(tmp_path):
    prompts = ["naïve 東京", "tab\tand\nlines", "# no comment", "3e-4", "no", "  spaces "]
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_yaml(load_config(changed("sample.prompts", prompts))), encoding="utf-8")
    assert load_config(path).sample.prompts == tuple(prompts)


def test_there_are_fewer_than_150_keys_and_each_says_what_it_is():
    keys = dict(sections(RunConfig))
    assert 50 < len(keys) < 150
    assert [key for key, field in keys.items() if not field.description] == []


def test_the_schema_names_every_key_refuses_others_and_is_json():
    schema = json.loads(json.dumps(json_schema()))
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert set(schema["required"]) == {"run_dir", "model", "data"}
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False
        assert section["description"]


def fits(value, schema, definitions) -> bool:
    """Whether a value is what the part of JSON Schema that we use allows."""
    if "$ref" in schema:
        return fits(value, definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    if "anyOf" in schema:
        return any(fits(value, option, definitions) for option in schema["anyOf"])
    if "const" in schema:
        return value == schema["const"]
    if "enum" in schema:
        return value in schema["enum"]
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    match schema.get("type"):
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case "array":
            return isinstance(value, list) and all(fits(item, schema["items"], definitions) for item in value)
        case "object" if "properties" in schema:
            known = schema["properties"]
            whole = set(schema.get("required", ())) <= set(value) <= set(known)
            return whole and all(fits(item, known[key], definitions) for key, item in value.items())
        case None:
            return True
        case kind:
            return isinstance(value, kinds[kind])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_schema_allows_the_shipped_configs(path):
    schema = json_schema()
    values = parse_yaml(path.read_text(encoding="utf-8"), name=path.name)
    assert fits(values, schema, schema["$defs"])
    assert not fits(values | {"optimiser": {}}, schema, schema["$defs"])
    assert not fits(values | {"train": values["train"] | {"steps": "many"}}, schema, schema["$defs"])
    load_config(path)
