"""A checkpoint's tensors become parameters and parameters its tensors, exactly, or the reasons why not are listed."""

import copy
import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from families.checkpoints import ROWS, checkpoint, reference_logits, tokens
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxformers.families import read_config
from jaxformers.hub.convert import export_tensors, import_params
from jaxformers.hub.layout import parts
from jaxformers.hub.pretrained import read_pretrained, write_pretrained
from jaxformers.hub.safetensors import INDEX_FILE, open_tensors, write_tensors
from jaxformers.models.params import ParamSpec, init_params, model_spec

# Fused and transposed, plain and tied, split experts, fused and interleaved experts, latent attention.
SHAPES_OF_FILE = ("gpt2", "qwen2", "mixtral", "gpt_oss", "deepseek_v3")
every_shape_of_file = pytest.mark.parametrize("name", SHAPES_OF_FILE)

# Large enough for a second copy to show.
LARGER = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def saved_tensors(name) -> dict[str, np.ndarray]:
    return dict(open_tensors(checkpoint(name).directory))


def refusal(name, tensors) -> str:
    with pytest.raises(ValueError) as caught:
        import_params(checkpoint(name).ours.config, tensors)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_bit_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        mine = np.asarray(ours[name])
        assert (mine.dtype, mine.shape) == (value.dtype, value.shape), name
        assert mine.tobytes() == value.tobytes(), name


# -- what does not fit


def test_every_missing_tensor_is_listed():
    gone = ("model.norm.weight", "model.layers.2.self_attn.q_proj.bias")
    message = refusal("qwen2", {name: value for name, value in saved_tensors("qwen2").items() if name not in gone})
    assert "2 tensors missing" in message
    assert all(name in message for name in gone)


def test_every_tensor_without_a_place_is_listed():
    extra = {"model.layers.4.input_layernorm.weight": np.ones(32), "visual.patch": np.ones(3)}
    message = refusal("qwen2", saved_tensors("qwen2") | extra)
    assert "2 tensors without a place" in message
    assert all(name in message for name in extra)


def test_every_misshapen_tensor_is_listed_with_both_shapes():
    tensors = saved_tensors("mixtral")
    expert = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    message = refusal("mixtral", tensors | {expert: tensors[expert].T, "lm_head.weight": np.zeros((66, 32), "f4")})
    assert f"{expert} is [48, 32], not [32, 48]" in message
    assert "lm_head.weight is [66, 32], not [67, 32]" in message


def test_every_tensor_that_is_no_float_is_listed():
    tensors = saved_tensors("qwen2")
    coded = {"model.norm.weight": np.int8, "model.embed_tokens.weight": ml_dtypes.float8_e4m3fn}
    message = refusal("qwen2", tensors | {name: tensors[name].astype(dtype) for name, dtype in coded.items()})
    assert "model.norm.weight (int8)" in message
    assert "model.embed_tokens.weight (float8_e4m3fn)" in message


def test_all_kinds_of_misfit_are_told_at_once_and_long_lists_are_cut():
    tensors = saved_tensors("mixtral") | {"stray": np.ones(3), "model.norm.weight": np.ones(5, "f4")}
    tensors = {name: value for name, value in tensors.items() if ".w1." not in name}
    message = refusal("mixtral", tensors)
    assert "20 tensors missing" in message
    assert "and 12 more" in message
    assert "stray" in message
    assert "model.norm.weight is [5], not [32]" in message


def test_tensors_known_to_hold_no_weight_are_ignored():
    inverse = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for i in range(4)}
    import_params(checkpoint("llama").ours.config, saved_tensors("llama") | inverse)
    causal = {f"transformer.h.{i}.attn.bias": np.ones((1, 1, 64, 64), np.bool_) for i in range(3)}
    import_params(checkpoint("gpt2").ours.config, saved_tensors("gpt2") | causal)
    further = {"model.layers.3.embed_tokens.weight": np.ones((67, 32), np.float32)}  # predicts the token after next
    import_params(checkpoint("deepseek_v3").ours.config, saved_tensors("deepseek_v3") | further)


# -- tied heads and bare base models


def test_a_tied_head_may_be_in_the_file_if_it_is_the_embedding():
    tensors, cfg = saved_tensors("qwen2"), checkpoint("qwen2").ours.config
    assert "lm_head.weight" not in tensors
    embedding = tensors["model.embed_tokens.weight"]
    params = import_params(cfg, tensors | {"lm_head.weight": embedding.copy()})
    assert "lm_head" not in params
    assert "lm_head.weight" not in export_tensors(cfg, params)
    message = refusal("qwen2", tensors | {"lm_head.weight": embedding + 1})
    assert "lm_head.weight" in message
    assert "tie_word_embeddings" in message


def test_an_untied_head_must_be_in_the_file():
    tensors = saved_tensors("llama")
    del tensors["lm_head.weight"]
    assert "1 tensors missing: lm_head.weight" in refusal("llama", tensors)


@pytest.mark.parametrize("name, prefix", [("gpt2", "transformer."), ("qwen2", "model.")])
def test_a_bare_base_model_reads_as_the_whole(name, prefix):
    tensors = saved_tensors(name)
    bare = {tensor.removeprefix(prefix): value for tensor, value in tensors.items()}
    assert bare.keys() != tensors.keys()
    params = import_params(checkpoint(name).ours.config, bare)
    jax.tree.map(np.testing.assert_array_equal, params, checkpoint(name).ours.params)


def test_a_bare_base_model_that_lacks_a_tensor_is_refused():
    bare = {name.removeprefix("transformer."): value for name, value in saved_tensors("gpt2").items()}
    del bare["h.1.ln_2.weight"]
    assert "h.1.ln_2.weight" in refusal("gpt2", bare)


# -- shardings


def shardings_of(cfg, mesh):
    """Every leaf cut along its two largest dims, whatever they mean: layers, experts, heads or widths."""

    def place(spec: ParamSpec) -> NamedSharding:
        axes: list[str | None] = [None] * len(spec.shape)
        for axis in ("x", "y"):
            open_dims = [i for i, size in enumerate(spec.shape) if axes[i] is None and size % mesh.shape[axis] == 0]
            if open_dims:
                axes[max(open_dims, key=lambda i: spec.shape[i])] = axis
        return NamedSharding(mesh, P(*axes))

    return jax.tree.map(place, model_spec(cfg))


@every_shape_of_file
def test_every_device_gets_its_part_of_the_whole(name):
    cfg, whole, _ = checkpoint(name).ours
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    places = shardings_of(cfg, mesh)
    sharded = import_params(cfg, open_tensors(checkpoint(name).directory), shardings=places)

    def compare(leaf, place, value):
        assert leaf.sharding == place
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(value)[shard.index])

    jax.tree.map(compare, sharded, places, whole)
    assert_bit_equal(export_tensors(cfg, sharded), saved_tensors(name))


def test_shardings_may_be_one_for_all_or_a_function_of_the_config():
    place = SingleDeviceSharding(jax.devices()[3])
    for shardings in (place, lambda cfg: jax.tree.map(lambda _: place, model_spec(cfg))):
        params = read_pretrained(checkpoint("gpt2").directory, shardings=shardings).params
        assert all(leaf.sharding == place for leaf in jax.tree.leaves(params))


# -- memory


@pytest.mark.parametrize("name", ROWS)
def test_reading_a_weight_copies_nothing(name):
    for part in parts(checkpoint(name).ours.config):
        source, tensor = part.source, np.zeros(part.disk_shape(), np.float32)
        if len(source.view) > len(part.spec.shape) and (source.stop or 0) - source.start > 1:
            continue  # queries that lie between keys and values of their group: no strides join the groups
        assert np.shares_memory(part.from_disk(tensor), tensor), part


def test_no_more_than_one_leaf_exists_twice_while_importing(tmp_path):
    cfg = read_config(LARGER)
    written = export_tensors(cfg, jax.tree.map(lambda spec: np.ones(spec.shape, np.float32), model_spec(cfg)))
    write_tensors(tmp_path, written)
    sizes = [4 * int(np.prod(spec.shape)) for spec in jax.tree.leaves(model_spec(cfg))]
    tensors = open_tensors(tmp_path)
    tracemalloc.start()
    try:
        jax.block_until_ready(import_params(cfg, tensors))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < sum(sizes) + max(sizes) + 1e6


# -- dtypes


def test_dtypes_are_kept_unless_another_is_asked_for():
    cfg, tensors = checkpoint("qwen2").ours.config, saved_tensors("qwen2")
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(import_params(cfg, half))} == {jnp.dtype(jnp.bfloat16)}
    wide = import_params(cfg, half, dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype(jnp.float32)}
    assert_bit_equal(export_tensors(cfg, wide, dtype=jnp.bfloat16), half)


def test_layers_of_different_dtypes_in_one_leaf_become_float32():
    cfg, tensors = checkpoint("qwen2").ours.config, saved_tensors("qwen2")
    mixed = "model.layers.0.mlp.up_proj.weight"
    params = import_params(cfg, tensors | {mixed: tensors[mixed].astype(np.float16)})
    up = params["layers"][0][0]["ffn"]["up"]
    assert up.dtype == jnp.float32
    np.testing.assert_array_equal(up[0], tensors[mixed].astype(np.float16).astype(np.float32).T)


@every_shape_of_file
def test_a_bfloat16_checkpoint_round_trips_bit_for_bit(name, tmp_path):
    model = copy.deepcopy(checkpoint(name).model).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    ours = read_pretrained(tmp_path / "theirs")
    write_pretrained(tmp_path / "ours", ours.config, ours.params, generation=ours.generation)
    assert_bit_equal(open_tensors(tmp_path / "ours"), open_tensors(tmp_path / "theirs"))
    assert json.loads((tmp_path / "ours/config.json").read_text())["dtype"] == "bfloat16"


def test_the_dtype_written_is_that_of_most_weights(tmp_path):
    # DeepSeek-V3 keeps the biases that select experts in float32 among bfloat16 weights.
    cfg, tensors = checkpoint("deepseek_v3").ours.config, saved_tensors("deepseek_v3")
    mixed = {n: v if n.endswith("correction_bias") else v.astype(ml_dtypes.bfloat16) for n, v in tensors.items()}
    write_pretrained(tmp_path, cfg, import_params(cfg, mixed))
    assert_bit_equal(open_tensors(tmp_path), mixed)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


# -- directories


def test_random_parameters_export_to_what_the_reference_opens(tmp_path):
    cfg = checkpoint("gemma2").ours.config
    params = init_params(cfg, jax.random.key(0))
    write_pretrained(tmp_path, cfg, params)
    reopened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_array_equal(reopened.model.embed_tokens.weight.detach(), params["embed"])


def test_an_older_files_torch_dtype_becomes_the_dtype_written(tmp_path):
    c = checkpoint("qwen2")
    values = {key: value for key, value in c.ours.config.source.items() if key != "dtype"}
    cfg = read_config(values | {"torch_dtype": "bfloat16"})
    write_pretrained(tmp_path, cfg, c.ours.params)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == values | {"dtype": "float32"}


def test_a_config_that_was_changed_since_it_was_read_is_not_exported(tmp_path):
    c = checkpoint("qwen2")
    changed = c.ours.config.replace(norm_eps=1e-3)
    with pytest.raises(ValueError, match=r"no config\.json to export"):
        write_pretrained(tmp_path, changed, c.ours.params)
    with pytest.raises(ValueError, match=r"no config\.json to export"):
        write_pretrained(tmp_path, dataclasses.replace(c.ours.config, norm_eps=1e-3), c.ours.params)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_a_sharded_export_opens_in_the_reference(name, tmp_path):
    c = checkpoint(name)
    write_pretrained(tmp_path, c.ours.config, c.ours.params, generation=c.ours.generation, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert set(index["weight_map"]) == set(open_tensors(c.directory))
    assert_bit_equal(open_tensors(tmp_path), open_tensors(c.directory))
    reopened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = tokens(1, 8)
    np.testing.assert_array_equal(reference_logits(reopened, ids), reference_logits(c.model, ids))


def test_generation_settings_survive(tmp_path):
    settings = {"bos_token_id": 1, "eos_token_id": [2, 5], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    c = checkpoint("qwen2")
    write_pretrained(tmp_path, c.ours.config, c.ours.params, generation=settings)
    assert read_pretrained(tmp_path).generation == settings
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 5]


def test_without_generation_settings_the_configs_token_ids_serve(tmp_path):
    c = checkpoint("qwen2")
    write_pretrained(tmp_path, c.ours.config, c.ours.params)
    assert not (tmp_path / "generation_config.json").exists()
    assert read_pretrained(tmp_path).generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def test_generation_settings_that_are_no_json_mapping_are_refused_by_name(tmp_path):
    c = checkpoint("qwen2")
    write_pretrained(tmp_path, c.ours.config, c.ours.params)
    for content in ("{", "[1]"):
        (tmp_path / "generation_config.json").write_text(content)
        with pytest.raises(ValueError, match=r"generation_config\.json"):
            read_pretrained(tmp_path)


def test_settings_of_an_older_export_do_not_stay_behind(tmp_path):
    c = checkpoint("qwen2")
    write_pretrained(tmp_path, c.ours.config, c.ours.params, generation={"temperature": 0.5})
    write_pretrained(tmp_path, c.ours.config, c.ours.params)
    assert "temperature" not in read_pretrained(tmp_path).generation
