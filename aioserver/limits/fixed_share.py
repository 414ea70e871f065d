"""Fixed shares: the part of a limit that one of several processes may use while no server divides
it.
"""

from __future__ import annotations

from typing import NamedTuple


def fixed_share(limit: int, rank: int, count: int) -> int:
    """Return the share of process *rank*, from 0, of *count* processes; the shares add up to
    *limit*.
    """
    return limit // count + (rank < limit % count)


class FixedShare:
    """The fixed share of an instance of a cluster, used while the shared server does not answer.

    *known* are its rank, from 0, and the number of instances, if they do not depend on the
    server's answers: the workers of one parent have them. Without them an instance has no share
    before it has learned which instances are alive: two strangers must not both believe that they
    are alone.

    Instances may know different members. The rules for ranks in
    tests/support/renew_script.py keep the sum of the shares within the limit nevertheless.
    """

    def __init__(self, known: tuple[int, int] | None) -> None:
        self._known = known
        self._learned: tuple[int, int] | None = None

    @property
    def instances(self) -> int:
        """The number of instances, 0 if it is not known."""
        view = self._known or self._learned
        return 0 if view is None else view[1]

    def of(self, limit: int, least: int = 0) -> int:
        """Return the share of *limit*; at least *least* once the rank is known."""
        view = self._known or self._learned
        if view is None:
            return 0
        rank, count = view
        return max(least, fixed_share(limit, rank, count))

    def adopt(self, rank: int, count: int, *, known_to_all: bool) -> None:
        """Adopt number *rank* of *count* as this instance's rank.

        Until the new rank is *known_to_all*, the share is within both the former share and the new
        one.
        """
        if known_to_all:
            self._learned = rank, count
        elif self._learned is not None:
            before, number = self._learned
            self._learned = max(before, rank), max(number, count)


class Scope(NamedTuple):
    """The processes among which a limit is shared: this one is number *rank* of the *workers* of
    *host*.

    *host* is a name that only the workers of one parent have. *first*: this is the first worker of
    that host.
    """

    host: str
    rank: int
    workers: int
    first: bool = False

    def share(self, limit: int) -> int:
        """Return the fixed share of *limit*: at least 1, but 0 of 0."""
        return max(1, fixed_share(limit, self.rank, self.workers)) if limit else 0
