"""The places of HTTP requests that wait at their keys: each is lent to others meanwhile.

A request that waits for a limit of its own key needs nobody's attention, and its place in front of
the handlers (`max_connections`) would be missing to others. So it gives the place back, and counts
among those that wait for one, of whose room all such requests have half at most. When its turn at
the key has come, it takes the next free place, before whoever waits at the door.

    has its place ──lend──▶ lent ──regain──▶ returns ──▶ has its place again
         └──────────────────┴────────────────┴──release──▶ over
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from aioserver.errors import AioserverError, ConcurrencyExceeded, public
from aioserver.limits.gate import Waiter

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.errors import ServerAtCapacity
    from aioserver.limits.gate import Gate, Place


class Loan:
    """The place of one request, from when it has got it to the end of its handler.

    Always: `release` leaves nothing behind, wherever the place is: whoever has made this calls it
    once, and nobody else gives the place back.
    """

    __slots__ = ("_back", "_lending", "_place", "_timer", "name", "over")

    def __init__(self, lending: Lending, place: Place, name: str) -> None:
        self.name = name
        self.over = False
        self._lending = lending
        self._place: Place | None = place
        # Done once the place is there again, while the request returns to it.
        self._back: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def lent(self) -> bool:
        """Whether it has no place now."""
        return self._place is None

    def lend(self) -> None:
        """Give the place back for as long as the request waits at its key.

        Raises:
            ConcurrencyExceeded: as many do so as may.
        """
        if self._place is None:
            return
        self._lending.lend(self)
        place, self._place = self._place, None
        place.release()

    def regain(self, until: float) -> asyncio.Future[None] | None:
        """Take the next free place, *until* a moment of the loop's clock; return what is done then,
        None if the request has its place or needs none any more. A second call returns the same.

        Raises:
            AioserverError: the server is stopping; the future has `ServerAtCapacity` once it is
                too late.
        """
        if self._place is not None or self.over:
            return None
        if self._back is None:
            place = self._lending.place()
            if place is not None:
                try:
                    self._has(place)
                except BaseException:
                    place.release()
                    raise
                return None
            loop = asyncio.get_running_loop()
            self._back = loop.create_future()
            self._timer = loop.call_at(until, self._give_up)
            self._lending.join(self)
        return self._back

    def came(self, place: Place) -> None:
        """Take *place*, which the door has handed over."""
        self._has(place)
        self._settle(None)

    def refused(self, error: AioserverError) -> None:
        """Hear that there is no place: the request ends with *error*."""
        self._settle(error)

    def release(self) -> None:
        """Give the place back, or leave the line for it: the handler of the request has ended."""
        self.over = True
        place, self._place = self._place, None
        if place is not None:
            place.release()
        else:
            self._lending.leave(self)
            self._lending.ends(self)
        self._settle(None)

    def _has(self, place: Place) -> None:
        self._lending.ends(self)
        self._place = place

    def _give_up(self) -> None:
        self._lending.leave(self)
        self._settle(self._lending.full())

    def _settle(self, error: AioserverError | None) -> None:
        back, self._back = self._back, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        conclude(back, error)


class _Returning(Waiter["Place"]):
    """The first of the requests that return, as it stands in the queue of the door."""

    __slots__ = ("lending", "loan")

    lending: Lending
    loan: Loan

    def start(self, place: Place) -> None:
        """Hand *place* over."""
        self.lending.stood(self)
        self.loan.came(place)

    def refuse(self, error: Callable[[], AioserverError]) -> bool:
        """Refuse the request."""
        self.lending.stood(self)
        self.loan.refused(error())
        return True

    def failed(self, place: asyncio.Future[Place]) -> None:
        """Hear of a bug while *place* was handed over."""
        if not place.cancelled() and (bug := place.exception()) is not None:
            self.lending.stood(self)
            self.loan.refused(public(bug))


class Lending:
    """The places of *gate* that are lent.

    Always: `lent` requests have no place; they take `lent` of the room of the gate's queue, and
    half of it at most; the first of those that return stands in front of that queue. *on_lent* is
    called with the name of the key whose place is lent, *on_ended* when it has one again, or is
    over.
    """

    def __init__(
        self,
        gate: Gate,
        full: Callable[[], ServerAtCapacity],
        on_lent: Callable[[str], None],
        on_ended: Callable[[Loan], None],
    ) -> None:
        self.lent = 0
        self.full = full
        self._gate = gate
        self._on_lent, self._on_ended = on_lent, on_ended
        self._returning: deque[Loan] = deque()
        self._first: _Returning | None = None

    def lend(self, loan: Loan) -> None:
        """Count *loan* as lent.

        Raises:
            ConcurrencyExceeded: there is no room for it.
        """
        size = self._gate.queue_size
        if self.lent >= size // 2:
            raise ConcurrencyExceeded(
                f"{self.lent} requests wait at their keys, at most half of"
                f" connection_queue_size={size}",
                retry_after=self._gate.retry_after(),
            )
        self._on_lent(loan.name)
        self.lent += 1
        self._count()

    def ends(self, loan: Loan) -> None:
        """Count *loan* as lent no more."""
        # First what may fail: a loan that has not ended ends with its handler.
        self._on_ended(loan)
        self.lent -= 1
        self._count()

    def place(self) -> Place | None:
        """Return a place that nobody waits for.

        Raises:
            AioserverError: the gate is closed.
        """
        self._gate.check_open()
        return self._gate.try_enter()

    def join(self, loan: Loan) -> None:
        """Let *loan* have the next place that is not another's that returns."""
        self._returning.append(loan)
        self._stand()
        self._gate.serve()

    def leave(self, loan: Loan) -> None:
        """Let *loan* return no more."""
        if loan not in self._returning:
            return
        first = self._first
        if first is not None and first.loan is loan:
            self.stood(first)
            self._gate.leave(first)
            self._gate.serve()
        else:
            self._returning.remove(loan)

    def stood(self, first: _Returning) -> None:
        """Let the next one stand in the queue of the door: *first* stands there no more."""
        if self._first is not first:
            return
        self._first = None
        self._returning.remove(first.loan)
        self._count()
        self._stand()

    def _stand(self) -> None:
        if self._first is not None or not self._returning:
            return
        loop, now = asyncio.get_running_loop(), self._gate.now()
        first = _Returning(
            loop.create_future(), None, None, now, now, None, 0, may_fail_over=False
        )
        first.lending, first.loan = self, self._returning[0]
        first.place.add_done_callback(first.failed)
        self._first = first
        self._gate.stand(first, 1, at_front=True)
        self._count()

    def _count(self) -> None:
        """Tell the gate how many take room of its queue and do not stand in it."""
        self._gate.outside = self.lent - (self._first is not None)


def conclude(decision: asyncio.Future[None] | None, error: Exception | None = None) -> None:
    """Let *decision*, if it is not done, have *error*, or no result."""
    if decision is None or decision.done():
        return
    if error is None:
        decision.set_result(None)
    else:
        decision.set_exception(error)
        # The client may have left.
        decision.exception()
