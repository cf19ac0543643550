"""`jaxformers checkpoint`: what each verb prints and writes, and that a mistake is one line that names the path."""

import functools
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from tiny import assert_bit_equal, flip, run_config

import jaxformers as jf
from jaxformers import checkpoint_cli, checkpoints, training
from jaxformers.config import load_config
from jaxformers.hub.average import average_leaves, average_weights
from jaxformers.hub.compare import compare_tensors
from jaxformers.hub.convert import export_tensors
from jaxformers.hub.safetensors import Deferred, open_tensors, write_tensors
from jaxformers.train.checkpoint import Checkpointer
from jaxformers.train.stored import open_stored

VERBS = ("ls", "verify", "rm", "diff", "average", "merge", "split", "reshard")
STEPS = [2, 4, 6]


@pytest.fixture
def run(command):
    """`run("ls", path)`: a verb of the group."""
    return functools.partial(command, "checkpoint")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of six steps on eight devices, with a moving average: checkpoints at steps 2, 4 and 6."""
    train = {"steps": 6, "ema_decay": 0.9, "eval_every": 4, "eval_batches": 1}
    folder = tmp_path_factory.mktemp("trained")
    config = run_config(folder, mesh={"dp": 2, "fsdp": 4}, train=train, checkpoint={"every_steps": 2})
    return jf.fit(config).run_dir


@pytest.fixture
def mine(trained, tmp_path) -> Path:
    """A copy of the run to do harm to."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """A checkpoint as a Hugging Face directory."""

    @functools.cache
    def make(step: int = STEPS[-1]) -> Path:
        directory = tmp_path_factory.mktemp("exported") / str(step)
        jf.save_pretrained(jf.load(trained / "checkpoints" / str(step)), directory)
        return directory

    return make


def at(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / str(step)


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def tensors_in(directory: Path) -> dict[str, np.ndarray]:
    """Read by the reference implementation."""
    files = [directory] if directory.is_file() else sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in safetensors.numpy.load_file(file).items()}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(run, verb):
    done = run(verb, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"checkpoint {verb} [OPTIONS]" in done.out


# -- ls


def test_ls_tells_step_size_loss_and_condition(run, mine):
    flip(largest_file(at(mine, 4)))
    largest_file(at(mine, 6)).write_bytes(b"short")
    (mine / "checkpoints" / ".unfinished-7" / "state").mkdir(parents=True)
    at(mine, 2).rename(mine / "checkpoints" / "2.damaged")
    lines = run("ls", mine).out.splitlines()
    assert [line.split()[0] for line in lines] == ["2", "4", "6", "7"]
    assert lines[0].endswith("  set aside")
    assert lines[1].endswith("  whole, best"), "files are not read, and the other is damaged"
    assert "  loss " in lines[1]
    assert f"  damaged: {largest_file(at(mine, 4)).relative_to(at(mine, 4)).parts[0]}" in lines[2]
    assert " has 5 bytes, not " in lines[2]
    assert lines[3].endswith("  unfinished")


def test_ls_as_json(run, trained):
    entries = json.loads(run("ls", trained, "--json").out)
    assert [entry["step"] for entry in entries] == STEPS
    assert {entry["condition"] for entry in entries} == {"whole"}
    assert entries[0]["validation_loss"] is None
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert entries[2]["validation_loss"] == [x["validation_loss"] for x in lines if "validation_loss" in x][-1]
    size = sum(path.stat().st_size for path in at(trained, 2).rglob("*") if path.is_file())
    assert entries[0]["nbytes"] == size


def test_ls_of_a_half_deleted_run_still_works(run, mine):
    (mine / "config.yaml").unlink()
    (mine / "metrics.jsonl").unlink()
    assert len(run("ls", mine).out.splitlines()) == 3


@pytest.mark.parametrize("verb", ["ls", "rm"])
def test_what_is_no_run_is_named(run, tmp_path, exported, verb):
    assert run(verb, exported(), *(["--damaged"] if verb == "rm" else [])).mistake == (
        f"{exported()} is no run directory: it has no checkpoints folder; name a run or one of its checkpoints"
    )


# -- verify


def test_verify_names_damaged_files_and_exits_1(run, mine):
    broken = largest_file(at(mine, 4))
    flip(broken)
    done = run("verify", mine)
    assert done.code == 1
    assert done.out.splitlines() == [
        f"{at(mine, 2)}: whole",
        f"{at(mine, 4)}: damaged: {broken.relative_to(at(mine, 4)).as_posix()} has changed",
        f"{at(mine, 6)}: whole",
    ]
    assert run("verify", at(mine, 2), at(mine, 6)).code == 0
    assert run("verify", at(mine, 4)).code == 1


def test_verify_of_half_a_checkpoint_and_of_a_mixed_one(run, mine):
    shutil.rmtree(at(mine, 4) / "data")
    shutil.copytree(at(mine, 2) / "meta", at(mine, 6) / "meta2")
    lines = run("verify", mine).out.splitlines()
    assert "damaged: data/commit_success.txt is missing, data/metadata is missing" in lines[1]
    assert "meta2/metadata does not belong there" in lines[2]


def test_verify_of_a_foreign_folder(run, tmp_path):
    foreign = tmp_path / "checkpoints" / "3"
    foreign.mkdir(parents=True)
    (foreign / "model.pt").write_bytes(b"x")
    done = run("verify", tmp_path)
    assert (done.code, done.out) == (1, f"{foreign}: damaged: checksums.json is missing\n")
    assert run("verify", tmp_path / "nowhere").mistake == f"{tmp_path / 'nowhere'}: no such file or directory"


def test_a_file_that_cannot_be_read_is_damage(run, mine, monkeypatch):
    broken = largest_file(at(mine, 6))
    opened = Path.open

    def failing(path, *args, **kwargs):
        if path == broken:
            raise OSError(5, os.strerror(5), str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", failing)
    done = run("verify", at(mine, 6))
    assert (done.code, done.out.count(" cannot be read (Input/output error)")) == (1, 1)


# -- rm


def left(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_rm_removes_the_steps_that_are_named(run, mine):
    done = run("rm", mine, "--step", 2, "--step", 4)
    assert done.out.splitlines() == [f"removed {at(mine, 2)}", f"removed {at(mine, 4)}"]
    assert left(mine) == ["6"]


def test_rm_keeps_the_newest_and_every_jth(run, mine):
    assert run("rm", mine, "--keep-last", 1, "--keep-every", 4, "--dry-run").out == f"would remove {at(mine, 2)}\n"
    assert left(mine) == ["2", "4", "6"]
    run("rm", mine, "--keep-last", 1, "--keep-every", 4)
    assert left(mine) == ["4", "6"]


def test_rm_removes_damaged_ones(run, mine):
    flip(largest_file(at(mine, 6)))
    at(mine, 2).rename(mine / "checkpoints" / "2.damaged")
    run("rm", mine, "--damaged")
    assert left(mine) == ["4"]


def test_rm_keeps_the_last_good_one_unless_forced(run, mine):
    flip(largest_file(at(mine, 6)))
    refused = run("rm", mine, "--step", 2, "--step", 4).mistake
    assert refused == f"{at(mine, 4)} is the last good checkpoint of {mine}; --force removes it too"
    assert run("rm", mine, "--keep-last", 1).code == 2
    assert left(mine) == ["2", "4", "6"]
    assert run("rm", mine, "--keep-last", 1, "--force").code == 0
    assert left(mine) == ["6"]
    assert run("rm", mine, "--damaged").code == 0, "nothing good is lost"


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "say which checkpoints to remove: --step, --keep-last, or --damaged"),
        (["--keep-every", 2], "--keep-every says which of the older checkpoints stay beside --keep-last; give both"),
        (["--step", 3], "{run}/checkpoints has no checkpoint of step 3; there are 2, 4, 6"),
    ],
)
def test_rm_of_nothing_that_is_there(run, trained, options, message):
    assert run("rm", trained, *options).mistake == message.format(run=trained)


def test_rm_on_a_read_only_disk_is_one_line(run, mine, monkeypatch):
    def refused(*_):
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(os, "replace", refused)
    assert run("rm", mine, "--step", 2).mistake == f"cannot remove {at(mine, 2)}: Read-only file system"


# -- diff


def test_a_run_equals_its_export_and_its_one_file(run, trained, exported, tmp_path):
    run("merge", exported(), tmp_path / "one.safetensors")
    for a, b in [(trained, exported()), (exported(), at(trained, 6)), (trained, tmp_path / "one.safetensors")]:
        done = run("diff", a, b)
        assert done.code == 0, done
        assert done.out == "21 tensors equal, 0 different (relative distance up to 0), 0 missing, 0 extra\n"


def test_diff_measures_each_tensor(run, trained, exported):
    done = run("diff", at(trained, 2), trained, "--json")
    found = json.loads(done.out)
    assert (done.code, found["equal"]) == (1, False)
    a, b = tensors_in(exported(2)), tensors_in(exported(6))
    for tensor in found["tensors"]:
        distance = np.abs(a[tensor["name"]].astype(np.float64) - b[tensor["name"]]).max()
        assert tensor["max_abs"] == pytest.approx(distance, rel=1e-12)
        assert tensor["relative"] == pytest.approx(distance / np.abs(a[tensor["name"]]).max(), rel=1e-12)
    largest = max(tensor["relative"] for tensor in found["tensors"])
    assert run("diff", at(trained, 2), trained, "--tolerance", 1.01 * largest).code == 0
    assert run("diff", at(trained, 2), trained, "--tolerance", 0.99 * largest).code == 1


def test_diff_names_missing_extra_misshapen_and_mistyped_tensors(run, tmp_path):
    a = {"same": np.ones(2), "gone": np.ones(1), "shape": np.ones((2, 3)), "dtype": np.ones(2), "nan": np.ones(3)}
    b = {"same": np.ones(2), "new": np.ones(1), "shape": np.ones((3, 2)), "dtype": np.ones(2, np.float32)}
    b["nan"] = np.array([1, np.nan, 1])
    for name, tensors in (("a", a), ("b", b)):
        safetensors.numpy.save_file(tensors, tmp_path / f"{name}.safetensors")
    done = run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert done.code == 1
    assert sorted(done.out.splitlines()[:-1]) == [
        "dtype: max 0, relative 0, float64 and float32",
        "gone: missing in B",
        "nan: max inf, relative inf",
        "new: extra in B",
        "shape: [2, 3] and [3, 2]",
    ]
    last = "1 tensors equal, 3 different (relative distance up to inf), 1 missing, 1 extra"
    assert done.out.splitlines()[-1] == last


def test_equal_nans_and_infinities_are_equal():
    a = {"x": np.array([np.nan, np.inf, -np.inf, 1.0])}
    assert compare_tensors(a, {"x": a["x"].copy()}).is_equal(None)
    assert not compare_tensors(a, {"x": -a["x"]}).is_equal(None)


def test_diff_of_a_damaged_checkpoint_and_of_nothing(run, mine, tmp_path):
    flip(largest_file(at(mine, 6)))
    assert f"the checkpoint {at(mine, 6)} is damaged" in run("diff", at(mine, 6), mine).mistake
    assert "is neither an existing path nor a hub id" in run("diff", "no such thing", mine).mistake


# -- average


@pytest.mark.parametrize(
    "options, weights",
    [([], [1 / 3, 1 / 3, 1 / 3]), (["--weights", "1,2,1"], [0.25, 0.5, 0.25]), (["--ema", "0.8"], [0.64, 0.16, 0.2])],
)
def test_averages_are_numpys(run, trained, exported, tmp_path, options, weights):
    refs = [at(trained, 2), exported(4), trained]  # of any kind
    done = run("average", *refs, "--output", tmp_path / "out", *options)
    assert (done.code, done.out) == (0, "")
    sources = [tensors_in(exported(step)) for step in STEPS]
    written = tensors_in(tmp_path / "out")
    assert written.keys() == sources[0].keys()
    for name, tensor in written.items():
        truth = sum(w * source[name].astype(np.float64) for w, source in zip(weights, sources, strict=True))
        np.testing.assert_allclose(tensor, truth, rtol=1e-5, atol=1e-8)
        assert not np.array_equal(tensor, sources[-1][name])


def test_an_average_opens_everywhere(run, trained, tmp_path):
    run("average", at(trained, 4), trained, "--output", tmp_path / "out", "--dtype", "bfloat16")
    model = jf.load(tmp_path / "out")
    assert model.params["embed"].dtype == "bfloat16"
    assert model.tokenizer.fingerprint == jf.load(trained).tokenizer.fingerprint
    assert run("diff", tmp_path / "out", tmp_path / "out").code == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = np.array([[1, 5, 9]])
    ours = jf.forward(jf.load(tmp_path / "out", dtype="float32").params, model.config, ids.astype(np.int32))
    with torch.no_grad():
        np.testing.assert_allclose(ours, theirs(torch.tensor(ids)).logits.numpy(), atol=1e-5)


def test_the_weights_of_an_exponential_average_follow_its_recurrence():
    values = [3.0, -1.0, 4.0, 1.5]
    average = values[0]
    for value in values[1:]:
        average = 0.7 * average + 0.3 * value
    assert np.dot(average_weights(4, ema=0.7), values) == pytest.approx(average)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--weights", "1"], "1 weights for 2 models; each needs one"),
        (["--weights", "1,x"], "--weights 1,x is not a list of numbers, such as 1,2,1"),
        (["--weights", "0,0"], "weights 0, 0 are not all at least 0 with one above it"),
        (["--weights", "1,-1"], "weights 1, -1 are not all at least 0 with one above it"),
        (["--ema", "1"], "ema is 1; a decay lies between 0 and 1"),
        (["--ema", "0.5", "--weights", "1,1"], "weights and ema are two ways to average; give one of them"),
    ],
)
def test_weights_that_mean_nothing_are_refused(run, trained, tmp_path, options, message):
    refused = run("average", at(trained, 2), trained, "--output", tmp_path / "out", *options)
    assert refused.mistake == message
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_averaged_are_refused(run, trained, exported, tmp_path):
    other = tmp_path / "other"
    cfg = jf.read_config(json.loads((exported() / "config.json").read_text()) | {"intermediate_size": 64})
    model = jf.Model(cfg, jf.init_params(cfg, jax.random.key(0)), jf.load(exported()).tokenizer, None)
    jf.save_pretrained(model, other)
    refused = run("average", trained, other, "--output", tmp_path / "out").mistake
    assert refused == f"{trained} and {other} are not of one architecture: they differ in d_ff"
    full = run("average", trained, exported(), "--output", exported()).mistake
    assert full == f"{exported()} exists and is not an empty directory; choose another destination"
    assert run("average", trained, "--output", tmp_path / "out").mistake == (
        "an average needs at least two models; 1 given"
    )


# -- merge and split


def test_shards_become_one_file_and_shards_again_bit_for_bit(run, exported, tmp_path):
    truth = tensors_in(exported())
    assert run("split", exported(), tmp_path / "shards", "--max-shard-size", "30KB").code == 0
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 45_000 for file in files), "a tensor of 38 kB has a file of its own"
    assert run("merge", tmp_path / "shards", tmp_path / "one").code == 0
    assert run("merge", tmp_path / "shards", tmp_path / "bare.safetensors").code == 0
    for written in (tmp_path / "shards", tmp_path / "one", tmp_path / "bare.safetensors"):
        assert_bit_equal(tensors_in(written), truth)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (exported() / "model.safetensors").read_bytes()
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        for directory in ("shards", "one"):
            assert (tmp_path / directory / name).read_bytes() == (exported() / name).read_bytes()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shards")


def test_a_run_is_split_as_its_export_is(run, trained, exported, tmp_path):
    run("split", trained, tmp_path / "run", "--max-shard-size", "30000")
    assert_bit_equal(tensors_in(tmp_path / "run"), tensors_in(exported()))
    assert_bit_equal(jf.load(tmp_path / "run").params, jax.device_get(jf.load(trained).params))


def test_any_dtype_survives(run, tmp_path):
    draw = np.random.default_rng(0)
    tensors = {
        f"{dtype}.{i}": draw.integers(0, 255, (8, 16), dtype=np.uint8).view(dtype)
        for i, dtype in enumerate(["uint8", "float16", "bfloat16", "float8_e4m3fn", "int64"])
        for dtype in [np.dtype(dtype)]
    }
    write_tensors(tmp_path / "all", tensors)
    run("split", tmp_path / "all" / "model.safetensors", tmp_path / "shards", "--max-shard-size", "200B")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 5
    assert_bit_equal(open_tensors(tmp_path / "shards"), open_tensors(tmp_path / "all"))


@pytest.mark.parametrize("size", ["2 apples", "0GB", "-1", "GB"])
def test_sizes_that_are_none_are_refused(run, exported, tmp_path, size):
    refused = run("split", exported(), tmp_path / "x", f"--max-shard-size={size}").mistake
    assert refused == f"--max-shard-size {size} is not a size, such as 2GB, 500MB or 100000"


def test_sizes_are_decimal():
    assert checkpoint_cli.parse_size("2GB") == 2_000_000_000
    assert checkpoint_cli.parse_size("1.5 mb") == 1_500_000


def test_merging_is_refused_where_it_would_overwrite_or_the_source_is_truncated(run, exported, tmp_path):
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"")
    assert run("merge", exported(), taken).mistake == f"{taken} exists; choose another name, or remove it first"
    broken = shutil.copytree(exported(), tmp_path / "broken")
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[:-100])
    assert f"{broken / 'model.safetensors'} is truncated" in run("merge", broken, tmp_path / "out").mistake


def test_a_disk_that_fails_is_one_line_and_leaves_nothing(run, exported, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("jaxformers.hub.safetensors._to_disk", full)
    refused = run("merge", exported(), tmp_path / "x.safetensors").mistake
    assert refused == f"cannot write 0.000139 GB of weights to {tmp_path / 'x.safetensors'}: No space left on device"
    assert list(tmp_path.iterdir()) == []


# -- reshard


def state_of(run_dir: Path, step: int):
    """All of a checkpoint, restored by the same code as a run's."""
    config = load_config(run_dir / "config.yaml", ["mesh.dp=1", "mesh.fsdp=8", "mesh.tp=1"])
    abstract = training.prepare_run(config).trainer.plain_state

    class Position:
        def set_state(self, state):
            self.state = state

    position = Position()
    with Checkpointer(run_dir) as opened:
        return jax.device_get(opened.restore(step, abstract, position)), position.state, opened.meta(step)


def test_a_resharded_checkpoint_holds_the_same_in_the_chunks_of_the_mesh(run, trained, tmp_path):
    target = tmp_path / "resharded"
    done = run("reshard", at(trained, 4), target, "--mesh", "fsdp=2,tp=2")
    assert (done.code, done.err) == (0, f"wrote {at(target, 4)}\n")
    assert run("verify", target).code == 0
    (ours, position, meta), (theirs, their_position, their_meta) = state_of(target, 4), state_of(trained, 4)
    assert_bit_equal(ours, theirs)
    assert position == their_position
    arrays = open_stored(at(target, 4) / "state")
    assert arrays["params.layers.0.0.attn.q"].shape == (2, 32, 4, 8)
    assert arrays["params.layers.0.0.attn.q"].chunks == (2, 16, 2, 8)
    assert arrays["opt_state.0.mu.embed"].chunks == (150, 16)
    assert meta["mesh"] == {"pp": 1, "dp": 1, "fsdp": 2, "ep": 1, "cp": 1, "tp": 2}
    assert {k: v for k, v in meta.items() if k not in ("mesh", "config")} == {
        k: v for k, v in their_meta.items() if k not in ("mesh", "config")
    }


def test_a_resharded_run_goes_on_and_loads(run, trained, tmp_path):
    target = tmp_path / "resharded"
    run("reshard", trained, target, "--mesh", "fsdp=4,tp=2")
    assert run("diff", trained, target).code == 0
    result = jf.fit(target / "config.yaml", ["train.steps=7"])
    assert result.step == 7
    assert_bit_equal(jax.device_get(jf.load(target, ema=True).params["embed"].shape), (300, 32))


def test_reshard_refuses_what_it_cannot_do(run, mine, exported, tmp_path):
    assert run("reshard", mine, tmp_path / "x", "--mesh", "gpus=4").mistake == (
        "--mesh: 'gpus=4' is not AXIS=SIZE, such as fsdp=4; axes are pp, dp, fsdp, ep, cp, tp"
    )
    assert run("reshard", mine, mine, "--mesh", "tp=2").mistake == (
        f"{at(mine, 6)} exists; name another run directory, or remove that checkpoint first"
    )
    assert "is no run directory" in run("reshard", exported(), tmp_path / "x", "--mesh", "tp=2").mistake
    flip(largest_file(at(mine, 4)))
    assert (
        f"the checkpoint {at(mine, 4)} is damaged"
        in run("reshard", at(mine, 4), tmp_path / "x", "--mesh", "tp=2").mistake
    )
    assert not (tmp_path / "x").exists()


def test_a_full_disk_under_reshard_is_one_line_and_leaves_no_checkpoint(run, trained, small_disk):
    refused = run("reshard", trained, small_disk / "run", "--mesh", "tp=2").mistake
    assert refused == f"cannot write {at(small_disk / 'run', 6)}: No space left on device"
    assert left(small_disk / "run") == []


DISK_SIZE = "400k"  # half of what a checkpoint needs


# -- memory


class Ledger:
    """Counts the bytes of tensors that exist at a time."""

    def __init__(self):
        self.now = self.most = 0

    def deferred(self, array: np.ndarray) -> Deferred:
        def load() -> np.ndarray:
            class Counted(np.ndarray):
                def __del__(made):
                    if made.base is None:
                        self.now -= made.nbytes

            made = Counted(array.shape, array.dtype)
            made[...] = array
            self.now += made.nbytes
            self.most = max(self.most, self.now)
            return made

        return Deferred(array.shape, array.dtype, load)


def deferred_leaves(ledger: Ledger, trained: Path):
    model = jf.load(trained)
    return model.config, jax.tree.map(lambda leaf: ledger.deferred(np.asarray(leaf)), model.params)


def test_exporting_streams_a_leaf_at_a_time(trained, exported, tmp_path):
    ledger = Ledger()
    cfg, leaves = deferred_leaves(ledger, trained)
    write_tensors(tmp_path / "out", export_tensors(cfg, leaves))
    assert_bit_equal(tensors_in(tmp_path / "out"), tensors_in(exported()))
    largest = max(leaf.dtype.itemsize * int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(leaves))
    assert 0 < ledger.most <= 2 * largest < sum(tensor.nbytes for tensor in tensors_in(exported()).values())


def test_averaging_holds_one_leaf_of_one_model_at_a_time_however_many_there_are(trained):
    ledger = Ledger()
    models = [deferred_leaves(ledger, trained)[1] for _ in range(5)]
    averaged = average_leaves(models, average_weights(5))
    for leaf in jax.tree.leaves(averaged):
        np.asarray(leaf)
    largest = max(leaf.dtype.itemsize * int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(models[0]))
    assert 0 < ledger.most <= 2 * largest


def test_comparing_holds_a_tensor_of_each_at_a_time(exported):
    ledger = Ledger()
    a, b = ({n: ledger.deferred(t) for n, t in tensors_in(exported()).items()} for _ in range(2))
    assert compare_tensors(a, b).is_equal(None)
    largest = max(tensor.nbytes for tensor in tensors_in(exported()).values())
    assert 0 < ledger.most <= 3 * largest


def test_a_run_is_compared_in_its_own_order(trained, exported):
    """Each leaf is read once: names come in the order in which leaves are cut into tensors."""
    read = []

    def noting(array):
        return Deferred(array.shape, array.dtype, lambda: read.append(array.shape) or np.asarray(array))

    model = jf.load(trained)
    tensors = export_tensors(model.config, jax.tree.map(noting, model.params))
    assert compare_tensors(tensors_in(exported()), tensors).is_equal(None)
    assert len(read) == len(jax.tree.leaves(model.params))
    assert checkpoints.tensors_of(trained).keys() == tensors.keys()
