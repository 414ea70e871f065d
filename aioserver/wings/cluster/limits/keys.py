"""The limits of one key (limits/quota.py), shared with other instances.

Its answers are a resource whose places are leased (grants.py), and its starts and tokens are rates
that instances share. An answer that finds a place, a slot and tokens granted here begins at once.
Otherwise it waits. If the key has no queue, it waits at most PATIENCE seconds. By then the server
has answered: another instance gives a place or does not, and the next slot and the tokens are
known.

The connections of a key are such a resource, too, if the workers of one host share them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from aioserver.limits.quota import Quota, minute
from aioserver.limits.resource import Supply
from aioserver.wings.cluster.limits.grants import State
from aioserver.wings.cluster.limits.rates import SharedRate
from aioserver.wings.cluster.limits.shared_budget import WAIT, SharedBudget

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.limits.fixed_share import Scope
    from aioserver.limits.resource import Bid, Resource
    from aioserver.limits.scheduler import Scheduler
    from aioserver.wings.cluster.limits.grants import Grant
    from aioserver.wings.cluster.limits.leases import Leases

# Seconds for which an answer waits that would otherwise be refused at once. An instance that knows
# of the want gives a place within two calls.
PATIENCE = 0.25
# The share of the burst that all instances together prefetch. For a key of 300 a minute these are
# 3 slots, so that its clients find nearly all of the burst at any instance.
SHARE_KEPT = 0.01
# Seconds by which a request that asks for tokens may start late.
LATE = 0.1
# The number of places of unbounded connections.
UNBOUNDED = 1 << 30


class LeasedPlaces(Supply):
    """The places of *resource* that this instance was granted of a shared limit: the supply of the
    resource, and the user of its lease.

    Always: nothing starts on an expired lease. For each place that others may have, one ticket
    waits for PATIENCE instead of being refused at once.

    *waiting* returns how many tickets could start soon if there were places for them.
    """

    # All instances have the same weight.
    weight = 1

    def __init__(
        self,
        leases: Leases,
        resource: Resource,
        scheduler: Callable[[], Scheduler],
        waiting: Callable[[], int],
    ) -> None:
        self._leases, self._resource = leases, resource
        self._scheduler, self._waiting = scheduler, waiting
        self.lease: Grant | None = None

    def hold(self, name: str, limit: int, *, least: int = 0, scope: Scope | None = None) -> None:
        """Share *limit* from now on, under *name*, which is the same in all instances."""
        if self.lease is None:
            # Nothing is granted yet.
            self.resize(0)
            self.lease = self._leases.hold(name, limit, self, least=least, scope=scope)
            self._resource.attach(self)
        else:
            self.lease.apply(limit)

    def end(self) -> None:
        """Stop sharing it."""
        if self.lease is not None:
            self._leases.drop(self.lease)
            self.lease, self._resource.grace = None, 0.0
            self._resource.attach(None)

    # The interface for the resource.

    def check(self) -> None:
        """Drop the grant if the lease has expired."""
        self._leases.check()
        resource = self._resource
        if self.lease is not None:
            free = self.lease.limit - resource.inside - resource.slots
            resource.grace = PATIENCE if free > 0 else 0.0

    def changed(self) -> None:
        """Ask for places for the waiting tickets, and for no more."""
        if self.lease is not None:
            self.lease.wait_begins()
            self.lease.wait_ends()

    def freed(self) -> None:
        """Let others have a place that ends, if they starve."""
        if self.lease is not None:
            self.lease.place_ends()

    # The interface for the lease.

    @property
    def inside(self) -> int:
        """The places that are taken."""
        return self._resource.inside

    @property
    def wanting(self) -> int:
        """The number of places that are still wanted."""
        return self._waiting()

    @property
    def ready(self) -> int:
        """The number of waiting tickets that could use a granted place: all of them."""
        return self._waiting()

    def resize(self, places: int) -> None:
        """Use *places* from now on; called by the lease."""
        resource = self._resource
        if resource.waiting:
            self._scheduler().resize(resource, places)
        else:
            resource.places.resize(places)

    def starve(self) -> None:
        """Do nothing: taken places are kept to their end."""


class SharedKey:
    """The limits of one key that all instances share under *name*; `quota` enforces them.

    The connections are shared by the workers of one host, which is its *scope*; None: there are no
    others.
    """

    patience = PATIENCE

    def __init__(
        self,
        max_concurrent: int,
        requests_per_minute: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        max_connections: int = 0,
        queue_size: int = 0,
        tokens_per_minute: int = 0,
        tokens_per_day: int = 0,
        tokens_per_week: int = 0,
        tokens_per_month: int = 0,
        leases: Leases,
        name: str,
        scope: Scope | None = None,
        scheduler: Scheduler | None = None,
    ) -> None:
        self._leases, self._name, self._scope = leases, name, scope
        self._clock = clock
        self._quota: Quota | None = None
        self._budget = SharedBudget(
            leases,
            name,
            tokens_per_minute,
            tokens_per_day,
            clock,
            per_week=tokens_per_week,
            per_month=tokens_per_month,
            head=self._first,
            on_tokens=self._serve,
        )
        self._rate = SharedRate(
            leases,
            f"K:{name}",
            *minute(requests_per_minute),
            clock,
            waiting=self._waiting,
            on_slots=self._serve,
            share_kept=SHARE_KEPT,
        )
        self._quota = self.quota = quota = Quota(
            max_concurrent,
            requests_per_minute,
            clock,
            max_connections=max_connections,
            queue_size=queue_size,
            budget=self._budget,
            starts=self._rate,
            scheduler=scheduler,
        )
        quota.shared = self
        self.answers = LeasedPlaces(leases, quota.resource, lambda: quota.scheduler, self._waiting)
        self.connections: LeasedPlaces | None = None
        if scope is not None:
            slots = quota.share_connections(clock)
            self.connections = LeasedPlaces(
                leases, slots, lambda: quota.scheduler, lambda: slots.waiting
            )
        self.apply()

    # The interface for the quota.

    @property
    def remembers(self) -> bool:
        """Whether the server remembers the starts."""
        return self._leases.standing.state is State.JOINED

    def apply(self) -> None:
        """Share the limits of the quota as they are now."""
        quota = self.quota
        self.answers.hold(f"k:{self._name}", quota.limit, least=1)
        connections, scope = self.connections, self._scope
        if connections is None or scope is None:
            return
        if quota.max_connections:
            name = f"h:{scope.host}:k:{self._name}"
            connections.hold(name, quota.max_connections, scope=scope)
        else:
            connections.end()
            connections.resize(UNBOUNDED)

    def end(self) -> None:
        """Stop sharing the limits: the key was revoked."""
        self._leases.drop_budget(self._budget)
        self._leases.drop_pace(self._rate)
        for places in (self.answers, self.connections):
            if places is not None:
                places.end()

    # The interface for the rates.

    def _serve(self) -> None:
        """Start the requests for which there are slots or tokens now."""
        if self._quota is not None:
            self._quota.serve()

    def _head(self) -> Bid | None:
        if self._quota is None:
            return None
        head = self._quota.resource.queue.queues[0].head()
        return None if head is None else head[0]

    def _first(self) -> tuple[int, float]:
        """Return the estimate of the request that is to start next, if only tokens are missing, and
        the seconds for which it waits for them.
        """
        head = self._head()
        if head is None or self.quota.running >= self.quota.limit or self._rate.delay() > LATE:
            return 0, 0.0
        return head.cost, max(0.0, head.until - self._clock())

    def _waiting(self) -> int:
        """Return how many requests could start soon if there were places for them. A request that
        waits for tokens leaves its place to others.
        """
        count = 0 if self._quota is None else self._quota.resource.waiting
        if not count or not self._budget.limited:
            return count
        head = self._head()
        if head is None or (short := self._budget.shortage(head.cost)) is None:
            return count
        return 1 if short.delay <= WAIT else 0
