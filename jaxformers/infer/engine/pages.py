"""Who owns which page of the cache, and which prefixes of prompts can be found in it.

Host-side arithmetic over page numbers: this module has never seen an array on a device. A page is free, used by at
least one request, or cached: kept, while nobody needs its room, because it holds a known piece of some prompt. Pieces
are looked up by a digest of all tokens up to their end, so one can be found only behind the same beginning
(arXiv:2312.07104); pieces that were longest unused go first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

Digest = bytes


def piece_digests(tokens: np.ndarray, piece: int, *, salt: bytes = b"", ahead: int = 0) -> list[Digest]:
    """One digest for each whole piece of int32 tokens [T], each over everything up to the piece's end and the `ahead`
    tokens behind it, on which what is kept of it depends too; a piece with fewer behind it has none. `salt` keeps
    apart what the same tokens mean in different circumstances."""
    chain, found = hashlib.blake2b(salt, digest_size=16), []
    for end in range(piece, len(tokens) + 1 - ahead, piece):
        chain.update(tokens[end - piece : end].tobytes())
        whole = chain.copy()
        whole.update(tokens[end : end + ahead].tobytes())
        found.append(whole.digest())
    return found


class Pages:
    """The pages 1 to `total`: page 0 belongs to nobody. free + used + cached = total, always."""

    def __init__(self, total: int):
        self.total, self.used, self.cached = total, 0, 0
        self._free = list(range(total, 0, -1))
        self._users = [0] * (total + 1)  # requests that hold each page
        self._known: dict[Digest, tuple[int, ...]] = {}
        self._digest_of: dict[int, Digest] = {}  # of the piece that a page belongs to
        self._idle: OrderedDict[Digest, None] = OrderedDict()  # known pieces that nobody uses, longest unused first

    @property
    def free(self) -> int:
        return len(self._free)

    def find(self, digests: Sequence[Digest]) -> list[int]:
        """The pages of the longest known beginning of a chain of pieces, in order."""
        found: list[int] = []
        for digest in digests:
            if digest not in self._known:
                break
            found.extend(self._known[digest])
        return found

    def take(self, shared: Sequence[int], fresh: int) -> list[int] | None:
        """`shared` pages that were found and `fresh` new ones, now held by the caller; None where there is no room.

        Room is made by forgetting idle pieces, the longest unused first.
        """
        if fresh > self.free + self.cached - sum(not self._users[page] for page in shared):
            return None
        for page in shared:
            self._hold(page)
        while len(self._free) < fresh:
            self._forget(next(iter(self._idle)))
        new = [self._free.pop() for _ in range(fresh)]
        for page in new:
            self._hold(page)
        self.check()
        return [*shared, *new]

    def remember(self, digest: Digest, pages: Sequence[int]) -> None:
        """Lets others find a piece in these held pages from now on. One that is known already stays where it is."""
        if digest not in self._known:
            self._known[digest] = tuple(pages)
            self._digest_of.update(dict.fromkeys(pages, digest))

    def give_back(self, pages: Sequence[int]) -> None:
        """Ends one holder's use of its pages, whole pieces: the only way in which a page becomes cached or free.

        Later pages first, so that a prefix outlives what came behind it.
        """
        for page in reversed(pages):
            assert self._users[page] > 0, f"page {page} is given back by somebody who does not hold it"
            self._users[page] -= 1
            if not self._users[page]:
                self.used -= 1
                self._leave(page)
        self.check()

    def check(self) -> None:
        """The invariant, by the numbers that are kept."""
        assert self.free + self.used + self.cached == self.total, (self.free, self.used, self.cached, self.total)

    def audit(self) -> None:
        """The invariant, page by page: each one is free, held by somebody, or in an idle piece, and no two of these."""
        idle = [page for digest in self._idle for page in self._known[digest]]
        held = [page for page, users in enumerate(self._users) if users]
        assert sorted([*self._free, *idle, *held]) == list(range(1, self.total + 1))
        assert (len(held), len(idle)) == (self.used, self.cached)

    def _hold(self, page: int) -> None:
        digest = self._digest_of.get(page)
        if digest in self._idle:
            del self._idle[digest]
            self.cached -= len(self._known[digest])
        self.used += not self._users[page]
        self._users[page] += 1

    def _leave(self, page: int) -> None:
        """Files a page that nobody holds any more: under free, or with the rest of its piece under idle."""
        digest = self._digest_of.get(page)
        if digest is None:
            self._free.append(page)
        elif not any(self._users[other] for other in self._known[digest]):
            self._idle[digest] = None
            self.cached += len(self._known[digest])

    def _forget(self, digest: Digest) -> None:
        """Frees the pages of an idle piece."""
        del self._idle[digest]
        pages = self._known.pop(digest)
        self.cached -= len(pages)
        for page in pages:
            del self._digest_of[page]
        self._free.extend(pages)
