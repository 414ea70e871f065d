"""A counting gate: places, a bounded queue with deadlines, and refusal beyond.

This file is one concept: a gate and the requests in its queues, whose invariants are the same
ones.

A gate stands in front of the handlers (`max_connections`, one queue in order of arrival), in front
of each provider (`concurrent_requests`, fair between callers) and in front of a provider's
sockets. It is bounded three times: in its places, in its waiters, and in the time that each of
them waits. A freed place is handed to the next waiter directly, so that a newcomer cannot
overtake, and nobody waits while a place is free. fair_queue.py decides which waiter is next.

A gate may have a pace as well (requests per minute). One queue then serves both: its head starts
once a place is free and the pace allows it. A request whose earliest start, by the pace alone, is
past its deadline is refused at once.

A gate has two queues: requests of the class *batch* use what the others, which are *interactive*,
leave. An interactive request goes first, and batch runs on all places but a tenth, so that one
that comes alone starts at once. While both wait, each interactive start lends batch a nineteenth
of its work as credit; once the credit has reached the work of batch's head, that head is next and
pays it. So batch never starves, and gets a twentieth of the work. Who is fair to whom is a matter
of each class alone.

Not asyncio.Semaphore: it bounds neither its waiters nor their wait, and reports no positions.
"""

# ruff: noqa: SLF001 - a gate and its places are one concept

from __future__ import annotations

import asyncio
import math
import random
import time
from fractions import Fraction
from itertools import chain
from math import inf
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

import msgspec

from aioserver.errors import AioserverError
from aioserver.limits.gcra import ROUNDING
from aioserver.limits.old_fair_queue import FairQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from aioserver.limits.old_fair_queue import Charge

P = TypeVar("P")
WHOLE = Fraction(1)


class Waiter(Generic[P]):
    """A request in the queue; *place* is done once it has a place or an error.

    *arrived* and *deadline* are times of the gate's clock. A request that has waited before counts
    as one that arrived so much earlier. *share* is what it takes of one request's room in the
    queue: less than 1 where it stands in others as well. *cost* is what it counts for the pace, and
    *work* what it is estimated to cost its caller's share. It *goes_on* with an answer that has
    begun.
    """

    __slots__ = (
        *("arrived", "batch", "caller", "cost", "deadline", "flow", "goes_on"),
        *("may_fail_over", "on_position", "place", "rejoined", "reported", "share", "work"),
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
        work: int = 1,
        batch: bool = False,
        may_fail_over: bool,
        rejoined: bool = False,
        goes_on: bool = False,
        share: Fraction = WHOLE,
    ) -> None:
        self.goes_on = goes_on
        self.work = work
        self.batch = batch
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
# Of N places batch leaves 1 / LEFT free, at least one.
LEFT = 10
# While others wait, each lends batch 1 / LENT of its work: a twentieth of all.
LENT = 19
# Batch fills half of a queue at most, and waits so many times as long.
BATCH_PATIENCE = 10
# The weight of the newest interval between two freed places in their moving average.
SMOOTHING = 0.2


class GateStats(msgspec.Struct, frozen=True):
    """A snapshot of a gate; *oldest_wait* in seconds. Of those *waiting*, *batch_waiting* are
    batch.
    """

    inside: int
    limit: int
    waiting: int
    queue_size: int
    oldest_wait: float
    refused: int
    batch_waiting: int = 0


class Pacer(Protocol):
    """A limit on how fast starts may follow each other."""

    def delay(self, ahead: int = 0) -> float:
        """Return the seconds until a request with *ahead* others before it may start."""

    def start(self, cost: int = 0) -> None:
        """Count a start that is expected to cost *cost*."""

    def charge(self, cost: int) -> None:
        """Add *cost* to the expected cost of a start; a negative cost takes some of it back."""


class Place(msgspec.Struct, eq=False):
    """A place inside a gate. It is given back once, however often `release` is called.

    *_charge* is what its caller was charged with for it, None for nothing, or not yet. *batch* is
    the class of the request that has it.
    """

    _gate: Gate | None
    _charge: Charge[Waiter[Place]] | None = None
    batch: bool = False

    # A place that is lent is a `Loan`.
    lent = False

    def release(self, cost: int | None = None) -> None:
        """Give the place back, whose request has cost so much work; None: what was estimated."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate._leave(self, cost)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.release()


class Gate:
    """Bounded in places, in waiters and in their wait; fair between callers.

    Always: `inside <= limit`, unless `apply` has lowered the limit since; nobody waits while a
    place is free for its class and the pace allows a start. One event loop owns one gate.

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
        # How many places there are.
        self.limit = limit
        # For how many requests the queue has room.
        self.queue_size = queue_size
        self._queue_timeout = queue_timeout
        self._full_error = full_error
        self._timeout_error = timeout_error
        self._pace = pace
        self._pace_error = pace_error or timeout_error
        self._clock = clock
        self._queue: FairQueue[Waiter[Place]] = FairQueue()
        # Those of the class batch, how many of them are inside, and the nineteenths of work that
        # interactive starts have lent them.
        self._batch: FairQueue[Waiter[Place]] = FairQueue()
        self._batch_inside = 0
        self._credit = 0
        # Places that were had without a wait, and nobody has waited since, with who has them and
        # what they are estimated to cost. Their callers are charged once somebody waits, or else
        # with what it was.
        self._early: dict[Place, tuple[Hashable, Hashable, int, Callable[[], int]]] = {}
        # How many places are taken.
        self.inside = 0
        self._refused = 0
        # While the gate is full: the time at which it became full, or a place was freed last.
        self._full_since = 0.0
        # What the requests in this queue that stand in others as well do not count here.
        self._counted_elsewhere = self._batch_elsewhere = Fraction()
        # How many requests take room of the queue, and do not stand in it: see loan.py.
        self.outside = 0
        # The smoothed seconds between two freed places of a full gate.
        self._interval = 1.0
        # The same of the places that batch may have.
        self._batch_full_since, self._batch_interval = 0.0, 1.0
        self._position_timer: asyncio.TimerHandle | None = None
        # Fires when the next start may be allowed.
        self._start_timer: asyncio.TimerHandle | None = None
        self._closed: Callable[[], AioserverError] | None = None
        # Whether those that go on with what has begun may still enter.
        self._finishes = False

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return self._queue.size + self._batch.size

    @property
    def batch_limit(self) -> int:
        """How many places batch may have."""
        limit = self.limit
        return limit - max(1, limit // LEFT) if limit > 1 else limit

    @property
    def full(self) -> bool:
        """Whether the queue has no room for one more request."""
        return self.room <= 0

    @property
    def room(self) -> Fraction | int:
        """For how many more requests the queue has room."""
        return self.queue_size - self.crowd

    @property
    def batch_room(self) -> Fraction | int:
        """For how many more requests of the class batch the queue has room."""
        crowd, most = self._batch.size - self._batch_elsewhere, -(-self.queue_size // 2)
        # Another process may have room for more.
        more = self.room - (self.queue_size - self.crowd)
        return min(self.room, most - crowd + max(0, more))

    def room_for(self, *, batch: bool) -> Fraction | int:
        """For how many more requests of a class the queue has room."""
        return self.batch_room if batch else self.room

    @property
    def crowd(self) -> Fraction | int:
        """How much of the queue's room is taken: a request that stands in other queues as well
        takes a part of one, and one that stands elsewhere and counts here a whole one.
        """
        elsewhere, waiting = self._counted_elsewhere, self.waiting + self.outside
        return waiting - elsewhere if elsewhere else waiting

    @property
    def room_elsewhere(self) -> bool:
        """Whether another process that shares these places may have one that it does not use."""
        return False

    @property
    def waiting_elsewhere(self) -> int:
        """How many requests at least wait in other processes for places that are taken here."""
        return 0

    def apply(self, limit: int, *, queue_size: int, queue_timeout: float) -> None:
        """Use new bounds. Places that are taken stay taken; waiters keep their deadlines."""
        self.limit, self.queue_size, self._queue_timeout = limit, queue_size, queue_timeout
        self._full_since = self._clock()
        self.serve()

    def check_open(self) -> None:
        """Do nothing, unless the gate is closed.

        Raises:
            AioserverError: it is.
        """
        if self._closed is not None:
            raise self._closed()

    def serve(self) -> None:
        """Let in the waiters that may start now; called when a place or the pace has changed."""
        while self.inside < self.limit and (self._queue.size or self._batch.size):
            if (queue := self._next()) is None:
                return
            if (delay := self._delay()) > ROUNDING:
                if self._start_timer is not None:
                    self._start_timer.cancel()
                    self._start_timer = None
                if delay < inf:
                    loop = asyncio.get_running_loop()
                    self._start_timer = loop.call_later(delay, self.serve)
                return
            self._enter()
            if queue is self._batch:
                self._batch_entered()
            self._hand_over(queue)

    def _next(self) -> FairQueue[Waiter[Place]] | None:
        """Return the queue whose head is the next to start; None if nobody may."""
        queue, batch = self._queue, self._batch
        if batch.size and self._batch_inside < self.batch_limit:
            if not queue.size:
                return batch
            head = batch.head(self._gone)
            if head is not None and self._credit >= LENT * head.work:
                return batch
        return queue if queue.size else None

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
        """Return a place if one is free and nobody waits for it.

        *cost* counts for the pace, and *work*, which is called if that has to be known before the
        end, for the share of *caller* and *flow*, as in `enter`; None: nobody is charged.
        """
        if self.inside >= self.limit or self._queue.size or self._closed is not None:
            return None
        if batch and (self._batch.size or self._batch_inside >= self.batch_limit):
            return None
        if (place := self._try_start(cost, batch)) is None:
            return None
        if work is not None:
            self._early[place] = caller, flow, weight, work
        self.inside += 1
        if self.inside == self.limit:
            self._full_since = self._clock()
        if batch:
            self._batch_entered()
        return place

    async def enter(
        self,
        caller: Hashable = None,
        flow: Hashable = None,
        *,
        weight: int = 1,
        on_position: Callable[[int, float], None] | None = None,
        waited: float = 0.0,
        came: float | None = None,
        may_fail_over: bool = False,
        rejoin: bool = False,
        goes_on: bool = False,
        cost: int = 0,
        work: int = 1,
        batch: bool = False,
        within: float = inf,
    ) -> Place:
        """Wait for a place. Cancelling is safe at any time: no place is lost.

        Callers share the places by their *weight* (1 to 10) and the *work* of their requests, which
        is an estimate: `Place.release` corrects it. The flows of one caller share evenly. A *batch*
        request starts when no other one wants the place, has half of the queue, and waits ten times
        as long.
        *on_position* is called with `(position, eta in seconds)` when the wait begins, and again
        each second if they have changed. The seconds that the request has *waited* before are a
        part of its `queue_timeout`. A request that comes back, and *came* first at that time of any
        clock, is put in front of its caller's other requests, behind those that came before it.
        `refuse_late` may also refuse a request that *may_fail_over* to
        another gate. A request that was in the queue before may *rejoin* it, though it is full.
        One that *goes_on* with an answer that has begun may also enter while the gate closes.
        *cost* counts for the pace. A request that cannot start *within* so many seconds, by the
        pace alone, is refused as one that cannot within `queue_timeout`; else it is the caller who
        ends its wait then.

        Raises:
            AioserverError: made by *full_error* or *pace_error* at once, by *timeout_error* at the
                deadline, or by the argument of `close` or `refuse_waiting`.
        """
        if place := self.try_enter(cost, caller, flow, weight, lambda: work, batch=batch):
            return place
        try:
            room = rejoin or self.room_for(batch=batch) > 0
            seconds = self.time_left(waited, room=room, batch=batch, goes_on=goes_on)
            self.check_pace(min(seconds, within), caller, flow, batch=batch, came=came)
        except AioserverError:
            self.count_refusal()
            raise
        now = self._clock()
        waiter = Waiter(
            asyncio.get_running_loop().create_future(),
            caller,
            flow,
            now - waited,
            now + min(seconds, within),
            on_position,
            cost,
            work=work,
            batch=batch,
            may_fail_over=may_fail_over,
            rejoined=rejoin,
            goes_on=goes_on,
        )
        self._add(waiter, weight, came=came)
        waiting = self._wait(waiter, seconds, came=came)
        # A refusal is in the waiter's future, and its traceback leads to this frame.
        del waiter
        return await waiting

    def _add(self, waiter: Waiter[Place], weight: int, *, came: float | None) -> None:
        queue = self._queue
        if self._early:
            self._charge_early()
        if waiter.batch:
            queue = self._batch
            if not queue.size:
                # Nothing is lent to those who do not wait.
                self._credit = 0
        queue.add(waiter, waiter.caller, waiter.flow, weight, waiter.work, came=came)

    def _charge_early(self) -> None:
        """Charge those that have started without a wait, in their order, since somebody waits."""
        for place, (caller, flow, weight, work) in list(self._early.items()):
            queue = self._batch if place.batch else self._queue
            place._charge = queue.start(caller, flow, weight, work())
            del self._early[place]

    def _remove(self, waiter: Waiter[Place]) -> bool:
        queue = self._batch if waiter.batch else self._queue
        return queue.remove(waiter, waiter.caller, waiter.flow)

    def time_left(
        self, waited: float, *, room: bool, batch: bool = False, goes_on: bool = False
    ) -> float:
        """Return for how many seconds a request that has *waited* before may wait here, where
        there is *room* for it.

        Raises:
            AioserverError: for none, or there is no room; or the gate is closed.
        """
        if self._closed is not None and not (goes_on and self._finishes):
            raise self._closed()
        patience = self._queue_timeout * (BATCH_PATIENCE if batch else 1)
        seconds = max(0.0, patience - waited)
        if (not room or seconds <= 0) and (seconds := self._grace()) <= 0:
            # A request without time left has waited already, at another gate or in an earlier
            # attempt.
            if waited >= patience > 0:
                raise self._too_long(batch=batch)
            raise self._full_error(self.retry_after())
        return seconds

    def check_pace(
        self,
        seconds: float,
        caller: Hashable,
        flow: Hashable,
        *,
        batch: bool,
        came: float | None,
    ) -> None:
        """Refuse a request that the pace alone lets start after more than *seconds*.

        Raises:
            AioserverError: it does.
        """
        if self._pace is None:
            return
        queue = self._batch if batch else self._queue
        number = queue.count(caller, flow) + 1
        own = queue.position(caller, flow, number, came=came)
        position = self._position(own, batch=batch)
        if (delay := self._pace.delay(position - 1)) > seconds:
            raise self._pace_error(delay)

    def stand(self, waiter: Waiter[Place], weight: int, *, came: float | None = None) -> None:
        """Let *waiter*, which stands in the queues of other gates as well, wait here: `serve` is
        next. lines.py is the other half of this.
        """
        self._add(waiter, weight, came=came)
        self._count_elsewhere(waiter, 1 - waiter.share)

    def share_out(self, waiter: Waiter[Place], share: Fraction) -> None:
        """Let *waiter*, which stands here, take another *share* of one request's room."""
        self._count_elsewhere(waiter, waiter.share - share)
        waiter.share = share

    def leave(self, waiter: Waiter[Place]) -> None:
        """Let *waiter*, which `stand` has let wait, wait here no more."""
        if self._remove(waiter):
            self._count_elsewhere(waiter, waiter.share - 1)

    def _count_elsewhere(self, waiter: Waiter[Place], more: Fraction) -> None:
        """Count so much *more* of what *waiter* takes as taken in other queues."""
        self._counted_elsewhere += more
        if waiter.batch:
            self._batch_elsewhere += more

    def give_up(self, waiter: Waiter[Place], place: Place) -> None:
        """Take back the *place* that *waiter* was handed and does not use."""
        if self._pace is not None and waiter.cost:
            self._pace.charge(-waiter.cost)
        place.release(0)

    def now(self) -> float:
        """Return the time by the gate's clock."""
        return self._clock()

    def count_refusal(self) -> None:
        """Count a request that was refused at once, unless the gate is closed."""
        self._refused += self._closed is None

    def timeout(self, *, batch: bool = False) -> AioserverError:
        """Return the error of a request whose wait here was too long, and count it."""
        self._refused += 1
        return self._too_long(batch=batch)

    def _too_long(self, *, batch: bool) -> AioserverError:  # noqa: ARG002 - its words may differ
        return self._timeout_error(self.retry_after())

    async def _wait(self, waiter: Waiter[Place], seconds: float, *, came: float | None) -> Place:
        place = waiter.place
        try:
            # Sets the timer of the pace if only the pace keeps the waiter from starting.
            self.serve()
            if waiter.on_position is not None and not place.done():
                self.report_first(waiter, came=came)
            async with asyncio.timeout(seconds):
                return await place
        except BaseException as exc:
            if place.done() and not place.cancelled() and place.exception() is None:
                # The place was handed over in the tick in which this task gave up: pass it on.
                self.give_up(waiter, place.result())
            else:
                self._remove(waiter)
            if isinstance(exc, TimeoutError):
                raise self.timeout(batch=waiter.batch) from None
            raise
        finally:
            self.resumed(waiter)
            # As in `enter`.
            del place, waiter

    def refuse_waiting(self, error: Callable[[], AioserverError]) -> None:
        """Refuse every waiter, each with an error of its own."""
        for waiter in list(self._waiters()):
            self._refuse(waiter, error)
        self._queue.clear()
        self._batch.clear()
        self._counted_elsewhere = self._batch_elsewhere = Fraction()

    def refuse_late(self, failover_wait: float) -> None:
        """Refuse the waiters that cannot start before their deadline, since the pace has slowed
        down.

        A waiter that may fail over is also refused if nothing starts for more than *failover_wait*
        seconds.
        """
        assert self._pace is not None
        delay = self._pace.delay()
        earliest_start = self._clock() + delay
        for waiter in list(self._waiters()):
            fails_over = waiter.may_fail_over and delay > failover_wait
            if fails_over or waiter.deadline < earliest_start:
                self._refuse(waiter, lambda: self._pace_error(delay))

    def close(self, error: Callable[[], AioserverError], *, finishes: bool = False) -> None:
        """Refuse every waiter and every newcomer, each with an error of its own; if it *finishes*
        what has begun, not those that go on with it.
        """
        self._closed, self._finishes = error, finishes
        going_on = [each for each in self._waiters() if each.goes_on] if finishes else []
        for waiter in going_on:
            self._remove(waiter)
        self.refuse_waiting(error)
        if self._start_timer is not None:
            self._start_timer.cancel()
        for waiter in going_on:
            # Nobody else waits whose weight would matter.
            self._add(waiter, 1, came=waiter.arrived)
        if going_on:
            self.serve()

    def retry_after(self) -> float:
        """Return the seconds until one more request may find a place.

        The result has jitter, so that the refused clients do not all come back at once.
        """
        low, high = RETRY_AFTER
        estimate = self._eta(self.waiting + 1)
        return min(high, max(low, estimate) * random.uniform(1.0, 1.5))  # noqa: S311 - jitter

    def stats(self) -> GateStats:
        """Return a snapshot."""
        heads = chain(self._queue.heads(), self._batch.heads())
        oldest = min((waiter.arrived for waiter in heads), default=None)
        return GateStats(
            inside=self.inside,
            limit=self.limit,
            waiting=self.waiting,
            queue_size=self.queue_size,
            oldest_wait=0.0 if oldest is None else self._clock() - oldest,
            refused=self._refused,
            batch_waiting=self._batch.size,
        )

    def _grace(self) -> float:
        """Return for how many seconds a request may wait that would be refused at once."""
        return 0.0

    def _delay(self) -> float:
        """Return the seconds until the next start.

        0.0 if nothing but places limits it, inf until `serve`.
        """
        return 0.0 if self._pace is None else self._pace.delay()

    def _try_start(self, cost: int, batch: bool) -> Place | None:
        """Count a start, for which there is a place, unless it has to wait."""
        if self._pace is None:
            return Place(self, None, batch)
        return None if self._delay() > ROUNDING else self._start(cost, None, batch)

    def _start(self, cost: int, charge: Charge[Waiter[Place]] | None, batch: bool) -> Place:
        """Count a start, for which there is a place, and for which somebody was charged."""
        if self._pace is not None:
            self._pace.start(cost)
        return Place(self, charge, batch)

    def _enter(self) -> None:
        self.inside += 1
        if self.inside == self.limit:
            self._full_since = self._clock()

    def _batch_entered(self) -> None:
        self._batch_inside += 1
        if self._batch_inside == self.batch_limit:
            self._batch_full_since = self._clock()

    def _leave(self, place: Place, cost: int | None) -> None:
        """Take *place* back, whose request has cost so much work; None: what was estimated."""
        if place._charge is not None:
            place._charge.settle(cost)
        elif self._early and (early := self._early.pop(place, None)) is not None:
            # Its caller has had it without a wait, and nobody has waited since.
            caller, _flow, weight, work = early
            queue = self._batch if place.batch else self._queue
            queue.spend(caller, weight, work() if cost is None else cost)
        if place.batch:
            self._batch_left()
        # Below the limit nobody had to wait for this place, so its interval does not count.
        if (inside := self.inside) >= self.limit:
            now = self._clock()
            self._interval += SMOOTHING * (min(60.0, now - self._full_since) - self._interval)
            self._full_since = now
        self.inside = inside - 1
        if self._queue.size or self._batch.size:
            self.serve()

    def _batch_left(self) -> None:
        if self._batch_inside >= self.batch_limit:
            now = self._clock()
            interval = min(60.0, now - self._batch_full_since)
            self._batch_interval += SMOOTHING * (interval - self._batch_interval)
            self._batch_full_since = now
        self._batch_inside -= 1

    def _hand_over(self, queue: FairQueue[Waiter[Place]]) -> None:
        """Hand a place, which is counted already, to the next waiter of *queue*; free it if there
        is none.
        """
        waiter = place = charge = None
        batch = queue is self._batch
        try:
            popped = queue.pop(self._gone)
            if popped is not None:
                waiter, charge = popped
                if waiter.share is not WHOLE:
                    self._count_elsewhere(waiter, waiter.share - 1)
                self._lend(waiter)
                self._handed_over(waiter)
                place = self._start(waiter.cost, charge, batch)
        except Exception as exc:
            if waiter is None:
                raise
            # It is raised in the task that waits, and not in the one that has given its place
            # back.
            waiter.place.set_exception(exc)
        finally:
            if place is None:
                self.inside -= 1
                if batch:
                    self._batch_inside -= 1
                if charge is not None:
                    charge.settle(0)
        if waiter is not None and place is not None:
            try:
                waiter.start(place)
            except Exception as exc:
                if waiter.place.done():
                    raise
                place.release(0)
                waiter.place.set_exception(exc)

    def _lend(self, waiter: Waiter[Place]) -> None:
        """Lend batch, or have it pay, what the start of *waiter* is worth, while others wait."""
        if waiter.batch:
            if self._queue.size:
                self._credit = max(0, self._credit - LENT * waiter.work)
        elif self._batch.size:
            head = self._batch.head(self._gone)
            # No more than one that is too much: it may have to wait for its places.
            if head is not None and self._credit < LENT * head.work:
                self._credit += waiter.work

    def _gone(self, waiter: Waiter[Place]) -> bool:
        """Return whether *waiter*, the first in the queue, has a place or an error, or has given
        up.
        """
        gone = waiter.place.done()
        if gone and waiter.share is not WHOLE:
            self._count_elsewhere(waiter, waiter.share - 1)
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

    def _waiters(self) -> Iterator[Waiter[Place]]:
        """Iterate over those that wait in the order in which they start if nobody comes or leaves,
        and batch has places.
        """
        batch, credit = iter(self._batch), self._credit
        head = next(batch, None)
        for waiter in self._queue:
            while head is not None and credit >= LENT * head.work:
                credit -= LENT * head.work
                yield head
                head = next(batch, None)
            yield waiter
            credit += waiter.work
        if head is not None:
            yield head
            yield from batch

    def _position(self, own: int, *, batch: bool) -> int:
        """Estimate the position of the *own*-th of its class among all, if those of each class
        have their mean work.
        """
        queue, others = self._queue, self._batch
        if not others.size and not batch:
            return own
        price = LENT * others.work / others.size if others.size else LENT
        if not batch:
            lent = self._credit + (own - 1) * (queue.work / queue.size if queue.size else 0)
            return own + min(others.size, int(lent / price))
        if not queue.size:
            return own
        before = math.ceil((own * price - self._credit) * queue.size / queue.work)
        return own + max(0, min(queue.size, before))

    def _eta(self, position: int, batch_position: int = 0) -> float:
        """Estimate the seconds until the request at *position* starts, which is at
        *batch_position* among those of its class if that is batch.
        """
        wait = position * self._interval if self.inside >= self.limit else 0.0
        if batch_position and self._batch_inside >= self.batch_limit:
            wait = max(wait, batch_position * self._batch_interval)
        return wait if self._pace is None else max(wait, self._pace.delay(position - 1))

    def report_first(self, waiter: Waiter[Place], *, came: float | None) -> None:
        """Report the position of a new *waiter*, and start the reports to all."""
        caller, flow, batch = waiter.caller, waiter.flow, waiter.batch
        queue = self._batch if batch else self._queue
        number = queue.count(caller, flow)
        own = queue.position(caller, flow, number, came=came)
        position = self._position(own, batch=batch)
        waiter.report(position, self._eta(position, own if batch else 0))
        if self._position_timer is None:
            loop = asyncio.get_running_loop()
            self._position_timer = loop.call_later(POSITION_INTERVAL, self._report_positions)

    def _report_positions(self) -> None:
        self._position_timer = None
        listeners, batch = False, 0
        waiting = [waiter for waiter in self._waiters() if not waiter.place.done()]
        for position, waiter in enumerate(waiting, 1):
            listeners = listeners or waiter.on_position is not None
            batch += waiter.batch
            waiter.report(position, self._eta(position, batch if waiter.batch else 0))
        if listeners:
            loop = asyncio.get_running_loop()
            self._position_timer = loop.call_later(POSITION_INTERVAL, self._report_positions)
