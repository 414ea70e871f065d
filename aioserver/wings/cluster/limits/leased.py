"""The capacity of a resource that other instances share: the places granted here
(grants.py).

It connects two objects: for the resource, which knows nothing of leases, it is the supply; for the
grant, which knows nothing of queues, it is the user.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aioserver.limits.resource import Supply

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.limits.fixed_share import Scope
    from aioserver.limits.resource import Resource
    from aioserver.limits.scheduler import Scheduler
    from aioserver.wings.cluster.limits.leases import Leases

# Seconds: a request that the rate lets start within them wants a place.
SOON = 0.1
# Seconds that a request may wait for a place of another instance, where it would otherwise be
# refused at once. The place is granted within two renewals, later only if an event loop is late.
GRACE = 0.5
# The same if no other instance is known to have a place: a place that has just ended may be on its
# way between two of them. The second number bounds the requests that wait for this.
MOMENT, MOMENTARY = 0.05, 100


class LeasedCapacity(Supply):
    """The places of *resource* that are granted here, out of *limit* for all instances together,
    or for those of *scope*, under *name*.

    Always: nothing starts on an expired lease. A full queue takes one more ticket for each place
    that others may have free, until the server has said that they have none. Without a queue, a
    ticket may wait for *grace* seconds while others may have a place, and for a *moment* while one
    may be on its way.

    *least* is the smallest fixed share. *on_starving* is called while tickets wait, here or in
    other instances, and all places are taken, as far as is known.
    """

    def __init__(
        self,
        leases: Leases,
        scheduler: Scheduler,
        resource: Resource,
        name: str,
        limit: int,
        *,
        scope: Scope | None = None,
        least: int = 0,
        grace: float = GRACE,
        moment: float = MOMENT,
        on_starving: Callable[[], None] | None = None,
    ) -> None:
        self._leases, self._scheduler, self._resource = leases, scheduler, resource
        self._scope, self._grace, self._moment = scope, grace, moment
        self._on_starving = on_starving
        # Fires once no place of another instance can be on its way here any more.
        self._hoping: asyncio.TimerHandle | None = None
        # Nothing starts before places are granted.
        scheduler.resize(resource, 0)
        resource.attach(self)
        self._grant = leases.hold(name, limit, self, least=least, scope=scope)

    @property
    def limit(self) -> int:
        """The number of places of all instances together."""
        return self._grant.limit

    @property
    def waiting_elsewhere(self) -> int:
        """The least number of tickets that wait in other instances for places that are
        taken here.
        """
        return 1 if self._grant.starving and self._full else 0

    @property
    def waiting(self) -> int:
        """The number of tickets that wait here."""
        return self._resource.waiting

    @property
    def elsewhere(self) -> int:
        """The number of places that may be free in other instances, as far as is known."""
        grant = self._grant
        return grant.elsewhere or int(self._hoping is not None and not grant.starving)

    @property
    def _full(self) -> bool:
        return self._resource.inside >= self._resource.limit

    # The interface for the resource.

    def check(self) -> None:
        """Drop the grant if the lease has expired."""
        self._leases.check()

    def asked(self) -> None:
        """Set how many places others may have free, and for how long a ticket may wait for them if
        it may not wait here.
        """
        resource, grant = self._resource, self._grant
        resource.elsewhere, resource.grace = grant.elsewhere, 0.0
        if resource.queue_timeout > 0:
            return
        waiting = resource.waiting
        own = max(0, resource.limit - resource.inside)
        if own + resource.elsewhere > waiting:
            resource.grace = self._grace
        elif grant.joined and waiting < MOMENTARY and grant.limit > resource.inside:
            resource.grace = self._moment

    def changed(self) -> None:
        """Ask for places for the waiting tickets, and withdraw earlier requests."""
        if self._resource.waiting:
            self._grant.wait_begins()
        self._grant.wait_ends()

    def freed(self) -> None:
        """Leave the place to others, if it is their turn."""
        self._grant.place_ends()

    def apply(self, limit: int) -> None:
        """Use another limit, which is that of all instances together."""
        self._grant.apply(limit)

    def leave(self) -> None:
        """Take no more places, and leave each that ends to others."""
        self._grant.leave()

    def share(self, size: int) -> int:
        """Return the fixed share of *size*."""
        return size if self._scope is None else self._scope.share(size)

    # The interface for the grant.

    @property
    def inside(self) -> int:
        """The number of places that are taken."""
        return self._resource.inside

    @property
    def wanting(self) -> int:
        """The number of waiting tickets that could start soon if there were places for them."""
        resource = self._resource
        count, rate = resource.queue.size, resource.rate
        if not count or rate is None:
            return count
        following = resource.queue.next(lambda _index: False)
        if rate.delay(0 if following is None else following[1].cost) > SOON:
            return 0
        while count > 1 and rate.delay(0, count - 1) > SOON:
            count //= 2
        return count

    @property
    def ready(self) -> int:
        """The number of these that may use granted places: of each class, no more than its own."""
        resource = self._resource
        ready = sum(
            queue.size if limit is None else max(0, min(queue.size, limit.limit - limit.inside))
            for queue, limit in zip(resource.queue.queues, resource.limits, strict=True)
        )
        return min(self.wanting, ready)

    @property
    def weight(self) -> int:
        """The sum of the weights of the waiting callers; at least 1, which also stands for any
        number of callers of the lighter classes.
        """
        return max(1, self._resource.queue.queues[0].weight)

    def resize(self, places: int) -> None:
        """Take no more than *places* from now on."""
        self._scheduler.resize(self._resource, places)

    def starve(self) -> None:
        """Tell the tickets that hold places here that others wait for them."""
        if self._on_starving is None or not self._full:
            return
        if self._grant.starving or not self._grant.joined:
            self._on_starving()
        elif self._hoping is None:
            # Another instance may be about to give back a place that it does not use.
            loop = asyncio.get_running_loop()
            self._hoping = loop.call_later(self._grace, self._starve_still)

    def _starve_still(self) -> None:
        self._hoping = None
        if self._on_starving is not None and self._full and self.waiting:
            self._on_starving()
