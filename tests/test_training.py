"""Whole runs, end to end on a tiny corpus: what they leave behind, and that a stop at any step changes nothing."""

import functools
import gc
import itertools
import random
import re
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
import transformers
from tiny import assert_bit_equal, flip, run_config, write_corpus
from whole_runs import (
    KILLED_AT,
    STEPS,
    Stopped,
    act_at,
    again,
    checkpoints_of,
    metrics_of,
    process,
    raise_signal,
    saved_state,
    steps_of,
)

import jaxformers as jf
from jaxformers import training
from jaxformers.config import load_config
from jaxformers.train.checkpoint import CheckpointError
from jaxformers.train.goodput import PURPOSES
from jaxformers.train.monitor import MetricsFile

# What resuming has to bring back: accumulated microbatches, documents cut between rows, a moving average.
EVERYTHING = {
    "data": {"packing": "concat"},
    "train": {"steps": STEPS, "batch_size": 16, "accumulation": 2, "ema_decay": 0.9, "eval_batches": 2},
    "checkpoint": {"every_steps": 3},
}


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Runs that nothing interrupts, one for each setting: (config, result)."""

    @functools.cache
    def run(kind: str):
        config = run_config(tmp_path_factory.mktemp("whole"), **{"plain": {}, "everything": EVERYTHING}[kind])
        return config, jf.fit(config)

    return run


# -- what a run leaves behind


def test_a_run_learns_and_returns_its_model_and_metrics(whole):
    _, result = whole("plain")
    assert (result.step, result.stopped) == (STEPS, None)
    losses = [loss for _, loss, _, _ in steps_of(result.run_dir)]
    assert np.log(300) < losses[0] < np.log(300) + 1, "a random model knows nothing"
    assert losses[-1] < losses[0] - 1
    assert result.validation["validation_loss"] < losses[0] - 1
    assert result.metrics["loss"] == losses[-1]


def test_metrics_jsonl_holds_one_object_a_step_with_every_field(whole):
    _, result = whole("plain")
    lines = metrics_of(result.run_dir)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    fields = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "step_seconds", "mfu", "accuracy"}
    assert all(fields <= set(line) for line in steps)
    assert [line["tokens"] for line in steps] == [step * 8 * 32 for step in range(1, STEPS + 1)]
    assert all(line["mfu"] > 0 and line["step_seconds"] > 0 for line in steps)
    assert [line["lr"] for line in steps[:2]] == pytest.approx([0.005, 0.01])
    assert lines[-2] == {"step": STEPS, "validation_loss": result.validation["validation_loss"]}
    assert lines[-1].keys() == {"step", "goodput", *(f"seconds/{purpose}" for purpose in PURPOSES)}


def test_the_run_directory_holds_the_resolved_config_the_tokenizer_and_the_checkpoints(whole):
    config, result = whole("plain")
    assert {path.name for path in result.run_dir.iterdir()} == {
        "about.json",
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "tokenizer",
    }
    assert load_config(result.run_dir / "config.yaml") == load_config(config)
    assert checkpoints_of(result.run_dir) == [4, 8]


def test_a_run_and_each_of_its_checkpoints_load_as_models(whole):
    _, result = whole("plain")
    newest = jf.load(result.run_dir)
    assert_bit_equal(newest.params, jax.device_get(result.model.params))
    assert newest.tokenizer.fingerprint == result.model.tokenizer.fingerprint
    older = jf.load(result.run_dir / "checkpoints" / "4")
    assert older.config == newest.config
    assert not np.array_equal(older.params["embed"], newest.params["embed"])
    assert jf.generate(newest, "alpha", max_new_tokens=4) == jf.generate(result.model, "alpha", max_new_tokens=4)


def test_a_run_loads_onto_a_mesh_and_in_another_dtype(whole):
    _, result = whole("plain")
    model = jf.load(result.run_dir, mesh=jf.MeshConfig(fsdp=4, tp=2), dtype="bfloat16")
    q = model.params["layers"][0][0]["attn"]["q"]
    assert q.dtype == "bfloat16"
    assert q.sharding.shard_shape(q.shape) == (2, 8, 2, 8)
    exact = result.model.params["layers"][0][0]["attn"]["q"].astype("bfloat16")
    np.testing.assert_array_equal(np.asarray(q), np.asarray(exact))


def test_the_moving_average_is_saved_loads_and_is_not_the_parameters(whole):
    config, result = whole("everything")
    state, _ = saved_state(config)
    assert_bit_equal(state.params, jax.device_get(result.model.params))
    assert not np.array_equal(state.ema["embed"], state.params["embed"])
    assert_bit_equal(jf.load(result.run_dir, ema=True).params, state.ema)


def test_a_run_exports_to_a_directory_that_transformers_opens_with_equal_logits(whole, tmp_path):
    _, result = whole("plain")
    jf.save_pretrained(jf.load(result.run_dir), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "alpha of the naïve 42;"
    ids = tokenizer(text)["input_ids"]
    assert ids == result.model.tokenizer.encode(text)
    with torch.no_grad():
        truth = theirs(torch.tensor([ids])).logits.numpy()
    ours = jf.forward(jf.load(tmp_path / "hf").params, result.model.config, np.array([ids], np.int32))
    np.testing.assert_allclose(ours, truth, atol=1e-5 * np.abs(truth).max())
    assert theirs.generation_config.eos_token_id == result.model.tokenizer.eos_id


def test_a_run_with_evaluations_samples_and_a_log_line_now_and_then(whole, tmp_path):
    config = again(whole("plain")[0], tmp_path)
    config["train"] = config["train"] | {"eval_every": 3, "log_every": 4}
    config["sample"] = {"prompts": ["alpha", ""], "max_new_tokens": 5, "temperature": 0}
    result = jf.fit(config)
    lines = metrics_of(result.run_dir)
    assert [line["step"] for line in lines if "loss" in line] == [4, 8]
    assert [line["step"] for line in lines if "validation_loss" in line] == [3, 6, 8]
    assert len(result.samples) == 2
    assert result.samples[0] == jf.generate(result.model, "alpha", max_new_tokens=5, temperature=0)


def test_without_evaluation_batches_there_is_no_validation(whole, tmp_path):
    config = again(whole("plain")[0], tmp_path)
    result = jf.fit(config, ["train.eval_batches=0"])
    assert result.validation == {}
    assert result.metrics["loss"] == whole("plain")[1].metrics["loss"], "evaluating changes nothing"


def test_an_epoch_ends_the_run_when_the_data_does(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", documents=30)
    result = jf.fit(run_config(tmp_path, data={"epochs": 1}))
    assert 0 < result.step < STEPS
    assert checkpoints_of(result.run_dir)[-1] == result.step


def test_a_tokenizer_is_trained_where_the_config_asks_for_one(tmp_path):
    result = jf.fit(run_config(tmp_path, tokenizer={"kind": "train", "vocab_size": 280}))
    assert result.model.tokenizer.vocab_size <= 280
    assert jf.load(result.run_dir).tokenizer.encode("alpha beta") == result.model.tokenizer.encode("alpha beta")


# -- stopped and resumed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_finishes_the_step_saves_and_says_so(whole, tmp_path, monkeypatch, number):
    before, config = signal.getsignal(number), again(whole("plain")[0], tmp_path)
    with monkeypatch.context() as patch:
        act_at(patch, 2, raise_signal(number))
        result = jf.fit(config)
    assert result.stopped == signal.Signals(number).name
    assert result.step == 3, "the step in progress is finished"
    assert checkpoints_of(result.run_dir) == [3]
    assert result.samples == ()
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("kind, stop", [("plain", 1), ("plain", 5), ("everything", 2), ("everything", 6)])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(whole, tmp_path, monkeypatch, kind, stop):
    truth_config, truth = whole(kind)
    config = again(truth_config, tmp_path)
    with monkeypatch.context() as patch:
        act_at(patch, stop, raise_signal(signal.SIGTERM))
        assert jf.fit(config).step in (stop, stop + 1)
    result = jf.fit(config)
    assert (result.step, result.stopped) == (STEPS, None)
    assert steps_of(result.run_dir) == steps_of(truth.run_dir), "bit-equal"
    assert result.validation == truth.validation
    (ours, row), (theirs, their_row) = saved_state(config), saved_state(truth_config)
    assert_bit_equal(ours, theirs)
    assert row == their_row


def test_a_run_whose_process_died_takes_the_lost_steps_again(whole, tmp_path, monkeypatch):
    truth_config, truth = whole("plain")
    config = again(truth_config, tmp_path)

    def die():
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("jaxformers.train.monitor.Trackers.log", lambda self, *a: [t.log(*a) for t in self._trackers])
        act_at(patch, 6, die)
        with pytest.raises(Stopped):
            jf.fit(config)
    run = Path(config["run_dir"])
    assert checkpoints_of(run) == [4]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "los')  # as a kill in the middle of a line leaves it
    assert jf.fit(config).step == STEPS
    assert steps_of(run) == steps_of(truth.run_dir)
    assert_bit_equal(saved_state(config)[0], saved_state(truth_config)[0])


def test_a_run_goes_on_upon_another_mesh(whole, tmp_path, monkeypatch):
    truth_config, truth = whole("plain")
    config = again(truth_config, tmp_path)
    with monkeypatch.context() as patch:
        act_at(patch, 3, raise_signal(signal.SIGTERM))
        jf.fit(config)
    result = jf.fit(config, ["mesh.dp=1", "mesh.fsdp=4", "mesh.tp=2"])
    ours, theirs = np.array(steps_of(result.run_dir)), np.array(steps_of(truth.run_dir))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert result.validation["validation_loss"] == pytest.approx(truth.validation["validation_loss"], rel=1e-5)


def test_layers_may_be_laid_out_otherwise_when_a_run_goes_on(whole, tmp_path, monkeypatch):
    truth_config, truth = whole("plain")
    config = again(truth_config, tmp_path)
    with monkeypatch.context() as patch:
        act_at(patch, 3, raise_signal(signal.SIGTERM))
        jf.fit(config)
    result = jf.fit(config, ["runtime.layers=unroll"])
    np.testing.assert_allclose(np.array(steps_of(result.run_dir)), np.array(steps_of(truth.run_dir)), rtol=1e-5)


def test_a_finished_run_started_again_changes_nothing(whole, tmp_path):
    config, truth = whole("everything")
    before = saved_state(config)[0]
    result = jf.fit(config)
    assert result.step == STEPS
    assert_bit_equal(jax.device_get(result.model.params), before.params)
    assert [step for step, *_ in steps_of(truth.run_dir)] == list(range(1, STEPS + 1))


def test_the_same_config_and_seed_give_the_same_run_and_another_seed_another(whole, tmp_path):
    config, truth = whole("plain")
    assert steps_of(jf.fit(again(config, tmp_path)).run_dir) == steps_of(truth.run_dir)
    other = jf.fit(again(config, tmp_path / "other", seed=1))
    assert steps_of(other.run_dir)[0] != steps_of(truth.run_dir)[0]


# -- killed, in a process of its own


def killed_and_resumed(truth, folder: Path, step: int) -> None:
    truth_config, result = truth
    config = again(truth_config, folder)
    dead = process(config, folder, code=KILLED_AT, extra=("SIGKILL", str(step)))
    dead.communicate()
    assert dead.returncode == -signal.SIGKILL
    run = Path(config["run_dir"])
    assert len(steps_of(run)) >= step
    assert jf.fit(config).step == STEPS
    assert steps_of(run) == steps_of(result.run_dir)
    assert_bit_equal(saved_state(config)[0], saved_state(truth_config)[0])


def test_a_run_killed_at_a_random_step_goes_on_bit_equal(whole, tmp_path):
    killed_and_resumed(whole("everything"), tmp_path, random.SystemRandom().randint(1, STEPS - 1))


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS))
@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_a_run_killed_at_any_step_goes_on_bit_equal(whole, tmp_path, kind, step):
    killed_and_resumed(whole(kind), tmp_path, step)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(8))
def test_a_run_killed_at_random_moments_of_saving_goes_on_bit_equal(whole, tmp_path, attempt):
    truth_config, truth = whole("plain")
    config = again(truth_config, tmp_path)
    config["checkpoint"] = {"every_steps": 1, "keep_last": 2}
    draw = random.SystemRandom()
    for _ in range(3):
        running = process(config, tmp_path)
        metrics = Path(config["run_dir"]) / "metrics.jsonl"
        lines = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        while running.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) <= lines):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        running.kill()
        running.communicate()
    result = jf.fit(config)
    assert steps_of(result.run_dir) == steps_of(truth.run_dir)
    assert_bit_equal(saved_state(config)[0], saved_state(truth_config)[0])


def test_a_process_that_is_asked_to_stop_exits_0_and_says_how_to_go_on(whole, tmp_path):
    config = again(whole("plain")[0], tmp_path)
    stopped = process(config, tmp_path, code=KILLED_AT, extra=("SIGTERM", "2"))
    out, err = stopped.communicate()
    assert stopped.returncode == 0, err
    assert out == ""
    assert err.splitlines()[-1] == "stopped by SIGTERM at step 3; the same command goes on from there"
    assert "Traceback" not in err
    assert checkpoints_of(Path(config["run_dir"])) == [3]


# -- which checkpoints are written and kept


def test_the_newest_checkpoints_are_kept_and_every_jth_forever(whole, tmp_path):
    config = again(whole("plain")[0], tmp_path)
    config["checkpoint"] = {"every_steps": 1, "keep_last": 2, "keep_every": 3}
    assert checkpoints_of(jf.fit(config).run_dir) == [3, 6, 7, 8]


def test_one_checkpoint_is_kept_where_one_is_asked_for(whole, tmp_path):
    config = again(whole("plain")[0], tmp_path)
    config["checkpoint"] = {"every_steps": 2, "keep_last": 1}
    assert checkpoints_of(jf.fit(config).run_dir) == [8]


def test_checkpoints_by_the_clock(whole, tmp_path, monkeypatch):
    config = again(whole("plain")[0], tmp_path)
    config["checkpoint"] = {"every_steps": None, "every_minutes": 10}
    clock = itertools.count(step=4 * 60.0)  # each look at the clock is four minutes later
    monkeypatch.setattr("jaxformers.train.checkpoint.time", SimpleNamespace(monotonic=lambda: next(clock)))
    found = checkpoints_of(jf.fit(config).run_dir)
    assert found[-1] == STEPS
    assert len(found) == 3
    assert np.diff(found[:-1]).min() >= 2


def test_only_the_end_is_saved_where_neither_steps_nor_minutes_are_given(whole, tmp_path):
    config = again(whole("plain")[0], tmp_path, checkpoint={"every_steps": None})
    assert checkpoints_of(jf.fit(config).run_dir) == [STEPS]


# -- refused


def test_resume_never_and_must_mean_what_they_say(whole, tmp_path):
    config, _ = whole("plain")
    with pytest.raises(
        ValueError, match=r"checkpoints holds step 8; choose another run_dir, or checkpoint.resume=auto$"
    ):
        jf.fit(config, ["checkpoint.resume=never"])
    with pytest.raises(ValueError, match=r"run/checkpoints holds no checkpoint to resume from$"):
        jf.fit(again(config, tmp_path), ["checkpoint.resume=must"])
    assert jf.fit(config, ["checkpoint.resume=must"]).step == STEPS


def snapshot(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["model.intermediate_size=64"],
            "holds another model's checkpoint (it differs in d_ff)",
        ),
        (["tokenizer.special_tokens=[]", "tokenizer.kind=train"], "was trained with another tokenizer"),
        (["data.sequence_length=16"], "the checkpoint's position is in other data"),
        (["data.seed=3"], "the checkpoint's position is in other data"),
        (["data.packing=concat"], "the checkpoint's position is in other data"),
    ],
)
def test_a_run_directory_of_something_else_is_refused_and_left_alone(whole, overrides, message):
    config, result = whole("plain")
    before = snapshot(result.run_dir)
    if "tokenizer.kind=train" in overrides:
        overrides = [*overrides, "tokenizer.vocab_size=270"]
    with pytest.raises(ValueError) as caught:
        jf.fit(config, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(result.run_dir) == before


def test_changed_files_are_refused_on_a_resume(whole, tmp_path):
    config = run_config(tmp_path)
    jf.fit(config)
    before = snapshot(tmp_path / "run")
    write_corpus(tmp_path / "corpus.jsonl", seed=1)
    with pytest.raises(ValueError, match=r"^the checkpoint's position is in other data: files, tokenizer, or one of"):
        jf.fit(config)
    assert snapshot(tmp_path / "run") == before


def test_a_batch_that_the_mesh_does_not_divide_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"a microbatch of 6 rows .* cannot be split over 8 devices"):
        jf.fit(run_config(tmp_path, train={"batch_size": 12, "accumulation": 2}))
    assert not (tmp_path / "run").exists()


def test_rows_longer_than_the_models_context_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data.sequence_length is 65, but the model's context is 64"):
        jf.fit(run_config(tmp_path, data={"sequence_length": 65}))


def test_sample_prompts_that_cannot_be_continued_are_refused_before_the_training(tmp_path):
    gpt2 = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": 64}
    config = run_config(tmp_path, sample={"prompts": ["alpha"], "max_new_tokens": 60}) | {"model": gpt2}
    with pytest.raises(ValueError, match=r"^sample: a prompt of 6 tokens and 60 new ones pass the context"):
        jf.fit(config)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_is_used(whole, tmp_path, capsys):
    finished, expected = whole("plain")
    config = again(finished, tmp_path, checkpoint={"every_steps": 4})
    run = jf.fit(config).run_dir
    newest = run / "checkpoints" / "8"
    flip(next(path for path in sorted((newest / "state").rglob("*")) if path.stat().st_size > 1000 and path.is_file()))
    with pytest.raises(
        CheckpointError, match=r"^the checkpoint .*/8 is damaged: state/.* changed; the others there are: 4$"
    ):
        jf.load(newest)
    capsys.readouterr()
    assert jf.fit(config).step == STEPS
    said = capsys.readouterr().err
    assert re.search(r"the checkpoint .*/8 is damaged: state/.* has changed; going back to the one before\n", said)
    assert "resuming from step 4" in said
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["4", "8", "8.damaged"]
    assert steps_of(run) == steps_of(expected.run_dir)


def test_a_run_without_a_whole_checkpoint_is_refused_and_left_alone(whole, tmp_path):
    config = again(whole("plain")[0], tmp_path, checkpoint={"every_steps": None})
    run = jf.fit(config).run_dir
    (run / "checkpoints" / "8" / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=r"^no checkpoint in .*checkpoints can be used: the files of all are dam"):
        jf.fit(config)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["8"]


# -- a disk that is full


DISK_SIZE = "3m"  # which a few checkpoints fill


# Orbax leaves event loops behind when a write fails, which complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("noticed_before", [True, False])
def test_a_full_disk_is_one_clear_line_and_the_last_checkpoint_is_whole(whole, small_disk, monkeypatch, noticed_before):
    config = again(whole("plain")[0], small_disk)
    config["checkpoint"] = {"every_steps": 1, "keep_last": 10}
    if not noticed_before:  # as when somebody else fills it meanwhile
        monkeypatch.setattr("jaxformers.train.checkpoint.SPARE_BYTES", -(10**9))
    with pytest.raises(CheckpointError) as caught:
        jf.fit(config)
    message = str(caught.value)
    steps = checkpoints_of(small_disk / "run")
    assert message.startswith(f"cannot save step {steps[-1] + 1} in {small_disk / 'run' / 'checkpoints'} ")
    assert f"(the newest complete one is step {steps[-1]}): " in message
    assert ("the disk has" if noticed_before else "No space left on device") in message
    assert "\n" not in message
    jf.load(small_disk / "run" / "checkpoints" / str(steps[-1]))
    gc.collect()


# -- from other weights


@pytest.fixture(scope="session")
def pretrained(whole, tmp_path_factory) -> Path:
    """A Hugging Face directory with a tokenizer of its own."""
    directory = tmp_path_factory.mktemp("pretrained") / "model"
    jf.save_pretrained(jf.load(whole("plain")[1].run_dir), directory)
    return directory


def test_fine_tuning_begins_from_a_directorys_weights_and_tokenizer(whole, pretrained, tmp_path):
    config = run_config(tmp_path, model=str(pretrained))
    del config["tokenizer"]
    result = jf.fit(config)
    assert steps_of(result.run_dir)[0][1] < steps_of(whole("plain")[1].run_dir)[0][1] - 1, "it starts where that ended"
    assert result.model.tokenizer.fingerprint == jf.load(pretrained).tokenizer.fingerprint
    # What the run wrote of itself means the same run: the tokenizer is still the model's own.
    resolved = load_config(result.run_dir / "config.yaml")
    assert resolved == load_config(config)
    assert resolved.tokenizer is None


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_fine_tuning_takes_the_weights_as_they_are(pretrained, tmp_path, layers):
    config = run_config(tmp_path, model=str(pretrained), runtime={"layers": layers})
    setup = training.prepare_run(load_config(config))
    with jax.set_mesh(setup.mesh):
        state = setup.trainer.from_params(setup.pretrained.read_params(setup.mesh, dtype="float32"), 0)
        plain = jax.device_get(setup.trainer.to_plain(state))
    assert_bit_equal(plain.params, jax.device_get(jf.load(pretrained).params))
    assert int(plain.step) == 0


def test_a_pretrained_model_without_a_tokenizer_asks_for_one(pretrained, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((pretrained / name).read_bytes())
    config = run_config(tmp_path, model=str(bare))
    del config["tokenizer"]
    with pytest.raises(ValueError, match="bare holds no tokenizer; set one under the key 'tokenizer'"):
        jf.fit(config)


# -- trackers


def test_a_tracker_that_fails_never_stops_a_run(whole, tmp_path, monkeypatch, caplog):
    config, truth = whole("plain")

    def broken(self, step, metrics):
        raise OSError("the tracker's server is gone")

    monkeypatch.setattr(MetricsFile, "log", broken)
    result = jf.fit(again(config, tmp_path))
    assert result.step == STEPS
    assert result.metrics["loss"] == truth.metrics["loss"]
    assert (
        caplog.messages.count("MetricsFile failed at step 1 and is off from now on: the tracker's server is gone") == 1
    )


def test_a_run_off_the_main_thread_works_and_leaves_signals_alone(whole, tmp_path):
    config, truth = whole("plain")
    found = []
    thread = threading.Thread(target=lambda: found.append(jf.fit(again(config, tmp_path))))
    thread.start()
    thread.join()
    assert found[0].metrics["loss"] == truth.metrics["loss"]
