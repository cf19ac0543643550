"""What a run takes from another run's checkpoint, and what it says of it."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from tiny import assert_bit_equal, run_config

import jaxformers as jf
from jaxformers import training
from jaxformers.config import load_config
from jaxformers.inspection import describe
from jaxformers.train.checkpoint import Checkpointer, CheckpointError
from jaxformers.train.integrity import write_checksums
from jaxformers.train.provenance import library_versions, version_note
from jaxformers.train.restore import check_fits
from jaxformers.train.stored import StoredArray, named_leaves

EMA = {"train": {"steps": 4, "ema_decay": 0.9, "eval_batches": 0}, "checkpoint": {"every_steps": 2}}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of four steps with a moving average and checkpoints at steps 2 and 4: (config, result)."""
    config = run_config(tmp_path_factory.mktemp("first"), **EMA)
    return config, jf.fit(config)


def again(config, folder, **checkpoint):
    return config | {"run_dir": str(folder / "run"), "checkpoint": {"every_steps": 2, **checkpoint}}


def state_of(config, step):
    resolved = load_config(config)
    abstract = training.prepare_run(resolved).trainer.plain_state
    with Checkpointer(resolved.run_dir) as checkpoints:
        return jax.device_get(checkpoints.restore(step, abstract, None))


def begun(config):
    """The state that a run begins with, on the host."""
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", lambda program, state, *_, **__: taken.append(jax.device_get(state)) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            jf.fit(config)
    return taken[0]


def test_everything_of_another_runs_checkpoint_goes_on_where_that_was(first, tmp_path, capsys):
    config, result = first
    other = again(config, tmp_path, start_from=str(result.run_dir / "checkpoints" / "2"))
    assert jf.fit(other).step == 4
    assert_bit_equal(state_of(other, 4), state_of(config, 4))
    assert (
        f"starting from step 2 of {result.run_dir}: restored parameters, optimizer, moving average, step, guard, "
        "random key and data position; not restored: nothing\n"
    ) in capsys.readouterr().err


def test_parameters_alone_begin_anew_at_step_0(first, tmp_path, capsys):
    config, result = first
    state = begun(again(config, tmp_path, start_from=str(result.run_dir), load="params"))
    saved = state_of(config, 4)
    assert_bit_equal(state.params, saved.params)
    assert_bit_equal(state.ema, saved.params)
    assert int(state.step) == 0
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state))
    assert (
        "restored parameters; not restored: optimizer, moving average, step, guard, random key and data position\n"
        in capsys.readouterr().err
    )


def test_parameters_and_optimizer_keep_moments_and_begin_the_schedule_anew(first, tmp_path):
    config, result = first
    state = begun(again(config, tmp_path, start_from=str(result.run_dir), load="params_and_optimizer"))
    saved = state_of(config, 4)
    assert_bit_equal(state.params, saved.params)
    ours, theirs = named_leaves(state.opt_state), named_leaves(saved.opt_state)
    assert_bit_equal(
        {n: a for n, a in ours.items() if not n.startswith("2.")},
        {n: a for n, a in theirs.items() if not n.startswith("2.")},
    )
    assert (int(ours["0.count"]), int(ours["2.count"]), int(theirs["2.count"])) == (4, 0, 4)
    assert int(state.step) == 0


def test_a_run_of_its_own_checkpoint_goes_on_from_that(first, tmp_path, capsys):
    config, result = first
    other = again(config, tmp_path, start_from=str(result.run_dir), load="params")
    jf.fit(other)
    capsys.readouterr()
    assert jf.fit(other).step == 4
    assert "resuming from step 4: restored parameters, optimizer," in capsys.readouterr().err


def test_a_part_that_is_missing_is_an_error_that_names_it_all_and_may_be_allowed(tmp_path, capsys):
    plain = run_config(tmp_path, train={"steps": 4, "eval_batches": 0}, checkpoint={"every_steps": 2})
    jf.fit(plain)
    averaged = plain | {"train": plain["train"] | {"steps": 6, "ema_decay": 0.5}}
    with pytest.raises(CheckpointError) as caught:
        jf.fit(averaged)
    message = str(caught.value)
    leaves = named_leaves(state_of(plain, 4).params)
    assert re.search(rf"checkpoints/4 does not fit this run's state: {len(leaves)} missing: ema\.embed, ", message)
    assert all(f"ema.{name}" in message for name in leaves)
    assert "\n" not in message
    capsys.readouterr()
    result = jf.fit(averaged, ["checkpoint.allow_missing=['ema.*']"])
    said = capsys.readouterr().err
    assert "not restored: moving average\nmissing there and initialized freshly: ema.embed, " in said
    assert result.step == 6
    average = jf.load(result.run_dir, ema=True).params["embed"]
    assert not np.array_equal(average, result.model.params["embed"])


def test_a_part_that_is_too_much_is_named(first, tmp_path):
    config, result = first
    other = again(config, tmp_path, start_from=str(result.run_dir))
    with pytest.raises(CheckpointError, match=r"\d+ extra: ema\.embed, ema\.final_norm\.w, "):
        jf.fit(other, ["train.ema_decay=null"])
    jf.fit(other, ["train.ema_decay=null", "checkpoint.load=params_and_optimizer", "train.steps=3"])


def test_missing_extra_misshapen_and_mistyped_arrays_are_all_listed(tmp_path):
    def array(name, shape, dtype="float32"):
        return StoredArray(name, shape, np.dtype(dtype), shape, tmp_path)

    stored = {name: array(name, *rest) for name, *rest in [("a", (2,)), ("b", (2, 3)), ("c", (1,), "int32"), ("x", ())]}
    wanted = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in [("a", (2,)), ("b", (3, 2)), ("c", (1,))]}
    wanted |= {name: jax.ShapeDtypeStruct((), "float32") for name in ("m1", "m2")}
    with pytest.raises(CheckpointError) as caught:
        check_fits(stored, wanted, where="C", allow_missing=["m2"])
    assert str(caught.value) == (
        "the checkpoint C does not fit this run's state: 1 missing: m1; 1 extra: x; 1 of another shape: b is [2, 3], "
        "not [3, 2]; 1 of another dtype: c is int32, not float32; checkpoint.allow_missing lets named parts begin anew"
    )


def test_a_pattern_that_names_nothing_is_refused(first):
    config, _ = first
    with pytest.raises(CheckpointError, match=r"^checkpoint.allow_missing: emma\.\* names no part of this run's state"):
        jf.fit(config, ["checkpoint.allow_missing=['emma.*']"])


def test_what_cannot_be_started_from_is_refused(first, tmp_path):
    config, result = first
    with pytest.raises(ValueError, match=r"load=params says what is taken from start_from, which is not set"):
        load_config(again(config, tmp_path, load="params"))
    jf.save_pretrained(jf.load(result.run_dir), tmp_path / "hf")
    with pytest.raises(ValueError, match=r"hf is of the kind huggingface, which holds no training state; name it"):
        jf.fit(again(config, tmp_path, start_from=str(tmp_path / "hf")))
    with pytest.raises(ValueError, match=r"another model's checkpoint \(it differs in d_ff\); choose another checkp"):
        jf.fit(again(config, tmp_path, start_from=str(result.run_dir)), ["model.intermediate_size=64"])


def test_a_checkpoint_says_what_wrote_it(first):
    _, result = first
    with Checkpointer(result.run_dir) as checkpoints:
        meta = checkpoints.meta(4)
    assert meta["versions"] == library_versions()
    assert meta["versions"]["jax"] == jax.__version__
    assert meta["tokenizer_from"] == "bytes"
    assert {"model", "tokenizer", "generation", "config", "mesh"} <= meta.keys()


def test_other_versions_are_a_note():
    now = library_versions()
    assert version_note(now) is None
    assert version_note({}) is None
    assert version_note(now | {"jax": "0.1"}) == f"note: the checkpoint was written with jax 0.1 (now {now['jax']})"


def resealed(run_dir, harm):
    """The run's newest checkpoint after `harm`, with checksums of what is there now."""
    newest = run_dir / "checkpoints" / "4"
    harm(newest)
    (newest / "checksums.json").unlink()
    write_checksums(newest)
    return newest


def foreign_meta(checkpoint):
    (checkpoint / "meta" / "metadata").write_text('{"who": "somebody else"}')


@pytest.mark.parametrize(
    "harm, message",
    [
        (foreign_meta, "is no checkpoint of a run: it does not say its model"),
        (lambda c: shutil.rmtree(c / "meta"), "checkpoints/4 is not whole: it has no meta; use another checkpoint"),
        (lambda c: (c / "meta" / "metadata").write_text("{"), "cannot read the checkpoint .*/4: "),
        (lambda c: (c / "state" / "manifest.ocdbt").unlink(), r"holds no saved state \(manifest.ocdbt is missing\)"),
        (lambda c: shutil.rmtree(c / "state" / "d"), "cannot read the checkpoint .*/4: "),
    ],
)
def test_foreign_and_half_deleted_checkpoints_are_one_line_that_names_them(first, tmp_path, harm, message):
    config, result = first
    run = shutil.copytree(result.run_dir, tmp_path / "run")
    newest = resealed(run, harm)
    with pytest.raises(CheckpointError, match=message) as caught:
        jf.fit(config | {"run_dir": str(run)}, ["train.steps=5"])
    assert str(newest) in str(caught.value)
    assert "\n" not in str(caught.value)


def unknown_model(checkpoint):
    path = checkpoint / "meta" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": {"model_type": "of the future"}}))


@pytest.mark.parametrize("read", ["resume", "load", "inspect", "start_from"])
def test_a_checkpoint_of_a_model_that_this_version_does_not_know_is_one_line_that_names_it(first, tmp_path, read):
    config, result = first
    run = shutil.copytree(result.run_dir, tmp_path / "run")
    newest = resealed(run, unknown_model)
    with pytest.raises(CheckpointError) as caught:  # noqa: PT012  # one of them is called
        if read == "load":
            jf.load(run)
        elif read == "inspect":
            describe(run)
        elif read == "resume":
            jf.fit(config | {"run_dir": str(run)})
        else:
            jf.fit(config | {"run_dir": str(tmp_path / "new")}, [f"checkpoint.start_from={run}"])
    assert str(caught.value).startswith(f"{newest} holds a model that this version cannot read: ")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_whose_config_is_of_another_version_is_loaded_all_the_same(first, tmp_path):
    """Of what it was trained with, a model needs nothing."""
    _, result = first
    run = shutil.copytree(result.run_dir, tmp_path / "run")

    def age(checkpoint):
        path = checkpoint / "meta" / "metadata"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"config": {"optimiser": "sgd"}}))

    resealed(run, age)
    assert_bit_equal(jax.device_get(jf.load(run).params), jax.device_get(result.model.params))


def test_a_checkpoint_is_inspected(first):
    _, result = first
    found = describe(result.run_dir / "checkpoints" / "2")
    assert found["saved"] == "parameters, optimizer, moving average, step, guard, random key, data position"
    assert found["tokenizer hash"] == f"{result.model.tokenizer.fingerprint} (bytes)"
    assert f"jax {jax.__version__}, " in found["written with"]


def test_a_resume_with_other_versions_says_so(first, tmp_path, capsys):
    config, result = first
    run = shutil.copytree(result.run_dir, tmp_path / "run")

    def age(checkpoint):
        path = checkpoint / "meta" / "metadata"
        meta = json.loads(path.read_text())
        path.write_text(json.dumps(meta | {"versions": meta["versions"] | {"optax": "0.0.1"}}))

    resealed(run, age)
    assert jf.fit(config | {"run_dir": str(run)}).step == 4
    assert "note: the checkpoint was written with optax 0.0.1 (now " in capsys.readouterr().err
