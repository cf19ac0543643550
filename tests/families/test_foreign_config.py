"""The `config.json` of types that live in their authors' repositories: read as published, or refused by name."""

import numpy as np
import pytest
from families.published_foreign import (
    BAICHUAN2_7B,
    BAICHUAN2_13B,
    BAICHUAN_7B,
    BAICHUAN_13B,
    CHATGLM2_6B,
    GLM_4_9B_CHAT,
    INTERNLM2_7B,
    INTERNLM_7B,
    INTERNLM_20B,
    PUBLISHED,
    QWEN_7B,
    TELECHAT2_35B,
    TELECHAT3_36B,
    TELECHAT_7B,
    TELECHAT_12B,
    YI_6B,
)

from jaxformers.families import read_config
from jaxformers.models.config import DynamicScaling, Rope
from jaxformers.models.params import count_params


def rope_of(values):
    (rope,) = {kind.rope for kind in read_config(values).layers}
    return rope


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_read_and_count_their_parameters(name):
    values, billions = PUBLISHED[name]
    digits = len(billions.partition(".")[2])
    assert f"{count_params(read_config(values)) / 1e9:.{digits}f}" == billions


def test_baichuan_rotates_in_its_small_models_and_has_alibi_in_its_large_ones():
    assert rope_of(BAICHUAN_7B) == rope_of(BAICHUAN2_7B) == Rope(128)
    assert rope_of(BAICHUAN_13B) is rope_of(BAICHUAN2_13B) is None
    published = (BAICHUAN_7B, BAICHUAN_13B, BAICHUAN2_7B, BAICHUAN2_13B)
    assert [read_config(values).alibi for values in published] == [False, True, False, True]
    assert [read_config(values).context_length for values in published] == [4096] * 4


def test_baichuan_2_is_told_by_its_training_loss_or_by_its_vocabulary():
    assert not read_config(BAICHUAN_13B).normalize_head
    assert read_config(BAICHUAN2_13B).normalize_head
    assert read_config({k: v for k, v in BAICHUAN2_13B.items() if k != "z_loss_weight"}).normalize_head
    assert read_config(BAICHUAN_13B | {"z_loss_weight": 0}).normalize_head


def test_biases_of_internlm():
    biased, plain = read_config(INTERNLM_7B), read_config(INTERNLM_20B)
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, False)
    assert (plain.qkv_bias, plain.o_bias) == (False, False)


def test_dynamic_ropes_of_internlm():
    assert rope_of(INTERNLM_7B) == Rope(128)
    assert rope_of(INTERNLM_20B) == Rope(128, scaling=DynamicScaling(1.0, 4096))
    assert rope_of(INTERNLM2_7B) == Rope(128, 1e6, scaling=DynamicScaling(2.0, 32768))


def test_qwens_context_ends_where_its_long_text_extensions_begin():
    cfg = read_config(QWEN_7B)
    assert (cfg.context_length, cfg.d_ff) == (8192, 11008)
    assert read_config(QWEN_7B | {"use_dynamic_ntk": False, "use_logn_attn": False}) == cfg


def test_chatglm_rotates_half_of_each_head_in_neighbouring_pairs():
    assert rope_of(CHATGLM2_6B) == Rope(64, 1e4, interleaved=True)
    assert rope_of(GLM_4_9B_CHAT) == Rope(64, 5e6, interleaved=True)


def test_telechats_rope_grows_with_the_doublings_of_its_first_length():
    assert rope_of(TELECHAT_7B) == Rope(128, 1e4 * 3 ** (128 / 126))
    assert rope_of(TELECHAT_12B) == Rope(160, 1e4)
    assert rope_of(TELECHAT2_35B) == Rope(128, 1e4)
    assert rope_of(TELECHAT2_35B | {"training_seqlen": 32768}) == Rope(128, 1e4 * 7 ** (128 / 126))
    assert rope_of(TELECHAT2_35B | {"training_seqlen": 4096}) == Rope(128, 1e4)


def test_telechat_3_grows_attention_by_seven_tenths_of_yarn():
    assert rope_of(TELECHAT3_36B).scaling.attention_factor == pytest.approx(0.07 * np.log(4) + 1)
    assert read_config(TELECHAT3_36B | {"rope_scaling": None}).layers[0].rope == Rope(128, 1e6)


@pytest.mark.parametrize(
    "values, changes",
    [
        (BAICHUAN_7B, {"rope_theta": 5e5}),
        (BAICHUAN2_7B, {"tie_word_embeddings": True}),
        (BAICHUAN_7B, {"hidden_size": 4097}),
        (INTERNLM_20B, {"rotary": {"type": "linear"}}),
        (INTERNLM_20B, {"rotary": {"type": "dynamic", "scale": 2.0}}),
        (INTERNLM_20B, {"num_key_value_heads": 8}),
        (INTERNLM2_7B, {"num_key_value_heads": 7}),
        (QWEN_7B, {"kv_channels": 64}),
        (QWEN_7B, {"rotary_pct": 0.5}),
        (QWEN_7B, {"visual": {"layers": 48}}),
        (CHATGLM2_6B, {"multi_query_group_num": 3}),
        (CHATGLM2_6B, {"multi_query_attention": False}),
        (CHATGLM2_6B, {"pre_seq_len": 128}),
        (CHATGLM2_6B, {"position_encoding_2d": True}),
        (CHATGLM2_6B, {"rmsnorm": False}),
        (GLM_4_9B_CHAT, {"num_hidden_layers": 28}),
        (GLM_4_9B_CHAT, {"vocab_size": 65024}),
        (TELECHAT_7B, {"n_head": 31}),
        (TELECHAT_7B, {"num_key_value_heads": 5}),
        (TELECHAT_7B, {"embed_layernorm": True}),
        (TELECHAT_7B, {"moe_expert_num": 16}),
        (TELECHAT3_36B, {"rope_scaling": {"rope_type": "telechat3-yarn"}}),
        (YI_6B, {"hidden_act": "mish"}),
    ],
)
def test_settings_that_are_not_implemented_are_refused_by_name(values, changes):
    with pytest.raises(ValueError) as caught:
        read_config(values | changes)
    message, (key, value) = str(caught.value), next(iter(changes.items()))
    assert "\n" not in message
    named = {"rope_scaling": "factor", "rotary": "rotary config: "}.get(key, key)
    assert named in message
    assert isinstance(value, dict) or repr(value) in message
