"""The part of each limit that an instance has while the server does not answer.

Of N instances each has `limit // N`, and the first `limit % N` one more: as many as the limit
together. Instances may have heard of different members; what tests/support/settle_model.py says of
ranks keeps the sum within the limit then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.limits.fixed_share import fixed_share

if TYPE_CHECKING:
    from aioserver.wings.cluster.lease_messages import Answer


class FixedShare:
    """The fixed share of an instance.

    *known* are its rank from 0 and the number of instances, where both are known by other means
    than answers: those of a parent's workers. Without them an instance has no share before it was
    told who lives: two strangers must not both think that they are alone.
    """

    def __init__(self, known: tuple[int, int] | None) -> None:
        self._known = known
        self._told: tuple[int, int] | None = None

    @property
    def instances(self) -> int:
        """Of how many instances it is one; 0: of an unknown number."""
        view = self._known or self._told
        return 0 if view is None else view[1]

    def of(self, limit: int, least: int = 0) -> int:
        """Return the share of *limit*, and at least *least* where there is one."""
        view = self._known or self._told
        if view is None:
            return 0
        rank, count = view
        return max(least, fixed_share(limit, rank, count))

    def adopt(self, answer: Answer) -> None:
        """Take in who else lives.

        Until all others know of this instance, its share is within both its former one and the one
        to come.
        """
        if answer.known_to_all:
            self._told = answer.rank, answer.count
        elif self._told is not None:
            rank, count = self._told
            self._told = max(rank, answer.rank), max(count, answer.count)
