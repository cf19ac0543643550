"""Modules for multi-token prediction in checkpoints: in and out bit for bit, left alone where nobody trains them, and
files that lack them."""

import logging

import jax
import numpy as np
import pytest
from tiny import LLAMA, assert_bit_equal, random_params, run_config

import jaxformers as jf
from jaxformers.config import load_config
from jaxformers.families import read_config
from jaxformers.hub.convert import import_params
from jaxformers.hub.pretrained import read_pretrained, write_pretrained
from jaxformers.hub.safetensors import open_tensors, write_tensors
from jaxformers.training import prepare_run

MOE = {
    "num_nextn_predict_layers": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
MODELS = {
    "deepseek_v3": LLAMA
    | MOE
    | {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "head_dim": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
    "glm4_moe": LLAMA | MOE | {"model_type": "glm4_moe", "head_dim": 8},
    "tied": LLAMA | MOE | {"model_type": "glm4_moe", "tie_word_embeddings": True},
}
every_model = pytest.mark.parametrize("name", MODELS)


def written(name: str, folder):
    """A checkpoint with modules: its config and parameters."""
    cfg = read_config(MODELS[name])
    params = random_params(cfg)
    write_pretrained(folder, cfg, params, dtype="bfloat16")
    return cfg, params


@every_model
def test_modules_are_written_under_deepseeks_names_and_read_back_bit_for_bit(name, tmp_path):
    cfg, _ = written(name, tmp_path / "first")
    tensors = open_tensors(tmp_path / "first")
    shapes = {
        "embed_tokens.weight": (300, 32),
        "enorm.weight": (32,),
        "hnorm.weight": (32,),
        "eh_proj.weight": (32, 64),
        "shared_head.norm.weight": (32,),
        "shared_head.head.weight": (300, 32),
        "input_layernorm.weight": (32,),
        "mlp.experts.3.down_proj.weight": (32, 8),
    }
    for layer in (2, 3):
        found = {n: tensors[f"model.layers.{layer}.{n}"].shape for n in shapes}
        assert found == shapes
    again = read_pretrained(tmp_path / "first")
    assert again.config == cfg
    assert len(again.params["mtp"]) == 2
    write_pretrained(tmp_path / "second", again.config, again.params)
    second = open_tensors(tmp_path / "second")
    assert second.keys() == tensors.keys()
    assert all(np.asarray(second[n]).tobytes() == np.asarray(tensors[n]).tobytes() for n in tensors)


def test_of_what_the_projection_reads_the_token_comes_first(tmp_path):
    _, params = written("deepseek_v3", tmp_path)
    proj = np.asarray(open_tensors(tmp_path)["model.layers.3.eh_proj.weight"]).astype(np.float32)
    for part, columns in ((0, slice(0, 32)), (1, slice(32, 64))):
        np.testing.assert_allclose(proj[:, columns].T, params["mtp"][1]["proj"][part], rtol=1e-2)


@every_model
def test_whoever_does_not_train_leaves_modules_in_the_file(name, tmp_path):
    cfg, _ = written(name, tmp_path / "first")
    model = jf.load(tmp_path / "first")
    assert "mtp" not in model.params
    assert model.config == cfg.replace(mtp_modules=0)
    jf.save_pretrained(model, tmp_path / "second")
    assert read_config(tmp_path / "second").mtp_modules == 0
    whole = jf.load(tmp_path / "first", mtp=True)
    assert whole.config == cfg
    without = {name: leaf for name, leaf in whole.params.items() if name != "mtp"}
    assert_bit_equal(jax.device_get(model.params), jax.device_get(without))


def test_a_checkpoint_that_lacks_its_modules_opens_without_them_and_says_so(tmp_path, caplog):
    written("deepseek_v3", tmp_path)
    main = {
        n: np.asarray(t)
        for n, t in open_tensors(tmp_path).items()
        if not n.startswith(("model.layers.2.", "model.layers.3."))
    }
    write_tensors(tmp_path, main)
    with caplog.at_level(logging.WARNING):
        model = jf.load(tmp_path, mtp=True)
    assert "lacks the weights of its 2 module(s) for multi-token prediction" in caplog.text
    assert "mtp" not in model.params
    caplog.clear()
    jf.save_pretrained(jf.load(tmp_path), tmp_path / "again")
    assert not caplog.text
    assert read_config(tmp_path / "again") == read_config(tmp_path), "its config.json is written back as it was"
    setup = prepare_run(load_config(run_config(tmp_path, model=str(tmp_path))))
    assert setup.cfg.mtp_modules == read_config(setup.cfg.source).mtp_modules == 0


def test_a_checkpoint_with_some_of_its_modules_weights_is_refused(tmp_path):
    cfg, _ = written("deepseek_v3", tmp_path)
    tensors = {n: t for n, t in open_tensors(tmp_path).items() if n != "model.layers.3.hnorm.weight"}
    with pytest.raises(ValueError, match=r"1 tensors missing: model\.layers\.3\.hnorm\.weight$"):
        import_params(cfg, tensors)


def test_what_modules_share_may_be_absent_but_not_different(tmp_path):
    cfg, _ = written("deepseek_v3", tmp_path)
    tensors = dict(open_tensors(tmp_path))
    copies = [n for n in tensors if n.endswith((".embed_tokens.weight", "shared_head.head.weight")) and "layers" in n]
    assert len(copies) == 4
    import_params(cfg, {n: t for n, t in tensors.items() if n not in copies})
    tensors["model.layers.2.shared_head.head.weight"] = np.zeros((300, 32), np.float32)
    with pytest.raises(
        ValueError, match=r"1 tensors unlike the model's own although its modules share it: model\.layers\.2"
    ):
        import_params(cfg, tensors)


def test_a_bare_base_models_modules_are_found(tmp_path):
    written("tied", tmp_path)
    tensors = {n.removeprefix("model."): np.asarray(t) for n, t in open_tensors(tmp_path).items()}
    assert "layers.2.embed_tokens.weight" in tensors
    write_tensors(tmp_path, tensors)
    assert len(read_pretrained(tmp_path).params["mtp"]) == 2
    assert "mtp" not in jf.load(tmp_path).params
