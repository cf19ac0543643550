"""The pages of layers that look back only so far: a request has them for what its next queries see, and no more.

They come and go in whole pieces of prompts. A piece that others may look for stays known when its request has moved on,
until its room is needed. A prompt can go on behind a known beginning if all that is still looked at there is known, in
these pages as in those of the other layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxformers.infer.engine.pages import Digest, Pages

Held = dict[int, list[int]]  # a request's pages, by the number of the piece that they hold


class Recent:
    """`total` pages, `piece_pages` to each piece of `piece` tokens, for queries that see `window` keys."""

    def __init__(self, total: int, *, window: int, piece: int, piece_pages: int):
        self.pages = Pages(total)
        self._window, self._piece, self._piece_pages = window, piece, piece_pages

    def reach(self, digests: Sequence[Digest], most: int) -> int:
        """The largest number of pieces, `most` at most, behind which a prompt can go on."""
        for count in range(most, 0, -1):
            seen = digests[self._first_seen(count * self._piece) : count]
            if len(self.pages.find(seen)) == len(seen) * self._piece_pages:
                return count
        return 0

    def share(self, held: Held, digests: Sequence[Digest], count: int) -> None:
        """In place of what a request has, it gets what queries behind so many known pieces see."""
        self.end(held)
        for number in range(self._first_seen(count * self._piece), count):
            pages = self.pages.take(self.pages.find(digests[number : number + 1]), 0)
            assert pages is not None
            held[number] = pages

    def move(self, held: Held, start: int, end: int) -> bool:
        """Gives back what no query from position `start` on sees, and takes pages for positions up to `end`; whether
        anything has changed."""
        gone = [number for number in held if number < self._first_seen(start)]
        new = [number for number in range(start // self._piece, -(-end // self._piece)) if number not in held]
        for number in gone:
            self.pages.give_back(held.pop(number))
        for number in new:
            pages = self.pages.take([], self._piece_pages)
            assert pages is not None, "there is room for as much as every slot may look back at"
            held[number] = pages
        return bool(gone or new)

    def remember(self, held: Held, digest: Digest, number: int) -> None:
        """Lets others find a piece from now on."""
        self.pages.remember(digest, held[number])

    def end(self, held: Held) -> None:
        """Takes all of a request's pages from it."""
        for number in sorted(held, reverse=True):
            self.pages.give_back(held.pop(number))

    def row(self, held: Held, width: int) -> np.ndarray:
        """int32 [width]: a slot's row of the table, `NOWHERE` for what it does not have."""
        row = np.zeros(width, np.int32)
        for number, pages in held.items():
            place = row[number * self._piece_pages :][: self._piece_pages]
            place[:] = pages[: len(place)]
        return row

    def _first_seen(self, position: int) -> int:
        """The number of the first piece that a query at this position sees."""
        return max(position - (self._window - 1), 0) // self._piece
