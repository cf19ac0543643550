"""Tokenizers built from a bare vocabulary: byte-level BPE, sentencepiece BPE and sentencepiece unigram.

Formats other than tokenizer.json (GGUF, sentencepiece, tiktoken) hold a list of pieces and a few settings; this module
turns those into the one form that `Tokenizer` has. It knows no file format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from jaxformers.data.tokenizer import Tokenizer

SPACE = "▁"  # how sentencepiece spells a space
_LETTERS, _WORD = r"\p{L}\p{N}", r"[^\r\n\p{L}\p{N}]?"
_REST = rf" ?[^\s{_LETTERS}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_APOSTROPHE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"{_WORD}{_UPPER}*{_LOWER}+", rf"{_WORD}{_UPPER}+{_LOWER}*")
_SLASHED = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)


@dataclass(frozen=True)
class Split:
    """How a byte-level BPE cuts text into words before merging, and what goes with it.

    `pattern` is a regular expression of words, None for GPT-2's. `digits`: each digit is a word. `nfc`: text is
    composed first. `whole_words`: a word that is in the vocabulary is taken whole. `begins`: texts begin with the token
    for that, unless told otherwise.
    """

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    begins: bool = False


GPT2 = Split()
GPT2_DIGITS = Split(digits=True)
LLAMA3 = Split(rf"{_APOSTROPHE}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}|{_REST}", whole_words=True, begins=True)
QWEN2 = Split(rf"{_APOSTROPHE}|{_WORD}\p{{L}}+|\p{{N}}|{_REST}", nfc=True)
TEKKEN = Split("|".join((*_CASED, r"\p{N}", _SLASHED)), whole_words=True, begins=True)
GPT4O = Split("|".join((*(f"{word}{_APOSTROPHE}?" for word in _CASED), r"\p{N}{1,3}", _SLASHED)), whole_words=True)


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Which pieces of a vocabulary do what. `control` pieces are special; `user` ones are matched whole in a text."""

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None
    control: Sequence[str] = ()
    user: Sequence[str] = ()
    add_bos: bool = False
    add_eos: bool = False
    stop_ids: Sequence[int] = ()
    chat_template: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # more of tokenizer_config.json


def byte_level_bpe(pieces: Sequence[str], merges: Iterable[tuple[str, str]], split: Split) -> tokenizers.Tokenizer:
    """A BPE over bytes, each spelt as a printable character (GPT-2's table)."""
    model = models.BPE(vocab=_ids(pieces), merges=list(merges), ignore_merges=split.whole_words)
    text = tokenizers.Tokenizer(model)
    if split.nfc:
        text.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    text.pre_tokenizer = pre_tokenizers.Sequence(steps)
    text.decoder = decoders.ByteLevel()
    return text


def sentencepiece_bpe(
    pieces: Sequence[str],
    scores: Sequence[float],
    *,
    normal: Sequence[bool],
    unk: str | None,
    byte_fallback: bool,
) -> tokenizers.Tokenizer:
    """Sentencepiece's BPE, without normalizer and decoder. Only `normal` pieces are merged; the best score first."""
    merges = _merges(pieces, scores, normal)
    model = models.BPE(vocab=_ids(pieces), merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=byte_fallback)
    return tokenizers.Tokenizer(model)


def sentencepiece_unigram(
    pieces: Sequence[str], scores: Sequence[float], *, unk_id: int, byte_fallback: bool
) -> tokenizers.Tokenizer:
    """Sentencepiece's unigram model, without normalizer and decoder. Scores are log probabilities."""
    vocabulary = list(zip(pieces, scores, strict=True))
    return tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=unk_id, byte_fallback=byte_fallback))


def spell_spaces(
    text: tokenizers.Tokenizer,
    *,
    prefix: bool,
    byte_fallback: bool,
    charsmap: bytes = b"",
    squeeze: bool = False,
) -> None:
    """Sentencepiece's way with spaces: each is a piece's character, and with `prefix` one begins a text.

    charsmap: its compiled table of characters to replace. squeeze: one space for several, none at the ends.
    """
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    if squeeze:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(SPACE)] if prefix else []
    text.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    back = [decoders.Replace(SPACE, " "), *([decoders.ByteFallback()] if byte_fallback else []), decoders.Fuse()]
    text.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if prefix else [])])


def finish(text: tokenizers.Tokenizer, roles: Roles, *, origin: str) -> Tokenizer:
    """The tokenizer with its special tokens; `origin` is what error lines call it."""
    return Tokenizer(files_of(text, roles), origin=origin, stop_ids=roles.stop_ids)


def files_of(text: tokenizers.Tokenizer, roles: Roles) -> dict[str, bytes]:
    """The tokenizer with its special tokens, as the files that `transformers` reads, by name."""
    text.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in roles.control])
    text.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in roles.user])
    begin = [roles.bos] if roles.add_bos and roles.bos else []
    end = [roles.eos] if roles.add_eos and roles.eos else []
    if begin or end:
        text.post_processor = processors.Sequence([*_byte_offsets(text), _template(text, begin, end)])
    named = {"bos_token": roles.bos, "eos_token": roles.eos, "pad_token": roles.pad, "unk_token": roles.unk}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: token for name, token in named.items() if token is not None},
        **roles.extra,
    }
    files = {"tokenizer.json": text.to_str().encode(), "tokenizer_config.json": json.dumps(config, indent=2).encode()}
    if roles.chat_template is not None:
        files["chat_template.jinja"] = roles.chat_template.encode()
    return files


def _byte_offsets(text: tokenizers.Tokenizer) -> list[processors.PostProcessor]:
    return [processors.ByteLevel(trim_offsets=False)] if isinstance(text.decoder, decoders.ByteLevel) else []


def _template(text: tokenizers.Tokenizer, begin: list[str], end: list[str]) -> processors.PostProcessor:
    single, second = [*begin, "$A", *end], [f"{token}:1" for token in (*begin, "$B", *end)]
    return processors.TemplateProcessing(
        single=single,
        pair=[*single, *second],
        special_tokens=[(token, text.token_to_id(token)) for token in {*begin, *end}],
    )


def _ids(pieces: Sequence[str]) -> dict[str, int]:
    ids = {piece: i for i, piece in enumerate(pieces)}
    if len(ids) != len(pieces):
        twice = next(piece for i, piece in enumerate(pieces) if ids[piece] != i)
        raise ValueError(f"the piece {twice!r} comes twice in the vocabulary")
    return ids


def _merges(pieces: Sequence[str], scores: Sequence[float], normal: Sequence[bool]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, in the order in which sentencepiece prefers them."""
    score_of = {piece: score for piece, score, is_normal in zip(pieces, scores, normal, strict=True) if is_normal}
    found = [
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score in score_of.items()
        for cut in range(1, len(piece))
        if piece[:cut] in score_of and piece[cut:] in score_of
    ]
    return [(left, right) for _, _, left, right in sorted(found, key=lambda merge: merge[:2])]
