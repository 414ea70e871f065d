"""A gate whose places are shared with other instances: its limit is what is granted here
(wings/cluster/grants.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.limits.gate import Gate, Place

if TYPE_CHECKING:
    from aioserver.wings.cluster.grants import Grant
    from aioserver.wings.cluster.leases import Leases

# Seconds: a request that the pace lets start within them wants a place.
SOON = 0.1


class SharedGate(Gate):
    """A gate that starts nothing beyond what is granted; `share` it before it is used.

    It comes first among the bases of a gate that has others:
    `class Shared(SharedGate, ProviderGate)`.

    Always: nothing starts on a lease that is over. A queue that is full takes as many more
    requests as there are places that others may have free, until the server has said that they
    have not.
    """

    _leases: Leases
    _grant: Grant

    def share(self, leases: Leases, name: str) -> None:
        """Share the limit, which is that of all instances together, under *name*."""
        limit, self._limit = self._limit, 0
        self._leases = leases
        self._grant = leases.hold(name, limit, self)

    def unshare(self) -> None:
        """Say no more of the places; for a gate that ends."""
        self._leases.drop(self._grant)

    @property
    def shared_limit(self) -> int:
        """How many places all instances have together."""
        return self._grant.limit

    @property
    def full(self) -> bool:
        """Whether the queue has no room for one more request."""
        return super().full and self.waiting >= self._queue_size + self._grant.elsewhere

    def apply(self, limit: int, *, queue_size: int, queue_timeout: float) -> None:
        """Use new bounds; *limit* is that of all instances together."""
        self._grant.apply(limit)
        super().apply(self._limit, queue_size=queue_size, queue_timeout=queue_timeout)

    def serve(self) -> None:
        """Let in the waiters that may start now, and ask for places for the others."""
        self._leases.check()
        super().serve()
        if self._queue:
            self._grant.wait_begins()

    def try_enter(self, cost: int = 0) -> Place | None:
        """Return a place if a granted one is free and nobody waits for it.

        *cost* counts for the pace.
        """
        self._leases.check()
        return super().try_enter(cost)

    @property
    def wanting(self) -> int:
        """How many requests wait and could start soon if there were places for them."""
        count = len(self._queue)
        if not count or self._pace is None:
            return count
        if self._delay() > SOON:
            return 0
        while count > 1 and self._pace.delay(count - 1) > SOON:
            count //= 2
        return count

    @property
    def weight(self) -> int:
        """The weights of the callers that wait, together; at least 1."""
        return max(1, self._queue.weight)

    def resize(self, places: int) -> None:
        """Take no more than *places* from now on; called by the grant."""
        more = places > self._limit
        self._limit = places
        if more:
            self._full_since = self._clock()
            super().serve()

    def _leave(self) -> None:
        self._grant.place_ends()
        super()._leave()
