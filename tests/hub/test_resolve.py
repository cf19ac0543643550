"""A reference becomes a path: what exists wins, paths never reach the network, and every refusal says what to do."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from jaxformers.hub.resolve import classify, resolve


class Hub:
    """Stands in for `snapshot_download`: answers with a path or an error, and remembers what it was asked."""

    def __init__(self):
        self.answer = None
        self.asked = []

    def __call__(self, repo_id, **options):
        self.asked.append((repo_id, options))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def http_error(kind, message="404 Client Error.\n\nSome long advice."):
    """An error as the client raises it; its response, which differs between client versions, is not looked at."""
    error = kind.__new__(kind)
    error.args = (message,)
    return error


def refusal(ref):
    with pytest.raises(ValueError) as caught:
        resolve(ref)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What is local stays local


@pytest.mark.parametrize("form", ["org/model", "./org/model", "org/../org/model", "{cwd}/org/model"])
def test_an_existing_path_wins_over_a_hub_id(tmp_path, monkeypatch, hub, form):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve(form.format(cwd=tmp_path)).samefile(tmp_path / "org" / "model")
    assert not hub.asked


def test_a_file_and_a_path_object_resolve_to_themselves(tmp_path, hub):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert resolve(file) == resolve(str(file)) == file
    assert not hub.asked


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch, hub):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == tmp_path / "model"


@pytest.mark.parametrize(
    "ref",
    ["./org/model", "../org", "/org/model", "~/org/model", "~nobody-here/model", "org/model.gguf",
     "org/model.safetensors", Path("org/model")],
)  # fmt: skip
def test_what_looks_like_a_path_is_never_sent_to_the_hub(tmp_path, monkeypatch, hub, ref):
    monkeypatch.chdir(tmp_path)
    assert refusal(ref) == f"{ref}: no such file or directory"
    assert not hub.asked


@pytest.mark.parametrize(
    "ref",
    ["", "gpt2", "a/b/c", "org/", "/".join(["org", "na me"]), "org/name@", "org/name@../x", "org/name@a@b", "org/na:me",
     "https://example.org/model", "org\n/name", "org/name\n", "-org/name", "x" * 5000, "org/na\0me"],
)  # fmt: skip
def test_what_is_neither_a_path_nor_a_hub_id_is_refused_without_asking(tmp_path, monkeypatch, hub, ref):
    monkeypatch.chdir(tmp_path)
    message = refusal(ref)
    assert "neither an existing path nor a hub id" in message
    assert repr(ref) in message
    assert not hub.asked


# What comes from the hub


@pytest.mark.parametrize(
    "ref, repository, revision",
    [
        ("org/name", "org/name", None),
        ("Org-1/Name_2.5-B", "Org-1/Name_2.5-B", None),
        ("org/name@main", "org/name", "main"),
        ("org/name@refs/pr/1", "org/name", "refs/pr/1"),
        ("org/name@v1.0", "org/name", "v1.0"),
    ],
)
def test_a_hub_id_is_downloaded_at_its_revision(tmp_path, monkeypatch, hub, ref, repository, revision):
    monkeypatch.chdir(tmp_path)
    hub.answer = tmp_path / "snapshot"
    assert resolve(ref) == tmp_path / "snapshot"
    [(asked, options)] = hub.asked
    assert (asked, options["revision"]) == (repository, revision)


def test_weights_come_once_without_pickles_and_with_all_that_tokenizers_need(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    hub.answer = tmp_path
    resolve("org/name")
    options = hub.asked[0][1]
    wanted = [
        "config.json", "generation_config.json", "model.safetensors", "model-00001-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "tokenizer.model", "vocab.json", "merges.txt", "qwen.tiktoken", "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    ]  # fmt: skip
    unwanted = [
        "pytorch_model.bin", "model.pt", "optimizer.pth", "training_args.bin", "flax_model.msgpack", "tf_model.h5",
        "consolidated.safetensors", "original/model.safetensors", "onnx/model.onnx", "modeling_custom.py", "README.md",
    ]  # fmt: skip
    patterns = {key: options[key] for key in ("allow_patterns", "ignore_patterns")}
    kept = huggingface_hub.utils.filter_repo_objects(wanted + unwanted, **patterns)
    assert list(kept) == wanted


@pytest.mark.parametrize(
    "error, said",
    [
        (http_error(errors.RepositoryNotFoundError), "the hub has no such repository; if it is private"),
        (http_error(errors.GatedRepoError), "gated: accept its terms"),
        (http_error(errors.RevisionNotFoundError), "no revision 'v9'; name a branch, a tag or a commit"),
        (errors.LocalEntryNotFoundError("Cannot find\nanything"), "cannot be reached.*check the network"),
        (http_error(errors.HfHubHTTPError, "503 Server Error\nmore"), "the hub did not give it: 503 Server Error$"),
        (http_error(errors.HTTPError, ""), "the hub did not give it: HTTPError$"),
    ],
)  # fmt: skip
def test_a_failure_of_the_hub_is_one_line_that_names_the_reference(tmp_path, monkeypatch, hub, error, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.answer = error
    with pytest.raises(ValueError, match=f"^org/name@v9: no such local path, and .*{said}") as caught:
        resolve("org/name@v9")
    assert "\n" not in str(caught.value)


def test_a_fault_that_is_not_the_hubs_is_not_disguised(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    hub.answer = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        resolve("org/name")


# Offline, with the real client


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_offline_and_not_in_the_cache_names_the_cache_and_the_switch(offline_cache):
    message = refusal("org/name")
    assert message.startswith("org/name: no such local path")
    assert str(offline_cache) in message
    assert "unset HF_HUB_OFFLINE" in message


def test_offline_a_cached_snapshot_is_found(offline_cache):
    commit = "0123456789" * 4
    repository = offline_cache / "models--org--name"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert resolve("org/name") == resolve("org/name@main") == resolve(f"org/name@{commit}") == snapshot
    assert "not whole in the hub's cache" in refusal("org/name@other")


def test_a_local_path_does_not_import_the_hub_client(tmp_path):
    program = (
        "import sys; from jaxformers.hub.resolve import resolve, classify; resolve(sys.argv[1]);"
        "sys.exit('huggingface_hub' in sys.modules or 'jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=os.environ)


# Kinds


@pytest.fixture
def places(tmp_path):
    run = tmp_path / "runs" / "x"
    (run / "checkpoints" / "100").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "config.json").write_text("{}")
    for name in ("model.safetensors", "model.gguf", "model.bin"):
        (exported / name).write_bytes(b"")
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    (run / "checkpoints" / "100.tmp").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "place, kind",
    [
        ("exported", "huggingface"),
        ("exported/model.safetensors", "safetensors"),
        ("exported/model.gguf", "gguf"),
        ("runs/x", "run"),
        ("runs/x/checkpoints/100", "checkpoint"),
        ("runs/x/checkpoints/../checkpoints/100", "checkpoint"),
    ],
)
def test_each_kind_is_told_from_its_files(places, place, kind):
    assert classify(places / place) == kind
    assert classify(str(places / place)) == kind


def test_a_checkpoint_is_known_from_inside_its_run(places, monkeypatch):
    monkeypatch.chdir(places / "runs" / "x" / "checkpoints")
    assert classify("100") == "checkpoint"
    assert classify("..") == "run"
    monkeypatch.chdir("100")
    assert classify(".") == "checkpoint"


@pytest.mark.parametrize(
    "place",
    [".", "runs", "runs/x/checkpoints", "runs/x/checkpoints/100.tmp", "runs/x/checkpoints/7", "checkpoints/100",
     "exported/model.bin", "nowhere"],
)  # fmt: skip
def test_anything_else_is_refused_with_the_kinds_there_are(places, place):
    with pytest.raises(ValueError, match=r"is none of: a Hugging Face directory .*a run directory .*\.gguf file$"):
        classify(places / place)
