"""The connections of each key, counted over all workers, for a key's own `max_connections`.

Each slot has a table of its own on the shared page, which only its worker writes: rows of a digest
of the key's name and a count, with open addressing (Knuth, "The Art of Computer Programming" 3,
6.4). A row stays where it is until the slot's process is gone. Only keys with a bound have a row.

A worker first adds a connection to its own count and then reads those of the others. So two
workers that take the last place at the same time cannot both miss the other one; both may be
refused, though.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.workers.shared_page import SharedPage

_DIGEST, _COUNT, _ROW = 0, 1, 2


class KeyCounts:
    """Counts connections by the names of their keys.

    Always: a row's count is that of this worker's connections. A key beyond `shared_page.MAX_KEYS`
    has no row: its connections are counted in each worker alone.
    """

    def __init__(self, page: SharedPage) -> None:
        self._page = page
        self._own = page.key_table(page.slot)
        self._others = [page.key_table(slot) for slot in range(page.slots) if slot != page.slot]

    def counter(self, name: str) -> Callable[[int], int]:
        """Return a function that adds to the count of *name* here, and returns how many there are
        elsewhere.
        """
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        # Positive, and not the 0 of an empty row.
        return partial(self._add, int.from_bytes(digest) >> 1 | 1)

    def _add(self, digest: int, change: int) -> int:
        at = _find(self._own, digest)
        if at is None:
            return 0
        if not self._own[at + _DIGEST]:
            self._own[at + _DIGEST] = digest
        self._own[at + _COUNT] += change
        return sum(
            table[at + _COUNT]
            for table in self._others
            if (at := _find(table, digest)) is not None
        )


def _find(table: memoryview[int], digest: int) -> int | None:
    """Return where the row of *digest* is, or where it would be.

    None if it is not there, and there is no room.
    """
    size = len(table)
    start = digest * _ROW % size
    for step in range(0, size, _ROW):
        at = (start + step) % size
        if table[at + _DIGEST] in {digest, 0}:
            return at
    return None
