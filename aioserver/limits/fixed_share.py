"""Fixed shares: what one of several processes may use of a limit, where nobody says who uses how
much.
"""

from __future__ import annotations

from typing import NamedTuple


def fixed_share(limit: int, rank: int, count: int) -> int:
    """Return the share of number *rank*, from 0, of *count*; all of them together are *limit*."""
    return limit // count + (rank < limit % count)


class FixedShare:
    """The fixed share of an instance of a cluster, for as long as its server does not answer.

    *known* are its rank from 0 and the number of instances, where both are known by other means
    than answers: those of a parent's workers. Without them an instance has no share before it has
    learned who lives: two strangers must not both think that they are alone.

    Instances may have heard of different members; what tests/support/renew_script.py says of ranks
    keeps the sum within the limit then.
    """

    def __init__(self, known: tuple[int, int] | None) -> None:
        self._known = known
        self._learned: tuple[int, int] | None = None

    @property
    def instances(self) -> int:
        """Of how many instances it is one; 0: of an unknown number."""
        view = self._known or self._learned
        return 0 if view is None else view[1]

    def of(self, limit: int, least: int = 0) -> int:
        """Return the share of *limit*, and at least *least* where there is one."""
        view = self._known or self._learned
        if view is None:
            return 0
        rank, count = view
        return max(least, fixed_share(limit, rank, count))

    def adopt(self, rank: int, count: int, *, known_to_all: bool) -> None:
        """Take in that this instance is number *rank* of *count*.

        Until that is *known_to_all*, its share is within both its former one and the one to come.
        """
        if known_to_all:
            self._learned = rank, count
        elif self._learned is not None:
            before, number = self._learned
            self._learned = max(before, rank), max(number, count)


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
