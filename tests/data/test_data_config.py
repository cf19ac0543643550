import json

import pytest
from pydantic import ValidationError

from jaxformers.data.config import DataConfig, TokenizerConfig


def test_one_glob_may_be_written_as_a_string():
    assert DataConfig(paths="*.txt").paths == ("*.txt",)


def test_no_glob_at_all_is_refused():
    with pytest.raises(ValidationError, match="paths"):
        DataConfig(paths=[])


def test_unknown_keys_are_refused():
    with pytest.raises(ValidationError, match="sequence_lenght"):
        DataConfig(paths="*.txt", sequence_lenght=8)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"kind": "bytes", "vocab_size": 500}, "tokenizer.vocab_size is for kind train, but tokenizer.kind is bytes"),
        ({"kind": "train", "path": "t.json"}, "tokenizer.path is for kind file"),
        ({"kind": "file", "path": "t.json", "special_tokens": ["<x>"]}, "special_tokens is for kind train or bytes"),
        ({"kind": "file"}, "tokenizer.path must name"),
        ({"vocab_size": 258}, "tokenizer.vocab_size is 258; bytes and special tokens alone need 259"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        TokenizerConfig(**settings)


@pytest.mark.parametrize("settings", [{"kind": "bytes"}, {"kind": "train"}, {"kind": "file", "path": "t.json"}])
def test_a_config_written_out_in_full_reads_back(settings):
    config = TokenizerConfig(**settings)
    assert TokenizerConfig(**config.model_dump(mode="json")) == config


def test_every_key_explains_itself_in_the_schema():
    for config in (TokenizerConfig, DataConfig):
        properties = json.loads(json.dumps(config.model_json_schema()))["properties"]
        assert all(entry["description"] for entry in properties.values())


def test_the_schema_lets_an_editor_accept_one_glob_or_many():
    kinds = DataConfig.model_json_schema()["properties"]["paths"]["anyOf"]
    assert {kind["type"] for kind in kinds} == {"string", "array"}
