"""A model as users hold it, from a run on one mesh to others: its embedding stays tied, and it writes the same text."""

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from tiny import LLAMA, assert_bit_equal, run_config

import jaxformers as jf

TIED = LLAMA | {"tie_word_embeddings": True, "vocab_size": 304, "num_attention_heads": 8, "head_dim": 8}
TWO_BY_TWO = {"dp": 2, "fsdp": 2, "tp": 2}
TP4, TP8 = jf.MeshConfig(dp=2, fsdp=1, tp=4), jf.MeshConfig(fsdp=1, tp=8)  # more shards than the two kv heads


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> jf.FitResult:
    """A run of a tied model on dp x fsdp x tp."""
    sections = {"mesh": TWO_BY_TWO, "train": {"steps": 3, "eval_batches": 1}, "checkpoint": {"every_steps": 1}}
    return jf.fit(run_config(tmp_path_factory.mktemp("tied"), model=TIED, **sections))


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    """The Hugging Face directory of that run, saved from a mesh."""
    directory = tmp_path_factory.mktemp("export")
    jf.save_pretrained(jf.load(trained.run_dir, mesh=jf.MeshConfig(**TWO_BY_TWO)), directory)
    return directory


def test_a_tied_model_has_one_embedding_after_steps_saving_and_loading_on_any_mesh(trained, exported):
    trained_params = jax.device_get(trained.model.params)
    assert "lm_head" not in trained_params
    earlier = jf.load(trained.run_dir / "checkpoints" / "1")
    assert not np.array_equal(earlier.params["embed"], trained_params["embed"]), "steps move it"
    for ref in (trained.run_dir, exported):
        for mesh in (jf.MeshConfig(**TWO_BY_TWO), TP4, jf.MeshConfig(fsdp=8)):
            assert_bit_equal(jax.device_get(jf.load(ref, mesh=mesh).params), trained_params)


def test_the_exported_directory_holds_one_embedding_and_the_reference_ties_it(trained, exported):
    tensors = load_file(exported / "model.safetensors")
    of_the_vocabulary = [name for name, tensor in tensors.items() if TIED["vocab_size"] in tensor.shape]
    assert of_the_vocabulary == ["model.embed_tokens.weight"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    ids = np.arange(5, 29, dtype=np.int32)[None]
    with torch.no_grad():
        truth = theirs(torch.tensor(ids)).logits.numpy()
    model = jf.load(trained.run_dir, mesh=TP4)
    ours = jf.forward(model.params, model.config, ids)
    np.testing.assert_allclose(ours, truth, atol=1e-5 * np.abs(truth).max())


@pytest.mark.parametrize("mesh", [TP4, TP8], ids=["tp4", "tp8"])
def test_more_tensor_shards_than_kv_heads_generate_the_text_of_one_device(exported, mesh):
    prompts, knobs = ["alpha of", "naïve 42;", "the"], {"max_new_tokens": 10, "temperature": 1.0, "seed": 3}
    sharded, one = jf.load(exported, mesh=mesh), jf.load(exported)
    assert mesh.tp > one.config.num_kv_heads
    queries, keys = (sharded.params["layers"][0][0]["attn"][name] for name in "qk")
    assert queries.sharding.shard_shape(queries.shape)[2] == one.config.num_heads / mesh.tp
    assert keys.sharding.shard_shape(keys.shape)[2] == one.config.num_kv_heads
    texts = jf.generate(one, prompts, **knobs)
    assert jf.generate(sharded, prompts, **knobs) == texts
    assert len(set(texts)) == len(prompts)
