"""Checkpoints of a real run, harmed in every way that disks and people do it: named, and passed over."""

import json
import logging
import os
import random
import re
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import pytest
from harms import GOOD, HARMS, NEWEST, files_of, harmed_again_and_again
from tiny import assert_bit_equal, run_config

import jaxformers as jf
from jaxformers.train.checkpoint import FOLDER, Checkpointer, CheckpointError
from jaxformers.train.integrity import CHECKSUMS

NOBODY = 65534


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run with two checkpoints, and its config."""
    config = run_config(tmp_path_factory.mktemp("original"))
    jf.fit(config)
    return config


@pytest.fixture
def run(original, tmp_path) -> Path:
    return Path(shutil.copytree(original["run_dir"], tmp_path / "run"))


def test_fifty_random_harms_to_a_runs_checkpoint_are_found_and_named(run):
    assert harmed_again_and_again(run, 50, seed=0) == 50


@pytest.mark.slow
def test_a_thousand_random_harms_to_a_runs_checkpoint_are_found_and_named(run):
    assert harmed_again_and_again(run, 1000, seed=1) == 1000


@pytest.mark.parametrize("harm", sorted(set(HARMS), key=lambda harm: harm.__name__))
def test_a_run_whose_newest_checkpoint_is_harmed_loads_from_the_one_before_and_says_so(run, harm, caplog):
    truth = jf.load(run / FOLDER / str(GOOD))
    harm(random.Random(3), files_of(run / FOLDER / str(NEWEST)))
    with caplog.at_level(logging.WARNING):
        model = jf.load(run)
    assert_bit_equal(jax.device_get(model.params), jax.device_get(truth.params))
    [said] = caplog.messages
    assert re.match(rf"the checkpoint {run / FOLDER / str(NEWEST)} is damaged: .*; going back to the one before$", said)


# -- what people do to folders


def one_line(caught, *parts) -> None:
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert str(part) in text, text


def test_files_of_two_steps_in_one_folder_are_named(run):
    newest = run / FOLDER / str(NEWEST)
    shutil.rmtree(newest / "state")
    shutil.copytree(run / FOLDER / str(GOOD) / "state", newest / "state")
    with pytest.raises(CheckpointError) as caught:
        jf.load(newest)
    one_line(caught, f"the checkpoint {newest} is damaged: state/", f"the others there are: {GOOD}")


def test_a_checkpoint_under_the_number_of_another_step_is_refused(original, run):
    shutil.copytree(run / FOLDER / str(GOOD), run / FOLDER / "100")
    with pytest.raises(CheckpointError) as caught:
        jf.fit(original | {"run_dir": str(run)})
    one_line(caught, f"{run / FOLDER / '100'} holds step {GOOD}: it is a copy under another name; remove it")


def test_a_half_deleted_checkpoint_is_named_and_one_that_is_alone_says_so(run):
    shutil.rmtree(run / FOLDER / str(GOOD))
    newest = run / FOLDER / str(NEWEST)
    shutil.rmtree(newest / "meta")
    with pytest.raises(CheckpointError) as caught:
        jf.load(newest)
    one_line(caught, f"the checkpoint {newest} is damaged: meta/", "there is no other one")
    with pytest.raises(CheckpointError) as caught:
        jf.load(run)
    one_line(caught, f"no checkpoint in {run / FOLDER} can be used", "choose another run_dir")


@pytest.mark.parametrize("content", [{}, {"model.safetensors": b"\x08\0\0\0\0\0\0\0{}"}, {"_METADATA": b"{}"}])
def test_a_folder_of_something_else_is_no_checkpoint(run, content, caplog):
    foreign = run / FOLDER / "12"
    foreign.mkdir()
    for name, data in content.items():
        (foreign / name).write_bytes(data)
    with Checkpointer(run) as checkpoints:
        said = []
        assert checkpoints.newest_good(said.append) == NEWEST
    assert said == [f"the checkpoint {foreign} is damaged: {CHECKSUMS} is missing; going back to the one before"]


@pytest.mark.parametrize("name", ["012", "8.damaged", "notes", "٨"])
def test_other_names_among_the_checkpoints_are_left_alone(run, name):
    (run / FOLDER / name).mkdir()
    (run / FOLDER / "9").write_text("a file")
    with Checkpointer(run) as checkpoints:
        assert checkpoints.steps == [GOOD, NEWEST]
    assert (run / FOLDER / name).is_dir()


def test_links_and_folders_in_the_place_of_files_are_damage(run):
    newest = run / FOLDER / str(NEWEST)
    manifest, metadata = newest / "state" / "manifest.ocdbt", newest / "meta" / "metadata"
    manifest.unlink()
    manifest.symlink_to("nowhere")
    metadata.unlink()
    metadata.mkdir()
    with pytest.raises(CheckpointError) as caught:
        jf.load(newest)
    one_line(caught, "meta/metadata is missing", "state/manifest.ocdbt cannot be read (No such file or directory)")


# -- without rights


@pytest.fixture
def open_run(original):
    """A run below a folder that others may enter, as pytest's own may not be."""
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(shutil.copytree(original["run_dir"], Path(folder) / "run"))


@contextmanager
def without_rights():
    """Inside, this process is a user who owns nothing."""
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("only root can give up its rights to files, which this test has to")
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_run_directory_without_permission_to_write_is_one_line(original, open_run):
    with without_rights(), pytest.raises(CheckpointError) as caught:
        jf.fit(original | {"run_dir": str(open_run)})
    where = open_run / FOLDER
    one_line(caught, f"cannot write in {where}: Permission denied; make it writable, or choose another run_dir")


def test_a_file_without_permission_to_read_is_named(open_run):
    path = open_run / FOLDER / str(NEWEST) / "meta" / "metadata"
    path.chmod(0)
    with without_rights(), pytest.raises(CheckpointError) as caught:
        jf.load(path.parents[1])
    one_line(caught, path.parents[1], "meta/metadata cannot be read (Permission denied)")


@pytest.fixture
def read_only(run, tmp_path):
    """The run on a disk that cannot be written."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", mounted], check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a read-only disk")
    shutil.copytree(run, mounted / "run")
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    yield mounted
    subprocess.run(["umount", "--lazy", mounted], check=True)


def test_a_read_only_disk_can_be_loaded_from_but_not_trained_on(original, read_only):
    assert jf.load(read_only / "run").config.family == "llama"
    for run_dir in (read_only / "run", read_only / "new"):
        with pytest.raises(CheckpointError) as caught:
            jf.fit(original | {"run_dir": str(run_dir)})
        one_line(caught, f"cannot write in {run_dir / FOLDER}: Read-only file system; make it writable, or choose")


# -- of other versions


def test_checksums_of_another_algorithm_say_which(run):
    path = run / FOLDER / str(NEWEST) / CHECKSUMS
    path.write_text(json.dumps(json.loads(path.read_text()) | {"algorithm": "sha256"}))
    with pytest.raises(CheckpointError) as caught:
        jf.load(path.parent)
    one_line(caught, f"the checkpoint {path.parent} is damaged", "its algorithm is 'sha256', not xxh3_128")
