"""Conversations on their way into a token cache: read from records, written out as texts, encoded with what to learn.

Beside its ids, a cache of conversations keeps a byte a token, 1 where the token is learned, and a row of facts for each
document: where it came from and how many turns of each role it has. Knows nothing of shards and rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxformers.data.config import ChatConfig
from jaxformers.data.conversations import ROLES, ConversationError, conversation_of
from jaxformers.data.records import BadRecord, Document, Entry, Unit
from jaxformers.data.tokenizer import Tokenizer

UNITS: tuple[Unit, ...] = ("byte", "row", "file")
# One row per document of a cache of conversations: the number of its file among the sources, where in it the record
# begins (as of `BadRecord`), and its messages by role, all 0 for a raw text.
ORIGIN = np.dtype([("file", "<i4"), ("unit", "u1"), ("offset", "<i8"), ("turns", "<u2", (len(ROLES),))])


@dataclass(frozen=True, eq=False)
class Dialogue:
    """A conversation as a text with its special tokens, and where it came from.

    Attributes:
        learned: ranges of the text's characters that are to be learned.
        hash: 64 bits of what is said.
        turns: how many messages there are of each of ROLES.
    """

    text: str
    learned: tuple[tuple[int, int], ...]
    hash: int
    turns: tuple[int, ...]
    path: str
    offset: int
    unit: Unit


def dialogue_reader(
    config: ChatConfig, tokenizer: Tokenizer
) -> Callable[[str, Entry], "Dialogue | Document | BadRecord"]:
    """A function from a file's path and one of its records to the conversation, or the raw text, that it holds."""
    from jaxformers.data.chat import ChatTemplateError  # brings jinja, which most corpora do not need
    from jaxformers.data.turns import Writer

    writer = Writer(tokenizer, config)

    def read(path: str, entry: Entry) -> Dialogue | Document | BadRecord:
        try:
            found = conversation_of(entry.value, config)
            if isinstance(found, str):
                return Document(found, entry.offset)
            written = writer.write(found)
        except (ConversationError, ChatTemplateError) as error:
            return BadRecord(path, entry.offset, str(error), entry.unit)
        return Dialogue(written.text, written.learned, found.hash, found.turns, path, entry.offset, entry.unit)

    return read


def encode_dialogues(dialogues: Sequence[Dialogue], tokenizer: Tokenizer) -> list[tuple[list[int], np.ndarray]]:
    """Ids of each conversation, and bool [tokens]: which of them to learn. Nothing is put before or behind the text."""
    found = tokenizer.encode_with_places([dialogue.text for dialogue in dialogues])
    return [
        (ids, learned_tokens(places, dialogue.learned))
        for dialogue, (ids, places) in zip(dialogues, found, strict=True)
    ]


def learned_tokens(places: np.ndarray, learned: tuple[tuple[int, int], ...]) -> np.ndarray:
    """bool [tokens]: which tokens have a character to learn, given the characters of each token (int64 [tokens, 2])."""
    starts, stops = places[:, 0], places[:, 1]
    # A token of nothing but spaces may come out as no characters; it stands for those behind the token before.
    before = np.concatenate([np.zeros(1, np.int64), stops[:-1]])
    starts = np.where(starts == stops, np.minimum(before, starts), starts)
    found = np.zeros(len(places), bool)
    for first, last in learned:
        found |= (starts < last) & (stops > first)
    return found


def origins_of(documents: Sequence[object], file_numbers: dict[str, int]) -> np.ndarray:
    """A row of ORIGIN for each document."""
    rows = np.zeros(len(documents), ORIGIN)
    for row, document in enumerate(documents):
        if isinstance(document, Dialogue):
            turns = np.minimum(document.turns, np.iinfo(np.uint16).max)
            rows[row] = (file_numbers[document.path], UNITS.index(document.unit), document.offset, turns)
    return rows
