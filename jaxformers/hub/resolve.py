"""Where a reference points: `runs/x`, `./model.gguf` or `org/name@revision` becomes a local path, and its kind.

What exists on disk always wins, and what looks like a path is never sent over the network. Everything else about hub
access (token, cache directory, mirrors, offline mode) is `huggingface_hub`'s own, through its environment variables.

This module looks at names and at which files exist. It opens none of them.
"""

import os
import re
from pathlib import Path
from typing import Literal

from jaxformers.families.catalog import nearest_published, published

Kind = Literal["huggingface", "adapter", "run", "checkpoint", "safetensors", "gguf"]

# One format of weights, no pickles, and everything small that configures a model or its tokenizer.
ALLOW_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
# Second copies of the same weights, in their authors' own layouts.
IGNORE_PATTERNS = ("*/*.safetensors", "consolidated*.safetensors")

HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)


def resolve(ref: str | Path) -> Path:
    """The local file or directory that `ref` means; a hub id is downloaded, or found in the hub's cache.

    `ref` is a path, or `ORG/NAME` or `ORG/NAME@REVISION` where the revision is a branch, tag or commit. With
    `HF_HUB_OFFLINE=1` only the cache is used.

    Raises `ValueError` if it is neither, or cannot be had (no such repository or revision, gated, offline), with what
    to do about it.
    """
    text = os.fspath(ref)
    path = Path(os.path.expanduser(text))
    if text and os.path.exists(path):
        return path
    if isinstance(ref, Path) or text.startswith((".", "/", "~")) or path.suffix in (".gguf", ".safetensors"):
        raise ValueError(f"{text}: no such file or directory")
    match = HUB_ID.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{text!r} is neither an existing path nor a hub id (ORG/NAME or ORG/NAME@REVISION){_hint(text)}"
        )
    return _download(match["repository"], match["revision"])


def _hint(text: str) -> str:
    """What a bare name may have meant: published sizes have names without weights."""
    entry = published().get(text)
    if entry is not None:
        return (
            f"; the weights of {text} are {entry.hub_id}" if entry.hub_id else f"; no weights of {text} are published"
        )
    near = nearest_published(text)
    return f"; did you mean the published size {near!r}?" if near else ""


def classify(path: str | Path) -> Kind:
    """What is at `path`, told from the files there.

    "huggingface": a directory with config.json. "adapter": one with adapter_config.json in its place. "run": a training
    run, config.yaml beside checkpoints/. "checkpoint": one of its checkpoints/STEP. "safetensors" and "gguf": one file
    with that suffix.

    Raises `ValueError` for anything else, with the kinds there are.
    """
    path = Path(path)
    if path.is_file() and path.suffix in (".safetensors", ".gguf"):
        return "gguf" if path.suffix == ".gguf" else "safetensors"
    if (path / "config.json").is_file():
        return "huggingface"
    if (path / "adapter_config.json").is_file():
        return "adapter"
    if _is_run(path):
        return "run"
    step = path.absolute()
    if step.is_dir() and step.name.isdecimal() and step.parent.name == "checkpoints" and _is_run(step.parent.parent):
        return "checkpoint"
    raise ValueError(
        f"{path} is none of: a Hugging Face directory (config.json), an adapter (adapter_config.json), a run directory "
        "(config.yaml and checkpoints/), one of its checkpoints (checkpoints/STEP), a .safetensors file, a .gguf file"
    )


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()


def _download(repository: str, revision: str | None) -> Path:
    # Imported here because a local path, which is the common case, needs nothing of it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError, OfflineModeIsEnabled

    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(ALLOW_PATTERNS),
                ignore_patterns=list(IGNORE_PATTERNS),
            )
        )
    except (EntryNotFoundError, HFValidationError, HTTPError, OfflineModeIsEnabled) as error:
        ref = f"{repository}@{revision}" if revision else repository
        raise ValueError(f"{ref}: no such local path, and {_why_not(error, revision)}") from error


def _why_not(error: Exception, revision: str | None) -> str:
    """What kept the hub from giving a repository, and what to do about it, in one line."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "on the hub it is gated: accept its terms on its page there, then `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such repository; if it is private, `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"on the hub it has no revision {revision!r}; name a branch, a tag or a commit"
    if constants.HF_HUB_OFFLINE:
        return f"it is not whole in the hub's cache ({constants.HF_HUB_CACHE}); unset HF_HUB_OFFLINE to download it"
    if isinstance(error, errors.EntryNotFoundError):
        return "the hub cannot be reached and its cache does not have it whole; check the network, or give a local path"
    first_line = str(error).strip().partition("\n")[0]
    return f"the hub did not give it: {first_line or type(error).__name__}"
