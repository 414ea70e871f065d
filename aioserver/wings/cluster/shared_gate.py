"""A gate whose places are shared with other instances: its limit is what is granted here
(wings/cluster/grants.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.limits.gate import Gate, Place

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from fractions import Fraction

    from aioserver.limits.fixed_share import Scope
    from aioserver.limits.gate import Waiter
    from aioserver.wings.cluster.grants import Grant
    from aioserver.wings.cluster.leases import Leases

# Seconds: a request that the pace lets start within them wants a place.
SOON = 0.1
# Seconds that a request may wait for a place of another instance, where it would be refused at
# once otherwise: it is given within two renewals, later only if an event loop is late.
GRACE = 0.5
# As long where no other instance is known to have one: a place that has just ended may be on its
# way between two of them; and how many may wait so.
MOMENT, MOMENTARY = 0.05, 100


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

    def share(self, leases: Leases, name: str, scope: Scope | None = None) -> None:
        """Share the limit, which is that of all instances together, or of those of *scope*, under
        *name*.
        """
        limit, self.limit = self.limit, 0
        self._leases = leases
        self._grant = leases.hold(name, limit, self, scope=scope)

    @property
    def shared_limit(self) -> int:
        """How many places all instances have together."""
        return self._grant.limit

    @property
    def room(self) -> Fraction | int:
        """For how many more requests there is room, those included for which others may have a
        place.
        """
        return super().room + self._grant.elsewhere

    @property
    def room_elsewhere(self) -> bool:
        """Whether others may have a place that they do not use."""
        return self._grant.elsewhere > 0

    @property
    def waiting_elsewhere(self) -> int:
        """How many requests at least wait in other instances for places that are taken here."""
        return 1 if self._grant.starving and self.inside >= self.limit else 0

    def apply(self, limit: int, *, queue_size: int, queue_timeout: float) -> None:
        """Use new bounds; *limit* is that of all instances together."""
        self._grant.apply(limit)
        super().apply(self.limit, queue_size=queue_size, queue_timeout=queue_timeout)

    def serve(self) -> None:
        """Let in the waiters that may start now, and ask for places for the others."""
        self._leases.check()
        super().serve()
        if self._queue.size or self._batch.size:
            self._grant.wait_begins()

    def try_enter(
        self,
        cost: int = 0,
        caller: Hashable = None,
        flow: Hashable = None,
        weight: int = 1,
        work: Callable[[], int] | None = None,
        *,
        batch: bool = False,
    ) -> Place | None:
        """Return a place if a granted one is free and nobody waits for it.

        The arguments are those of `Gate.try_enter`.
        """
        self._leases.check()
        return super().try_enter(cost, caller, flow, weight, work, batch=batch)

    @property
    def wanting(self) -> int:
        """How many requests wait and could start soon if there were places for them."""
        count = self._queue.size + self._batch.size
        if not count or self._pace is None:
            return count
        if self._delay() > SOON:
            return 0
        while count > 1 and self._pace.delay(count - 1) > SOON:
            count //= 2
        return count

    @property
    def ready(self) -> int:
        """How many of them may use places in hand: of batch, no more than leave what it must."""
        batch = max(0, min(self._batch.size, self.batch_limit - self._batch_inside))
        return min(self.wanting, self._queue.size + batch)

    @property
    def weight(self) -> int:
        """The weights of the callers that wait, together; at least 1, which is that of any number
        of batch ones.
        """
        return max(1, self._queue.weight)

    def resize(self, places: int) -> None:
        """Take no more than *places* from now on; called by the grant."""
        more = places > self.limit
        self.limit = places
        if more:
            self._full_since = self._clock()
            super().serve()

    def others_starve(self) -> None:
        """Hear that requests wait in other instances; called by the grant."""

    def _grace(self) -> float:
        if self._queue_timeout > 0:
            return 0.0
        own = max(0, self.limit - self.inside)
        if own + self._grant.elsewhere > self.waiting:
            return GRACE
        shared = self._grant.joined and self.waiting < MOMENTARY
        return MOMENT if shared and self._grant.limit > self.inside else 0.0

    def _remove(self, waiter: Waiter[Place]) -> bool:
        waited = super()._remove(waiter)
        if waited:
            # No place is asked for any more: it has started elsewhere, or has given up.
            self._grant.wait_ends()
        return waited

    def _leave(self, place: Place, cost: int | None) -> None:
        self._grant.place_ends()
        super()._leave(place, cost)
