"""The capacity of a provider: its places and its rate as one resource, with the part of the places
that background answers may use.

Attempts start at the pace of the provider. While it is dead only trials start, and the grant of an
attempt carries its trial until its end. Answers in the *background* run for long, and no waiting
request ends them. So they have half of the places at most, and wait for these in a queue of their
own, for longer than others wait.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Protocol

import msgspec

from aioserver.limits.fair_queue import BATCH, INTERACTIVE
from aioserver.limits.gcra import ROUNDING
from aioserver.limits.resource import (
    BOTH_CLASSES,
    Class,
    QueueStats,
    Reason,
    Resource,
    all_but_a_tenth,
    half,
)
from aioserver.provider_errors import (
    ProviderFault,
    ProviderPaced,
    ProviderQueueFull,
    ProviderQueueTimeout,
)
from aioserver.providers.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.config.settings import HttpClient
    from aioserver.errors import AioserverError
    from aioserver.limits.gcra import Gcra
    from aioserver.limits.resource import Bid, Ticket
    from aioserver.limits.scheduler import Scheduler
    from aioserver.providers.health import Health

if TYPE_CHECKING:
    # A function of the scheduler, the provider's name, its health, its clock, and a callback for
    # the time in which requests in other instances wait for places that are taken here.
    ShareProvider = Callable[
        [Scheduler, str, Health, Callable[[], float], Callable[[], None]], "SharedCapacity"
    ]

# An attempt that can fail over does so if its provider can start nothing for more than these
# seconds.
FAILOVER_WAIT = 1.0
# An answer in the background waits so many times as long as others, in either class.
BACKGROUND_PATIENCE = 10.0
BACKGROUND_CLASSES = (Class(INTERACTIVE, 19), Class(BATCH, 1, all_but_a_tenth, 0.5))


class SharedCapacity(Protocol):
    """Lets all instances share the capacity of one provider (implemented by the wing `cluster`)."""

    def places(self, resource: Resource, limit: int) -> None:
        """Share the places of *resource*, the provider or its background part; all instances
        together have *limit*.
        """

    def starts(self, interval: float, tolerance: float, serve: Callable[[], None]) -> Gcra:
        """Return the shared rate of starts, which calls *serve* when it allows more."""

    def tokens(self, interval: float, tolerance: float, serve: Callable[[], None]) -> Gcra:
        """Return the shared rate of tokens, which calls *serve* when it allows more."""

    def without_tokens(self) -> None:
        """Stop sharing tokens: they are not paced any more."""

    @property
    def starving(self) -> bool:
        """Whether requests wait in other instances for places that are taken here."""

    @property
    def elsewhere(self) -> int:
        """How many places may be free in other instances, as far as is known."""


class Trial(msgspec.Struct, eq=False):
    """A trial of a dead provider, with the tokens that were charged to the pace for it.

    Always: the breaker learns its result, from the attempt that has *taken* it, or else when its
    grant ends.
    """

    cost: int
    taken: bool = False


class ProviderRate:
    """The rate at which attempts may start: that of the *pace*, and while the provider is dead,
    that of its breaker's trials.
    """

    def __init__(self, pace: Pace, health: Health) -> None:
        self._pace, self._health = pace, health

    def delay(self, _cost: int, ahead: int = 0) -> float:
        """Return the seconds until a start with so many others *ahead*; inf if that depends on a
        trial's result.
        """
        delay, breaker = self._pace.delay(ahead), self._health.breaker
        if not breaker.dead:
            return delay
        return inf if ahead else max(delay, breaker.delay())

    def try_take(self, cost: int) -> object:
        """Count a start of *cost* tokens if it is allowed; return the tokens or the trial, True if
        there is nothing to settle, and None if it is not allowed.
        """
        pace, breaker = self._pace, self._health.breaker
        if not breaker.dead:
            return (cost or True) if pace.try_start(cost) else None
        if max(pace.delay(), breaker.delay()) > ROUNDING:
            return None
        trial = Trial(cost)
        pace.start(cost)
        breaker.start()
        return trial

    def settle(self, taken: object, spent: int | None) -> None:
        """Correct the tokens, and report the end of a trial that no attempt has taken over."""
        cost = taken
        if isinstance(taken, Trial):
            cost = taken.cost
            if not taken.taken:
                taken.taken = True
                self._health.breaker.unsure(trial=True)
        assert isinstance(cost, int)
        if cost:
            self._pace.charge((spent or 0) - cost)


class Capacity:
    """The capacity of the provider *name*, by the *limits* that were applied last.

    Always: attempts start within `concurrent_requests`, the pace and the trials of the breaker.
    Requests that wait, are parked or may come back number at most `queue_size` together, unless
    that number was lowered since.
    """

    def __init__(
        self,
        name: str,
        limits: HttpClient,
        health: Health,
        scheduler: Scheduler,
        clock: Callable[[], float],
        look: Callable[[Bid], ProviderFault | None],
        shared: SharedCapacity | None = None,
    ) -> None:
        self._name, self._limits, self._health = name, limits, health
        self._scheduler, self._shared = scheduler, shared
        # The background part; None before its first request.
        self._background: Resource | None = None
        self.resource = Resource(
            name,
            limits.concurrent_requests,
            queue_size=limits.queue_size,
            queue_timeout=limits.queue_timeout,
            refuse=self._refusal,
            serve=scheduler.serve,
            clock=scheduler.time,
            keeps=self._is_dead,
            look=look,
            reopens=lambda: health.retry_after,
            classes=BOTH_CLASSES,
        )
        self.pace = Pace(
            limits.requests_per_minute,
            _burst(limits),
            clock,
            tokens_per_minute=limits.tokens_per_minute,
            make_rate=None if shared is None else self._shared_starts,
            make_tokens=None if shared is None else self._shared_tokens,
            on_cooling=health.observer.cooling,
        )
        self.resource.rate = ProviderRate(self.pace, health)
        if shared is not None:
            shared.places(self.resource, limits.concurrent_requests)

    def apply_limits(self, limits: HttpClient) -> None:
        """Apply new limits. Places that are taken stay taken, and starts stay counted."""
        self._limits, resource = limits, self.resource
        self.pace.apply(
            limits.requests_per_minute, _burst(limits), tokens_per_minute=limits.tokens_per_minute
        )
        resource.queue_size, resource.queue_timeout = limits.queue_size, limits.queue_timeout
        if self._background is not None:
            self._bound_background(self._background)
        if self._shared is not None and not limits.tokens_per_minute:
            self._shared.without_tokens()
        places = limits.concurrent_requests
        for part, limit in zip(self.parts, (places, half(places)), strict=False):
            if part.supply is not None:
                part.supply.apply(limit)
                self._scheduler.serve(part)
            else:
                self._scheduler.resize(part, limit)

    def part(self, *, background: bool) -> Resource:
        """Return the resource for which an attempt bids, in the *background* or not."""
        if not background:
            return self.resource
        if self._background is None:
            self._background = self._make_background()
        return self._background

    def paced_fault(self, wait: float) -> ProviderPaced:
        """Return the fault of a request that cannot wait for *wait* seconds until its start."""
        limits = self._limits
        text = f"{self._name} limits our rate"
        if not self.pace.cooling and wait <= limits.queue_timeout:
            # The request's own deadline is too short.
            text = f"{self._name} is at its requests_per_minute={limits.requests_per_minute}"
        elif not self.pace.cooling:
            text = (
                f"{self._name} can take no more requests in the next {limits.queue_timeout} s: "
                f"requests_per_minute={limits.requests_per_minute}"
            )
        return ProviderPaced(text, retry_after=wait)

    def refuse_late(self) -> None:
        """Refuse the bids that cannot start in time, since the pace has slowed down; also those of
        requests that can go elsewhere, if nothing starts for longer than FAILOVER_WAIT.
        """
        delay = self.pace.delay()
        earliest_start = self._scheduler.time() + delay
        self._scheduler.refuse(
            self.resource,
            lambda: self.paced_fault(delay),
            lambda bid: bid.until < earliest_start or (bid.movable and delay > FAILOVER_WAIT),
        )

    def told_cooling(self, seconds: float) -> None:
        """Start nothing for *seconds*, since the provider has asked another instance for a pause."""
        self.pace.told_cooling(seconds)
        self.refuse_late()

    def refuse(self, error: Callable[[], AioserverError], *, movable_only: bool = False) -> None:
        """Refuse all waiting requests; with *movable_only* those that another provider can answer."""
        self._scheduler.refuse(self.resource, error, lambda bid: bid.movable or not movable_only)

    def resume(self) -> None:
        """Admit the waiting requests, since the provider is back."""
        self._scheduler.recover(self.resource)

    def close(self, error: Callable[[], AioserverError], *, finishes: bool) -> None:
        """Refuse all waiting and future requests, except those that continue an answer if it
        *finishes* these.
        """
        self._scheduler.shut(self.resource, error, finishes=finishes)
        if self._background is not None:
            self._scheduler.shut(self._background, error, finishes=finishes)

    @property
    def parts(self) -> tuple[Resource, ...]:
        """The resources for which attempts bid."""
        part = self._background
        return (self.resource,) if part is None else (self.resource, part)

    @property
    def inside(self) -> int:
        """The number of places that are taken."""
        return self.resource.places.inside

    @property
    def limit(self) -> int:
        """The number of places."""
        return self.resource.places.limit

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a place here."""
        return self.resource.waiting

    @property
    def full(self) -> bool:
        """Whether all places are taken, as far as is known those of other instances, too."""
        places, shared = self.resource.places, self._shared
        return places.inside >= places.limit and (shared is None or not shared.elsewhere)

    @property
    def waiting_elsewhere(self) -> int:
        """The least number of requests that wait in other instances for places that are taken
        here.
        """
        return int(self._shared is not None and self.full and self._shared.starving)

    @property
    def background(self) -> tuple[int, int]:
        """The number of background answers that have a place or are next to get one, and of those
        that wait for others to end.
        """
        part = self._background
        return (0, 0) if part is None else (part.inside, part.waiting)

    def waited(self, ticket: Ticket) -> float:
        """Return the seconds for which *ticket* has waited here, in all its attempts together."""
        if (waited := ticket.waited) is None:
            return 0.0
        return sum(waited.get(part, 0.0) for part in self.parts)

    def add_wait(self, ticket: Ticket, seconds: float) -> None:
        """Add *seconds* to the wait of *ticket* here."""
        if ticket.waited is None:
            ticket.waited = {}
        ticket.waited[self.resource] = ticket.waited.get(self.resource, 0.0) + seconds

    def patience(self, ticket: Ticket) -> float:
        """Return the seconds for which *ticket* may wait here, in all its attempts together."""
        part = self.resource
        return part.queue_timeout * part.classes[part.index(ticket)].patience

    def stats(self) -> QueueStats:
        """Return a snapshot."""
        return self.resource.stats()

    def _is_dead(self) -> bool:
        return self._health.breaker.dead

    def _make_background(self) -> Resource:
        outer = self.resource
        part = Resource(
            self._name,
            half(self._limits.concurrent_requests),
            queue_size=0,
            queue_timeout=0.0,
            refuse=self._refusal,
            serve=self._scheduler.serve,
            clock=self._scheduler.time,
            keeps=self._is_dead,
            look=outer.look,
            classes=BACKGROUND_CLASSES,
            within=outer,
        )
        self._bound_background(part)
        if self._shared is not None:
            places = half(self._limits.concurrent_requests)
            self._shared.places(part, places)
        part.closed, part.finishes = outer.closed, outer.finishes
        return part

    def _bound_background(self, part: Resource) -> None:
        limits = self._limits
        part.queue_size = (limits.queue_size + 1) // 2
        part.queue_timeout = BACKGROUND_PATIENCE * limits.queue_timeout

    def _refusal(self, reason: Reason, seconds: float, bid: Bid) -> AioserverError:
        """Return the error of a refusal, with the *seconds* after which to come back."""
        name, limits, resource = self._name, self._limits, bid.resource
        if reason is Reason.SLOW and not self._health.breaker.dead:
            return self.paced_fault(seconds)
        if reason is Reason.FULL and resource is not self.resource:
            text = f"{resource.waiting} answers in the background wait for {name} already"
            return ProviderQueueFull(text, retry_after=seconds)
        if reason is Reason.FULL:
            text = f"{limits.queue_size} requests wait for {name} already"
            return ProviderQueueFull(text, retry_after=seconds)
        patience = resource.queue_timeout * resource.classes[bid.index].patience
        if self._health.breaker.dead:
            text = f"{name} was not back within {patience} s"
        elif resource is not self.resource:
            text = f"no place for an answer in the background at {name} within {patience} s"
        else:
            text = f"no place at {name} within {patience} s"
        return ProviderQueueTimeout(text, retry_after=seconds)

    def _shared_starts(self, interval: float, tolerance: float) -> Gcra:
        assert self._shared is not None
        return self._shared.starts(interval, tolerance, self._serve)

    def _shared_tokens(self, interval: float, tolerance: float) -> Gcra:
        assert self._shared is not None
        return self._shared.tokens(interval, tolerance, self._serve)

    def _serve(self) -> None:
        self._scheduler.serve(self.resource)


def _burst(limits: HttpClient) -> int:
    """Return how many requests may start at once after a rest: those of one second."""
    return min(limits.concurrent_requests, limits.requests_per_minute // 60)
