"""Fixed shares: what one of several processes may use of a limit, where nobody says who uses how
much.
"""

from __future__ import annotations

from typing import NamedTuple


def fixed_share(limit: int, rank: int, count: int) -> int:
    """Return the share of number *rank*, from 0, of *count*; all of them together are *limit*."""
    return limit // count + (rank < limit % count)


class Scope(NamedTuple):
    """The processes among which a limit is shared: this one is number *rank* of the *workers* of
    *host*.

    *host* is a name that only the workers of one parent have. *first*: no other worker of it was
    there before.
    """

    host: str
    rank: int
    workers: int
    first: bool = False

    def share(self, limit: int) -> int:
        """Return the fixed share of *limit*: at least 1, but 0 of 0."""
        return max(1, fixed_share(limit, self.rank, self.workers)) if limit else 0
