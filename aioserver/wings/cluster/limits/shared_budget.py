"""The tokens of one key (limits/budget.py), which all instances share: a script at the server.

The server has the bucket of the minute, and the counts of the day, the week and the month, of all
instances (budget.lua). A request asks it for tokens. If there is no room, the request waits in the queue of the script, behind
all requests that came before, and the instance asks again when its turn comes, and each second until
then. So small requests of other instances cannot overtake a large request for ever. Only the first
waiting request of an instance asks; a request that cannot wait so long is refused.

The corrections of ended requests are reported together. An instance that starts many requests
prefetches tokens with a question, and uses them within a second. Tokens that have drained before
their use are charged once more; this is possible only while the bucket is less than half full. All
granted tokens are charged at the server. So in any span of t seconds all instances together start
no more than a single instance would.

If the server does not answer within WAIT seconds, the instance uses an equal part of the minute,
which begins used up, and of the rest of each period. It asks until there is an answer, and then
reports its use. A server that may have lost its state grants nothing until all living instances
have told it what they know: the counts go on, and the minute begins used up.

A request counts alike in every period of the calendar: an estimate above the smallest of these
budgets counts as that budget.

This file is one concept: one budget as its instance sees it, beside budget.lua at the server.
"""

# ruff: noqa: SLF001 - a budget continues with what another one knows

from __future__ import annotations

import time
from math import ceil, inf
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from aioserver.limits.budget import (
    MINUTE,
    PER_MINUTE,
    PERIODS,
    ROUNDING,
    Budget,
    BudgetState,
    Reservation,
    Shortage,
    day_at,
    day_of,
)
from aioserver.wings.cluster.limits.lease_messages import SECOND

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aioserver.limits.budget import Period

# Seconds for which a request waits for an answer: less than `keys.PATIENCE`. Seconds after which
# corrections are reported, and after which a server is asked again that does not answer.
WAIT, TOGETHER, AGAIN = 0.2, 0.05, 0.1
# Seconds for which a refusal holds for other requests; and seconds after which the server is asked
# again for a waiting request, or for the state.
FRESH, STALE = 0.05, 1.0
# A question prefetches this share of the tokens of the last second, and at most this part of a
# budget. They may be used for so many seconds. Granted tokens count as whole for PROMPT seconds.
AHEAD, PART, PREFETCHED, PROMPT = 0.5, 1 / 64, 1.0, 0.01
# The settings of the budgets, as the script numbers them.
SETTINGS = PER_MINUTE, *(period.setting for period in PERIODS)
# Seconds that a request waits at an instance which does not know the number of the others.
UNKNOWN = 1.0


class Charge(NamedTuple):
    """Tokens that are charged: *minute* tokens of the bucket of this *life*, the last of them at the
    position *stood*, and *counted* tokens of the day *number*, its week and its month. The life of a
    bucket ends when the server loses its state. A correction has the tokens beyond these; negative
    numbers give tokens back.
    """

    minute: int
    counted: int
    stood: float = 0.0
    life: float = 0.0
    number: int = 0


class Answer(NamedTuple):
    """Whether the tokens are *granted*, and how many *more*. Otherwise there is room for them in
    *wait* microseconds, by the budget of SETTINGS[*by*], and the request is *queued* or refused.
    Nothing is granted for *closed* microseconds.

    The bucket has *level* tokens, of which those granted are the last, and *gone* tokens have left
    it. *used* tokens are used of the day *number*, its week and its month; the day ends in *rest*
    microseconds.
    """

    granted: bool
    queued: bool
    wait: float
    by: int
    more: int
    closed: float
    level: float
    gone: float
    life: float
    number: int
    used: tuple[int, int, int]
    rest: float


encode = msgspec.msgpack.Encoder().encode
decode_answer = msgspec.msgpack.Decoder(Answer).decode


class BudgetCalls(Protocol):
    """The object that carries the questions: `Leases`, which imports this module."""

    instance: str
    #: Asks the server for a budget, soon.
    ask: Callable[[SharedBudget], None]
    #: Calls a function after so many seconds.
    later: Callable[[float, Callable[[], None]], object]

    @property
    def sharing(self) -> int:
        """The number of instances that have fixed shares; 0 if it is not known."""

    def share_budget(self, budget: SharedBudget) -> None:
        """Share the tokens of *budget*."""


class SharedReservation(Reservation):
    """The tokens of one request: the tokens *taken* for it, also from a *part* that an instance has
    while the server does not answer.
    """

    __slots__ = ("part", "taken")

    def __init__(
        self, budget: SharedBudget, tokens: int, taken: Charge, part: Reservation | None
    ) -> None:
        super().__init__(budget, tokens)
        self.taken, self.part = taken, part

    def settle(self, tokens: int) -> None:
        """Correct the count to *tokens*, the cost of the request, which has ended."""
        budget, self._budget = self._budget, None
        if isinstance(budget, SharedBudget):
            budget.settle(self, tokens)


class SharedBudget(Budget):
    """The tokens of the key *name*, which all instances share.

    Always: while the server answers, requests take only tokens that it has granted and that are in
    its bucket; one question is under way at most. `reserved` are the tokens that requests of this
    instance have reserved.

    *head* returns the estimate of the first request that waits for nothing but tokens, and the
    seconds for which it may wait; 0 tokens: there is none. *on_tokens* is called when more requests
    may start than before.
    """

    def __init__(
        self,
        leases: BudgetCalls,
        name: str,
        per_minute: int,
        per_day: int,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        *,
        per_week: int = 0,
        per_month: int = 0,
        head: Callable[[], tuple[int, float]] = lambda: (0, 0.0),
        on_tokens: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        # The limits of the minute, and of the periods of the calendar: the smallest, and each.
        self.limits, self._of_periods = (0, 0), (0, 0, 0)
        self._leases, self._head, self._on_tokens = leases, head, on_tokens
        # The last answer, and when its question was sent. A life of 0: there was none.
        today = day_of(wall_clock())
        self._answer = Answer(False, False, 0, 0, 0, 0, 0, 0, 0, today, (0, 0, 0), 0)
        self._answered_at = -inf
        # A day, and the least numbers of tokens that are used of it, its week and its month.
        self._least = 0, (0, 0, 0)
        # Whether a question is under way, when it was sent, the tokens that it asks for, and the
        # correction that it reports.
        self._asking, self._sent = False, -inf
        self._asked, self._reported = 0, list[Charge]()
        self._corrections: list[Charge] = []
        # The tokens that are granted and not used yet; until when they may be used, and count as
        # whole.
        self._granted: Charge | None = None
        self._granted_until = self._whole_until = -inf
        # The last refusal; until when it holds for others, and when there is room.
        self._refused: Shortage | None = None
        self._refused_until = self._room_at = -inf
        # The tokens of the last second, as they were at a moment.
        self._recent, self._recent_at = 0.0, -inf
        # Whether the server does not answer. Always: then a question is under way, or will be.
        self._away = False
        # After a call that failed: until when nothing is reported by another one.
        self._again_at = -inf
        # The part of the budget that is used then.
        self._part: Budget | None = None
        super().__init__(
            per_minute, per_day, clock, wall_clock, per_week=per_week, per_month=per_month
        )
        leases.share_budget(self)

    # The interface for the quota of the key.

    def apply(
        self, per_minute: int, per_day: int = 0, per_week: int = 0, per_month: int = 0
    ) -> None:
        """Use other limits from now on, those of all instances together."""
        of_periods = per_day, per_week, per_month
        if self.limits[0] != per_minute or self._of_periods != of_periods:
            self._release()
            self.limits = per_minute, min(filter(None, of_periods), default=0)
            self._of_periods, self.limited = of_periods, any(self.limits)
            self._refused = None
            self._on_tokens()

    def take_over(self, old: Budget) -> None:
        """Take over the knowledge of *old*, a budget of the same name, which settles its own
        reservations.
        """
        assert isinstance(old, SharedBudget)
        self._answer, self._answered_at = old._answer, old._answered_at

    @property
    def periods(self) -> Sequence[Period]:
        """The periods of the calendar that have a limit."""
        return [period for period, limit in zip(PERIODS, self._of_periods, strict=True) if limit]

    @property
    def whole(self) -> bool:
        """Whether a new budget of this name would allow no more than this one, since the server
        knows all that was used.
        """
        return not (
            self.reserved or self._granted or self._corrections or self._reported or self._away
        )

    def begin(self, used: Mapping[str, int]) -> None:
        """Count at least the tokens *used* by the ledger in the current periods."""
        day, week, month = (used.get(period.setting, 0) for period in PERIODS)
        self._least = self._today, (day, week, month)
        self._ask()

    def shortage(self, tokens: int) -> Shortage | None:
        """Return the shortage for which a request of *tokens* cannot start now; None if it can
        start. If this is not known, the server is asked, and the delay is the wait for its answer.
        """
        now = self._clock()
        if not self.limited or self._has(tokens, now):
            return None
        self._away |= self._asking and now >= self._sent + WAIT - ROUNDING
        if self._away:
            if (part := self._part_now()) is None:
                return self._short(PER_MINUTE, tokens, UNKNOWN)
            short = part.shortage(tokens)
            return short and self._short(short.period, tokens, short.delay)
        known = self._refused
        if known is not None and now < self._refused_until and tokens >= known.tokens:
            return known._replace(tokens=tokens, delay=self._room_at - now)
        if self._head()[0]:
            self._ask()
        wait = self._sent + WAIT - now if self._asking else WAIT
        return self._short(PER_MINUTE, tokens, wait)

    def reserve(self, tokens: int) -> SharedReservation:
        """Reserve *tokens*. The caller must have called `shortage` before, without an `await` since."""
        now, part, granted = self._clock(), None, self._granted
        minute, counted = (min(tokens, limit) for limit in self.limits)
        self._recently(tokens, now)
        if granted is not None and self._has(tokens, now):
            rest = granted._replace(
                minute=granted.minute - minute, counted=granted.counted - counted
            )
            self._granted = rest if rest.minute or rest.counted else None
            taken = granted._replace(
                minute=minute, counted=counted, stood=granted.stood - rest.minute
            )
            if now > self._whole_until:
                # Tokens that have drained are charged once more.
                self._correct(Charge(minute - ceil(self._left(taken, now)), 0))
        else:
            taken = Charge(minute, counted, number=self._today)
            if self._away and (budget := self._part_now()) is not None:
                part = budget.reserve(tokens)
            self._correct(taken)
        self.reserved += tokens
        return SharedReservation(self, tokens, taken, part)

    def settle(self, reservation: SharedReservation, tokens: int) -> None:
        """Correct the count to *tokens*, the cost of the request of *reservation*."""
        self.reserved -= reservation.tokens
        taken, part = reservation.taken, reservation.part
        minute = tokens - taken.minute if taken.minute and self.limits[0] else 0
        counted = tokens - taken.counted if taken.counted and self.limits[1] else 0
        if part is not None:
            part.settle(tokens)
        self._correct(taken._replace(minute=minute, counted=counted))

    def states(self) -> dict[str, BudgetState]:
        """Return the budgets of all instances, as far as is known."""
        now, minute = self._clock(), self.limits[0]
        if not self._away and now - self._answered_at >= STALE:
            self._ask()
        states = {}
        if minute:
            level = self._level(now)
            states[PER_MINUTE] = self._state(minute, level, level * MINUTE / minute)
        for at, (period, limit) in enumerate(zip(PERIODS, self._of_periods, strict=True)):
            if limit:
                used = self._used(at)
                ends = period.begins(period.number_of(day_at(self._today)) + 1)
                rest = max(0.0, ends - self._wall_clock()) if used else 0.0
                states[period.setting] = self._state(limit, used, rest)
        return states

    def _state(self, limit: int, level: float, reset: float) -> BudgetState:
        total = min(limit, ceil(level))
        reserved = min(self.reserved, total)
        return BudgetState(limit, total - reserved, reserved, limit - total, reset)

    # The interface for `Leases`, and for the connection.

    def server_changed(self) -> None:
        """Tell what is known to another server, or to one that has lost its state."""
        self._away |= self._answer.life > 0
        self._ask()

    def leave(self) -> None:
        """Give back the granted tokens, and report all corrections."""
        self._release()
        if self._corrections:
            self._ask()

    def question(self, run: str) -> bytes:
        """Return the question (budget.lua) that is sent now to the server's process *run*."""
        now, answer, (tokens, patience) = self._clock(), self._answer, self._head()
        if self._away or self._has(tokens, now):
            # A server that was away is told of all that was used before it is asked for more.
            tokens = 0
        elif tokens:
            self._release()
        if self._part is not None and (state := self._part.states().get(PER_MINUTE)):
            # Nothing else of the minute is left by now.
            level = state.used + state.reserved
            self._corrections = [
                each if each.life else each._replace(minute=min(each.minute, level))
                for each in self._corrections
            ]
        self._reported, self._corrections, self._asked = self._corrections, [], tokens
        more = self._more(tokens, now) if tokens else 0
        return encode(
            (
                *(self._leases.instance, self.name, run, answer.life),
                *(self.limits[0], self._of_periods),
                *(tokens, more, patience * SECOND, self._reported),
                *(answer.number, answer.used, *self._least),
            )
        )

    def answered(self, data: bytes | None) -> None:
        """Take in the server's answer to the question under way; None: the call has failed."""
        now, asked, reported = self._clock(), self._asked, self._reported
        self._asking, self._asked, self._reported = False, 0, []
        if data is None:
            # The call may have been carried out: tokens that are given back twice would be used
            # twice.
            for each in reported:
                self._correct(
                    each._replace(minute=max(0, each.minute), counted=max(0, each.counted))
                )
            self._again_at = now + AGAIN
            self._stay_away(AGAIN)
        else:
            self._again_at = -inf
            self._answer, self._answered_at = decode_answer(data), self._sent
            self._take_in(self._answer, asked, now)
        self._on_tokens()
        if asked and self._granted is not None:
            self._leases.later(PREFETCHED, self._expire)
        if self._corrections:
            self._leases.later(TOGETHER, self._report)

    def _take_in(self, answer: Answer, asked: int, now: float) -> None:
        if answer.closed:
            self._stay_away(max(AGAIN, answer.closed / SECOND))
        else:
            self._away, self._part = False, None
        if answer.granted:
            minute, counted = (
                min(asked, limit) + answer.more if limit else 0 for limit in self.limits
            )
            stood = answer.level + answer.gone
            self._granted = Charge(minute, counted, stood, answer.life, answer.number)
            self._granted_until = now + min(PREFETCHED, answer.rest / SECOND)
            # An answer that comes late is an old one.
            self._whole_until = now + PROMPT if now < self._sent + WAIT else now
            self._refused = None
        elif asked:
            wait = max(ROUNDING, answer.wait / SECOND)
            if answer.queued:
                wait = min(wait, STALE)
            self._room_at = now + wait
            self._refused_until = self._room_at if answer.queued else now + min(wait, FRESH)
            self._refused = self._short(SETTINGS[answer.by], asked, wait)

    def _ask(self) -> None:
        """Ask the server, unless a question is under way."""
        if self.limited and not self._asking:
            self._asking, self._sent = True, self._clock()
            self._leases.ask(self)

    def _report(self) -> None:
        """Report the corrections; after a call that failed, the next question reports them."""
        if self._corrections and self._clock() >= self._again_at - ROUNDING:
            self._ask()

    def _correct(self, correction: Charge) -> None:
        """Report *correction* soon, together with others."""
        corrections = self._corrections
        if not (correction.minute or correction.counted):
            return
        if not corrections:
            self._leases.later(TOGETHER, self._report)
        elif not correction.life and correction[2:] == corrections[-1][2:]:
            # There may be many until the server answers.
            minute, counted, *_ = corrections.pop()
            correction = correction._replace(
                minute=correction.minute + minute, counted=correction.counted + counted
            )
        corrections.append(correction)

    # The tokens that are granted.

    def _has(self, tokens: int, now: float) -> bool:
        """Return whether the granted tokens are enough for a request of *tokens*."""
        granted = self._granted
        if granted is None or now >= self._granted_until or granted.life != self._answer.life:
            return False
        minute, counted = (min(tokens, limit) for limit in self.limits)
        left = float(granted.minute)
        if now > self._whole_until and 2 * self._answer.level > self.limits[0]:
            left = self._left(granted, now)
        return (not minute or minute <= left) and counted <= granted.counted

    def _left(self, charge: Charge, now: float) -> float:
        """Return the tokens of *charge* that have not drained."""
        drained = (now - self._answered_at) * self.limits[0] / MINUTE
        left = charge.stood - self._answer.gone - drained
        return max(0.0, min(float(charge.minute), left))

    def _expire(self) -> None:
        """Give back the granted tokens that were not used in time."""
        if self._clock() >= self._granted_until - ROUNDING:
            self._release()

    def _release(self) -> None:
        """Give back the granted tokens."""
        granted, self._granted = self._granted, None
        if granted is not None:
            self._correct(granted._replace(minute=-granted.minute, counted=-granted.counted))

    def _more(self, tokens: int, now: float) -> int:
        """Return how many tokens to prefetch with a request of *tokens*."""
        part = min(limit for limit in self.limits if limit) * PART
        more = int(min(self._recently(0, now) * AHEAD, part))
        return more if more >= 2 * tokens and now >= self._refused_until else 0

    def _recently(self, tokens: int, now: float) -> float:
        """Return the tokens of the last second, with *tokens* more; they are forgotten evenly."""
        left = max(0.0, 1.0 - (now - self._recent_at))
        self._recent, self._recent_at = self._recent * left + tokens, now
        return self._recent

    # The part of an instance while the server does not answer.

    def _stay_away(self, seconds: float) -> None:
        """Use a part of the budget until the server answers; ask it in *seconds*."""
        self._away = True
        self._leases.later(seconds, self._ask)

    def _part_now(self) -> Budget | None:
        """Return an equal part of the minute, and of the rest of each period; None if the number of
        instances is not known.
        """
        minute, answer = self.limits[0], self._answer
        if not (count := self._leases.sharing):
            return None
        part = max(1, minute // count) if minute else 0
        if self._part is None:
            self._part = Budget(part, 0, self._clock, self._wall_clock)
            if answer.life:
                # Other instances may have used up the minute.
                self._part.reserve(part)
        left = (
            limit - used if self._goes_on(period, answer.number) else limit
            for period, limit, used in zip(PERIODS, self._of_periods, answer.used, strict=True)
        )
        of_periods = (
            max(1, rest // count) if limit else 0
            for rest, limit in zip(left, self._of_periods, strict=True)
        )
        self._part.apply(part, *of_periods)
        return self._part

    # The known use of all instances.

    @property
    def _today(self) -> int:
        return max(self._answer.number, day_of(self._wall_clock()))

    def _goes_on(self, period: Period, day: int) -> bool:
        """Return whether today is in the same period as *day*."""
        return period.number_of(day_at(day)) == period.number_of(day_at(self._today))

    def _used(self, at: int) -> int:
        """Return the tokens that are used of the present period PERIODS[*at*]."""
        period, answer = PERIODS[at], self._answer
        known = (self._least, (answer.number, answer.used))
        used = max((used[at] for day, used in known if self._goes_on(period, day)), default=0)
        corrections = (
            each.counted for each in self._corrections if self._goes_on(period, each.number)
        )
        return max(0, used + sum(corrections))

    def _level(self, now: float) -> float:
        drained = (now - self._answered_at) * self.limits[0] / MINUTE
        more = sum(each.minute for each in self._corrections)
        return max(0.0, max(0.0, self._answer.level - drained) + more)

    def _short(self, setting: str, tokens: int, delay: float) -> Shortage:
        """Return a shortage of the budget *setting*, or of the first that has a limit."""
        limits = dict(zip(SETTINGS, (self.limits[0], *self._of_periods), strict=True))
        if not limits[setting]:
            setting = next(name for name, limit in limits.items() if limit)
        if setting == PER_MINUTE:
            level = round(self._level(self._clock()))
        else:
            level = self._used(SETTINGS.index(setting) - 1)
        limit = limits[setting]
        return Shortage(setting, limit, min(limit, level), tokens, delay)
