"""One request in the queues of several gates: it starts at the first place that any of them
offers.

It stands in each *line* as any other request does, fair among those that stand there, and leaves
all others in the moment in which it starts at one. It takes room in each line by the sizes of all:
lines of 10 and 30 requests are both full when 40 stand in them. A line is left when its gate
refuses the request, or after its `queue_timeout`, and those that are left give the room for it;
the request ends when it stands in none.
"""

from __future__ import annotations

import asyncio
import functools
from fractions import Fraction
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from aioserver.errors import AioserverError
from aioserver.limits.gate import POSITION_INTERVAL, Place, Waiter

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from aioserver.limits.gate import Gate


class Wish(NamedTuple):
    """A place that a request wants at *gate*, which counts *cost* for the gate's pace, and *work*
    for the caller's share of it.

    *waited* has the seconds that the request has waited there before. It joins the line after
    *delay* seconds.
    """

    gate: Gate
    cost: int = 0
    waited: float = 0.0
    delay: float = 0.0
    may_fail_over: bool = False
    work: int = 1


class _Standing(Waiter[Place]):
    """The request as it stands in one line."""

    __slots__ = ("at", "gate", "lines", "timer", "wish")

    lines: Lines
    gate: Gate
    wish: Wish
    timer: asyncio.TimerHandle
    at: tuple[int, float]

    def start(self, place: Place) -> None:
        """Hand *place* over: the request leaves all other lines."""
        self.lines.started(self, place)

    def refuse(self, error: Callable[[], AioserverError]) -> bool:
        """Leave this line; return whether the request stood in no other, and is refused."""
        return self.lines.refused(self, error)

    def report(self, position: int, eta: float) -> None:
        """Note where the request stands in this line, and tell where it stands in all."""
        self.at = position, eta
        self.lines.report()


class Lines:
    """A request of *caller* and *flow* that waits for the first of several places.

    Always: it stands in no line once `wait` has returned; it is handed one place at most.
    *weight*, *on_position*, *came*, *batch* and *within* are as for `Gate.enter`. The position
    that is told is the smallest, and the time until the start that of lines which serve the
    request side by side: first when all of these are joined, and then once in POSITION_INTERVAL
    at most, however many lines have changed.
    """

    def __init__(
        self,
        caller: Hashable,
        flow: Hashable,
        *,
        weight: int = 1,
        on_position: Callable[[int, float], None] | None = None,
        came: float | None = None,
        batch: bool = False,
        within: float = inf,
    ) -> None:
        self._batch = batch
        self._caller, self._flow, self._weight = caller, flow, weight
        self._on_position = on_position
        self._came = came
        self._loop = asyncio.get_running_loop()
        self._until = self._loop.time() + within
        self._place: asyncio.Future[Place] = self._loop.create_future()
        self._standing: list[_Standing] = []
        self._coming: dict[asyncio.TimerHandle, Wish] = {}
        self._winner: _Standing | None = None
        # Whether `wait` has ended.
        self._over = False
        self._reported: tuple[int, float] | None = None
        # Whether it stands in all lines that it wanted at once; and until when nothing is told:
        # all lines tell their changes, each at a time of its own.
        self._joined = False
        self._quiet: asyncio.TimerHandle | None = None

    async def wait(self, wishes: Sequence[Wish]) -> tuple[Wish, Place]:
        """Wait for the first place; return it, and the wish that it fulfils. Cancelling is safe.

        Raises:
            AioserverError: there is room in no line, or the request can start in none before its
                time there is over; or it was refused in all.
        """
        try:
            self._join(wishes)
            place = await self._place
        except BaseException:
            if self._winner is not None:
                # It was handed over in the turn of the loop in which this task gave up.
                self._winner.gate.give_up(self._winner, self._place.result())
            raise
        finally:
            self._over = True
            for timer in self._coming:
                timer.cancel()
            if self._quiet is not None:
                self._quiet.cancel()
            for standing in list(self._standing):
                self._leave(standing)
            if self._winner is not None:
                self._winner.gate.resumed(self._winner)
            # A refusal is in this future, and its traceback leads to this frame.
            self._place = self._loop.create_future()
        winner, self._winner = self._winner, None
        assert winner is not None
        return winner.wish, place

    def join(self, wish: Wish) -> None:
        """Stand in the line of one more *wish*, if there is room and time for it."""
        if self._over or self._place.done():
            return
        gates = [wish.gate, *(standing.gate for standing in self._standing)]
        room = sum(gate.room_for(batch=self._batch) for gate in gates) > 0
        try:
            seconds = self._time_left(wish, room=room)
        except AioserverError:
            return
        standing = self._stand(wish, seconds)
        self._share_out()
        self._serve(standing)

    def quit(self, wish: Wish, error: Callable[[], AioserverError]) -> None:
        """Leave the line of *wish*; if it was the last one, *error* ends the wait."""
        if self._over:
            return
        for timer, coming in list(self._coming.items()):
            if coming is wish:
                timer.cancel()
                del self._coming[timer]
        for standing in [each for each in self._standing if each.wish is wish]:
            self.refused(standing, error)
        if not (self._standing or self._coming or self._place.done()):
            self._place.set_exception(error())

    def _time_left(self, wish: Wish, *, room: bool) -> float:
        """Return for how many seconds the request may stand in the line of *wish*.

        Raises:
            AioserverError: for none, or it could not start in time.
        """
        batch = self._batch
        seconds = wish.gate.time_left(wish.waited, room=room, batch=batch)
        wish.gate.check_pace(
            min(seconds, self._until - self._loop.time()),
            self._caller,
            self._flow,
            batch=batch,
            came=self._came,
        )
        return seconds

    def _join(self, wishes: Sequence[Wish]) -> None:
        """Stand in the lines of *wishes*, those with a delay later.

        Raises:
            AioserverError: of a gate that may be asked again soonest, if there is none to wait at.
        """
        room = sum(wish.gate.room_for(batch=self._batch) for wish in wishes) > 0
        errors: list[tuple[float, int, AioserverError]] = []
        for wish in wishes:
            try:
                seconds = self._time_left(wish, room=room)
            except AioserverError as error:
                errors.append((error.retry_after or 0.0, len(errors), error))
                continue
            if wish.delay > 0:
                self._stand_later(wish, seconds)
            else:
                self._stand(wish, seconds)
        if not self._standing and not self._coming:
            wishes[0].gate.count_refusal()
            raise min(errors)[2]
        self._share_out()
        for standing in list(self._standing):
            self._serve(standing)
        self._joined = True
        self.report()

    def _stand_later(self, wish: Wish, seconds: float) -> None:
        def come() -> None:
            del self._coming[timer]
            standing = self._stand(wish, seconds - wish.delay)
            self._share_out()
            self._serve(standing)

        timer = self._loop.call_later(wish.delay, come)
        self._coming[timer] = wish

    def _stand(self, wish: Wish, seconds: float) -> _Standing:
        """Stand in the line of *wish* for *seconds* at most; `_share_out` is next."""
        gate, now = wish.gate, wish.gate.now()
        standing = _Standing(
            self._place,
            self._caller,
            self._flow,
            now - wish.waited,
            now + min(seconds, self._until - self._loop.time()),
            self._on_position,
            wish.cost,
            work=wish.work,
            batch=self._batch,
            may_fail_over=wish.may_fail_over,
        )
        standing.lines, standing.gate, standing.wish = self, gate, wish
        standing.at = 0, 0.0
        gate.stand(standing, self._weight, came=self._came)
        self._standing.append(standing)
        too_long = functools.partial(gate.timeout, batch=self._batch)
        standing.timer = self._loop.call_later(seconds, self.refused, standing, too_long)
        return standing

    def _share_out(self) -> None:
        """Take the room of one request, in all lines together, by their sizes."""
        size = sum(standing.gate.queue_size for standing in self._standing)
        for standing in self._standing:
            standing.gate.share_out(standing, Fraction(standing.gate.queue_size, size))

    def _serve(self, standing: _Standing) -> None:
        """Have its gate let the request in, if it may start now; else tell its position."""
        if self._place.done():
            return
        standing.gate.serve()
        if self._on_position is not None and standing in self._standing:
            standing.gate.report_first(standing, came=self._came)

    def _leave(self, standing: _Standing) -> None:
        standing.timer.cancel()
        self._standing.remove(standing)
        standing.gate.leave(standing)

    def started(self, standing: _Standing, place: Place) -> None:
        """Take *place*, which the gate of *standing* hands over, and leave all lines."""
        for other in list(self._standing):
            self._leave(other)
        self._winner = standing
        self._place.set_result(place)

    def refused(self, standing: _Standing, error: Callable[[], AioserverError]) -> bool:
        """Leave the line of *standing*; return whether it was the last, so that *error* ends the
        wait.
        """
        if standing not in self._standing or self._place.done():
            return False
        self._leave(standing)
        if self._standing or self._coming:
            self._share_out()
            self.report()
            return False
        self._place.set_exception(error())
        return True

    def _report_again(self) -> None:
        self._quiet = None
        self.report()

    def report(self) -> None:
        """Tell the best position, and the seconds until the start, if nothing was told lately."""
        if self._quiet is not None or not self._joined or self._place.done():
            return
        known = [standing.at for standing in self._standing if standing.at[0]]
        if self._on_position is None or not known:
            return
        etas = [eta for _, eta in known]
        eta = 1 / sum(1 / eta for eta in etas) if all(etas) else 0.0
        told = min(position for position, _ in known), eta
        if told != self._reported:
            self._reported = told
            self._quiet = self._loop.call_later(POSITION_INTERVAL, self._report_again)
            self._on_position(*told)
