"""The queue of a provider: its gate, which opens at the provider's pace, and its faults. The gate,
what keeps room in it, and the permits that come before it are one concept.

While the provider is dead, the gate opens for trials only. Where requests may wait until it is
back (`when_down: wait`), they stay in the queue meanwhile. A request whose attempt has just failed
is *parked* outside of the queue before it comes back to it, since the provider may be away and not
be known as dead yet. A request whose attempt is under way may come back as well, so its room in
the queue is kept.

Answers in the *background* run for long, and nothing ends them for a request that waits. So they
have half of the places at most: each needs a *permit* before it stands in the queue, and waits for
that in a queue of its own, for longer than others wait.
"""

from __future__ import annotations

import asyncio
import time
from math import inf
from typing import TYPE_CHECKING

from msgspec.structs import replace

from aioserver.limits.gate import BATCH_PATIENCE, Gate, GateStats, Place
from aioserver.limits.gcra import Gcra
from aioserver.provider_errors import ProviderPaced, ProviderQueueFull, ProviderQueueTimeout
from aioserver.providers.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from fractions import Fraction

    from aioserver.config.settings import HttpClient
    from aioserver.errors import AioserverError
    from aioserver.limits.gate import Waiter
    from aioserver.limits.old_fair_queue import Charge
    from aioserver.providers.breaker import Breaker
    from aioserver.providers.health import Health

    # Called as `ProviderGate` is.
    GateFactory = Callable[
        [str, HttpClient, Health, Callable[[], float], Callable[[], None]], "ProviderGate"
    ]

# An attempt that can fail over does so if nothing can start at its provider for more than these
# seconds.
FAILOVER_WAIT = 1.0
# How many times as long as other requests one in the background waits, for its permit.
BACKGROUND_PATIENCE = 10.0


class TrialPlace(Place, eq=False, kw_only=True):
    """A place whose attempt is a trial of a dead provider.

    Always: the breaker hears of the trial's end, also if the place is given back and nobody has
    taken the trial over.
    """

    _breaker: Breaker
    _taken: bool = False

    def take(self) -> None:
        """Take the trial over: the caller will tell the breaker how it ends."""
        self._taken = True

    def release(self, cost: int | None = None) -> None:
        """Give the place back."""
        if not self._taken:
            self._taken = True
            self._breaker.unsure(trial=True)
        super().release(cost)


def permits(places: int) -> int:
    """Return how many of *places* answers in the background may have at once."""
    return max(1, places // 2)


class Permits(Gate):
    """The permits of answers in the background for places of the provider *name*, which has these
    *limits*.

    Always: who waits for a permit takes room in the queue of the provider, at most half of it, as
    far as there is *room*.
    """

    def __init__(
        self,
        name: str,
        limits: HttpClient,
        room: Callable[[], Fraction | int],
        clock: Callable[[], float],
    ) -> None:
        self._room = room
        queue_size, queue_timeout = _background_queue(limits)
        super().__init__(
            permits(limits.concurrent_requests),
            queue_size=queue_size,
            queue_timeout=queue_timeout,
            full_error=lambda wait: ProviderQueueFull(
                f"{self.waiting} answers in the background wait for {name} already",
                retry_after=wait,
            ),
            timeout_error=lambda wait: ProviderQueueTimeout(
                f"no place for an answer in the background at {name} "
                f"within {self._queue_timeout} s",
                retry_after=wait,
            ),
            clock=clock,
        )

    def apply_limits(self, limits: HttpClient) -> None:
        """Use new limits. Permits that are taken stay taken."""
        queue_size, queue_timeout = _background_queue(limits)
        places = permits(limits.concurrent_requests)
        self.apply(places, queue_size=queue_size, queue_timeout=queue_timeout)

    @property
    def room(self) -> Fraction | int:
        """For how many more requests there is room."""
        return min(super().room, self._room())

    def time_left(
        self,
        waited: float,
        *,
        room: bool,
        batch: bool = False,  # noqa: ARG002 - both classes wait as long
        goes_on: bool = False,
    ) -> float:
        """Return for how many seconds a request may wait here, as that of any gate."""
        return super().time_left(waited, room=room, goes_on=goes_on)

    def refuse_movable(self, error: Callable[[], AioserverError]) -> None:
        """Refuse every waiter that another provider can answer."""
        for waiter in list(self._waiters()):
            if waiter.may_fail_over:
                self._refuse(waiter, error)


class ProviderGate(Gate):
    """The gate of the provider *name*, which opens as the breaker of its *health* allows.

    Always: places, queue and pace follow the *limits* that were applied last; a parked request is
    counted as one that waits, and refused as one. Those that queue, are parked, or may come back
    are `queue_size` together, unless new limits have lowered that number since.

    A gate that shares its places calls *on_starving* while requests wait in other processes for
    places that are taken here; this one has no others.
    """

    def __init__(
        self,
        name: str,
        limits: HttpClient,
        health: Health,
        clock: Callable[[], float] = time.monotonic,
        on_starving: Callable[[], None] = lambda: None,  # noqa: ARG002 - see above
    ) -> None:
        self._name = name
        self._limits = limits
        self._health = health
        self._clock = clock
        # The parked requests, each done when it may come back, with the time at which its wait
        # began.
        self._parked: dict[asyncio.Future[None], float] = {}
        # The attempts under way whose requests have waited, and come back if the provider is still
        # away; and the waiters that such attempts begin with, until their tasks go on.
        self._returning: set[Hashable] = set()
        # None before the first request in the background.
        self._permits: Permits | None = None
        self.pace = Pace(
            limits.requests_per_minute,
            _burst(limits),
            clock,
            tokens_per_minute=limits.tokens_per_minute,
            make_rate=self._make_rate,
            make_tokens=self._make_tokens,
            on_cooling=health.observer.cooling,
        )
        super().__init__(
            limits.concurrent_requests,
            queue_size=limits.queue_size,
            queue_timeout=limits.queue_timeout,
            full_error=lambda wait: ProviderQueueFull(
                f"{self._limits.queue_size} requests wait for {name} already", retry_after=wait
            ),
            timeout_error=self._timeout_fault,
            pace=self.pace,
            pace_error=self.paced_fault,
            clock=clock,
        )

    def paced_fault(self, wait: float) -> ProviderPaced:
        """Return the fault of a request that cannot wait the *wait* seconds until it could
        start.
        """
        limits = self._limits
        text = f"{self._name} limits our rate"
        if not self.pace.cooling and wait <= limits.queue_timeout:
            # The request itself is in a hurry.
            text = f"{self._name} is at its requests_per_minute={limits.requests_per_minute}"
        elif not self.pace.cooling:
            text = (
                f"{self._name} can take no more requests in the next {limits.queue_timeout} s: "
                f"requests_per_minute={limits.requests_per_minute}"
            )
        return ProviderPaced(text, retry_after=wait)

    @property
    def permits(self) -> Permits:
        """What answers in the background need for their places."""
        if self._permits is None:
            self._permits = self._make_permits()
        return self._permits

    def _make_permits(self) -> Permits:
        return Permits(self._name, self._limits, lambda: self.room, self._clock)

    @property
    def background(self) -> tuple[int, int]:
        """How many answers in the background have a permit, and how many wait for one."""
        return (0, 0) if self._permits is None else (self._permits.inside, self._permits.waiting)

    def apply_limits(self, limits: HttpClient) -> None:
        """Use new limits. Places that are taken stay taken, and starts stay counted."""
        self._limits = limits
        if self._permits is not None:
            self._permits.apply_limits(limits)
        self.pace.apply(
            limits.requests_per_minute, _burst(limits), tokens_per_minute=limits.tokens_per_minute
        )
        self.apply(
            limits.concurrent_requests,
            queue_size=limits.queue_size,
            queue_timeout=limits.queue_timeout,
        )

    @property
    def waiting(self) -> int:
        """How many requests wait, parked ones included."""
        return super().waiting + len(self._parked)

    @property
    def room(self) -> Fraction | int:
        """For how many more requests there is room, beside those that may come back."""
        return super().room - len(self._returning)

    @property
    def crowd(self) -> Fraction | int:
        """How much of the queue's room is taken, by those that wait for a permit, too."""
        waiting = super().crowd
        return waiting if self._permits is None else waiting + self._permits.crowd

    def check_room(self, *, batch: bool = False) -> None:
        """Refuse one more request that would wait, if the queue is full for its class.

        Raises:
            ProviderQueueFull: it is.
        """
        if self.room_for(batch=batch) <= 0:
            self._refused += 1
            raise self._full_error(self.retry_after())

    def keep_room(self, attempt: Hashable) -> None:
        """Keep room in the queue for the request of *attempt*, which has waited and starts now."""
        self._returning.add(attempt)

    def free_room(self, attempt: Hashable) -> None:
        """Give away what `keep_room` has kept, if it has."""
        self._returning.discard(attempt)

    async def park(self, seconds: float, *, waited: float = 0.0) -> None:
        """Wait for *seconds*, or until `resume`, outside of the queue. Cancelling is safe.

        The request has *waited* for so many seconds before.

        Raises:
            AioserverError: made by the argument of `close` or `refuse_waiting`.
        """
        if self._closed is not None:
            raise self._closed()
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(seconds, _settle, over)
        self._parked[over] = self._clock() - waited
        try:
            await over
        finally:
            timer.cancel()
            del self._parked[over]
            # A refusal is in this future, and its traceback leads to this frame.
            del over

    def told_cooling(self, seconds: float, failover_wait: float) -> None:
        """Start nothing for *seconds*, since the provider has asked another instance to be left
        alone.

        Waiters that may fail over are refused as by `refuse_late`.
        """
        self.pace.told_cooling(seconds)
        self.refuse_late(failover_wait)

    def resume(self) -> None:
        """Let the requests in that wait, since the provider is back."""
        for over in self._parked:
            _settle(over)
        self.serve()

    def refuse_waiting(
        self, error: Callable[[], AioserverError], *, fallback_only: bool = False
    ) -> None:
        """Refuse every waiter, or with *fallback_only* those that another provider can answer."""
        if fallback_only:
            for waiter in self._waiters():
                if waiter.may_fail_over:
                    self._refuse(waiter, error)
            if self._permits is not None:
                self._permits.refuse_movable(error)
            return
        super().refuse_waiting(error)
        if self._permits is not None:
            self._permits.refuse_waiting(error)
        for over in self._parked:
            if not over.done():
                self._refused += 1
                over.set_exception(error())

    def stats(self) -> GateStats:
        """Return a snapshot."""
        stats = super().stats()
        if not self._parked:
            return stats
        longest = self._clock() - min(self._parked.values())
        return replace(stats, oldest_wait=max(stats.oldest_wait, longest))

    def _make_rate(self, interval: float, tolerance: float) -> Gcra:
        return Gcra(interval, tolerance, self._clock)

    def _make_tokens(self, interval: float, tolerance: float) -> Gcra:
        return Gcra(interval, tolerance, self._clock)

    def _handed_over(self, waiter: Waiter[Place]) -> None:
        if waiter.rejoined or self._health.breaker.dead:
            self._returning.add(waiter)

    def resumed(self, waiter: Waiter[Place]) -> None:
        """Keep the room of *waiter*, whose task goes on, no longer."""
        self._returning.discard(waiter)

    def _too_long(self, *, batch: bool) -> AioserverError:
        return self._timeout_fault(self.retry_after(), BATCH_PATIENCE if batch else 1)

    def _timeout_fault(self, wait: float, times: int = 1) -> ProviderQueueTimeout:
        seconds = self._limits.queue_timeout * times
        text = f"no place at {self._name} within {seconds} s"
        if self._health.breaker.dead:
            text = f"{self._name} was not back within {seconds} s"
        return ProviderQueueTimeout(text, retry_after=wait)

    def _delay(self) -> float:
        breaker = self._health.breaker
        return max(self.pace.delay(), breaker.delay()) if breaker.dead else self.pace.delay()

    def _eta(self, position: int, batch_position: int = 0) -> float:
        eta, breaker = super()._eta(position, batch_position), self._health.breaker
        if not breaker.dead:
            return eta
        # Nobody knows when the provider is back. The first in the queue waits for the next trial,
        # and the others wait for one that succeeds: they are told what a request that does not
        # wait is told.
        trial = breaker.delay()
        return max(eta, self._health.retry_after if position > 1 or trial == inf else trial)

    def _try_start(self, cost: int, batch: bool) -> Place | None:
        if self._health.breaker.dead:
            return super()._try_start(cost, batch)
        return Place(self, None, batch) if self.pace.try_start(cost) else None

    def _start(self, cost: int, charge: Charge[Waiter[Place]] | None, batch: bool) -> Place:
        breaker = self._health.breaker
        if not breaker.dead:
            self.pace.start(cost)
            return Place(self, charge, batch)
        # First what may fail.
        trial = TrialPlace(self, charge, batch, _breaker=breaker)
        self.pace.start(cost)
        breaker.start()
        return trial


def _settle(over: asyncio.Future[None]) -> None:
    if not over.done():
        over.set_result(None)


def _background_queue(limits: HttpClient) -> tuple[int, float]:
    """Return the `queue_size` and the `queue_timeout` of requests that wait for a permit."""
    return (limits.queue_size + 1) // 2, BACKGROUND_PATIENCE * limits.queue_timeout


def _burst(limits: HttpClient) -> int:
    """Return how many requests may start at once after a rest: those of a second."""
    return min(limits.concurrent_requests, limits.requests_per_minute // 60)
