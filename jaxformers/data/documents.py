"""Documents by number, as a packing plan cuts them: their lengths, and the ids of any parts of them.

Knows no row: which parts are wanted, and what lies beside what, is decided by who asks.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from jaxformers.data.cache import TokenCache

TooLong = Literal["drop", "keep_start", "keep_end", "error"]


class Documents(Protocol):
    """Numbered documents.

    Attributes:
        lengths: int64 [documents], in tokens.
        hashes: uint64 [documents], of their texts.
        settings: a text that is equal where equal hashes and lengths mean equal ids.
        learns_all: whether every token is to be learned; `learned` says which ones else.
    """

    lengths: np.ndarray
    hashes: np.ndarray
    settings: str
    learns_all: bool

    def read(self, document: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        """int32: tokens [start, start + length) of each document (int64 [pieces] each), side by side."""

    def learned(self, document: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        """uint8: whether each of those tokens is to be learned, 1 or 0."""


class CachedDocuments:
    """Some documents of a token cache, in the order they are given in. Of conversations, those that are too long for a
    row of `row` tokens are cut or left out, as `too_long` says."""

    def __init__(self, cache: TokenCache, chosen: np.ndarray, *, row: int | None = None, too_long: TooLong = "drop"):
        """`chosen` is int64, indices into the cache. ValueError for a conversation that is too long, if that is one."""
        self.settings, self.learns_all = cache.settings, cache.learned is None
        self._tokens, self._learned = cache.tokens, cache.learned
        starts, lengths = cache.starts[chosen], cache.lengths[chosen]
        if cache.learned is not None and row is not None:
            fit = fit_conversations(cache, chosen, row=row, too_long=too_long)
            chosen, starts, lengths = fit.documents, fit.starts, fit.lengths
            self.settings += f" {too_long}"
        self.lengths, self.hashes, self._starts = lengths, cache.hashes[chosen], starts

    def read(self, document: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        ids = np.empty(int(length.sum()), np.int32)
        return self._copy(self._tokens, ids, document, start, length)

    def learned(self, document: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        found = np.ones(int(length.sum()), np.uint8)
        return found if self._learned is None else self._copy(self._learned, found, document, start, length)

    def _copy(
        self, source: np.ndarray, out: np.ndarray, document: np.ndarray, start: np.ndarray, length: np.ndarray
    ) -> np.ndarray:
        left = 0
        for first, count in zip((self._starts[document] + start).tolist(), length.tolist(), strict=True):
            out[left : left + count] = source[first : first + count]
            left += count
        return out


@dataclass(frozen=True)
class Fit:
    """Documents that have a place in rows: int64 [documents] each. `starts` count tokens of the cache.

    `too_long` are the conversations, as indices into the cache, that were left out or cut.
    """

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    too_long: np.ndarray


def fit_conversations(cache: TokenCache, chosen: np.ndarray, *, row: int, too_long: TooLong) -> Fit:
    """Some documents (int64, indices into a cache of conversations) so that no conversation is longer than a row.

    A conversation of which nothing to learn fits is left out, wherever it is cut. Raw texts may go on in another row.

    Raises:
        ValueError: too_long is "error" and a conversation is, which is named.
    """
    assert cache.learned is not None
    assert cache.origins is not None
    starts, lengths = cache.starts[chosen].copy(), cache.lengths[chosen].copy()
    long = np.flatnonzero((lengths > row) & cache.origins["turns"][chosen].any(axis=1))
    if too_long == "error" and len(long):
        tokens, name = lengths[long[0]], cache.name_of(int(chosen[long[0]]))
        raise ValueError(
            f"{name}: a conversation of {tokens} tokens, and rows have {row}: raise data.sequence_length, or set "
            "data.chat.too_long to drop, keep_start or keep_end"
        )
    if too_long == "keep_end":
        starts[long] += lengths[long] - row
    lengths[long] = row
    # The first token of a row is no target.
    empty = [n for n in long.tolist() if too_long == "drop" or not cache.learned[starts[n] + 1 : starts[n] + row].any()]
    kept = np.delete(np.arange(len(chosen)), empty)
    return Fit(chosen[kept], starts[kept], lengths[kept], chosen[long])
