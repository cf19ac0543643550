"""The tokenizer that a GGUF file describes in its metadata. Knows the keys under `tokenizer.` and no file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from jaxformers.data.tokenizer import Tokenizer
from jaxformers.data.vocabularies import (
    GPT2,
    GPT2_DIGITS,
    GPT4O,
    LLAMA3,
    QWEN2,
    TEKKEN,
    Roles,
    Split,
    byte_level_bpe,
    finish,
    sentencepiece_bpe,
    spell_spaces,
)

log = logging.getLogger(__name__)

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6  # sentencepiece's types of pieces
END_OF_TURN = ("eos", "eot", "eom")

TYPES: dict[str, type] = {
    **dict.fromkeys(("model", "pre", "chat_template"), str),
    **dict.fromkeys(("tokens", "scores", "token_type", "merges"), list),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_space_prefix"), bool),
}
# tokenizer.ggml.pre: how a byte-level vocabulary was trained to cut text into words.
SPLITS: dict[str, Split] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "roberta-bpe"), GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), GPT2_DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "smaug-bpe", "dbrx"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4"), GPT4O),
    "tekken": TEKKEN,
}


def gguf_tokenizer(metadata: Mapping[str, Any], *, origin: str) -> Tokenizer | None:
    """The tokenizer of a GGUF file's metadata with its chat template; None where the file has none.

    Raises `ValueError`, beginning with `origin`, for kinds and splits that are not known and for damaged vocabularies.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind == "none":
        return None
    _check_types(metadata, origin)
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise ValueError(f"{origin}: the tokenizer {kind!r} is not read from GGUF; known are {', '.join(builders)}")
    settings = _Settings(metadata, origin)
    try:
        return builders[kind](settings)
    except ValueError as error:
        raise ValueError(f"{origin}: {str(error).removeprefix(f'{origin}: ')}") from None
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{origin}: its vocabulary is damaged ({' '.join(str(error).split())})") from error


def _check_types(metadata: Mapping[str, Any], origin: str) -> None:
    for key, value in metadata.items():
        name = key.removeprefix("tokenizer.").removeprefix("ggml.")
        kind = int if name.endswith("_token_id") else TYPES.get(name)
        if key.startswith("tokenizer.") and kind is not None and type(value) is not kind:
            raise ValueError(f"{origin}: {key} is of type {type(value).__name__}; it must be {kind.__name__}")


class _Settings:
    """The keys under `tokenizer.`, by their last names."""

    def __init__(self, metadata: Mapping[str, Any], origin: str):
        self.origin = origin
        self.template = metadata.get("tokenizer.chat_template")
        prefix = "tokenizer.ggml."
        self.values = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
        self.pieces: list[str] = self.values.get("tokens") or []
        self.types: list[int] = self.values.get("token_type") or [NORMAL] * len(self.pieces)
        if not self.pieces or not isinstance(self.pieces[0], str):  # an array's entries are all of one type
            raise ValueError(f"{origin} has a tokenizer without tokenizer.ggml.tokens")
        for name, length in (("token_type", len(self.types)), ("scores", len(self.scores))):
            if length != len(self.pieces):
                raise ValueError(f"{origin}: tokenizer.ggml.{name} has {length} entries for {len(self.pieces)} tokens")

    @property
    def scores(self) -> list[float]:
        return self.values.get("scores") or [0.0] * len(self.pieces)

    def pieces_of(self, kind: int) -> list[str]:
        return [piece for piece, its in zip(self.pieces, self.types, strict=True) if its == kind]

    def named(self, name: str) -> str | None:
        """The piece whose id is under `name`_token_id."""
        index = self.values.get(f"{name}_token_id")
        if index is None:
            return None
        if type(index) is not int or not 0 <= index < len(self.pieces):
            raise ValueError(f"{name}_token_id is {index!r}, but there are {len(self.pieces)} tokens")
        return self.pieces[index]

    def roles(self, *, begins: bool) -> Roles:
        ends = [self.values.get(f"{name}_token_id") for name in END_OF_TURN if self.named(name) is not None]
        return Roles(
            bos=self.named("bos"),
            eos=self.named("eos"),
            pad=self.named("padding"),
            unk=self.named("unknown"),
            control=self.pieces_of(CONTROL),
            user=self.pieces_of(USER_DEFINED),
            add_bos=self.values.get("add_bos_token", begins),
            add_eos=self.values.get("add_eos_token", False),
            stop_ids=list(dict.fromkeys(ends)),
            chat_template=self.template,
        )


def _byte_level(settings: _Settings) -> Tokenizer:
    name = settings.values.get("pre")
    if name is None:
        log.warning("%s does not say how its tokenizer splits words; splitting as GPT-2's does", settings.origin)
    elif name not in SPLITS:
        raise ValueError(f"the tokenizer's split {name!r} is not known; known are {', '.join(sorted(SPLITS))}")
    split = SPLITS[name] if name else GPT2
    merges = [tuple(str(merge).split(" ")) for merge in settings.values.get("merges", ())]
    if any(len(merge) != 2 for merge in merges):
        raise ValueError("tokenizer.ggml.merges has an entry that is not two pieces")
    roles = settings.roles(begins=split.begins)
    return finish(byte_level_bpe(settings.pieces, merges, split), roles, origin=settings.origin)


def _sentencepiece(settings: _Settings) -> Tokenizer:
    roles, fallback = settings.roles(begins=True), BYTE in settings.types
    text = sentencepiece_bpe(
        settings.pieces,
        settings.scores,
        normal=[kind == NORMAL for kind in settings.types],
        unk=roles.unk,
        byte_fallback=fallback,
    )
    spell_spaces(text, prefix=settings.values.get("add_space_prefix", True), byte_fallback=fallback)
    return finish(text, roles, origin=settings.origin)
