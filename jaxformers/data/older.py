"""Tokenizers of directories that have no tokenizer.json: sentencepiece models and tiktoken's ranks, converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxformers.data import sentencepiece, tiktoken
from jaxformers.data.vocabularies import Roles, files_of

# Settings of tokenizer classes that are gone once a tokenizer is converted.
_OF_THE_CLASS = ("auto_map", "tokenizer_class", "sp_model_kwargs", "legacy", "add_bos_token", "add_eos_token")


def find_older(path: Path) -> Path | None:
    """The file of a directory, or the file itself, that can be converted; None where there is none."""
    if path.is_file():
        return path if path.suffix in (".model", ".tiktoken") else None
    found = [*path.glob("*.model"), *path.glob("*.tiktoken")]
    return min(found, key=lambda file: (file.name != "tokenizer.model", file.name), default=None)


def convert(path: Path, config: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a file that `find_older` found; `config` is the settings beside it.

    Raises `ValueError` for a damaged file, and for models that cannot be converted.
    """
    content = path.read_bytes()
    kind: Callable[..., dict[str, bytes]] = _from_ranks if tiktoken.is_ranks(content) else _from_sentencepiece
    try:
        return kind(content, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{path}: its vocabulary is damaged ({' '.join(str(error).split())})") from error


def _from_sentencepiece(content: bytes, config: Mapping[str, Any]) -> dict[str, bytes]:
    model = sentencepiece.parse_model(content)
    control = model.of_kind(sentencepiece.CONTROL)
    unk = None if model.unk_id is None else model.pieces[model.unk_id]
    roles = Roles(
        bos=_named("bos_token", config, "<s>" if "<s>" in control else None),
        eos=_named("eos_token", config, "</s>" if "</s>" in control else None),
        unk=_named("unk_token", config, unk),
        control=[*control, *([unk] if unk else [])],
        user=model.of_kind(sentencepiece.USER_DEFINED),
        add_bos=config.get("add_bos_token", "<s>" in control or "<bos>" in control),
        add_eos=config.get("add_eos_token", False),
        extra=_kept(config),
    )
    return files_of(sentencepiece.build(model), roles)


def _from_ranks(content: bytes, config: Mapping[str, Any]) -> dict[str, bytes]:
    tokens = tiktoken.parse_ranks(content)
    known = tiktoken.published(tokens)
    bos = _named("bos_token", config, known.bos)
    roles = Roles(
        bos=bos,
        eos=_named("eos_token", config, known.eos),
        control=_listed(config) or known.special,
        add_bos=config.get("add_bos_token", known.split.begins and bos is not None),
        extra=_kept(config),
    )
    return files_of(tiktoken.build(tokens, known.split), roles)


def _listed(config: Mapping[str, Any]) -> list[str]:
    """Special tokens of added_tokens_decoder, by id."""
    listed = config.get("added_tokens_decoder") or {}
    return [token["content"] for _, token in sorted(listed.items(), key=lambda item: int(item[0]))]


def _named(name: str, config: Mapping[str, Any], default: str | None) -> str | None:
    token = config.get(name, default)
    return token["content"] if isinstance(token, Mapping) else token


def _kept(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _OF_THE_CLASS}
