"""What a token cache holds, in figures: lengths, bytes a token, which tokens are frequent, how full its rows are.

Knows no tokenizer: tokens are ids here, and whoever shows them decodes them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxformers.data.cache import TokenCache
from jaxformers.data.rows import Row

PERCENTILES = (5, 25, 50, 75, 95, 99)
_COUNTED = 1 << 28  # tokens of a histogram at most, about two seconds
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Lengths:
    """Tokens of the documents of a corpus; `percentiles` in the order of PERCENTILES."""

    mean: float
    shortest: int
    longest: int
    percentiles: tuple[int, ...]
    longer_than_a_row: float


@dataclass(frozen=True)
class Histogram:
    """How often tokens occur among the `counted` ones, which are all of them or even samples of a large corpus.

    `used` is how many ids of the vocabulary occur; `frequent` is (id, count) of the most frequent ones.
    """

    counted: int
    used: int
    frequent: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Segment:
    """Tokens side by side in a row, of one piece of a document, that are all learned or all not.

    `segment` counts the pieces of the row from 1, 0 is padding; `start` is the column; `learned` says whether the row
    asks the model to predict these tokens.
    """

    segment: int
    start: int
    ids: tuple[int, ...]
    learned: bool


def lengths_of(cache: TokenCache, *, sequence_length: int) -> Lengths:
    """How long the documents of a cache are, in tokens."""
    lengths = cache.lengths
    ranks = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    return Lengths(
        mean=float(lengths.mean()),
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        percentiles=tuple(map(int, ranks)),
        longer_than_a_row=float((lengths > sequence_length).mean()),
    )


def histogram_of(cache: TokenCache, *, top: int, vocab_size: int) -> Histogram:
    """How often each token occurs, of which the `top` most frequent are named; of equal ones the smallest ids."""
    total = len(cache.tokens)
    counts = np.zeros(vocab_size, np.int64)
    parts = -(-total // _AT_ONCE)
    read = min(parts, _COUNTED // _AT_ONCE)
    for number in range(read):
        start = number * parts // read * _AT_ONCE
        counts += np.bincount(cache.tokens[start : start + _AT_ONCE], minlength=vocab_size)
    order = np.argsort(-counts, kind="stable")[:top]
    frequent = tuple((int(i), int(counts[i])) for i in order if counts[i])
    return Histogram(counted=int(counts.sum()), used=int(np.count_nonzero(counts)), frequent=frequent)


def segments_of(row: Row) -> Iterator[Segment]:
    """A row [T] cut where a piece begins or where learning begins or stops."""
    tokens, segments, weights = row["tokens"], row["segment_ids"], row["weights"]
    # The weight of a token is that of the place before it, which predicts it; a piece's first token nothing predicts.
    learned = np.zeros(len(tokens), bool)
    learned[1:] = (weights[:-1] > 0) & (segments[1:] == segments[:-1])
    cuts = np.flatnonzero((np.diff(segments) != 0) | (np.diff(learned.astype(np.int8)) != 0)) + 1
    for part in np.split(np.arange(len(tokens)), cuts):
        start = int(part[0])
        yield Segment(int(segments[start]), start, tuple(tokens[part].tolist()), bool(learned[start]))
