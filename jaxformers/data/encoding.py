"""Documents to ids: the good records of some pieces, in batches, with the facts that the cache keeps of each.

Knows no file but through its pieces, and nothing of shards.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxformers.data.config import ChatConfig
from jaxformers.data.dialogues import Dialogue, dialogue_reader, encode_dialogues
from jaxformers.data.records import BadRecord, Document, Entry, Fields, Piece, Tokens
from jaxformers.data.sources import read
from jaxformers.data.tokenizer import Tokenizer

# One row per document: length in tokens, a hash of its text (or of its ids, where it came as ids), and the bytes of
# its text as UTF-8.
DOCUMENT = np.dtype([("length", "<i8"), ("hash", "<u8"), ("bytes", "<i8")])

_BATCH_CHARACTERS = 1 << 18  # encoded in one call: large enough to hide the call, small enough to stay in cache


@dataclass(frozen=True, eq=False)
class Encoded:
    """Documents as ids [tokens], end to end, each ended by the end-of-text id or as its chat template has it; and
    `DOCUMENT` rows [documents]. `learned`, uint8 [tokens], is 1 where a token is to be learned."""

    ids: np.ndarray
    facts: np.ndarray
    learned: np.ndarray


def good_documents(
    pieces: Iterable[Piece],
    fields: Fields,
    tokenizer: Tokenizer,
    bad: list[BadRecord],
    chat: ChatConfig | None = None,
) -> Iterator[Document | Tokens | Dialogue]:
    """The documents of the pieces in order; what is none, or has ids that the tokenizer lacks, goes to `bad`."""
    dialogue = None if chat is None else dialogue_reader(chat, tokenizer)
    for piece in pieces:
        for record in read(piece, text_field=fields.text, tokens_field=fields.tokens, entries=fields.entries):
            if isinstance(record, Entry):
                assert dialogue is not None
                record = dialogue(piece.path, record)
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


def is_empty(document: Document | Tokens | Dialogue) -> bool:
    """Whether there is nothing to learn: white space, or no ids."""
    return not (len(document.ids) if isinstance(document, Tokens) else document.text.strip())


def batches(documents: Iterable[Document | Tokens | Dialogue]) -> Iterator[list[Document | Tokens | Dialogue]]:
    """Some documents at a time, by their size."""
    batch: list[Document | Tokens | Dialogue] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.ids if isinstance(document, Tokens) else document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(
    documents: Sequence[Document | Tokens | Dialogue], tokenizer: Tokenizer, *, parse_special_tokens: bool, dtype: str
) -> Encoded:
    """A batch as ids of a dtype: a text begins and ends as the tokenizer has it, a conversation as its template has it,
    ready ids stay as they are."""
    texts = [document.text for document in documents if isinstance(document, Document)]
    encoded = tokenizer.encode_batch(texts, parse_special_tokens=parse_special_tokens)
    for ids in encoded:
        if not ids or ids[-1] != tokenizer.eos_id:
            ids.append(tokenizer.eos_id)
    if len(texts) == len(documents):
        lengths = list(map(len, encoded))
        # One pass over Python's integers; an array for each text and then one of all would be three.
        flat = np.fromiter(itertools.chain.from_iterable(encoded), dtype, sum(lengths))
        return Encoded(flat, _facts(documents, flat, lengths, tokenizer), np.ones(len(flat), np.uint8))
    of_texts = iter(encoded)
    of_dialogues = iter(encode_dialogues([each for each in documents if isinstance(each, Dialogue)], tokenizer))
    parts, learned = [], []
    for each in documents:
        if isinstance(each, Dialogue):
            ids, mask = next(of_dialogues)
        else:
            ids = next(of_texts) if isinstance(each, Document) else _ended(each.ids, tokenizer)
            mask = np.ones(len(ids), bool)
        parts.append(np.asarray(ids, dtype))
        learned.append(mask)
    flat = np.concatenate(parts)
    facts = _facts(documents, flat, list(map(len, parts)), tokenizer)
    return Encoded(flat, facts, np.concatenate(learned).astype(np.uint8))


def _ended(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    return ids if ids[-1] == tokenizer.eos_id else np.append(ids.astype(np.int64), tokenizer.eos_id)


def _facts(
    documents: Sequence[Document | Tokens | Dialogue], flat: np.ndarray, lengths: Sequence[int], tokenizer: Tokenizer
) -> np.ndarray:
    facts = np.empty(len(documents), DOCUMENT)
    stops = itertools.accumulate(lengths)
    for row, (document, length, stop) in enumerate(zip(documents, lengths, stops, strict=True)):
        if isinstance(document, Dialogue):
            facts[row] = (length, document.hash, len(document.text.encode()))
            continue
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
