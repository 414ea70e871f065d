"""The limits of one key (limits/quota.py), shared with other instances.

Its answers are a resource whose places are leased (wings/cluster/grants.py), and its starts and
tokens are rates that instances share. An answer that finds a place, a slot and its tokens in hand
begins at once. Otherwise it waits, where the key has no queue for PATIENCE seconds at most: until
then the server has said whether another instance has a place to give, when the next slot begins,
or whether there are tokens.

The connections of a key are such a resource, too, where the workers of one host share them.
"""

from __future__ import annotations

import time
from math import inf
from typing import TYPE_CHECKING

from aioserver.limits.quota import Quota, minute
from aioserver.limits.resource import Supply
from aioserver.wings.cluster.grants import State
from aioserver.wings.cluster.rates import LOOK_AGAIN, SharedRate
from aioserver.wings.cluster.shared_budget import PATIENT, SharedBudget

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.limits.fixed_share import Scope
    from aioserver.limits.resource import Bid, Resource
    from aioserver.limits.scheduler import Scheduler
    from aioserver.wings.cluster.grants import Grant
    from aioserver.wings.cluster.leases import Leases

# Seconds for which an answer waits that would be refused at once otherwise. An instance that is told
# of the want gives within two calls.
PATIENCE = 0.25
# Of the burst so much is kept in hand by all instances together. A key of 300 a minute has 3 slots
# of it, so that its clients find nearly all of it at any instance.
SHARE_KEPT = 0.01
# The places of connections that nobody bounds.
UNBOUNDED = 1 << 30


class LeasedPlaces(Supply):
    """The places of *resource* that this instance was granted, of which several share the limit:
    the supply of the resource, and the user of its lease.

    Always: nothing starts on a lease that is over. As many tickets as others may have places for
    wait for PATIENCE, where they would be refused at once.

    *waiting* returns how many tickets could start soon if there were places for them.
    """

    # Of all instances the same.
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
        """Share it no more."""
        if self.lease is not None:
            self._leases.drop(self.lease)
            self.lease, self._resource.grace = None, 0.0
            self._resource.attach(None)

    # The supply of the resource.

    def check(self) -> None:
        """Let go of what is granted if the lease is over."""
        self._leases.check()
        resource = self._resource
        if self.lease is not None:
            free = self.lease.limit - resource.inside - resource.slots
            resource.grace = PATIENCE if free > 0 else 0.0

    def changed(self) -> None:
        """Ask for places for those that wait, and for no more."""
        if self.lease is not None:
            self.lease.wait_begins()
            self.lease.wait_ends()

    def freed(self) -> None:
        """Let others have a place that ends, if they starve."""
        if self.lease is not None:
            self.lease.place_ends()

    # The user of the lease.

    @property
    def inside(self) -> int:
        """The places that are taken."""
        return self._resource.inside

    @property
    def wanting(self) -> int:
        """The places that are still wanted."""
        return self._waiting()

    @property
    def ready(self) -> int:
        """How many of those that want one could use a place that is granted: each."""
        return self._waiting()

    def resize(self, places: int) -> None:
        """Use *places* from now on; called by the lease."""
        resource = self._resource
        if resource.waiting:
            self._scheduler().resize(resource, places)
        else:
            resource.places.resize(places)

    def others_starve(self) -> None:
        """Do nothing: what is taken is kept to its end."""


class SharedKey:
    """The limits of one key that all instances share under *name*; `quota` has them.

    The connections are those of the workers of one host, which is its *scope*; None: there are no
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
            waiting=self._first_tokens,
            patience=self._first_patience,
            on_tokens=self._serve,
        )
        self._rate = SharedRate(
            leases,
            f"K:{name}",
            *minute(requests_per_minute),
            clock,
            waiting=self._waiting,
            on_slots=self._serve,
            rested=True,
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

    # What the quota says.

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
        """Share the limits no more: the key was revoked."""
        self._budget.drop()
        self._leases.drop_pace(self._rate)
        for places in (self.answers, self.connections):
            if places is not None:
                places.end()

    # What the rates ask.

    def _serve(self) -> None:
        """Let those begin for which there are slots or tokens now."""
        if self._quota is not None:
            self._quota.serve()

    def _head(self) -> Bid | None:
        if self._quota is None:
            return None
        head = self._quota.resource.queue.queues[0].head()
        return None if head is None else head[0]

    def _first_tokens(self) -> int:
        """Return the estimate of the request that is to start next, if only tokens are missing."""
        head = self._head()
        return 0 if head is None or self.quota.running >= self.quota.limit else head.cost

    def _first_patience(self) -> float:
        """Return for how many seconds that one waits for them."""
        head = self._head()
        return (
            PATIENT if head is None or self.quota.queue_size else max(0.0, head.until - self._now)
        )

    @property
    def _now(self) -> float:
        return self._clock()

    def _waiting(self) -> int:
        """Return how many requests could start soon if there were places for them: a place that
        waits for tokens is others' to use.
        """
        count = 0 if self._quota is None else self._quota.resource.waiting
        if not count or not self._budget.limited:
            return count
        head = self._head()
        delay = 0.0 if head is None else self._budget.hand.delay(head.cost)
        if delay == 0.0:
            return count
        return 1 if delay == inf or delay < LOOK_AGAIN else 0
