"""The command line: what each verb prints, and that a user's mistake is one line on standard error and exit 2."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import LLAMA, run_config

import jaxformers as jf
from jaxformers.families import FAMILIES
from jaxformers.hub.safetensors import open_tensors, write_tensors

VERBS = ("train", "generate", "convert", "models", "inspect", "schema", "bench", "checkpoint", "data")


@pytest.fixture
def run(command):
    return command


def process(*arguments, **kwargs) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxformers", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, **kwargs)


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="session")
def trained(session_folder):
    """The run directory of one short run, made once."""

    @functools.cache
    def make() -> Path:
        return jf.fit(run_config(session_folder)).run_dir

    return make


@pytest.fixture(scope="session")
def exported(trained, session_folder):
    """The same model as a Hugging Face directory."""

    @functools.cache
    def make() -> Path:
        directory = session_folder / "exported"
        jf.save_pretrained(jf.load(trained()), directory)
        return directory

    return make


def write_config(folder: Path, **sections) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(run_config(folder, **sections)), encoding="utf-8")
    return path


# -- help, version, lists


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_verb_has_help(run, verb, flag):
    done = run(verb, flag)
    assert done.code == 0
    assert f"{verb} [OPTIONS]" in done.out
    assert done.err == ""


def test_the_help_lists_every_verb(run):
    done = run("--help")
    assert done.code == 0
    assert all(verb in done.out for verb in VERBS)


def test_without_a_verb_the_help_is_shown(run):
    done = run()
    assert "Usage" in done.out + done.err


def test_the_version_is_the_packages(run):
    assert run("--version") == (0, f"jaxformers {jf.__version__}\n", "")


def test_every_model_type_is_listed_with_its_status_and_below_it_its_sizes(run):
    lines = run("models").out.splitlines()
    types = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert types == sorted(types)
    assert set(FAMILIES) <= set(types)
    qwen = lines.index(next(line for line in lines if line.startswith("qwen3 ")))
    assert lines[qwen].split(None, 1)[1] == "train: proved  generate: proved  convert: proved"
    assert lines[qwen + 1].split() == ["qwen3-0.6b", "596,049,920", "40,960", "Qwen/Qwen3-0.6B"]


@pytest.mark.parametrize(
    "only, types, sizes",
    [
        ("gemma-2-9B", ["gemma2"], ["gemma-2-9b"]),
        ("mixtral", ["mixtral"], ["mixtral-8x7b", "mixtral-8x22b"]),
        ("codellama", ["llama"], ["codellama-7b", "codellama-13b", "codellama-34b", "codellama-70b"]),
    ],
)
def test_a_part_of_a_type_lineage_or_size_narrows_the_list_of_models(run, only, types, sizes):
    rows = json.loads(run("models", only, "--json").out)
    assert [row["model_type"] for row in rows] == types
    assert [size["name"] for row in rows for size in row["sizes"]] == sizes
    assert run("models", "mixtrel").mistake.endswith("did you mean 'mixtral'?")


def test_the_name_of_a_published_size_in_a_config_is_its_architecture(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path, model="smollm2-135m")
    shown = run("train", path, "--dry-run")
    assert "# parameters: 134,515,008" in shown.out
    assert "model: smollm2-135m" in shown.out
    mistake = run("train", write_config(tmp_path, model="smollm2-135"), "--dry-run").mistake
    assert "did you mean the published size 'smollm2-135m'?" in mistake


def test_a_directory_wins_over_the_published_size_of_its_name(run, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("gpt2").symlink_to(exported())
    shown = run("train", write_config(tmp_path, model="gpt2"), "--dry-run")
    assert "# model: llama" in shown.out


def test_a_published_size_has_no_weights_of_its_own(run):
    assert run("generate", "gpt2", "x").mistake.endswith("the weights of gpt2 are openai-community/gpt2")


def test_the_schema_is_json(run):
    assert set(json.loads(run("schema").out)["required"]) == {"run_dir", "model", "data"}


@pytest.mark.parametrize(
    "arguments", [["tran"], ["train"], ["train", "--stepz", "x.yaml"], ["inspect"], ["convert", "a"]]
)
def test_a_verb_or_option_that_there_is_not_and_a_missing_argument_exit_2(run, arguments):
    done = run(*arguments)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert "Usage" in done.err


# -- bad input, through the command


def test_an_unknown_config_key_is_answered_with_the_nearest_one(run, tmp_path):
    config = write_config(tmp_path, train={"steps": 8, "batchsize": 8})
    assert run("train", config).mistake == f"{config}: unknown key 'train.batchsize'; did you mean 'batch_size'?"


def test_a_mistyped_override_is_answered_with_the_nearest_key(run, tmp_path):
    config = write_config(tmp_path)
    assert run("train", config, "train.stpes=5").mistake.endswith("unknown key 'train.stpes'; did you mean 'steps'?")
    assert run("train", config, "steps").mistake.startswith("override 'steps' is not of the form key=value")


def test_a_config_that_is_not_there_or_no_yaml(run, tmp_path):
    assert run("train", tmp_path / "no.yaml").mistake == f"{tmp_path / 'no.yaml'}: no such config file"
    (tmp_path / "bad.yaml").write_text("train: [1")
    assert run("train", tmp_path / "bad.yaml").mistake.startswith(f"{tmp_path / 'bad.yaml'} is not YAML (line 1)")


def test_a_mesh_that_does_not_fit_the_devices(run, tmp_path):
    config = write_config(tmp_path, mesh={"fsdp": 3, "dp": 1})
    assert run("train", config).mistake == "mesh: fsdp=3 needs 3 devices, but there are 8; nearest legal: 8"
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_mesh_does_not_divide(run, tmp_path):
    config = write_config(tmp_path, train={"batch_size": 12})
    assert run("train", config).mistake == (
        "train: a microbatch of 12 rows (batch_size 12 / accumulation 1) cannot be split over 8 devices; "
        "nearest legal batch_size: 8 and 16"
    )


@pytest.mark.parametrize("name, reason", [("none/*.txt", "no file matches"), ("", "is a directory: name its files")])
def test_a_data_glob_that_names_no_file(run, tmp_path, name, reason):
    pattern = str(tmp_path / name)
    config = write_config(tmp_path, data={"paths": pattern})
    assert reason in run("train", config).mistake
    assert pattern in run("train", config).mistake


def test_files_with_no_text_in_them(run, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(" \n\t\n")
    config = write_config(tmp_path, data={"paths": str(tmp_path / "*.txt")})
    assert "no document in" in run("train", config).mistake
    assert "2 empty" in run("train", config).mistake


def test_text_that_is_not_utf8_is_counted_and_named_or_refused_as_the_config_says(run, tmp_path):
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"text number {number}, " * 9)
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 au lait")
    config = write_config(tmp_path, data={"paths": str(tmp_path / "*.txt")})
    refused = run("train", config, "data.on_bad_text=error")
    assert refused.mistake == f"{tmp_path / 'bad.txt'}: not UTF-8 (byte 3)"
    done = run("train", config)
    assert done.code == 0
    assert f"skipped 1 records that are no text, the first {tmp_path / 'bad.txt'}: not UTF-8 (byte 3)" in done.err


def test_a_tokenizer_larger_than_the_vocabulary(run, tmp_path):
    config = write_config(tmp_path, model=LLAMA | {"vocab_size": 200})
    assert run("train", config).mistake == "the tokenizer has 259 ids but the model's vocab_size is 200"


def test_an_unknown_model_type_is_answered_with_those_known(run, tmp_path):
    config = write_config(tmp_path, model=LLAMA | {"model_type": "lama"})
    message = run("train", config).mistake
    assert message == f"model_type 'lama' is not known; known are {', '.join(sorted(FAMILIES))}"


@pytest.mark.parametrize("verb", ["generate", "convert", "inspect"])
def test_a_directory_of_an_unknown_family(run, tmp_path, verb):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    arguments = {"generate": ["x"], "convert": [tmp_path / "out"], "inspect": []}[verb]
    message = run(verb, tmp_path, *arguments).mistake
    assert f"'nonesuch' is not known; known are {', '.join(sorted(FAMILIES))}" in message


@pytest.mark.parametrize("verb", ["generate", "convert", "inspect", "train"])
def test_a_truncated_safetensors(run, exported, tmp_path, verb):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in exported().iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    if verb == "train":
        arguments = [write_config(tmp_path, model=str(broken))]
    else:
        arguments = [broken, *{"generate": ["x"], "convert": [tmp_path / "out"], "inspect": []}[verb]]
    message = run(verb, *arguments).mistake
    assert str(weights) in message
    assert not (tmp_path / "out").exists()


def with_tensors(change):
    """A fault: the weights with some tensors dropped, added or replaced."""

    def break_it(directory: Path):
        tensors = dict(open_tensors(directory))
        write_tensors(directory, {name: value for name, value in (tensors | change).items() if value is not None})

    return break_it


def with_header(change):
    """A fault: a header that `change` has edited, over the same data."""

    def break_it(directory: Path):
        path = directory / "model.safetensors"
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = change(raw[8 : 8 + size].decode()).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])

    return break_it


def overlapping(text: str) -> str:
    """The second tensor begins where the first does."""
    header = json.loads(text)
    first, second, *_ = sorted((v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"])
    length = second["data_offsets"][1] - second["data_offsets"][0]
    second["data_offsets"] = [first["data_offsets"][0], first["data_offsets"][0] + length]
    return json.dumps(header)


def with_index(change):
    """A fault: an index of two files that `change` has edited."""

    def break_it(directory: Path):
        tensors = dict(open_tensors(directory))
        write_tensors(directory, tensors, max_shard_bytes=sum(t.nbytes for t in tensors.values()) // 2 + 1000)
        index = directory / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        change(directory, content["weight_map"])
        index.write_text(json.dumps(content))

    return break_it


def rename_shard(to: str):
    def change(_directory: Path, shard_of: dict[str, str]):
        shard_of["model.norm.weight"] = to

    return change


def copy_shard(directory: Path, shard_of: dict[str, str]):
    """A third file that holds what the first one does."""
    first = shard_of["model.embed_tokens.weight"]
    (directory / "again.safetensors").write_bytes((directory / first).read_bytes())
    shard_of["model.embed_tokens.weight"] = "again.safetensors"


def only_pickled(directory: Path):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


BROKEN = {
    "missing": (
        with_tensors({"model.norm.weight": None, "model.layers.1.mlp.up_proj.weight": None}),
        ["2 tensors missing: ", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"],
    ),
    "extra": (
        with_tensors({"one": np.ones(2, "f4"), "model.layers.9.two": np.ones(2, "f4")}),
        ["2 tensors without a place in the model: ", "one", "model.layers.9.two"],
    ),
    "misshapen": (
        with_tensors(
            {"model.norm.weight": np.ones(7, "f4"), "model.layers.0.mlp.up_proj.weight": np.ones((2, 3), "f4")}
        ),
        ["2 tensors of another shape", "model.norm.weight is [7], not [32]", "up_proj.weight is [2, 3], not [48, 32]"],
    ),
    "no shard": (with_index(rename_shard("model-3.safetensors")), ["'model-3.safetensors', which is not there"]),
    "a shard elsewhere": (with_index(rename_shard("../x.safetensors")), ["'../x.safetensors'", "same directory"]),
    "twice in the shards": (with_index(copy_shard), ["and in another shard"]),
    "twice in a file": (with_header(lambda text: text.rstrip()[:-1] + "," + text[1:]), ["comes 2 times"]),
    "overlap": (with_header(overlapping), ["overlaps another"]),
    "long header": (
        lambda d: (d / "model.safetensors").write_bytes((10**6).to_bytes(8, "little") + b"{}"),
        ["truncated or no safetensors file", "1000000"],
    ),
    "pickled": (only_pickled, ["pytorch_model.bin", "never loaded", "convert once: python -c"]),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_weights_are_one_line_that_names_what_is_wrong(run, exported, tmp_path, fault):
    directory = tmp_path / "model"
    shutil.copytree(exported(), directory)
    break_it, said = BROKEN[fault]
    break_it(directory)
    mistake = run("generate", directory, "x").mistake
    assert all(text in mistake for text in said), mistake


@pytest.mark.parametrize("verb", ["generate", "convert", "inspect"])
@pytest.mark.parametrize("ref, reason", [("./nowhere", "no such file or directory"), ("no spaces here", "neither")])
def test_a_reference_to_nothing(run, tmp_path, verb, ref, reason):
    arguments = {"generate": ["x"], "convert": [tmp_path / "out"], "inspect": []}[verb]
    assert reason in run(verb, ref, *arguments).mistake


def test_a_directory_that_holds_no_model(run, tmp_path):
    assert "is none of: a Hugging Face directory" in run("generate", tmp_path, "x").mistake


def test_a_run_directory_that_is_a_file(run, tmp_path):
    (tmp_path / "run").write_text("not a directory")
    message = run("train", write_config(tmp_path)).mistake
    assert str(tmp_path / "run") in message


def test_a_full_disk_while_saving(run, trained, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        config = write_config(tmp_path, checkpoint={"every_steps": 1, "keep_last": 9})
        done = run("train", config, f"run_dir={disk / 'run'}")
        kept = max(int(path.name) for path in (disk / "run" / "checkpoints").iterdir() if path.name.isdecimal())
        assert done.code == 2
        last = done.err.splitlines()[-1]
        assert last.startswith(f"jaxformers: cannot save step {kept + 1} in {disk / 'run' / 'checkpoints'} ")
        assert f"the newest complete one is step {kept}" in last
        assert "Traceback" not in done.err
        assert run("generate", disk / "run", "alpha", "--max-new-tokens", "2").code == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_debugging_shows_where_a_mistake_was_found(run, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFORMERS_DEBUG", "1")
    done = run("train", tmp_path / "no.yaml")
    assert done.code == 2
    assert done.err.startswith("Traceback")
    assert done.err.rstrip().endswith("no.yaml: no such config file")


# -- train


def test_a_dry_run_prints_the_resolved_config_and_what_it_needs_and_writes_nothing(run, tmp_path):
    config = write_config(tmp_path, mesh={"fsdp": 8, "dp": 1})
    done = run("train", config, "--dry-run", "train.steps=1000")
    assert done.code == 0
    values = yaml.safe_load(done.out)
    assert values["train"]["steps"] == 1000
    assert values["optimizer"]["b2"] == 0.95, "defaults are spelled out"
    notes = dict(line[2:].split(": ", 1) for line in done.out.splitlines() if line.startswith("# "))
    count = jf.count_params(jf.read_config(LLAMA))
    assert notes["parameters"] == f"{count:,}"
    assert notes["devices"] == "8 (fsdp=8)"
    assert notes["steps"] == "1,000 of 256 tokens, 256,000 in all"
    assert "GiB of state" in notes["memory per device"]
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_a_dry_run_refuses_what_a_run_would(run, tmp_path):
    config = write_config(tmp_path)
    assert "cannot be split" in run("train", config, "--dry-run", "train.batch_size=12").mistake
    assert "warmup_steps is 8" in run("train", config, "--dry-run", "schedule.warmup_steps=8").mistake
    assert "ep=2 needs a model with experts" in run("train", config, "--dry-run", "mesh.dp=4", "mesh.ep=2").mistake


def test_training_prints_samples_and_where_the_run_is(run, tmp_path):
    config = write_config(tmp_path, sample={"prompts": ["alpha"], "max_new_tokens": 4, "temperature": 0})
    done = run("train", config)
    assert done.code == 0
    assert done.out.startswith("--- sample\nalpha")
    assert done.err.splitlines()[-1] == f"done: {tmp_path / 'run'} holds step 8"
    assert "step 8/8  loss " in done.err
    # The resolved config in the run directory is the same run, which has nothing left to do.
    again = run("train", tmp_path / "run" / "config.yaml")
    assert again.code == 0
    assert "resuming from step 8" in again.err


# -- generate


def test_one_prompt_is_streamed_behind_itself(run, trained):
    done = run("generate", trained(), "alpha", "--max-new-tokens", "6")
    model = jf.load(trained())
    assert done == (0, f"alpha{jf.generate(model, 'alpha', max_new_tokens=6)}\n", "")


def test_several_prompts_come_from_arguments_and_a_file(run, trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("beta\n\ngamma of\n", encoding="utf-8")
    arguments = ["alpha", "--prompts-file", tmp_path / "prompts.txt", "--max-new-tokens", "3"]
    done = run("generate", trained(), *arguments)
    texts = jf.generate(jf.load(trained()), ["alpha", "beta", "gamma of"], max_new_tokens=3)
    shown = zip(["alpha", "beta", "gamma of"], texts, strict=True)
    assert done.out == "".join(f"{prompt}{text}\n\n" for prompt, text in shown)


def test_standard_input_is_one_prompt(run, trained):
    done = run("generate", trained(), "--max-new-tokens", "3", stdin="two\nlines\n")
    assert done.code == 0
    assert done.out.startswith("two\nlines")


def test_a_checkpoint_and_an_exported_directory_generate_too(run, trained, exported):
    newest = run("generate", trained(), "alpha", "--max-new-tokens", "5").out
    assert run("generate", trained() / "checkpoints" / "8", "alpha", "--max-new-tokens", "5").out == newest
    assert run("generate", exported(), "alpha", "--max-new-tokens", "5").out == newest


def test_the_same_seed_draws_the_same_text(run, trained):
    settings = ["--temperature", "1.5", "--top-k", "50", "--top-p", "0.9", "--max-new-tokens", "8"]
    draws = [run("generate", trained(), "alpha", *settings, "--seed", seed).out for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_a_prompt_is_asked_for(run, trained):
    assert run("generate", trained(), stdin="").mistake.startswith("no prompt: give one as an argument")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--temperature", "-1"],
        ["--top-p", "1.5"],
        ["--top-k", "-2"],
        ["--seed", "-1"],
        ["--max-new-tokens", "0"],
    ],
)
def test_a_setting_of_sampling_that_cannot_be(run, trained, arguments):
    assert arguments[1].lstrip("-") in run("generate", trained(), "x", *arguments).mistake


def test_a_prompts_file_that_is_missing_or_not_utf8(run, trained, tmp_path):
    missing, bad = tmp_path / "none.txt", tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe")
    assert run("generate", trained(), "--prompts-file", missing).mistake == f"{missing}: No such file or directory"
    assert run("generate", trained(), "--prompts-file", bad).mistake.startswith(f"{bad} is not UTF-8 text")


# -- convert


def test_convert_writes_what_transformers_opens(run, trained, tmp_path):
    done = run("convert", trained(), tmp_path / "out", "--dtype", "bfloat16")
    assert done.code == 0
    assert done.err.startswith(f"{tmp_path / 'out'}: llama, ")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names


def test_a_moving_average_that_is_not_there_is_refused(run, trained, exported, tmp_path):
    for ref in (trained(), exported()):
        done = run("convert", ref, tmp_path / "out", "--ema")
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "train.ema_decay" in done.err
        assert not (tmp_path / "out").exists()


def test_convert_cuts_weights_into_files_of_a_size(run, exported, tmp_path):
    assert run("convert", exported(), tmp_path / "out", "--max-shard-size", "0.001").code == 0
    assert jf.load(tmp_path / "out").config == jf.load(exported()).config


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_convert_refuses_a_destination_that_holds_something(run, exported, tmp_path, kind):
    destination = tmp_path / "out"
    kept = destination if kind == "file" else destination / "precious.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("precious")
    message = run("convert", exported(), destination).mistake
    assert message == f"{destination} exists and is not an empty directory; choose another destination"
    assert kept.read_text() == "precious"


# -- inspect


def shown(done) -> dict[str, str]:
    assert done.code == 0, done
    return {line[:20].strip(): line[21:] for line in done.out.splitlines()}


def test_inspect_shows_a_run(run, trained):
    found = shown(run("inspect", trained()))
    assert found["kind"] == "run"
    assert found["model type"] == "llama"
    assert found["parameters"] == f"{jf.count_params(jf.read_config(LLAMA)):,}"
    assert found["layers"] == "2 x (gqa dense)"
    assert found["tokenizer"] == "259 ids, end of text 257"
    assert found["checkpoints"] == "4, 8"
    assert found["trained on"] == "dp=8"
    assert float(found["loss"]) > 0
    assert float(found["validation loss"]) > 0


def test_inspect_shows_a_checkpoint(run, trained, monkeypatch):
    found = shown(run("inspect", trained() / "checkpoints" / "4"))
    assert (found["kind"], found["step"]) == ("checkpoint", "4")
    monkeypatch.chdir(trained() / "checkpoints" / "8")
    assert shown(run("inspect", "."))["step"] == "8", "also from inside it"


def test_inspect_shows_a_hugging_face_directory_and_a_file_of_weights(run, exported):
    found = shown(run("inspect", exported()))
    assert found["kind"] == "huggingface"
    assert found["weights"].endswith("GB of float32")
    assert found["context"] == "64"
    weights = shown(run("inspect", exported() / "model.safetensors"))
    assert weights["kind"] == "safetensors"
    assert weights["weights"] == found["weights"]


def test_inspect_of_a_run_that_has_saved_nothing_yet(run, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("{}")
    assert shown(run("inspect", tmp_path))["checkpoints"] == "none yet"
    assert run("generate", tmp_path, "x").mistake == f"{tmp_path} has no checkpoint yet"


def test_a_checkpoint_that_there_is_not(run, trained):
    assert "5" in run("generate", trained() / "checkpoints" / "5", "x").mistake


# -- in a process of its own


def test_the_command_starts_quickly_and_needs_no_jax_to_help():
    code = "import sys, jaxformers.cli; print('jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_mistake_in_a_process_of_its_own_is_one_line_and_exit_2(tmp_path):
    done = process("train", tmp_path / "none.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"jaxformers: {tmp_path / 'none.yaml'}: no such config file\n"


def test_a_reader_that_goes_away_is_no_failure():
    command = f"{sys.executable} -m jaxformers schema | head -c 10 > /dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode in (0, 1)


def test_generating_in_a_process_of_its_own_says_nothing_but_the_text(trained):
    done = process("generate", trained(), "--max-new-tokens", "3", input="alpha")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("alpha")
    assert done.stderr == ""
