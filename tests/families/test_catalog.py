"""The published sizes are those that their authors published, and what is said to be proved is what the matrix runs."""

import json

import pytest
from families.proved import FILE, proved

from jaxformers.families import FAMILIES, read_config
from jaxformers.families.catalog import is_published, published
from jaxformers.listing import TASKS, list_types
from jaxformers.models.params import count_params

# What MindSpore Transformers lists, as far as it is a decoder of text whose weights or config are public.
REFERENCE_SIZES = """
llama-7b llama-13b llama-2-7b llama-2-13b llama-2-70b llama-3-8b llama-3-70b llama-3.1-8b llama-3.1-70b llama-3.2-3b
codellama-34b mixtral-8x7b yi-6b yi-34b gpt2 gpt2-13b bloom-560m bloom-7b1 bloom-176b wizardcoder-15b codegeex2-6b
deepseek-v2 deepseek-v3 deepseek-r1 deepseek-coder-33b deepseek-coder-1.5-7b qwen-7b qwen-14b
qwen1.5-7b qwen1.5-14b qwen1.5-72b qwen2-0.5b qwen2-1.5b qwen2-7b qwen2-57b-a14b qwen2-72b
qwen2.5-0.5b qwen2.5-1.5b qwen2.5-7b qwen2.5-14b qwen2.5-32b qwen2.5-72b qwen3-0.6b qwen3-1.7b qwen3-4b qwen3-8b
qwen3-14b qwen3-32b qwen3-30b-a3b qwen3-235b-a22b chatglm2-6b chatglm3-6b chatglm3-6b-32k glm-4-9b glm-4.5 glm-4.5-air
baichuan-7b baichuan-13b baichuan2-7b baichuan2-13b internlm-7b internlm-20b internlm2-7b internlm2-20b skywork-13b
telechat-7b telechat-12b telechat2-7b telechat2-35b telechat2-115b telechat3-36b telechat3-105b-a4.7b yizhao-12b
mengzi3-13b ziya-13b knowlm-13b pangu-alpha-2.6b
""".split()
ROUNDED = {"M": 1e6, "B": 1e9}


def test_every_size_of_the_reference_is_there_and_many_more():
    assert set(REFERENCE_SIZES) <= set(published())
    assert len(published()) >= 150


@pytest.mark.parametrize("entry", published().values(), ids=lambda entry: entry.name)
def test_a_published_size_has_as_many_parameters_as_its_authors_say(entry):
    count = count_params(read_config(entry.name))
    if isinstance(entry.parameters, int):
        assert count == entry.parameters
    elif entry.parameters is not None:
        figure, unit = entry.parameters[:-1], ROUNDED[entry.parameters[-1]]
        last_digit = 10.0 ** -len(figure.partition(".")[2])
        assert count == pytest.approx(float(figure) * unit, rel=0.01, abs=last_digit / 2 * unit)


def test_most_counts_are_exact():
    exact = [entry for entry in published().values() if isinstance(entry.parameters, int)]
    assert len(exact) >= 0.85 * len(published())


def test_a_size_repeats_no_key_of_its_lineage():
    text = (FILE.parent / "published.json").read_text(encoding="utf-8")
    for lineage in json.loads(text).values():
        for name, own in lineage["checkpoints"].items():
            repeated = [key for key, value in own["config"].items() if lineage["config"].get(key, own) == value]
            assert not repeated, name


def test_hub_ids_are_of_their_form_and_names_are_lower_case():
    for entry in published().values():
        assert entry.name == entry.name.lower()
        assert entry.hub_id is None or entry.hub_id.count("/") == 1


def test_a_file_of_the_same_name_wins_over_a_published_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_published("gpt2")
    (tmp_path / "gpt2").mkdir()
    assert not is_published("gpt2")
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        read_config("gpt2")


def test_an_unknown_size_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"'gpt2-lage' is neither .*; did you mean 'gpt2-large'\?"):
        read_config("gpt2-lage")


def test_what_is_said_to_be_proved_is_what_the_matrix_runs():
    assert json.loads(FILE.read_text(encoding="utf-8")) == proved(), f"run: python {proved.__module__}"


def test_types_are_proved_loads_or_untested():
    rows = {row.model_type: row for row in list_types()}
    assert rows.keys() == set(FAMILIES)
    for row in rows.values():
        assert row.status.keys() == set(TASKS)
        assert set(row.status.values()) <= {"proved", "loads", "untested"}
