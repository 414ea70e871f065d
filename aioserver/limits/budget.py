"""The tokens that one key may use in a minute and in a day.

Tokens are reserved by an estimate before a request starts, and corrected once the cost of its
attempts is known. Both budgets are checked before either is charged, in one step of the event
loop, so that a refusal charges nothing.

    minute   a GCRA (ITU-T I.371) whose unit is a token: a bucket that drains evenly, and holds a
             whole minute's tokens. After a rest a minute's tokens may be used at once; there is no
             edge at which a second burst starts
    day      a count from 00:00 UTC. If the clock goes back to an earlier day, the count goes on
             as it was on that day. So a clock that was wrong for a moment neither brings a second
             budget nor takes one away

A settled reservation returns to the bucket only the tokens that are still in it; the oldest tokens
drain first. Otherwise a long answer that cost nothing would return tokens that have drained
already, and the tokens of other requests would be undercounted.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

MINUTE, DAY = 60.0, 86400
PER_MINUTE, PER_DAY = "tokens_per_minute", "tokens_per_day"
# Days whose counts are remembered, for a clock that is set back.
MAX_DAYS = 4
# Tokens that may be missing by the rounding of sums: a client that comes back after exactly the
# delay of its refusal is not refused again.
ROUNDING = 1e-6


class Shortage(NamedTuple):
    """A budget into which a request of *tokens* does not fit for *delay* seconds; *used* counts
    the tokens that are used or reserved.
    """

    period: str
    limit: int
    used: int
    tokens: int
    delay: float


class BudgetState(NamedTuple):
    """The present state of a budget, in tokens. *reset*: the seconds until it is full again, if no
    more is used.
    """

    limit: int
    used: int
    reserved: int
    remaining: int
    reset: float


class _Slot(NamedTuple):
    """The tokens of one request in the bucket of the minute: *tokens* in front of *end*, taken
    when *returned* tokens in all had been given back.
    """

    tokens: int
    end: float
    returned: float


class _Minute:
    """The bucket of a minute.

    Always: `0 <= _drained <= _charged`; the tokens between the two are in the bucket.
    """

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self.limit = limit
        self._clock = clock
        self._then = clock()
        # All tokens that were put in, less the returned ones; and all tokens that have drained.
        self._charged = self._drained = 0.0
        # The tokens that were ever given back.
        self._returned = 0.0
        self._reserved = 0

    def apply(self, limit: int) -> None:
        """Set another limit; the tokens in the bucket stay."""
        self._drain()
        self.limit = limit

    def _drain(self) -> float:
        """Return how many tokens are in the bucket now."""
        now = self._clock()
        drained = self._drained + (now - self._then) * self.limit / MINUTE
        self._drained, self._then = min(self._charged, drained), now
        return self._charged - self._drained

    def shortage(self, tokens: int) -> Shortage | None:
        """Return the shortage for a request of *tokens*, None if it fits."""
        level = self._drain()
        missing = level + min(tokens, self.limit) - self.limit
        if missing <= ROUNDING:
            return None
        delay = missing * MINUTE / self.limit
        return Shortage(PER_MINUTE, self.limit, round(level), tokens, delay)

    def reserve(self, tokens: int) -> _Slot:
        self._drain()
        tokens = min(tokens, self.limit)
        self._charged += tokens
        self._reserved += tokens
        return _Slot(tokens, self._charged, self._returned)

    def settle(self, slot: _Slot, tokens: int) -> None:
        """Replace the reservation of *slot* by the real cost, *tokens*."""
        self._drain()
        self._reserved -= slot.tokens
        if tokens > slot.tokens:
            self._charged += tokens - slot.tokens
            return
        # Tokens that others have given back since may have stood in front of these.
        left = slot.end - (self._returned - slot.returned) - self._drained
        back = min(float(slot.tokens - tokens), max(0.0, left))
        self._charged -= back
        self._returned += back

    def state(self) -> BudgetState:
        level = self._drain()
        reserved = min(self._reserved, round(level))
        return BudgetState(
            self.limit,
            round(level) - reserved,
            reserved,
            max(0, self.limit - round(level)),
            level * MINUTE / self.limit,
        )


class _DayCount:
    """The tokens that are used and reserved on one day, and how many of them are reserved."""

    __slots__ = ("count", "reserved")

    def __init__(self, count: int = 0) -> None:
        self.count, self.reserved = count, 0


class _Day:
    """The counts of the days that the clock has shown most recently.

    Always: tokens that were reserved on one day count on that day alone, however their request
    ends.
    """

    def __init__(self, limit: int, wall_clock: Callable[[], float]) -> None:
        self.limit = limit
        self._wall_clock = wall_clock
        # The day by its number, counted from 1970.
        self._number = int(wall_clock() // DAY)
        # Counts by the number of the day; the day that was begun last comes last.
        self._counts = {self._number: _DayCount()}

    def _turn(self) -> float:
        """Turn to the current day; return the seconds until the next one."""
        now = self._wall_clock()
        number = int(now // DAY)
        if number != self._number:
            if number not in self._counts:
                # The clock was ahead until now: tokens that were used then were used on this day.
                used = self._today.count if number < self._number else 0
                self._counts[number] = _DayCount(used)
                if len(self._counts) > MAX_DAYS:
                    del self._counts[next(iter(self._counts))]
            self._number = number
        return (number + 1) * DAY - now

    @property
    def _today(self) -> _DayCount:
        return self._counts[self._number]

    def shortage(self, tokens: int) -> Shortage | None:
        """Return the shortage for a request of *tokens*, None if it fits."""
        rest, used = self._turn(), self._today.count
        if used + min(tokens, self.limit) <= self.limit:
            return None
        return Shortage(PER_DAY, self.limit, used, tokens, rest)

    def reserve(self, tokens: int) -> tuple[int, _DayCount]:
        """Reserve *tokens*; return the tokens reserved, and the day."""
        self._turn()
        tokens, today = min(tokens, self.limit), self._today
        today.count += tokens
        today.reserved += tokens
        return tokens, today

    def settle(self, reserved: tuple[int, _DayCount], tokens: int) -> None:
        """Replace what was *reserved* by the real cost, *tokens*."""
        estimate, day = reserved
        day.reserved -= estimate
        day.count += tokens - estimate

    def begin(self, used: int) -> None:
        """Count at least *used* tokens for today."""
        self._turn()
        self._today.count = max(self._today.count, used)

    def state(self) -> BudgetState:
        rest, today = self._turn(), self._today
        return BudgetState(
            self.limit,
            today.count - today.reserved,
            today.reserved,
            max(0, self.limit - today.count),
            rest if today.count else 0.0,
        )


class Reservation:
    """The tokens that one request has reserved; the first of `settle` and `release` counts."""

    __slots__ = ("_budget", "_day", "_minute", "tokens")

    def __init__(self, budget: Budget, tokens: int) -> None:
        self.tokens = tokens
        self._budget: Budget | None = budget
        self._minute: tuple[_Minute, _Slot] | None = None
        self._day: tuple[_Day, tuple[int, _DayCount]] | None = None

    def take(self, minute: _Minute | None, day: _Day | None) -> None:
        """Reserve its tokens in these budgets."""
        if minute is not None:
            self._minute = minute, minute.reserve(self.tokens)
        if day is not None:
            self._day = day, day.reserve(self.tokens)

    def settle(self, tokens: int) -> None:
        """Replace the reservation by the real cost, *tokens*, since the request has ended."""
        budget, self._budget = self._budget, None
        if budget is None:
            return
        if self._minute is not None:
            minute, slot = self._minute
            minute.settle(slot, tokens)
        if self._day is not None:
            day, reserved = self._day
            day.settle(reserved, tokens)
        budget.reserved -= self.tokens

    def release(self) -> None:
        """Give all of it back: the request has cost nothing."""
        self.settle(0)


class Budget:
    """The tokens that one key may use in a minute and in a day; a limit of 0 bounds nothing.

    Always: `reserved` is the sum of the estimates of the requests that have reserved and not
    ended. Tokens used and reserved fit both budgets, except where requests have cost more than
    their estimates, or limits were lowered since. An estimate above a whole budget counts as that
    budget, so that the request starts once nothing of it is used.

    *clock* measures the minute; *wall_clock*, in seconds since 1970, decides which day it is.
    """

    def __init__(
        self,
        per_minute: int = 0,
        per_day: int = 0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        # Whether there is any limit.
        self.limited = False
        self.reserved = 0
        self._clock, self._wall_clock = clock, wall_clock
        self._minute: _Minute | None = None
        self._day: _Day | None = None
        self.apply(per_minute, per_day)

    def apply(self, per_minute: int, per_day: int) -> None:
        """Set other limits; tokens that are used and reserved stay counted."""
        if not per_minute:
            self._minute = None
        elif self._minute is None:
            self._minute = _Minute(per_minute, self._clock)
        else:
            self._minute.apply(per_minute)
        if not per_day:
            self._day = None
        elif self._day is None:
            self._day = _Day(per_day, self._wall_clock)
        else:
            self._day.limit = per_day
        self.limited = per_minute > 0 or per_day > 0

    def take_over(self, old: Budget) -> None:
        """Continue the counts of *old* under our own limits; *old* settles its own reservations."""
        minute, day = self._minute, self._day
        self._minute, self._day = old._minute, old._day
        self.apply(0 if minute is None else minute.limit, 0 if day is None else day.limit)

    @property
    def counts_days(self) -> bool:
        """Whether a day has a limit."""
        return self._day is not None

    @property
    def whole(self) -> bool:
        """Whether no token is used or reserved."""
        return not any(state.used or state.reserved for state in self.states().values())

    def shortage(self, tokens: int) -> Shortage | None:
        """Return the shortage of the budget that delays a request of *tokens* longest, None if it
        can start now.
        """
        minute = None if self._minute is None else self._minute.shortage(tokens)
        day = None if self._day is None else self._day.shortage(tokens)
        if minute is None or (day is not None and day.delay > minute.delay):
            return day
        return minute

    def reserve(self, tokens: int) -> Reservation:
        """Reserve *tokens* in both budgets, whether they fit or not: call `shortage` first,
        without an `await` between the two.
        """
        reservation = Reservation(self, tokens)
        self.reserved += tokens
        try:
            reservation.take(self._minute, self._day)
        except BaseException:
            reservation.release()
            raise
        return reservation

    def begin_day(self, used: int) -> None:
        """Count at least *used* tokens, those in the ledger, for today."""
        if self._day is not None:
            self._day.begin(used)

    def states(self) -> dict[str, BudgetState]:
        """Return the states of the limited budgets, by the names of their settings."""
        states = {}
        if self._minute is not None:
            states[PER_MINUTE] = self._minute.state()
        if self._day is not None:
            states[PER_DAY] = self._day.state()
        return states
