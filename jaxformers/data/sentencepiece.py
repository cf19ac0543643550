"""Sentencepiece's `tokenizer.model`: pieces, scores and a few settings in a protobuf message.

Read field by field (https://protobuf.dev/programming-guides/encoding, and sentencepiece_model.proto for the fields'
numbers), so that neither library is needed. Knows no file and no model.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from jaxformers.data.vocabularies import sentencepiece_bpe, sentencepiece_unigram, spell_spaces

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of pieces
UNIGRAM, BPE = 1, 2  # types of models
MODEL_TYPES = {UNIGRAM: "unigram", BPE: "BPE", 3: "word", 4: "char"}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types

Value = int | bytes


@dataclass(frozen=True)
class Model:
    """What a `tokenizer.model` says. kinds: NORMAL, ... of each piece. charsmap: characters to replace, compiled."""

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    model_type: int
    byte_fallback: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool

    def of_kind(self, kind: int) -> list[str]:
        return [piece for piece, its in zip(self.pieces, self.kinds, strict=True) if its == kind]

    @property
    def unk_id(self) -> int | None:
        return self.kinds.index(UNKNOWN) if UNKNOWN in self.kinds else None


def parse_model(content: bytes) -> Model:
    """Raises `ValueError` for bytes that are no such message, and for settings that are not implemented."""
    try:
        fields = list(_fields(content))
        pieces = [_piece(value) for number, value in fields if number == 1]
        trainer, normalizer = (dict(_fields(_last(fields, number))) for number in (2, 3))
    except (IndexError, TypeError, UnicodeDecodeError, struct.error):
        raise ValueError("no sentencepiece model, or a damaged one") from None
    if not pieces:
        raise ValueError("no sentencepiece model, or a damaged one: it has no pieces")
    if trainer.get(24, 0) or not normalizer.get(5, 1):
        raise ValueError("sentencepiece models with spaces as suffixes or left as they are cannot be read")
    texts, scores, kinds = (list(column) for column in zip(*pieces, strict=True))
    return Model(
        texts,
        scores,
        kinds,
        model_type=trainer.get(3, UNIGRAM),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=normalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def build(model: Model) -> Tokenizer:
    """The model as a tokenizer that gives the ids which sentencepiece gives, without special tokens."""
    if model.model_type == UNIGRAM:
        if model.unk_id is None:
            raise ValueError("the sentencepiece model has no piece for the unknown")
        text = sentencepiece_unigram(model.pieces, model.scores, unk_id=model.unk_id, byte_fallback=model.byte_fallback)
    elif model.model_type == BPE:
        text = sentencepiece_bpe(
            model.pieces,
            model.scores,
            normal=[kind == NORMAL for kind in model.kinds],
            unk=None if model.unk_id is None else model.pieces[model.unk_id],
            byte_fallback=model.byte_fallback,
        )
    else:
        kind = MODEL_TYPES.get(model.model_type, model.model_type)
        raise ValueError(f"a sentencepiece model of type {kind} cannot be read; known are BPE and unigram")
    spell_spaces(
        text,
        prefix=model.add_dummy_prefix,
        byte_fallback=model.byte_fallback,
        charsmap=model.charsmap,
        squeeze=model.remove_extra_whitespaces,
    )
    return text


def _piece(message: Value) -> tuple[str, float, int]:
    fields = dict(_fields(message))
    (score,) = struct.unpack("<f", fields.get(2, b"\0\0\0\0"))
    return fields[1].decode() if 1 in fields else "", score, fields.get(3, NORMAL)


def _last(fields: list[tuple[int, Value]], number: int) -> Value:
    return next((value for its, value in reversed(fields) if its == number), b"")


def _fields(message: Value) -> Iterator[tuple[int, Value]]:
    """Number and value of each field; IndexError or TypeError where the bytes are no message."""
    if not isinstance(message, bytes):
        raise TypeError
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == BYTES:
            size, at = _varint(message, at)
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        else:
            raise TypeError
        if at + size > len(message):
            raise IndexError
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """An integer of seven bits a byte, least first, and where the next field begins."""
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise TypeError
