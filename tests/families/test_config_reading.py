"""A `config.json` means what `transformers` takes it to mean, or is refused with one line that names the key."""

import inspect
import json
import math
import re

import pytest
import torch
import transformers
from families.checkpoints import ROWS, checkpoint
from families.published import (
    DEEPSEEK_V3,
    DEEPSEEK_V3_QUANTIZATION,
    GEMMA_2_2B,
    GEMMA_3_1B,
    GPT2,
    GPT_OSS_20B,
    GPT_OSS_20B_QUANTIZATION,
    LLAMA_3_2_1B,
    MISTRAL_7B,
    PUBLISHED,
    QWEN2_5_0_5B,
    QWEN3_0_6B,
    QWEN3_30B_A3B,
)

from jaxformers.families import FAMILIES, read_config
from jaxformers.families.keys import unused
from jaxformers.models.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    Rope,
    YarnScaling,
    plan_stacks,
)
from jaxformers.models.params import count_params


def without(values, *keys):
    return {key: value for key, value in values.items() if key not in keys}


def refusal(values) -> str:
    with pytest.raises(ValueError) as caught:
        read_config(values)
    message = str(caught.value)
    assert "\n" not in message
    return message


def read_or_message(values):
    try:
        return read_config(values)
    except ValueError as error:
        return str(error)


def windows(cfg):
    return [kind.window for kind in cfg.layers]


# -- well-known checkpoints


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_read_and_count_their_parameters(name):
    values, billions = PUBLISHED[name]
    count = count_params(read_config(values))
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**values)
        model = transformers.AutoModelForCausalLM.from_config(config)
    # The bias that selects experts is a weight of the checkpoint, though the reference keeps it as a buffer.
    biases = sum(b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    assert count == sum(p.numel() for p in model.parameters()) + biases
    assert count / 1e9 == pytest.approx(billions, rel=5e-3)


@pytest.mark.parametrize(
    "values, billions", [(QWEN3_30B_A3B, 3.3), (DEEPSEEK_V3, 37), (GPT_OSS_20B, 3.6)], ids=lambda v: str(v)[:12]
)
def test_published_checkpoints_count_their_active_parameters(values, billions):
    # Published figures are rounded, and gpt-oss leaves its embedding out.
    cfg = read_config(values)
    active = count_params(cfg, active=True) - (cfg.vocab_size * cfg.d_model if cfg.family == "gpt_oss" else 0)
    assert active / 1e9 == pytest.approx(billions, rel=0.03)


@pytest.mark.parametrize(
    "quantization",
    [
        GPT_OSS_20B_QUANTIZATION,
        DEEPSEEK_V3_QUANTIZATION | {"weight_block_size": None},
        DEEPSEEK_V3_QUANTIZATION | {"weight_block_size": [128, 0]},
        DEEPSEEK_V3_QUANTIZATION | {"fmt": "e5m2"},
    ],
)
def test_quantized_checkpoints_that_cannot_be_read_are_refused_by_name(quantization):
    message = refusal(GPT_OSS_20B | {"quantization_config": quantization})
    assert "quantization_config" in message
    assert quantization["quant_method"] in message
    assert read_config(GPT_OSS_20B | {"quantization_config": None}) == read_config(GPT_OSS_20B)


def test_blocks_of_float8_change_no_architecture_and_are_not_written_back():
    cfg = read_config(DEEPSEEK_V3 | {"quantization_config": DEEPSEEK_V3_QUANTIZATION})
    assert cfg == read_config(DEEPSEEK_V3)
    assert cfg.source == DEEPSEEK_V3


def test_the_other_name_of_float8_is_known():
    named = DEEPSEEK_V3_QUANTIZATION | {"fmt": "float8_e4m3fn"}
    assert read_config(DEEPSEEK_V3 | {"quantization_config": named}) == read_config(DEEPSEEK_V3)


# -- keys of published files that say nothing, and keys by other names


def of_type(model_type):
    """The settings of a test model of this type, as its file holds them."""
    row = ROWS[model_type]
    return json.loads(transformers.AutoConfig.for_model(row.model_type, **row.base | row.settings).to_json_string())


@pytest.mark.parametrize("model_type", sorted(unused().keys() - {"*"}))
def test_what_published_files_say_in_vain_is_read_nowhere_in_the_reference_and_changes_nothing(model_type):
    config, values = transformers.AutoConfig.for_model(model_type), of_type(model_type)
    reference = inspect.getsource(inspect.getmodule(transformers.AutoModelForCausalLM._model_mapping[type(config)]))
    for key in unused()[model_type]:
        assert not re.search(rf"config\.{key}\b|[\"']{key}[\"']", reference), key
        assert key not in config.attribute_map
        assert read_config(values | {key: "whatever"}) == read_config(values), key


def test_what_files_of_any_type_say_in_vain_changes_nothing():
    for key in unused()["*"]:
        assert read_config(LLAMA_3_2_1B | {key: {"any": 1}}) == read_config(LLAMA_3_2_1B)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_bigcode", "gptj", "bloom", "mpt"])
def test_keys_are_known_by_the_names_that_the_reference_maps_to_them(model_type):
    aliases = transformers.AutoConfig.for_model(model_type).attribute_map
    values = of_type(model_type)
    renamed = dict(values)
    for other, key in aliases.items():
        renamed[other] = renamed.pop(key)
    assert aliases
    assert read_config(renamed) == read_config(values) == read_config(values | renamed)
    assert "num_attention_heads is 3; it must be what" in refusal(values | {"num_attention_heads": 3})


def test_files_without_a_key_that_their_type_has_a_default_for():
    falcon = without(of_type("falcon"), "max_position_embeddings")
    assert read_config(falcon).context_length == 2048
    exaone = of_type("exaone4")
    assert read_config(exaone | {"sliding_window_pattern": "LLLG"}) == read_config(exaone)
    assert "sliding_window_pattern" in refusal(without(exaone, "layer_types") | {"sliding_window_pattern": "LLLG"})


FLAT = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
BARE = {name: {"rope_type": "default"} for name in ("full_attention", "sliding_attention")}


@pytest.mark.parametrize(
    "model_type, values, line",
    [
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; it must be 1 in this type"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; it must be 1 in this type"),
        ("gpt_neox", {"rotary_emb_base": 1e4, "rope_theta": 500.0}, "rope_theta is 500.0; it must be what"),
        ("gpt_neox", {"rotary_pct": 0.25, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; it must be"),
        ("gemma3_text", {"rope_parameters": FLAT}, "it must be settings for each of layer_types"),
        ("olmo3", {"rope_parameters": FLAT}, "it must be settings for each of layer_types"),
        ("gemma3_text", {"rope_parameters": BARE, "rope_theta": 500.0}, "rope_theta is 500.0; it must be in rope_par"),
    ],
)
def test_rotations_spelled_in_two_ways_of_which_the_reference_hears_one_are_refused(model_type, values, line):
    assert line in refusal(without(of_type(model_type), "rope_parameters") | values)


def test_layers_of_published_checkpoints():
    gemma = read_config(GEMMA_3_1B)
    assert windows(gemma) == ([512] * 5 + [None]) * 4 + [512] * 2
    assert [(len(s.pattern), s.repeats) for s in plan_stacks(gemma.layers)] == [(6, 4), (1, 2)]
    deepseek = read_config(DEEPSEEK_V3)
    assert [(s.pattern[0].ffn, s.repeats) for s in plan_stacks(deepseek.layers)] == [("dense", 3), ("moe", 58)]
    assert windows(read_config(GEMMA_2_2B)) == [4096, None] * 13
    assert windows(read_config(GPT_OSS_20B)) == [128, None] * 12
    assert windows(read_config(MISTRAL_7B)) == [4096] * 32
    assert windows(read_config(QWEN2_5_0_5B)) == [None] * 24


def test_ropes_of_published_checkpoints():
    assert read_config(LLAMA_3_2_1B).layers[0].rope == Rope(64, 5e5, scaling=Llama3Scaling(32.0, 8192, 1.0, 4.0))
    local, *_, globally = (kind.rope for kind in read_config(GEMMA_3_1B).layers[:6])
    assert (local, globally) == (Rope(256, 1e4), Rope(256, 1e6))
    deepseek = read_config(DEEPSEEK_V3)
    assert deepseek.layers[0].rope == Rope(64, 1e4, interleaved=True, scaling=YarnScaling(40.0, 4096, 1.0))
    assert deepseek.attn_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    oss = read_config(GPT_OSS_20B).layers[0].rope
    assert oss == Rope(64, 1.5e5, scaling=YarnScaling(32.0, 4096, 0.1 * math.log(32) + 1, truncate=False))


# -- spellings


@pytest.mark.parametrize("name", [name for name, (values, _) in PUBLISHED.items() if "rope_theta" in values])
def test_both_spellings_of_the_rope_keys_mean_the_same(name):
    values = PUBLISHED[name][0]
    modern = transformers.AutoConfig.for_model(**values).to_dict()
    assert "rope_parameters" in modern
    assert "rope_theta" not in modern
    assert read_config(modern) == read_config(values)


def test_rope_parameters_of_each_kind():
    plain = without(LLAMA_3_2_1B, "rope_scaling")

    def scaling(**rope):
        return read_config(plain | {"rope_parameters": rope}).layers[0].rope.scaling

    assert scaling(rope_type="default") is None
    assert scaling(rope_type="linear", factor=2) == LinearScaling(2.0)
    assert scaling(type="linear", factor=2.0) == LinearScaling(2.0)
    assert scaling(rope_type="dynamic", factor=2.0) == DynamicScaling(2.0, 131072)
    assert scaling(rope_type="yarn", factor=2.0, attention_factor=1.5) == YarnScaling(2.0, 131072, 1.5)
    assert scaling(rope_type="yarn", factor=2.0, mscale=None, beta_fast=8).beta_fast == 8.0


@pytest.mark.parametrize(
    "rope, named",
    [
        ({"rope_type": "su", "factor": 2.0}, "'su'"),
        ({"rope_type": "linear"}, "'factor'"),
        ({"rope_type": "linear", "factor": "2"}, "'2'"),
        ({"rope_type": "linear", "factor": 2.0, "facter": 3.0}, "facter"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}, "'high_freq_factor'"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": "no"}, "'no'"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096.5}, "4096.5"),
    ],
)
def test_rope_scalings_that_are_not_understood_are_refused(rope, named):
    assert named in refusal(LLAMA_3_2_1B | {"rope_scaling": rope})


def test_two_ropes_that_disagree_are_refused():
    modern = {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    assert "rope_parameters" in refusal(LLAMA_3_2_1B | modern)


# -- keys that older files lack


def saved(name) -> dict:
    return json.loads((checkpoint(name).directory / "config.json").read_text())


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "gpt_oss"])
def test_files_older_than_layer_types_follow_the_familys_rule(name):
    assert "layer_types" in saved(name)
    assert read_config(without(saved(name), "layer_types")) == checkpoint(name).ours.config


def test_qwen2_windows_start_at_max_window_layers():
    values = QWEN2_5_0_5B | {"use_sliding_window": True, "max_window_layers": 20, "sliding_window": 100}
    assert windows(read_config(values)) == [None] * 20 + [100] * 4


def test_gemma3_files_with_a_pattern_length():
    assert windows(read_config(GEMMA_3_1B | {"sliding_window_pattern": 2}))[:4] == [512, None, 512, None]
    modern = without(GEMMA_3_1B, "sliding_window_pattern") | {"_sliding_window_pattern": 6}
    assert read_config(modern) == read_config(GEMMA_3_1B)


def test_gemma3_scales_the_global_layers_only():
    scaled = read_config(GEMMA_3_1B | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert scaled.layers[0].rope == Rope(256, 1e4)
    assert scaled.layers[5].rope == Rope(256, 1e6, scaling=LinearScaling(8.0))


@pytest.mark.parametrize("name", ROWS)
def test_an_absent_key_means_its_default_in_the_reference_or_is_refused(name):
    values = saved(name)
    for key in values.keys() - {"model_type"}:
        if (name, key) == ("exaone4-full", "layer_types"):
            continue  # the reference divides by zero there
        if key == "num_nextn_predict_layers":
            assert read_config(without(values, key)).mtp_modules == 0
            continue  # the reference says 1 and makes none
        older = without(values, key)
        found = read_or_message(older)
        if isinstance(found, str):
            assert key in found, found
        else:
            assert found == read_config(transformers.AutoConfig.for_model(**older).to_dict()), key


# -- nulls and neutral values


def test_a_null_switches_off_what_is_on_by_default():
    gemma = read_config(GEMMA_2_2B | {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (gemma.attn_softcap, gemma.logit_softcap) == (None, None)
    assert windows(read_config(MISTRAL_7B | {"sliding_window": None})) == [None] * 32
    assert windows(read_config(without(MISTRAL_7B, "sliding_window"))) == [4096] * 32
    lite = read_config(DEEPSEEK_V3 | {"q_lora_rank": None})
    assert lite.mla.q_rank is None


def test_a_null_where_a_rule_gives_the_value_follows_the_rule():
    assert read_config(LLAMA_3_2_1B | {"num_key_value_heads": None}).num_kv_heads == 32
    assert read_config(LLAMA_3_2_1B | {"head_dim": None}).head_dim == 64
    assert read_config(GPT2 | {"n_inner": None}).d_ff == 4 * 768
    assert read_config(GPT2 | {"n_inner": 100}).d_ff == 100


@pytest.mark.parametrize(
    "values, neutral, other",
    [
        (LLAMA_3_2_1B, {"pretraining_tp": 1}, {"pretraining_tp": 2}),
        (GPT2, {"scale_attn_weights": True}, {"scale_attn_weights": False}),
        (GPT2, {"add_cross_attention": False}, {"add_cross_attention": True}),
        (GEMMA_2_2B, {"use_bidirectional_attention": None}, {"use_bidirectional_attention": True}),
        (DEEPSEEK_V3, {"scoring_func": "sigmoid"}, {"scoring_func": "softmax"}),
        (DEEPSEEK_V3, {"moe_layer_freq": 1}, {"moe_layer_freq": 2}),
        (GPT_OSS_20B, {"swiglu_alpha": 1.702}, {"swiglu_alpha": 1.0}),
        (QWEN3_0_6B, {"unheard_of": None}, {"unheard_of": 1}),
    ],
)
def test_keys_at_a_neutral_value_are_accepted_and_at_any_other_refused(values, neutral, other):
    assert read_config(values | neutral) == read_config(values)
    assert next(iter(other)) in refusal(values | other)


# -- refusals


def test_an_unknown_model_type_lists_the_known_ones():
    message = refusal({"model_type": "mamba2"})
    assert "'mamba2'" in message
    assert all(known in message for known in FAMILIES)
    assert "None" in refusal({"hidden_size": 8})
    assert "['llama']" in refusal({"model_type": ["llama"]})


def test_a_missing_key_is_named():
    assert "'hidden_size'" in refusal(without(LLAMA_3_2_1B, "hidden_size"))


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_size", "2048"),
        ("hidden_size", 2048.5),
        ("num_hidden_layers", 0),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 0),
        ("num_key_value_heads", 3),
        ("vocab_size", True),
        ("vocab_size", -1),
        ("rms_norm_eps", "1e-5"),
        ("tie_word_embeddings", "true"),
        ("hidden_act", "mish"),
        ("hidden_act", 3),
        ("rope_scaling", [1, 2]),
        ("rope_theta", "10000"),
    ],
)
def test_a_mistyped_or_impossible_value_is_named_with_its_key(key, value):
    message = refusal(LLAMA_3_2_1B | {key: value})
    assert key in message
    assert repr(value) in message


@pytest.mark.parametrize(
    "values, changes",
    [
        (QWEN3_30B_A3B, {"num_experts_per_tok": 129}),
        (QWEN3_30B_A3B, {"mlp_only_layers": 3}),
        (DEEPSEEK_V3, {"n_group": 7}),
        (DEEPSEEK_V3, {"topk_group": 9}),
        (DEEPSEEK_V3, {"topk_group": 3, "n_group": 128}),
        (DEEPSEEK_V3, {"n_group": 256}),
        (GPT_OSS_20B, {"experts_per_token": 2}),
        (GPT_OSS_20B, {"layer_types": ["full_attention"] * 23}),
        (GPT_OSS_20B, {"layer_types": ["chunked_attention"] * 24}),
        (GPT2, {"n_embd": 770}),
        (GPT2, {"n_ctx": 512}),
        (GEMMA_3_1B, {"sliding_window": 0}),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(values, changes):
    assert next(iter(changes)) in refusal(values | changes)


def test_an_unknown_key_is_refused_with_the_nearest_known_one():
    message = refusal(LLAMA_3_2_1B | {"rope_thetta": 1e4})
    assert "'rope_theta'" in message
    assert "rope_thetta = 10000.0" in message


# -- files


def test_a_directory_a_file_and_its_content_read_alike(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_3_2_1B))
    assert read_config(tmp_path) == read_config(str(path)) == read_config(LLAMA_3_2_1B)
    assert read_config(path).source == LLAMA_3_2_1B


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"llama"', b"\xff\xfe", b"null"])
def test_a_file_that_is_no_json_mapping_is_refused_by_name(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    assert str(tmp_path / "config.json") in refusal(tmp_path)


def test_a_directory_without_a_config_is_refused_by_name(tmp_path):
    assert str(tmp_path / "config.json") in refusal(tmp_path)
