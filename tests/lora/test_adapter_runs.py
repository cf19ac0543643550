"""Runs that train an adapter: what moves, what a checkpoint holds, on any mesh; what a user may ask for."""

import json

import jax
import numpy as np
import pytest
from tiny import LLAMA, assert_bit_equal, random_params, relative_error, run_config

import jaxformers as jf
from jaxformers.api import find_model
from jaxformers.families import read_config
from jaxformers.hub.peft import read_adapter
from jaxformers.hub.pretrained import write_pretrained
from jaxformers.hub.targets import Wish, plan_adapter
from jaxformers.parallel.mesh import single_device_mesh
from jaxformers.train.build import Trainer
from jaxformers.train.checkpoint import Checkpointer

SHAPE = LLAMA | {"hidden_size": 64, "intermediate_size": 96}
LAYER_BYTES = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
LORA = {"rank": 4, "targets": ["q_proj", "v_proj", "down_proj"], "ranks": {"layers.0.self_attn.q_proj": 2}}
FSDP2_TP2 = {"mesh": {"dp": 2, "fsdp": 2, "tp": 2}, "runtime": {"layers": "scan"}}
LAYOUTS = {
    "fsdp2 tp2": FSDP2_TP2,
    "pp2 cp2": {"mesh": {"dp": 2, "fsdp": 1, "pp": 2, "cp": 2}, "runtime": {"context": "ring"}},
    "microbatches": FSDP2_TP2 | {"train": {"steps": 4, "batch_size": 8, "eval_batches": 2, "accumulation": 2}},
    "chunks": {"loss": {"chunk": 8}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    cfg = read_config(SHAPE)
    write_pretrained(folder, cfg, random_params(cfg))
    return folder


def config(folder, base, **sections):
    return run_config(folder, model=str(base), **({"lora": LORA, "train": {"steps": 4}} | sections))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base):
    """A run over unrolled layers, recomputed in part, with dropout, a faster second matrix and a moving average."""
    folder = tmp_path_factory.mktemp("adapter")
    lora = LORA | {"targets": [*LORA["targets"], "lm_head"], "dropout": 0.1, "b_rate_ratio": 4.0}
    values = config(
        folder, base, lora=lora, train={"steps": 4, "ema_decay": 0.5}, runtime={"layers": "unroll", "remat": "dots"}
    )
    values["checkpoint"] = {"every_steps": 2}
    return values, jf.fit(values)


def test_the_base_stays_and_targets_move(finished, base):
    _, result = finished
    before = jf.load(base).params
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, result.model.params)
    layer = moved["layers"][0][0]
    assert layer["attn"] == {"q": True, "k": False, "v": True, "o": False}
    assert layer["ffn"] == {"gate": False, "up": False, "down": True}
    assert moved["lm_head"]
    assert not any([moved["embed"], moved["final_norm"]["w"], layer["attn_norm"]["w"]])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout_and_mesh_trains_the_same_adapter(finished, base, tmp_path, layout):
    values, result = finished
    found = jf.fit(values | layout | {"run_dir": str(tmp_path / "run")})
    assert relative_error(found.model.params, result.model.params) < 1e-5


def test_a_checkpoint_holds_the_adapter_alone_and_a_run_goes_on_from_it_exactly(finished, tmp_path):
    values, result = finished
    stored = Checkpointer(result.run_dir).stored(4)
    assert {name.rpartition(".")[2] for name in stored if name.startswith("params.")} == {"a", "b"}
    assert not any(name.startswith("frozen") for name in stored)
    half = values | {"run_dir": str(tmp_path / "run")}
    half["checkpoint"] = {"start_from": str(result.run_dir / "checkpoints" / "2")}
    assert_bit_equal(jf.fit(half).model.params, result.model.params)


def test_a_run_is_a_model_with_its_adapter_in_it(finished, tmp_path, command):
    _, result = finished
    assert relative_error(jf.load(result.run_dir).params, result.model.params) < 1e-6
    assert relative_error(jf.load(result.run_dir, ema=True).params, result.model.params) > 1e-6
    assert command("convert", result.run_dir, tmp_path / "adapter").code == 0
    assert relative_error(jf.load(tmp_path / "adapter").params, result.model.params) < 1e-6
    low = read_adapter(tmp_path / "adapter").modules["model.layers.0.self_attn.q_proj"]
    assert (low.a.shape, low.b.shape, low.scale) == ((2, 64), (64, 2), 8.0)
    assert command("convert", result.run_dir, tmp_path / "merged", "--merge-adapter").code == 0
    assert relative_error(jf.load(tmp_path / "merged").params, result.model.params) < 1e-6


def test_frozen_layers_stay_as_they_are_and_the_rest_trains_as_without_them(base, tmp_path):
    values = config(tmp_path, base, lora=None, train={"steps": 3, "freeze": ["embed_tokens", "model.layers.0"]})
    result, before = jf.fit(values), jf.load(base).params
    after = result.model.params
    assert_bit_equal(after["embed"], before["embed"])
    old, new = before["layers"][0][0], after["layers"][0][0]
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        assert np.array_equal(a[0], b[0])
        assert not np.array_equal(a[1], b[1])
    assert_bit_equal(jf.load(result.run_dir).params, after)
    assert "opt_state.0.mu.embed" not in Checkpointer(result.run_dir).stored(3)


def test_a_run_needs_weights_but_its_shapes_can_be_checked_without(base, tmp_path, command):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config(tmp_path, "smollm2-135m", lora={"rank": 4, "base": "nf4"})))
    shown = command("train", path, "--dry-run")
    assert shown.code == 0, shown
    assert "GiB in nf4 a device; a run needs the weights that lora trains an adapter of" in " ".join(shown.out.split())
    assert "model: a run needs the weights that lora trains an adapter of" in command("train", path).mistake


@pytest.mark.parametrize("kept_in", ["nf4", "bfloat16"])
def test_a_base_packed_while_it_is_read_is_the_one_packed_as_a_whole(kept_in, base):
    found, mesh = find_model(base), single_device_mesh()
    trainer = Trainer(found.config, mesh, 32, adapter=plan_adapter(found.config, Wish(rank=4, base=kept_in)))
    packed = found.read_params(mesh, dtype="float32", keep=trainer.keep)
    whole = trainer.from_params(found.read_params(mesh, dtype="float32"), seed=0)
    assert sum(a.nbytes for a in jax.tree.leaves(packed["layers"])) < 0.6 * found.config.num_layers * LAYER_BYTES
    assert_bit_equal(trainer.from_params(packed, seed=0), whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"targets": ["qq_proj"]}, "'qq_proj' means no module of llama; its modules are embed_tokens, lm_head, k_proj"),
        (
            {"rank": 65},
            "a rank of 65 for model.layers.1.self_attn.q_proj, which is 64 to 64 wide; it is at least 1 and at most 64",
        ),
        ({"ranks": {"o_proj": 2}}, "lora.ranks: 'o_proj' means no module with an adapter; they are q_proj"),
        ({"targets": ["embed_tokens"], "ranks": {}, "variants": ["dora"]}, "dora is for linear layers"),
        ({"rank": 0}, "lora.rank is 0"),
    ],
)
def test_an_adapter_that_cannot_be_is_one_line(change, said, base, tmp_path, command):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config(tmp_path, base, lora=LORA | change)))
    assert said in command("train", path, "--dry-run").mistake


def test_an_adapter_of_another_base_is_refused_by_shapes_and_by_weights(finished, base, tmp_path, command):
    values, result = finished
    command("convert", result.run_dir, tmp_path / "adapter")
    cfg = read_config(SHAPE)
    write_pretrained(tmp_path / "other", cfg, random_params(cfg, seed=1))
    wide = read_config(SHAPE | {"intermediate_size": 128})
    write_pretrained(tmp_path / "wide", wide, random_params(wide))

    def convert(model):
        done = command("convert", model, tmp_path / "out", "--adapter", tmp_path / "adapter", "--merge-adapter")
        return done.mistake

    assert "is an adapter of another base: its weights have the fingerprint" in convert(tmp_path / "other")
    assert "its model.layers.0.mlp.down_proj is 96 to 64 wide, the model's 128 to 64" in convert(tmp_path / "wide")
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(values | {"model": str(tmp_path / "other")}))
    assert "holds an adapter of another base" in command("train", path).mistake
