"""The capacity of a provider: its places and its rate as one resource, with the part of the places
that background answers may use, and its budget of retries.

Attempts start at the pace of the provider. While it is dead only trials start, and the grant of an
attempt carries its trial until its end. Answers in the *background* run for long, and no waiting
request ends them. So they have half of the places at most, and wait for these in a queue of their
own, for longer than others wait.

**The pace** has no burst at the edge of a minute: GCRA (limits/gcra.py) spaces the starts out, and
each span of time has at most its share of `requests_per_minute`, and a small burst. The provider
itself can lower the rate. Its headers report how many requests remain until their reset: the
starts are spread over that time, before the provider has to answer 429. After a `Retry-After`
nothing starts until that time is over; then requests start without a burst, and for as long again
at half the rate. `tokens_per_minute` is a second GCRA whose starts are worth their tokens, with a
burst of a sixth of the minute. A request is counted with its expected tokens when it starts, and
the count is corrected at its end. While more tokens are counted than the rate allows, nothing
starts.

**The retry budget** is a fifth of the requests, so that a failing provider causes no wave of
retries, after "Handling Overload" in Beyer et al., "Site Reliability Engineering", 2016. A
provider with few requests may have MIN_RETRIES in each WINDOW nevertheless.

This file is one concept: all that bounds the requests to one provider.
"""

from __future__ import annotations

import math
import random
import time
from functools import partial
from math import inf
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from aioserver.limits.fair_queue import BATCH, INTERACTIVE
from aioserver.limits.gcra import ROUNDING, Gcra
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
from aioserver.providers.rate_headers import limits_left

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aioserver.config.settings import HttpClient
    from aioserver.errors import AioserverError
    from aioserver.limits.resource import Bid, Ticket
    from aioserver.limits.scheduler import Scheduler
    from aioserver.providers.health import Health

    # A function of the scheduler, the provider's name, its health, its clock, and a callback for
    # the time in which requests in other instances wait for places that are taken here.
    ShareProvider = Callable[
        [Scheduler, str, Health, Callable[[], float], Callable[[], None]], "SharedCapacity"
    ]


# The most seconds for which a provider can stop the starts.
MAX_COOLING = 120.0
# The most seconds over which the remainder is spread; over a longer time, or until a date, the
# rate would be next to nothing.
MAX_RESET = 86_400.0
# Seconds' worth of tokens that may be used at once: a sixth of the minute.
TOKEN_BURST = 10.0
# The random share that is added to a wait of which several instances learn at the same time.
JITTER = 0.1


class Pace:
    """*per_minute* starts a minute, *burst* of them at once after a rest.

    Always: in any span of t seconds at most `t * per_minute / 60 + burst` starts.

    *on_cooling* is called with the seconds of a pause that the provider asks for.
    """

    def __init__(
        self,
        per_minute: int,
        burst: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        tokens_per_minute: int = 0,
        make_rate: Callable[[float, float], Gcra] | None = None,
        make_tokens: Callable[[float, float], Gcra] | None = None,
        on_cooling: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        self._clock = clock
        rate = 60.0 / per_minute, _tolerance(per_minute, burst)
        self._starts = Gcra(*rate, clock) if make_rate is None else make_rate(*rate)
        self._make_tokens = make_tokens or partial(Gcra, clock=clock)
        self._tokens = self._token_rate(tokens_per_minute)
        self._closed_until = 0.0
        self._on_cooling = on_cooling
        self._slow_interval, self._slow_until = 0.0, 0.0
        self.per_minute = per_minute

    def apply(self, per_minute: int, burst: int, *, tokens_per_minute: int = 0) -> None:
        """Set another pace; earlier starts count as before."""
        # A faster pace keeps the number of starts that are counted, a slower one the seconds until
        # the next.
        scale = min(1.0, self.per_minute / per_minute)
        self._starts.apply(60.0 / per_minute, _tolerance(per_minute, burst), scale=scale)
        self.per_minute = per_minute
        if self._tokens is None or not tokens_per_minute:
            self._tokens = self._token_rate(tokens_per_minute)
        else:
            interval = 60.0 / tokens_per_minute
            # The number of counted tokens stays.
            self._tokens.apply(interval, TOKEN_BURST, scale=interval / self._tokens.interval)

    @property
    def left(self) -> int:
        """The number of requests that could start now."""
        if self.cooling or (self._tokens is not None and self._tokens.delay() > 0):
            return 0
        return self._starts.available

    @property
    def cooling(self) -> float:
        """The seconds that are left of a pause for which the provider has asked."""
        until = self._closed_until
        return max(0.0, until - self._clock()) if until else 0.0

    def delay(self, ahead: int = 0) -> float:
        """Return the seconds until a request with *ahead* others before it may start."""
        others = ahead * self._interval() if ahead else 0.0
        delay = self._starts.delay(others)
        if self._closed_until:
            delay = max(delay, self._closed_until + others - self._clock())
        return delay if self._tokens is None else max(delay, self._tokens.delay())

    def start(self, tokens: int = 0) -> None:
        """Count a start that is expected to cost *tokens*."""
        starts = self._starts
        starts.take(self._interval() if self._slow_until else starts.interval)
        if tokens:
            self.charge(tokens)

    def try_start(self, tokens: int = 0) -> bool:
        """Count a start that is expected to cost *tokens*, if it is allowed now; return whether it
        is.
        """
        if not (self._closed_until or self._slow_until or self._tokens is not None):
            return self._starts.try_take() <= 0
        if self.delay() > ROUNDING:
            return False
        self.start(tokens)
        return True

    def charge(self, tokens: int) -> None:
        """Count *tokens* more than were expected; a negative number takes some back."""
        if self._tokens is not None:
            self._tokens.take(tokens * self._tokens.interval)

    def cool_down(self, seconds: float) -> None:
        """Start nothing for *seconds*, as the provider asks, then run at half the pace for as
        long.
        """
        self.told_cooling(seconds)
        if seconds > 0:
            self._on_cooling(min(seconds, MAX_COOLING))

    def told_cooling(self, seconds: float) -> None:
        """Do the same as `cool_down`, since the provider has asked another instance for it."""
        now = self._clock()
        wait = min(max(0.0, seconds), MAX_COOLING) * (1 + JITTER * random.random())  # noqa: S311
        self._closed_until = max(self._closed_until, now + wait)
        if wait:
            self._starts.postpone(self._closed_until)
        self._slow_interval, self._slow_until = (
            2 * self._starts.interval,
            self._closed_until + wait,
        )

    def learn(self, headers: Mapping[str, str]) -> bool:
        """Lower the pace to the remaining requests and tokens that the provider's *headers* report.

        Return whether nothing remains, so that no request starts before the reset.
        """
        exhausted = False
        for requests, left, seconds in limits_left(headers):
            if left < 1:
                self._close(seconds)
                exhausted = True
            elif requests and seconds <= MAX_RESET:
                self._spread(min(seconds / left, MAX_COOLING), seconds)
        return exhausted

    def forget(self) -> None:
        """Forget the requested pauses, which concern another account or address."""
        self._closed_until = self._slow_until = 0.0
        self._starts.catch_up()

    def _spread(self, interval: float, seconds: float) -> None:
        now = self._clock()
        if interval > self._starts.interval:
            self._slow_interval, self._slow_until = interval, now + seconds
        elif now >= self._closed_until and now < self._slow_until:
            # More is left than the provider reported before.
            self._slow_until = 0.0
            self._starts.catch_up()

    def _close(self, seconds: float) -> None:
        self._closed_until = max(self._closed_until, self._clock() + min(seconds, MAX_COOLING))

    def _token_rate(self, per_minute: int) -> Gcra | None:
        return self._make_tokens(60.0 / per_minute, TOKEN_BURST) if per_minute else None

    def _interval(self) -> float:
        """Return the seconds between two starts at the present rate."""
        interval = self._starts.interval
        return max(interval, self._slow_interval) if self._clock() < self._slow_until else interval


def _tolerance(per_minute: int, burst: int) -> float:
    return (max(1, burst) - 1) * 60.0 / per_minute


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
            look=self._look,
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

    def check(self, *, movable: bool) -> None:
        """Refuse a request if the provider is not asked now; *movable*: another one can answer it.

        Raises:
            ProviderFault: the provider is not healthy, and the request cannot be its next trial.
            ProviderPaced: the provider is cooling down for longer than a *movable* request waits
                before it fails over.
        """
        health = self._health
        if not (movable or health.breaker.dead or health.flagged_until):
            return
        if health.away and not movable:
            return
        health.check(alternative=movable)
        if health.breaker.dead and self.waiting:
            # The request that has waited longest is the next trial.
            raise health.refusal()
        if movable and self.cooling:
            raise self.paced_fault(self.pace.cooling)

    @property
    def cooling(self) -> bool:
        """Whether the provider is cooling down for longer than FAILOVER_WAIT."""
        return self.pace.cooling > FAILOVER_WAIT

    @property
    def well(self) -> bool:
        """Whether the provider is healthy, and not cooling down."""
        return self._health.well and not self.cooling

    def told_dead(self, *, unreachable: bool) -> None:
        """Learn that another instance has found the provider dead."""
        if self._health.breaker.told_dead(unreachable=unreachable):
            self.refuse_waiting()

    def told_alive(self) -> None:
        """Learn that the provider has answered another instance."""
        if self._health.breaker.told_alive():
            self.resume()

    def refuse_waiting(self) -> None:
        """Refuse the requests that cannot wait for the return of the provider, since none may start
        now.
        """
        self.refuse(self._health.refusal, movable_only=self._health.away)

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

    def cool_down(self, seconds: float) -> None:
        """Start nothing for *seconds*, since the provider has asked for a pause."""
        self.pace.cool_down(seconds)
        self.refuse_late()

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
    def places(self) -> tuple[int, int]:
        """The number of taken places, and the number of all places."""
        places = self.resource.places
        return places.inside, places.limit

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
    def held_up(self) -> int:
        """The number of requests that wait for a place that other requests hold; requests in other
        instances are included, as far as they are known. A place of another instance that may be
        free is nobody's.
        """
        return self.waiting + self.waiting_elsewhere if self.full else 0

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
        return part.patience(ticket, part.index(ticket))

    def stats(self) -> QueueStats:
        """Return a snapshot."""
        return self.resource.stats()

    def _look(self, bid: Bid) -> ProviderFault | None:
        """Return the fault of *bid* if the provider is not asked any more, else None."""
        try:
            self.check(movable=bid.movable)
        except ProviderFault as fault:
            return fault
        return None

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
            look=self._look,
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
        patience = resource.patience(bid.ticket, bid.index)
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


# Seconds.
WINDOW = 10
# Retries for each request.
SHARE = 0.2
MIN_RETRIES = 10


class RetryBudgetStats(NamedTuple):
    """A snapshot of a budget: the retries of the last WINDOW seconds, and the most that it allows
    in them.
    """

    used: int
    limit: int


class RetryBudget:
    """Counts the requests and retries of the last WINDOW seconds, second by second.

    Always: a retry is taken only while there are fewer than `max(MIN_RETRIES, SHARE * requests)`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests = [0] * WINDOW
        self._retries = [0] * WINDOW
        # The second of the newest count.
        self._second = int(clock())

    def add_request(self) -> None:
        """Count a request."""
        if (second := int(self._clock())) != self._second:
            self._pass_to(second)
        self._requests[second % WINDOW] += 1

    def take_retry(self) -> bool:
        """Count a retry if the budget has room for it; return whether it has."""
        used, limit = self.stats()
        if used >= limit:
            return False
        self._retries[self._second % WINDOW] += 1
        return True

    def stats(self) -> RetryBudgetStats:
        """Return a snapshot."""
        self._pass_to(int(self._clock()))
        limit = max(MIN_RETRIES, math.ceil(SHARE * sum(self._requests)))
        return RetryBudgetStats(sum(self._retries), limit)

    def _pass_to(self, second: int) -> None:
        """Forget the counts of seconds that are too old, now that *second* has come."""
        for passed in range(self._second + 1, min(second, self._second + WINDOW) + 1):
            self._requests[passed % WINDOW] = self._retries[passed % WINDOW] = 0
        self._second = second
