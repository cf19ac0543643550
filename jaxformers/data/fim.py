"""Fill-in-the-middle: documents rearranged so that a left-to-right model learns to fill a gap (arXiv:2207.14255).

A document is cut at two places into prefix, middle and suffix, and read as prefix, suffix, middle (PSM) or as suffix,
then prefix and middle in one (SPM, the second variant of the paper's appendix D), three sentinels longer:

    PSM   <prefix> prefix <suffix> suffix <middle> middle
    SPM   <prefix> <suffix> suffix <middle> prefix middle

What begins and ends a text stays where it is. Cuts are between tokens, since the ids of a corpus are made once. Which
documents, which way and where is a function of the seed and the document's hash alone.
"""

from dataclasses import dataclass

import numpy as np

from jaxformers.data.config import FimConfig
from jaxformers.data.documents import Documents
from jaxformers.data.packing import hash_of, splitmix64
from jaxformers.data.tokenizer import Tokenizer

# (prefix, middle, suffix) as models' authors spell them.
_USUAL = (
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
    ("▁<PRE>", "▁<MID>", "▁<SUF>"),
    ("<PRE>", "<MID>", "<SUF>"),
    ("<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜fim▁hole｜>"),
)
_SENTINELS = 3
_LEAST = 3  # tokens of a document, of which one may begin and one ends it, that leave something to cut
_STREAM = 3  # sets these hashes apart from those of the packing plan
_RUNS = 8  # begin, <prefix>, prefix, <suffix>, suffix, <middle>, middle, end


@dataclass(frozen=True)
class Fim:
    """How to rearrange: shares, and the ids of the sentinels and of the token that begins a text, if one does."""

    rate: float
    spm_rate: float
    seed: int
    prefix: int
    middle: int
    suffix: int
    bos: int | None


def make_fim(config: FimConfig, tokenizer: Tokenizer, *, seed: int) -> Fim | None:
    """What a config asks for, None where that is nothing. ValueError where the tokenizer lacks a sentinel."""
    if config.rate == 0:
        return None
    ids = [tokenizer.token_id(token) for token in _sentinels(config, tokenizer)]
    return Fim(config.rate, config.spm_rate, seed, *ids, bos=tokenizer.bos_id)


def _sentinels(config: FimConfig, tokenizer: Tokenizer) -> tuple[str, ...]:
    known = ", ".join(tokenizer.special_tokens) or "none"
    if config.sentinels is not None:
        missing = [token for token in config.sentinels if tokenizer.token_id(token) is None]
        if missing:
            raise ValueError(
                f"fim names {missing[0]!r}, which is no token; the tokenizer's special tokens are: {known}"
            )
        return config.sentinels
    for names in _USUAL:
        if all(tokenizer.token_id(token) is not None for token in names):
            return names
    raise ValueError(
        f"fim.rate is {config.rate}, but the tokenizer has no fill-in-the-middle tokens of a usual name: set "
        f"fim.sentinels; its special tokens are: {known}"
    )


class FimDocuments:
    """Documents of which some are rearranged, under the same numbers."""

    def __init__(self, documents: Documents, fim: Fim):
        self._documents, self._fim = documents, fim
        self._key = hash_of(fim.seed, _STREAM)
        self._chosen = _happens(self._draws(documents.hashes, 0)[0], fim.rate) & (documents.lengths >= _LEAST)
        self.lengths = documents.lengths + _SENTINELS * self._chosen
        self.hashes = documents.hashes
        self.settings = repr((documents.settings, fim))
        assert documents.learns_all, "conversations are not rearranged"
        self.learns_all = True

    def read(self, document: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        """int32: tokens [start, start + length) of each document as it is read here, side by side."""
        if not self._chosen[document].any():
            return self._documents.read(document, start, length)
        first, count = self._runs(document)
        begin = np.cumsum(count, axis=1) - count
        low = np.maximum(begin, start[:, None])
        taken = np.maximum(np.minimum(begin + count, (start + length)[:, None]) - low, 0)
        flat = taken.ravel()
        some = np.flatnonzero(flat)
        where = (first + low - begin).ravel()[some]
        ids = self._documents.read(document[some // _RUNS], where, flat[some])
        column = (np.cumsum(flat) - flat).reshape(taken.shape)
        for run, sentinel in ((1, self._fim.prefix), (3, self._fim.suffix), (5, self._fim.middle)):
            ids[column[taken[:, run] > 0, run]] = sentinel
        return ids

    def learned(self, document: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        """uint8: 1 for each of those tokens."""
        return np.ones(int(length.sum()), np.uint8)

    def _runs(self, document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [pieces, runs], twice: where each run of a document begins in the document as it was, and its length.
        A sentinel is a run of one token that stands for no other."""
        chosen, whole = self._chosen[document], self._documents.lengths[document]
        one, zero = np.ones_like(whole), np.zeros_like(whole)
        left = (self._documents.read(document, zero, one) == self._fim.bos).astype(np.int64)  # no id is None
        inner = whole - left - 1
        cut, end = self._cuts(document, inner)
        first = [zero, zero, left, zero, left + end, zero, left + cut, whole - 1]
        count = [left, one, cut, one, inner - end, one, end - cut, one]
        first, count = np.stack(first, axis=1), np.stack(count, axis=1)
        first[~chosen], count[~chosen] = 0, 0
        count[~chosen, 0] = whole[~chosen]
        return first, count

    def _cuts(self, document: np.ndarray, inner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [pieces], twice: where the middle begins and ends, each place as likely. SPM is PSM whose middle takes
        the prefix in."""
        way, *places = self._draws(self._documents.hashes[document], 1, 2, 3)
        gaps = (inner + 1).astype(np.uint64)
        cut, end = np.sort([(place >> np.uint64(32)) * gaps >> np.uint64(32) for place in places], axis=0)
        cut, end = cut.astype(np.int64), end.astype(np.int64)
        return np.where(_happens(way, self._fim.spm_rate), 0, cut), end

    def _draws(self, hashes: np.ndarray, *numbers: int) -> np.ndarray:
        """uint64 [numbers, documents]: random bits of each document; other numbers give others."""
        return splitmix64(splitmix64(hashes ^ self._key) + np.array(numbers, np.uint64)[:, None])


def _happens(draw: np.ndarray, rate: float) -> np.ndarray:
    """bool, true for a share of `rate` of random bits."""
    return (draw >> np.uint64(11)) < np.uint64(int(rate * 2**53))
