"""Rows cut out of the token cache: everything a model needs to know of one sequence. T tokens in a row.

Knows no batch and no process; `len` and `[n]` are all that Grain asks of a data source.
"""

import hashlib
import sys
from typing import TypedDict

import numpy as np

from jaxformers.data.cache import TokenCache
from jaxformers.data.config import DataConfig
from jaxformers.data.packing import PackingPlan


class Row(TypedDict):
    """One row [T], or a batch of rows [B, T].

    tokens: int32; 0 where there is padding.
    targets: int32; the token that follows in the same document, 0 where there is none.
    weights: float32; 1 where there is a target, 0 at a document's last token and at padding.
    positions: int32; counts from 0 in every piece of a document, 0 at padding.
    segment_ids: int32; 1, 2, ... for the pieces of a row from left to right, 0 at padding.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray


class PackedRows:
    """Some documents of a cache as rows, by number. Row n depends on the documents, the settings and n alone.

    Where a document goes on in another row, its last token here still has its target, so cutting loses none. Documents
    in one row have segments of their own in both kinds of packing: none is meant to see another.
    """

    def __init__(self, cache: TokenCache, documents: np.ndarray, config: DataConfig, *, epochs: int | None = None):
        """Rows of `documents` (int64, indices into the cache); `epochs` None repeats them without end."""
        self._cache = cache
        self._documents = documents
        self._plan = PackingPlan(
            cache.lengths[documents],
            sequence_length=config.sequence_length,
            packing=config.packing,
            window=config.packing_window,
            seed=config.seed,
            shuffle=config.shuffle,
        )
        settings = (config.sequence_length, config.packing, config.packing_window, config.seed, config.shuffle)
        self._settings = repr((cache.manifest.tokenizer, settings))
        self._epochs = epochs
        self.sequence_length = config.sequence_length

    @property
    def rows_per_epoch(self) -> int:
        return self._plan.rows_per_epoch

    @property
    def efficiency(self) -> float:
        """The share of all positions that hold a token rather than padding."""
        return self._plan.efficiency

    @property
    def fingerprint(self) -> str:
        """Equal exactly where row n is equal for every n: the same documents, tokenizer and settings."""
        digest = hashlib.sha256(self._settings.encode())
        digest.update(self._cache.hashes[self._documents].tobytes())
        digest.update(self._cache.lengths[self._documents].tobytes())
        return digest.hexdigest()[:32]

    def __len__(self) -> int:
        endless = self._epochs is None and self.rows_per_epoch > 0
        return sys.maxsize if endless else self.rows_per_epoch * (self._epochs or 1)

    def __repr__(self) -> str:
        return f"PackedRows({len(self._documents)} documents, {self.rows_per_epoch} rows of {self.sequence_length})"

    def __getitem__(self, n: int) -> Row:
        """Row n; epoch after epoch as n goes on.

        Raises:
            IndexError: n below 0, or at or past the last row of the last epoch.
        """
        if not 0 <= n < len(self):
            raise IndexError(f"row {n} of {len(self)}")
        pieces = self._plan.pieces(int(n))
        length, filled = pieces.length, int(pieces.length.sum())
        documents = self._documents[pieces.document]
        left = np.cumsum(length) - length  # where each piece begins in the row
        column = np.arange(filled)
        # Where each column's token lies in the cache, and where its document ends there.
        source = np.repeat(self._cache.starts[documents] + pieces.start - left, length) + column
        end = np.repeat(self._cache.starts[documents] + self._cache.lengths[documents], length)
        has_target = source + 1 < end
        following = self._cache.tokens[np.where(has_target, source + 1, source)]
        return Row(
            tokens=self._padded(self._cache.tokens[source]),
            targets=self._padded(np.where(has_target, following, 0)),
            weights=self._padded(has_target, np.float32),
            positions=self._padded(column - np.repeat(left, length)),
            segment_ids=self._padded(np.repeat(np.arange(1, len(length) + 1), length)),
        )

    def _padded(self, values: np.ndarray, dtype: type = np.int32) -> np.ndarray:
        row = np.zeros(self.sequence_length, dtype)
        row[: len(values)] = values
        return row
