"""A counting gate: places, a bounded queue with deadlines, and refusal beyond.

This file is one concept: a gate and the requests in its queue, whose invariants are the same ones.

A gate stands in front of the handlers (`max_connections`, one queue in order of arrival), in front
of each provider (`concurrent_requests`, fair between callers) and in front of a provider's
sockets. It is bounded three times: in its places, in its waiters, and in the time that each of
them waits. A freed place is handed to the next waiter directly, so that a newcomer cannot
overtake, and nobody waits while a place is free. fair_queue.py decides which waiter is next.

A gate may have a pace as well (requests per minute). One queue then serves both: its head starts
once a place is free and the pace allows it. A request whose earliest start, by the pace alone, is
past its deadline is refused at once.

Not asyncio.Semaphore: it bounds neither its waiters nor their wait, and reports no positions.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from fractions import Fraction
from math import inf
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

from aioserver.errors import AioserverError
from aioserver.limits.fair_queue import FairQueue
from aioserver.limits.gcra import ROUNDING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

P = TypeVar("P")
WHOLE = Fraction(1)


class Waiter(Generic[P]):
    """A request in the queue; *place* is done once it has a place or an error.

    *arrived* and *deadline* are times of the gate's clock. A request that has waited before counts
    as one that arrived so much earlier. *share* is what it takes of one request's room in the
    queue: less than 1 where it stands in others as well.
    """

    __slots__ = (
        *("arrived", "caller", "cost", "deadline", "flow"),
        *("may_fail_over", "on_position", "place", "rejoined", "reported", "share"),
    )

    def __init__(
        self,
        place: asyncio.Future[P],
        caller: Hashable,
        flow: Hashable,
        arrived: float,
        deadline: float,
        on_position: Callable[[int, float], None] | None,
        cost: int,
        *,
        may_fail_over: bool,
        rejoined: bool = False,
        share: Fraction = WHOLE,
    ) -> None:
        self.place = place
        self.caller = caller
        self.flow = flow
        self.arrived = arrived
        self.deadline = deadline
        self.on_position = on_position
        self.cost = cost
        self.may_fail_over = may_fail_over
        self.rejoined = rejoined
        self.share = share
        self.reported: tuple[int, float] | None = None

    def report(self, position: int, eta: float) -> None:
        """Tell *on_position* what has changed since the last report."""
        if self.on_position is not None and self.reported != (position, eta):
            self.reported = position, eta
            self.on_position(position, eta)

    def start(self, place: P) -> None:
        """Hand *place* over: the request starts."""
        self.place.set_result(place)

    def refuse(self, error: Callable[[], AioserverError]) -> bool:
        """Refuse the request with an error that *error* makes; return whether that ends its
        wait.
        """
        if self.place.done():
            return False
        self.place.set_exception(error())
        return True


# Seconds between two reports to the waiters that want to know their position.
POSITION_INTERVAL = 1.0
# The bounds in seconds of every estimate of when to come back.
RETRY_AFTER = (1.0, 60.0)
# The weight of the newest interval between two freed places in their moving average.
SMOOTHING = 0.2


@dataclass(frozen=True, slots=True)
class GateStats:
    """A snapshot of a gate; *oldest_wait* in seconds."""

    inside: int
    limit: int
    waiting: int
    queue_size: int
    oldest_wait: float
    entered: int
    refused: int


class Pacer(Protocol):
    """A limit on how fast starts may follow each other."""

    def delay(self, ahead: int = 0) -> float:
        """Return the seconds until a request with *ahead* others before it may start."""

    def start(self, cost: int = 0) -> None:
        """Count a start that is expected to cost *cost*."""

    def charge(self, cost: int) -> None:
        """Add *cost* to the expected cost of a start; a negative cost takes some of it back."""


class Place:
    """A place inside a gate. It is given back once, however often `release` is called."""

    __slots__ = ("_gate",)

    def __init__(self, gate: Gate) -> None:
        self._gate: Gate | None = gate

    def release(self) -> None:
        """Give the place back."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate._leave()  # noqa: SLF001 - the two are one concept

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.release()


class Gate:
    """Bounded in places, in waiters and in their wait; fair between callers.

    Always: `inside <= limit`, unless `apply` has lowered the limit since; nobody waits while a
    place is free and the pace allows a start. One event loop owns one gate.

    The errors are made by *full_error* (the queue is full), *timeout_error* (the wait was too
    long) and *pace_error* (the pace would make the wait too long; by default *timeout_error*).
    Each of the three is called with the seconds after which the client should come back.
    """

    def __init__(
        self,
        limit: int,
        *,
        queue_size: int,
        queue_timeout: float,
        full_error: Callable[[float], AioserverError],
        timeout_error: Callable[[float], AioserverError],
        pace: Pacer | None = None,
        pace_error: Callable[[float], AioserverError] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit
        self._queue_size = queue_size
        self._queue_timeout = queue_timeout
        self._full_error = full_error
        self._timeout_error = timeout_error
        self._pace = pace
        self._pace_error = pace_error or timeout_error
        self._clock = clock
        self._queue: FairQueue[Waiter[Place]] = FairQueue()
        self._inside = 0
        self._entered = 0
        self._refused = 0
        # While the gate is full: the time at which it became full, or a place was freed last.
        self._full_since = 0.0
        # What the requests in this queue that stand in others as well do not count here.
        self._counted_elsewhere = Fraction()
        # The smoothed seconds between two freed places of a full gate.
        self._interval = 1.0
        self._position_timer: asyncio.TimerHandle | None = None
        # Fires when the next start may be allowed.
        self._start_timer: asyncio.TimerHandle | None = None
        self._closed: Callable[[], AioserverError] | None = None

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return self._queue.size

    @property
    def full(self) -> bool:
        """Whether the queue has no room for one more request."""
        return self.room <= 0

    @property
    def room(self) -> Fraction | int:
        """For how many more requests the queue has room."""
        return self._queue_size - self.crowd

    @property
    def crowd(self) -> Fraction | int:
        """How much of the queue's room is taken: a request that stands in other queues as well
        takes a part of one.
        """
        elsewhere = self._counted_elsewhere
        return self.waiting - elsewhere if elsewhere else self.waiting

    @property
    def queue_size(self) -> int:
        """For how many requests the queue has room."""
        return self._queue_size

    @property
    def room_elsewhere(self) -> bool:
        """Whether another process that shares these places may have one that it does not use."""
        return False

    @property
    def waiting_elsewhere(self) -> int:
        """How many requests at least wait in other processes for places that are taken here."""
        return 0

    @property
    def inside(self) -> int:
        """How many places are taken."""
        return self._inside

    @property
    def limit(self) -> int:
        """How many places there are."""
        return self._limit

    def apply(self, limit: int, *, queue_size: int, queue_timeout: float) -> None:
        """Use new bounds. Places that are taken stay taken; waiters keep their deadlines."""
        self._limit, self._queue_size, self._queue_timeout = limit, queue_size, queue_timeout
        self._full_since = self._clock()
        self.serve()

    def serve(self) -> None:
        """Let in the waiters that may start now; called when a place or the pace has changed."""
        while self._queue.size and self._inside < self._limit:
            if (delay := self._delay()) > ROUNDING:
                if self._start_timer is not None:
                    self._start_timer.cancel()
                    self._start_timer = None
                if delay < inf:
                    loop = asyncio.get_running_loop()
                    self._start_timer = loop.call_later(delay, self.serve)
                return
            self._enter()
            self._hand_over()

    def try_enter(self, cost: int = 0) -> Place | None:
        """Return a place if one is free and nobody waits for it; *cost* counts for the pace."""
        if self._inside >= self._limit or self._queue.size or self._closed is not None:
            return None
        paced = self._pace is not None
        if paced and self._delay() > ROUNDING:
            return None
        self._enter()
        try:
            place = self._start(cost) if paced else Place(self)
        except BaseException:
            self._leave()
            raise
        self._entered += 1
        return place

    async def enter(
        self,
        caller: Hashable = None,
        flow: Hashable = None,
        *,
        weight: int = 1,
        on_position: Callable[[int, float], None] | None = None,
        waited: float = 0.0,
        at_front: bool = False,
        may_fail_over: bool = False,
        rejoin: bool = False,
        cost: int = 0,
    ) -> Place:
        """Wait for a place. Cancelling is safe at any time: no place is lost.

        Callers share the places by their *weight* (1 to 10); the flows of one caller share evenly.
        *on_position* is called with `(position, eta in seconds)` when the wait begins, and again
        each second if they have changed. The seconds that the request has *waited* before are a
        part of its `queue_timeout`. A request that has waited before is put *at_front* of its
        caller's other requests. `refuse_late` may also refuse a request that *may_fail_over* to
        another gate. A request that was in the queue before may *rejoin* it, though it is full.
        *cost* counts for the pace.

        Raises:
            AioserverError: made by *full_error* or *pace_error* at once, by *timeout_error* at the
                deadline, or by the argument of `close` or `refuse_waiting`.
        """
        if place := self.try_enter(cost):
            return place
        try:
            seconds = self.time_left(waited, room=rejoin or not self.full)
            self.check_pace(seconds, caller, flow, weight, at_front=at_front)
        except AioserverError:
            self.count_refusal()
            raise
        now = self._clock()
        waiter = Waiter(
            asyncio.get_running_loop().create_future(),
            caller,
            flow,
            now - waited,
            now + seconds,
            on_position,
            cost,
            may_fail_over=may_fail_over,
            rejoined=rejoin,
        )
        self._queue.add(waiter, caller, flow, weight, at_front=at_front)
        waiting = self._wait(waiter, seconds, at_front=at_front)
        # A refusal is in the waiter's future, and its traceback leads to this frame.
        del waiter
        return await waiting

    def time_left(self, waited: float, *, room: bool) -> float:
        """Return for how many seconds a request that has *waited* before may wait here, where
        there is *room* for it.

        Raises:
            AioserverError: for none, or there is no room; or the gate is closed.
        """
        if self._closed is not None:
            raise self._closed()
        seconds = max(0.0, self._queue_timeout - waited)
        if (not room or seconds <= 0) and (seconds := self._grace()) <= 0:
            # A request without time left has waited already, at another gate or in an earlier
            # attempt.
            timed_out = waited >= self._queue_timeout > 0
            raise (self._timeout_error if timed_out else self._full_error)(self.retry_after())
        return seconds

    def check_pace(
        self, seconds: float, caller: Hashable, flow: Hashable, weight: int, *, at_front: bool
    ) -> None:
        """Refuse a request that the pace alone lets start after more than *seconds*.

        Raises:
            AioserverError: it does.
        """
        if self._pace is None:
            return
        number = self._queue.count(caller, flow) + 1
        position = self._queue.position(caller, flow, number, weight, at_front=at_front)
        if (delay := self._pace.delay(position - 1)) > seconds:
            raise self._pace_error(delay)

    def stand(self, waiter: Waiter[Place], weight: int, *, at_front: bool) -> None:
        """Let *waiter*, which stands in the queues of other gates as well, wait here: `serve` is
        next. lines.py is the other half of this.
        """
        self._queue.add(waiter, waiter.caller, waiter.flow, weight, at_front=at_front)
        self._counted_elsewhere += 1 - waiter.share

    def share_out(self, waiter: Waiter[Place], share: Fraction) -> None:
        """Let *waiter*, which stands here, take another *share* of one request's room."""
        self._counted_elsewhere += waiter.share - share
        waiter.share = share

    def leave(self, waiter: Waiter[Place]) -> None:
        """Let *waiter*, which `stand` has let wait, wait here no more."""
        if self._queue.remove(waiter, waiter.caller, waiter.flow):
            self._counted_elsewhere -= 1 - waiter.share

    def give_up(self, waiter: Waiter[Place], place: Place) -> None:
        """Take back the *place* that *waiter* was handed and does not use."""
        if self._pace is not None and waiter.cost:
            self._pace.charge(-waiter.cost)
        place.release()

    def now(self) -> float:
        """Return the time by the gate's clock."""
        return self._clock()

    def count_refusal(self) -> None:
        """Count a request that was refused at once, unless the gate is closed."""
        self._refused += self._closed is None

    def timeout(self) -> AioserverError:
        """Return the error of a request whose wait here was too long, and count it."""
        self._refused += 1
        return self._timeout_error(self.retry_after())

    async def _wait(self, waiter: Waiter[Place], seconds: float, *, at_front: bool) -> Place:
        place = waiter.place
        try:
            # Sets the timer of the pace if only the pace keeps the waiter from starting.
            self.serve()
            if waiter.on_position is not None and not place.done():
                self.report_first(waiter, at_front=at_front)
            async with asyncio.timeout(seconds):
                return await place
        except BaseException as exc:
            if place.done() and not place.cancelled() and place.exception() is None:
                # The place was handed over in the tick in which this task gave up: pass it on.
                self.give_up(waiter, place.result())
            else:
                self._queue.remove(waiter, waiter.caller, waiter.flow)
            if isinstance(exc, TimeoutError):
                raise self.timeout() from None
            raise
        finally:
            self.resumed(waiter)
            # As in `enter`.
            del place, waiter

    def refuse_waiting(self, error: Callable[[], AioserverError]) -> None:
        """Refuse every waiter, each with an error of its own."""
        for waiter in list(self._queue):
            self._refuse(waiter, error)
        self._queue.clear()
        self._counted_elsewhere = Fraction()

    def refuse_late(self, failover_wait: float) -> None:
        """Refuse the waiters that cannot start before their deadline, since the pace has slowed
        down.

        A waiter that may fail over is also refused if nothing starts for more than *failover_wait*
        seconds.
        """
        assert self._pace is not None
        delay = self._pace.delay()
        earliest_start = self._clock() + delay
        for waiter in list(self._queue):
            fails_over = waiter.may_fail_over and delay > failover_wait
            if fails_over or waiter.deadline < earliest_start:
                self._refuse(waiter, lambda: self._pace_error(delay))

    def close(self, error: Callable[[], AioserverError]) -> None:
        """Refuse every waiter and every newcomer, each with an error of its own."""
        self._closed = error
        self.refuse_waiting(error)
        if self._start_timer is not None:
            self._start_timer.cancel()

    def retry_after(self) -> float:
        """Return the seconds until one more request may find a place.

        The result has jitter, so that the refused clients do not all come back at once.
        """
        low, high = RETRY_AFTER
        estimate = self._eta(self.waiting + 1)
        return min(high, max(low, estimate) * random.uniform(1.0, 1.5))  # noqa: S311 - jitter

    def stats(self) -> GateStats:
        """Return a snapshot."""
        oldest = min((waiter.arrived for waiter in self._queue.heads()), default=None)
        return GateStats(
            inside=self._inside,
            limit=self._limit,
            waiting=self.waiting,
            queue_size=self._queue_size,
            oldest_wait=0.0 if oldest is None else self._clock() - oldest,
            entered=self._entered,
            refused=self._refused,
        )

    def _grace(self) -> float:
        """Return for how many seconds a request may wait that would be refused at once."""
        return 0.0

    def _delay(self) -> float:
        """Return the seconds until the next start.

        0.0 if nothing but places limits it, inf until `serve`.
        """
        return 0.0 if self._pace is None else self._pace.delay()

    def _start(self, cost: int) -> Place:
        """Count a start, for which there is a place."""
        if self._pace is not None:
            self._pace.start(cost)
        return Place(self)

    def _enter(self) -> None:
        self._inside += 1
        if self._inside == self._limit:
            self._full_since = self._clock()

    def _leave(self) -> None:
        # Below the limit nobody had to wait for this place, so its interval does not count.
        if self._inside >= self._limit:
            now = self._clock()
            self._interval += SMOOTHING * (min(60.0, now - self._full_since) - self._interval)
            self._full_since = now
        self._inside -= 1
        self.serve()

    def _hand_over(self) -> None:
        """Hand a place, which is counted already, to the next waiter; free it if there is none."""
        waiter = place = None
        try:
            waiter = self._queue.pop(self._gone)
            if waiter is not None:
                if waiter.share is not WHOLE:
                    self._counted_elsewhere -= 1 - waiter.share
                self._handed_over(waiter)
                place = self._start(waiter.cost)
        except Exception as exc:
            if waiter is None:
                raise
            # It is raised in the task that waits, and not in the one that has given its place
            # back.
            waiter.place.set_exception(exc)
        finally:
            if place is None:
                self._inside -= 1
        if waiter is not None and place is not None:
            self._entered += 1
            try:
                waiter.start(place)
            except Exception as exc:
                if waiter.place.done():
                    raise
                place.release()
                waiter.place.set_exception(exc)

    def _gone(self, waiter: Waiter[Place]) -> bool:
        """Return whether *waiter*, the first in the queue, has a place or an error, or has given
        up.
        """
        gone = waiter.place.done()
        if gone and waiter.share is not WHOLE:
            self._counted_elsewhere -= 1 - waiter.share
        return gone

    def _handed_over(self, waiter: Waiter[Place]) -> None:
        """Note that *waiter* gets a place, of which its task hears in the next turn of the
        loop.
        """

    def resumed(self, waiter: Waiter[Place]) -> None:
        """Note that the task of *waiter* goes on, with a place or without one."""

    def _refuse(self, waiter: Waiter[Place], error: Callable[[], AioserverError]) -> None:
        if waiter.refuse(error):
            self._refused += 1

    def _eta(self, position: int) -> float:
        """Estimate the seconds until the request at *position* starts."""
        wait = position * self._interval if self._inside >= self._limit else 0.0
        return wait if self._pace is None else max(wait, self._pace.delay(position - 1))

    def report_first(self, waiter: Waiter[Place], *, at_front: bool) -> None:
        """Report the position of a new *waiter*, and start the reports to all."""
        caller, flow = waiter.caller, waiter.flow
        number = 1 if at_front else self._queue.count(caller, flow)
        position = self._queue.position(caller, flow, number)
        waiter.report(position, self._eta(position))
        if self._position_timer is None:
            loop = asyncio.get_running_loop()
            self._position_timer = loop.call_later(POSITION_INTERVAL, self._report_positions)

    def _report_positions(self) -> None:
        self._position_timer = None
        listeners = False
        waiting = [waiter for waiter in self._queue if not waiter.place.done()]
        for position, waiter in enumerate(waiting, 1):
            listeners = listeners or waiter.on_position is not None
            waiter.report(position, self._eta(position))
        if listeners:
            loop = asyncio.get_running_loop()
            self._position_timer = loop.call_later(POSITION_INTERVAL, self._report_positions)
