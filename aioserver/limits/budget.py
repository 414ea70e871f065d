"""The tokens that one key may use in a minute, in a day, in a week and in a month.

Tokens are reserved by an estimate before a request starts, and corrected once the cost of its
attempts is known. All budgets are checked before any is charged, in one step of the event loop, so
that a refusal charges nothing.

    minute   a GCRA (ITU-T I.371) whose unit is a token: a bucket that drains evenly, and holds a
             whole minute's tokens. After a rest a minute's tokens may be used at once; there is no
             edge at which a second burst starts
    day      a count from 00:00 UTC; that of a week is from Monday (ISO 8601), that of a month from
    week     its first day. If the clock goes back to an earlier period, the count goes on as it was
    month    in that period. So a clock that was wrong for a moment neither brings a second budget
             nor takes one away

A settled reservation returns to the bucket only the tokens that are still in it; the oldest tokens
drain first. Otherwise a long answer that cost nothing would return tokens that have drained
already, and the tokens of other requests would be undercounted.

This file is one concept: a reservation is counted in all budgets of its key, or in none.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MINUTE, DAY, WEEK = 60.0, 86400, 7 * 86400
PER_MINUTE, PER_DAY = "tokens_per_minute", "tokens_per_day"
PER_WEEK, PER_MONTH = "tokens_per_week", "tokens_per_month"
# The first Monday was the fourth day after 1970-01-01.
MONDAY = 4 * DAY
# Periods whose counts are remembered, for a clock that is set back.
MAX_PERIODS = 4
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


def day_at(number: int) -> int:
    """Return when the day *number*, counted from 1970-01-01, begins, in seconds since then."""
    return number * DAY


def week_at(number: int) -> int:
    """Return when the week *number* begins, on a Monday; week 0 is the first whole one of 1970."""
    return MONDAY + number * WEEK


def month_at(number: int) -> int:
    """Return when the month *number* begins; month 1 is January of the year 1."""
    year, month = divmod(number - 1, 12)
    return int(datetime(year + 1, month + 1, 1, tzinfo=UTC).timestamp())


def day_of(now: float) -> int:
    """Return the number of the day of *now*, which is in seconds since 1970."""
    return int(now // DAY)


def week_of(now: float) -> int:
    """Return the number of the week of *now*."""
    return int((now - MONDAY) // WEEK)


def month_of(now: float) -> int:
    """Return the number of the month of *now*."""
    date = datetime.fromtimestamp(now, UTC)
    return 12 * (date.year - 1) + date.month


class Period(NamedTuple):
    """A kind of period of the calendar, in UTC: the *setting* with its limit; `number_of(now)` is the
    number of the period at that time, and `begins(number)` the time at which a period begins.
    """

    setting: str
    number_of: Callable[[float], int]
    begins: Callable[[int], int]

    def since(self, now: float) -> int:
        """Return when the period of *now* began."""
        return self.begins(self.number_of(now))


PERIODS = (
    Period(PER_DAY, day_of, day_at),
    Period(PER_WEEK, week_of, week_at),
    Period(PER_MONTH, month_of, month_at),
)


class _Count:
    """The tokens that are used and reserved in one period, and how many of them are reserved."""

    __slots__ = ("count", "reserved")

    def __init__(self, count: int = 0) -> None:
        self.count, self.reserved = count, 0


class _Calendar:
    """The counts of the days, weeks or months that the clock has shown most recently.

    Always: tokens that were reserved in one period count in that period alone, however their
    request ends.
    """

    def __init__(self, period: Period, limit: int, wall_clock: Callable[[], float]) -> None:
        self.period, self.limit = period, limit
        self._wall_clock = wall_clock
        self._enter(period.number_of(wall_clock()))
        # Counts by the number of the period; the one that was begun last comes last.
        self._counts = {self._number: _Count()}

    def _enter(self, number: int) -> None:
        self._number = number
        self._begin, self._end = self.period.begins(number), self.period.begins(number + 1)

    def _turn(self) -> float:
        """Turn to the current period; return the seconds until the next one."""
        now = self._wall_clock()
        if not self._begin <= now < self._end:
            number = self.period.number_of(now)
            if number not in self._counts:
                # The clock was ahead until now: tokens that were used then were used in this period.
                used = self._current.count if number < self._number else 0
                self._counts[number] = _Count(used)
                if len(self._counts) > MAX_PERIODS:
                    del self._counts[next(iter(self._counts))]
            self._enter(number)
        return self._end - now

    @property
    def _current(self) -> _Count:
        return self._counts[self._number]

    def shortage(self, tokens: int) -> Shortage | None:
        """Return the shortage for a request of *tokens*, None if it fits."""
        rest, used = self._turn(), self._current.count
        if used + min(tokens, self.limit) <= self.limit:
            return None
        return Shortage(self.period.setting, self.limit, used, tokens, rest)

    def reserve(self, tokens: int) -> tuple[int, _Count]:
        """Reserve *tokens*; return the tokens reserved, and the count of the period."""
        self._turn()
        tokens, current = min(tokens, self.limit), self._current
        current.count += tokens
        current.reserved += tokens
        return tokens, current

    def begin(self, used: int) -> None:
        """Count at least *used* tokens in the current period."""
        self._turn()
        self._current.count = max(self._current.count, used)

    def state(self) -> BudgetState:
        rest, current = self._turn(), self._current
        return BudgetState(
            self.limit,
            current.count - current.reserved,
            current.reserved,
            max(0, self.limit - current.count),
            rest if current.count else 0.0,
        )


class Reservation:
    """The tokens that one request has reserved; the first of `settle` and `release` counts."""

    __slots__ = ("_budget", "_counted", "_minute", "tokens")

    def __init__(self, budget: Budget, tokens: int) -> None:
        self.tokens = tokens
        self._budget: Budget | None = budget
        self._minute: tuple[_Minute, _Slot] | None = None
        # The tokens reserved in each period of the calendar.
        self._counted: list[tuple[int, _Count]] = []

    def take(self, minute: _Minute | None, calendars: tuple[_Calendar, ...]) -> None:
        """Reserve its tokens in these budgets."""
        if minute is not None:
            self._minute = minute, minute.reserve(self.tokens)
        for calendar in calendars:
            self._counted.append(calendar.reserve(self.tokens))

    def settle(self, tokens: int) -> None:
        """Replace the reservation by the real cost, *tokens*, since the request has ended."""
        budget, self._budget = self._budget, None
        if budget is None:
            return
        if self._minute is not None:
            minute, slot = self._minute
            minute.settle(slot, tokens)
        for estimate, count in self._counted:
            count.reserved -= estimate
            count.count += tokens - estimate
        budget.reserved -= self.tokens

    def release(self) -> None:
        """Give all of it back: the request has cost nothing."""
        self.settle(0)


class Budget:
    """The tokens that one key may use in a minute, and in a day, a week and a month; a limit of 0
    bounds nothing.

    Always: `reserved` is the sum of the estimates of the requests that have reserved and not
    ended. Tokens used and reserved fit every budget, except where requests have cost more than
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
        *,
        per_week: int = 0,
        per_month: int = 0,
    ) -> None:
        # Whether there is any limit.
        self.limited = False
        self.reserved = 0
        self._clock, self._wall_clock = clock, wall_clock
        self._minute: _Minute | None = None
        # The calendar periods that have a limit, the shortest first.
        self._calendars: tuple[_Calendar, ...] = ()
        self.apply(per_minute, per_day, per_week, per_month)

    def apply(
        self, per_minute: int, per_day: int = 0, per_week: int = 0, per_month: int = 0
    ) -> None:
        """Set other limits; tokens that are used and reserved stay counted."""
        if not per_minute:
            self._minute = None
        elif self._minute is None:
            self._minute = _Minute(per_minute, self._clock)
        else:
            self._minute.apply(per_minute)
        known = {calendar.period: calendar for calendar in self._calendars}
        calendars = []
        for period, limit in zip(PERIODS, (per_day, per_week, per_month), strict=True):
            if limit:
                calendar = known.get(period) or _Calendar(period, limit, self._wall_clock)
                calendar.limit = limit
                calendars.append(calendar)
        self._calendars = tuple(calendars)
        self.limited = per_minute > 0 or bool(calendars)

    def take_over(self, old: Budget) -> None:
        """Continue the counts of *old* under our own limits; *old* settles its own reservations."""
        minute = 0 if self._minute is None else self._minute.limit
        limits = {calendar.period: calendar.limit for calendar in self._calendars}
        self._minute, self._calendars = old._minute, old._calendars
        self.apply(minute, *(limits.get(period, 0) for period in PERIODS))

    @property
    def periods(self) -> Sequence[Period]:
        """The periods of the calendar that have a limit."""
        return [calendar.period for calendar in self._calendars]

    @property
    def whole(self) -> bool:
        """Whether no token is used or reserved."""
        return not any(state.used or state.reserved for state in self.states().values())

    def shortage(self, tokens: int) -> Shortage | None:
        """Return the shortage of the budget that delays a request of *tokens* longest, None if it
        can start now.
        """
        longest = None if self._minute is None else self._minute.shortage(tokens)
        for calendar in self._calendars:
            shortage = calendar.shortage(tokens)
            if shortage is not None and (longest is None or shortage.delay > longest.delay):
                longest = shortage
        return longest

    def reserve(self, tokens: int) -> Reservation:
        """Reserve *tokens* in all budgets, whether they fit or not: call `shortage` first,
        without an `await` between the two.
        """
        reservation = Reservation(self, tokens)
        self.reserved += tokens
        try:
            reservation.take(self._minute, self._calendars)
        except BaseException:
            reservation.release()
            raise
        return reservation

    def begin(self, used: Mapping[str, int]) -> None:
        """Count at least the tokens *used* by the ledger in the current periods, by the names of
        their settings.
        """
        for calendar in self._calendars:
            calendar.begin(used.get(calendar.period.setting, 0))

    def states(self) -> dict[str, BudgetState]:
        """Return the states of the limited budgets, by the names of their settings."""
        states = {}
        if self._minute is not None:
            states[PER_MINUTE] = self._minute.state()
        for calendar in self._calendars:
            states[calendar.period.setting] = calendar.state()
        return states
