"""Documents by number, as a packing plan cuts them: their lengths, and the ids of any parts of them.

Knows no row: which parts are wanted, and what lies beside what, is decided by who asks.
"""

from typing import Protocol

import numpy as np

from jaxformers.data.cache import TokenCache


class Documents(Protocol):
    """Numbered documents.

    Attributes:
        lengths: int64 [documents], in tokens.
        hashes: uint64 [documents], of their texts.
        settings: a text that is equal where equal hashes and lengths mean equal ids.
    """

    lengths: np.ndarray
    hashes: np.ndarray
    settings: str

    def read(self, document: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        """int32: tokens [start, start + length) of each document (int64 [pieces] each), side by side."""


class CachedDocuments:
    """Some documents of a token cache, in the order they are given in."""

    def __init__(self, cache: TokenCache, chosen: np.ndarray):
        """`chosen` is int64, indices into the cache."""
        self.lengths, self.hashes = cache.lengths[chosen], cache.hashes[chosen]
        self.settings = cache.manifest.tokenizer
        self._tokens, self._starts = cache.tokens, cache.starts[chosen]

    def read(self, document: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        ids = np.empty(int(length.sum()), np.int32)
        left = 0
        for first, count in zip((self._starts[document] + start).tolist(), length.tolist(), strict=True):
            ids[left : left + count] = self._tokens[first : first + count]
            left += count
        return ids
