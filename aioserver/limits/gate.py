"""The counting gate: so many inside, so many waiting, the rest refused.

Used twice: in front of the handlers (`max_connections`, one line for all) and in front of each
provider (`concurrent_requests`, fair between callers). Three bounds make it what it is: the places,
the number of those who wait, and the time that each of them waits. A freed place is handed to the
next, never thrown open: a newcomer cannot overtake, and nobody waits while a place is free. Who is
next is told in turns.py.

Where there is a pace (requests a minute), one line covers both: its head starts when a place is free
and the pace allows it. Who cannot start before its deadline, as the pace alone says, is told at once.

Not asyncio.Semaphore: it bounds neither its waiters nor their wait, and tells nobody their position.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from aioserver.limits.fair_queue import FairQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from aioserver.errors import AioserverError

TELL_EVERY = 1.0  # seconds between two looks at the line for those who want their position
RETRY_AFTER = (1.0, 60.0)  # bounds of every estimate of when to come back
SMOOTHING = 0.2  # weight of the newest interval between two freed places


@dataclass(frozen=True, slots=True)
class GateStats:
    """A gate at one moment; *oldest_wait* in seconds."""

    inside: int
    limit: int
    waiting: int
    queue_size: int
    oldest_wait: float
    entered: int
    refused: int


class Pacer(Protocol):
    """How fast starts may follow each other."""

    def delay(self, ahead: int = 0) -> float:
        """Seconds until one may start before which *ahead* others start."""

    def start(self, cost: int = 0) -> None:
        """One starts that is expected to cost so much."""

    def charge(self, cost: int) -> None:
        """It costs so much more; negative: less."""


class Place:
    """One place inside a gate. Given back once, however often `release` is called."""

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


class _Waiter:
    __slots__ = ("caller", "cost", "elsewhere", "heard", "line", "since", "told", "turn", "until")

    def __init__(
        self,
        turn: asyncio.Future[Place],
        caller: Hashable,
        line: Hashable,
        since: float,
        until: float,
        told: Callable[[int, float], None] | None,
        cost: int,
        *,
        elsewhere: bool,
    ) -> None:
        self.cost = cost
        self.until = until
        self.elsewhere = elsewhere
        self.turn = turn
        self.caller = caller
        self.line = line
        self.since = since
        self.told = told
        self.heard: tuple[int, float] | None = None  # what it was told last

    def tell(self, position: int, eta: float) -> None:
        if self.told is not None and self.heard != (position, eta):
            self.heard = position, eta
            self.told(position, eta)


class Gate:
    """Bounded in places, in waiters and in their wait; fair between callers.

    Always: `inside <= limit`; nobody waits while a place is free and the pace allows a start. One
    event loop owns one gate.

    *full* and *late* make the errors for a line that is full and a wait that was too long, *paced*
    that for one that the pace makes too long; they get the seconds after which to come back.
    """

    def __init__(
        self,
        limit: int,
        *,
        queue_size: int,
        queue_timeout: float,
        full: Callable[[float], AioserverError],
        late: Callable[[float], AioserverError],
        pace: Pacer | None = None,
        paced: Callable[[float], AioserverError] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit
        self._queue_size = queue_size
        self._queue_timeout = queue_timeout
        self._full = full
        self._late = late
        self._pace = pace
        self._paced = paced or late
        self._clock = clock
        self._waiting: FairQueue[_Waiter] = FairQueue()
        self._inside = 0
        self._entered = 0
        self._refused = 0
        self._full_since = 0.0  # where it is full: since a place was freed, or it became full
        self._interval = 1.0  # smoothed seconds between two freed places of a full house
        self._teller: asyncio.TimerHandle | None = None
        self._starter: asyncio.TimerHandle | None = None  # for when the pace allows the next start
        self._closed: Callable[[], AioserverError] | None = None

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def inside(self) -> int:
        """How many places are taken."""
        return self._inside

    @property
    def limit(self) -> int:
        """How many places there are."""
        return self._limit

    def apply(self, limit: int, *, queue_size: int, queue_timeout: float) -> None:
        """Use new bounds. Who is inside stays; who waits keeps the deadline it came with."""
        self._limit, self._queue_size, self._queue_timeout = limit, queue_size, queue_timeout
        self._full_since = self._clock()
        self.serve()

    def serve(self) -> None:
        """Let in who may start now; called when a place or the pace has changed."""
        while self._waiting and self._inside < self._limit:
            if self._pace is not None and (delay := self._pace.delay()) > 0:
                if self._starter is not None:
                    self._starter.cancel()
                self._starter = asyncio.get_running_loop().call_later(delay, self.serve)
                return
            self._enter()
            self._hand_over()

    def try_enter(self, cost: int = 0) -> Place | None:
        """A place, if one is free and nobody waits for it; *cost*: what the pace is to count."""
        if self._inside < self._limit and not self._waiting and self._closed is None:
            if self._pace is not None:
                if self._pace.delay() > 0:
                    return None
                self._pace.start(cost)
            self._enter()
            self._entered += 1
            return Place(self)
        return None

    async def enter(
        self,
        caller: Hashable = None,
        line: Hashable = None,
        *,
        weight: int = 1,
        told: Callable[[int, float], None] | None = None,
        within: float | None = None,
        again: bool = False,
        elsewhere: bool = False,
        cost: int = 0,
    ) -> Place:
        """Wait for a place. *told* hears `(position, eta)` at once and when they change.

        Callers share by their *weight* (1 to 10), the lines of one caller evenly. *within*: seconds
        that it may take; None: `queue_timeout`. *again*: in front of its caller's others, since it
        has waited before. *elsewhere*: it can be asked of another, and waits for no `rest`.
        *cost*: as of `try_enter`.

        Raises:
            AioserverError: made by *full* or *paced* at once, or by *late* at the deadline; or what
                `close` was given.
        """
        if place := self.try_enter(cost):
            return place
        if self._closed is not None:
            raise self._closed()
        patience = self._queue_timeout if within is None else within
        if len(self._waiting) >= self._queue_size or patience <= 0:
            self._refused += 1
            late = patience <= 0 < self._queue_timeout  # it has waited elsewhere, or before
            raise (self._late if late else self._full)(self.retry_after())
        if self._pace is not None:
            number = self._waiting.count(caller, line) + 1
            position = self._waiting.position(caller, line, number, weight, first=again)
            if (wait := self._pace.delay(position - 1)) > patience:
                self._refused += 1
                raise self._paced(wait)
        turn: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        now = self._clock()
        waiter = _Waiter(turn, caller, line, now, now + patience, told, cost, elsewhere=elsewhere)
        self._waiting.add(waiter, caller, line, weight, first=again)
        return await self._wait(waiter, patience, again=again)

    async def _wait(self, waiter: _Waiter, patience: float, *, again: bool) -> Place:
        turn = waiter.turn
        try:
            self.serve()  # arms the timer where only the pace is in the way
            if waiter.told is not None and not turn.done():
                self._tell_one(waiter, again=again)
            async with asyncio.timeout(patience):
                return await turn
        except BaseException as exc:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                if self._pace is not None and waiter.cost:
                    self._pace.charge(-waiter.cost)
                turn.result().release()  # handed to us in the tick we gave up: pass it on
            else:
                self._waiting.remove(waiter, waiter.caller, waiter.line)
            if isinstance(exc, TimeoutError):
                self._refused += 1
                raise self._late(self.retry_after()) from None
            raise

    def turn_away(self, why: Callable[[], AioserverError]) -> None:
        """Refuse everybody who waits now, each with an error of its own."""
        for waiter in self._waiting:
            if not waiter.turn.done():
                self._refused += 1
                waiter.turn.set_exception(why())
        self._waiting.clear()

    def rest(self, worth: float) -> None:
        """The pace stands still from now on: refuse those whom that makes too late.

        Also those who can go elsewhere, where it stands still for more than *worth* seconds.
        """
        assert self._pace is not None
        wait = self._pace.delay()
        end = self._clock() + wait
        for waiter in self._waiting:
            late = waiter.until < end or (waiter.elsewhere and wait > worth)
            if late and not waiter.turn.done():
                self._refused += 1
                waiter.turn.set_exception(self._paced(wait))

    def close(self, why: Callable[[], AioserverError]) -> None:
        """Refuse everybody who waits, and everybody who comes, each with an error of its own."""
        self._closed = why
        self.turn_away(why)
        if self._starter is not None:
            self._starter.cancel()

    def retry_after(self) -> float:
        """Seconds until a place may be free for one more, with jitter so that not all come at once."""
        low, high = RETRY_AFTER
        estimate = self._eta(len(self._waiting) + 1)
        return min(high, max(low, estimate) * random.uniform(1.0, 1.5))  # noqa: S311 - jitter

    def stats(self) -> GateStats:
        """The state now."""
        oldest = min((waiter.since for waiter in self._waiting.heads()), default=None)
        return GateStats(
            inside=self._inside,
            limit=self._limit,
            waiting=len(self._waiting),
            queue_size=self._queue_size,
            oldest_wait=0.0 if oldest is None else self._clock() - oldest,
            entered=self._entered,
            refused=self._refused,
        )

    def _enter(self) -> None:
        self._inside += 1
        if self._inside == self._limit:
            self._full_since = self._clock()

    def _leave(self) -> None:
        if self._inside >= self._limit:  # else nobody has to wait for it
            now = self._clock()
            self._interval += SMOOTHING * (min(60.0, now - self._full_since) - self._interval)
            self._full_since = now
        self._inside -= 1
        self.serve()

    def _hand_over(self) -> None:
        """Give one place, counted already, to the next; nobody there: it is free."""
        waiter = self._waiting.pop(lambda one: one.turn.done())
        if waiter is None:
            self._inside -= 1
            return
        self._entered += 1
        if self._pace is not None:
            self._pace.start(waiter.cost)
        waiter.turn.set_result(Place(self))

    def _eta(self, position: int) -> float:
        """Seconds until who stands at *position* starts, about."""
        places = position * self._interval if self._inside >= self._limit else 0.0
        return places if self._pace is None else max(places, self._pace.delay(position - 1))

    def _tell_one(self, waiter: _Waiter, *, again: bool) -> None:
        caller, line = waiter.caller, waiter.line
        number = 1 if again else self._waiting.count(caller, line)
        position = self._waiting.position(caller, line, number)
        waiter.tell(position, self._eta(position))
        if self._teller is None:
            self._teller = asyncio.get_running_loop().call_later(TELL_EVERY, self._tell)

    def _tell(self) -> None:
        self._teller = None
        listeners = False
        waiting = [waiter for waiter in self._waiting if not waiter.turn.done()]
        for position, waiter in enumerate(waiting, 1):
            listeners = listeners or waiter.told is not None
            waiter.tell(position, self._eta(position))
        if listeners:
            self._teller = asyncio.get_running_loop().call_later(TELL_EVERY, self._tell)
