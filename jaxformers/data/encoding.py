"""Documents to ids: the good records of some pieces, in batches, with the facts that the cache keeps of each.

Knows no file but through its pieces, and nothing of shards.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxformers.data.records import BadRecord, Document, Fields, Piece, Tokens
from jaxformers.data.sources import read
from jaxformers.data.tokenizer import Tokenizer

# One row per document: length in tokens, a hash of its text (or of its ids, where it came as ids), and the bytes of
# its text as UTF-8.
DOCUMENT = np.dtype([("length", "<i8"), ("hash", "<u8"), ("bytes", "<i8")])

_BATCH_CHARACTERS = 1 << 18  # encoded in one call: large enough to hide the call, small enough to stay in cache


@dataclass(frozen=True, eq=False)
class Encoded:
    """Documents as ids [tokens], end to end, each ended by the end-of-text id; and `DOCUMENT` rows [documents]."""

    ids: np.ndarray
    facts: np.ndarray


def good_documents(
    pieces: Iterable[Piece], fields: Fields, tokenizer: Tokenizer, bad: list[BadRecord]
) -> Iterator[Document | Tokens]:
    """The documents of the pieces in order; what is none, or has ids that the tokenizer lacks, goes to `bad`."""
    for piece in pieces:
        for record in read(piece, text_field=fields.text, tokens_field=fields.tokens):
            if isinstance(record, Tokens):
                record = _in_vocabulary(record, piece.path, tokenizer)
            if isinstance(record, BadRecord):
                bad.append(record)
            else:
                yield record


def _in_vocabulary(record: Tokens, path: str, tokenizer: Tokenizer) -> Tokens | BadRecord:
    if not len(record.ids) or (record.ids.min() >= 0 and record.ids.max() < tokenizer.vocab_size):
        return record
    wrong = record.ids[(record.ids < 0) | (record.ids >= tokenizer.vocab_size)][0]
    reason = f"id {wrong} is not one of the tokenizer's {tokenizer.vocab_size} ids"
    return BadRecord(path, record.offset, reason, record.unit)


def is_empty(document: Document | Tokens) -> bool:
    """Whether there is nothing to learn: white space, or no ids."""
    return not (document.text.strip() if isinstance(document, Document) else len(document.ids))


def batches(documents: Iterable[Document | Tokens]) -> Iterator[list[Document | Tokens]]:
    """Some documents at a time, by their size."""
    batch: list[Document | Tokens] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text if isinstance(document, Document) else document.ids)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(
    documents: Sequence[Document | Tokens], tokenizer: Tokenizer, *, parse_special_tokens: bool, dtype: str
) -> Encoded:
    """A batch as ids of a dtype: a text begins and ends as the tokenizer has it, ready ids stay as they are."""
    texts = [document.text for document in documents if isinstance(document, Document)]
    encoded = tokenizer.encode_batch(texts, parse_special_tokens=parse_special_tokens)
    for ids in encoded:
        if not ids or ids[-1] != tokenizer.eos_id:
            ids.append(tokenizer.eos_id)
    if len(texts) == len(documents):
        lengths = list(map(len, encoded))
        # One pass over Python's integers; an array for each text and then one of all would be three.
        flat = np.fromiter(itertools.chain.from_iterable(encoded), dtype, sum(lengths))
    else:
        of_texts = iter(encoded)
        parts = [next(of_texts) if isinstance(each, Document) else _ended(each.ids, tokenizer) for each in documents]
        lengths = list(map(len, parts))
        flat = np.concatenate([np.asarray(part, dtype) for part in parts])
    return Encoded(flat, _facts(documents, flat, lengths, tokenizer))


def _ended(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    return ids if ids[-1] == tokenizer.eos_id else np.append(ids.astype(np.int64), tokenizer.eos_id)


def _facts(
    documents: Sequence[Document | Tokens], flat: np.ndarray, lengths: Sequence[int], tokenizer: Tokenizer
) -> np.ndarray:
    facts = np.empty(len(documents), DOCUMENT)
    stops = itertools.accumulate(lengths)
    for row, (document, length, stop) in enumerate(zip(documents, lengths, stops, strict=True)):
        if isinstance(document, Document):
            raw = document.text.encode()
            size = len(raw)
        else:
            ids = flat[stop - length : stop]
            raw = ids.astype("<u4").tobytes()  # whatever type they had, so that copies of a document are equal
            size = tokenizer.count_bytes(ids)
        content = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
        facts[row] = (length, content, size)
    return facts
