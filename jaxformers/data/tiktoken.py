"""tiktoken's ranks: a line for each token, its bytes in base64 and its rank, which is its id.

The file holds neither the rule that splits words nor the special tokens; those of the vocabularies that models are
published with are known here by their number of ranks.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
from collections.abc import Iterable
from typing import NamedTuple

from tokenizers import Tokenizer

from jaxformers.data.tokenizer import byte_characters
from jaxformers.data.vocabularies import LLAMA3, QWEN2, Split, byte_level_bpe

RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n?")


class Published(NamedTuple):
    """What goes with a published file of ranks. `special` tokens follow the ranks unless settings list their own."""

    split: Split
    special: tuple[str, ...] = ()
    bos: str | None = None
    eos: str | None = None


_LLAMA3_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


def _llama3_special() -> Iterable[str]:
    reserved = 0
    for i in range(256):
        if i in _LLAMA3_NAMED:
            yield _LLAMA3_NAMED[i]
        else:
            yield f"<|reserved_special_token_{reserved}|>"
            reserved += 1


_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
PUBLISHED = {
    128_000: Published(LLAMA3, tuple(_llama3_special()), "<|begin_of_text|>", "<|end_of_text|>"),
    151_329: Published(dataclasses.replace(LLAMA3, begins=False), eos="<|endoftext|>"),  # GLM-4
    151_643: Published(QWEN2, _QWEN_SPECIAL, eos="<|endoftext|>"),
}


def is_ranks(content: bytes) -> bool:
    """Whether the bytes begin as a file of ranks does."""
    return RANK_LINE.match(content) is not None


def parse_ranks(content: bytes) -> list[bytes]:
    """The tokens by rank. ValueError for a damaged line, and unless the ranks are 0, 1, 2, ..."""
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            tokens[int(rank)] = base64.b64decode(token, validate=True)
        except (ValueError, binascii.Error):
            raise ValueError(f"line {number} of the ranks is not a token in base64 and its rank") from None
    if sorted(tokens) != list(range(len(tokens))) or len(set(tokens.values())) != len(tokens):
        raise ValueError("the ranks are not 0, 1, 2, ... of as many different tokens")
    return [tokens[rank] for rank in range(len(tokens))]


def build(tokens: list[bytes], split: Split) -> Tokenizer:
    """The ranks as a byte-level BPE that gives the ids which tiktoken gives, without special tokens."""
    if missing := [byte for byte in range(256) if bytes([byte]) not in set(tokens)]:
        raise ValueError(f"the ranks lack {len(missing)} of the 256 bytes")
    spelling = "".join(byte_characters())
    pieces = ["".join(spelling[byte] for byte in token) for token in tokens]
    known = set(pieces)
    # Two parts that make a token merge however they came about, the token of the lowest rank first.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    return byte_level_bpe(pieces, merges, dataclasses.replace(split, whole_words=True))


def published(tokens: list[bytes]) -> Published:
    """What goes with these ranks. ValueError for a vocabulary that is not known."""
    if len(tokens) not in PUBLISHED:
        known = ", ".join(str(count) for count in PUBLISHED)
        raise ValueError(
            f"nothing is known of a vocabulary of {len(tokens)} ranks, which do not say how words are split; "
            f"known are those of {known}"
        )
    return PUBLISHED[len(tokens)]
