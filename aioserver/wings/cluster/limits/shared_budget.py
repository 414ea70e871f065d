"""The tokens of one key (limits/budget.py), which all instances share: tokens in hand.

This file is one concept, above 400 lines: how tokens are asked for, kept in hand, used, corrected
and given back is one algorithm.

The server has a bucket of the minute and a count of the day, for all instances. It gives tokens
with the renewals of the leases: for requests that need them, and a few more, so that most starts
ask nobody. What is in the bucket, and in the hands of all, is at most the budget: so in any span of
t seconds all instances together start at most what one would. They keep at most a HAND of it in
hand.

A request of a queue for which there is no room in the bucket waits in a queue of the server, too,
behind all that came before. So a large one is not overtaken for ever by small ones at another
instance. It is told when its turn comes, as far as is known, and its instance asks again at that
moment. An instance that has tokens in hand gives them back while others wait for more than there
is.

What a request has not used is given back with the next renewal, as far as it has not drained, and
so is what is too much in hand; what it has used above its estimate is charged with it. What an
instance had in hand, or ran, when it was killed counts as used.

An instance that the server does not answer goes on with what it has in hand, then with an equal
part of the budget of a minute and of what was left of the day, and says so when it is back.
"""

from __future__ import annotations

import time
from math import ceil, inf
from typing import TYPE_CHECKING, NamedTuple, Protocol

from aioserver.limits.budget import (
    MINUTE,
    PER_DAY,
    PER_MINUTE,
    ROUNDING,
    Budget,
    BudgetState,
    Reservation,
    Shortage,
)
from aioserver.wings.cluster.limits.lease_messages import SECOND, BudgetOp
from aioserver.wings.cluster.limits.rates import LOOK_AGAIN
from aioserver.wings.cluster.limits.shared_tally import Bucket, DayCount

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.wings.cluster.limits.lease_messages import Tokens

# All instances together keep this part of a budget in hand.
PREFETCH = 1 / 8
# Seconds after its last start at which an instance gives back what it has in hand.
UNUSED = 10.0
# Seconds for which it is known that there is too little, before the server is asked again.
FRESH = 0.05
# Seconds for which no more is asked for in advance where there was too little.
SCARCE = 1.0
# Seconds for which an instance wants to know what the others use, after it was asked for that.
SHOWN = 60.0
# Seconds that an instance waits which does not know how many others there are.
UNKNOWN = 1.0
# Seconds for which a request of a queue may wait for its tokens: longer than any does. And for
# which it may be late to use what was given for it; once some of that has drained: prompt.
PATIENT, LATE, PROMPT = 3600.0, 0.1, 0.01
# Tokens that were given back by so many requests are told at once.
MANY = 200


class TokenCalls(Protocol):
    """The object that carries the calls: `Leases`."""

    def share_tokens(self, user: PrefetchedTokens) -> None:
        """Share the tokens of *user*."""

    def drop_tokens(self, user: PrefetchedTokens) -> None:
        """Share the tokens of *user* no more."""

    def call_by(self, moment: float) -> None:
        """Make the next call at *moment* at the latest."""

    @property
    def instances(self) -> int:
        """How many instances are members."""


class _Taken(NamedTuple):
    """What a request has taken: *minute* tokens of the bucket of this *incarnation*, the last of which
    *stood* there, and *day* tokens of the day *number*.
    """

    incarnation: tuple[str, str]
    minute: int
    stood: float
    day: int
    number: int


class _First(NamedTuple):
    """The request of *tokens* that waits first at this instance: at the moment *at* its turn comes
    at the server, or something was *taken* for it.
    """

    tokens: int
    at: float
    taken: _Taken | None = None


class SharedReservation(Reservation):
    """The tokens of one request: what was *taken* for it, *part* of it from this instance's part."""

    __slots__ = ("_hand", "part", "taken")

    def __init__(self, budget: Budget, tokens: int, hand: PrefetchedTokens) -> None:
        super().__init__(budget, tokens)
        self._hand: PrefetchedTokens | None = hand
        self.taken: _Taken | None = None
        self.part: Reservation | None = None

    def have(self, taken: _Taken, part: Reservation | None = None) -> None:
        """Have what was *taken* for it, or what it has of this instance's *part*."""
        self.taken, self.part = taken, part

    def settle(self, tokens: int) -> None:
        """Let the request, which has ended, have cost so many *tokens*."""
        hand, self._hand = self._hand, None
        if hand is not None:
            hand.settle(self, tokens)
        super().settle(tokens)


class PrefetchedTokens:
    """What an instance has of the tokens of the key *name*: in hand, given for the request that
    waits first, and to be said.

    Always: while the server is heard, what requests take was given by it.

    It asks at *ask_at*; inf: it does not.
    """

    def __init__(
        self,
        calls: TokenCalls,
        name: str,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.name = name
        self.ask_at = inf
        self._calls = calls
        self._clock, self._wall_clock = clock, wall_clock
        self._minute, self._day = Bucket(clock), DayCount(clock, wall_clock)
        self._waiting: Callable[[], int] = lambda: 0
        self._patience: Callable[[], float] = lambda: PATIENT
        self._on_tokens: Callable[[], None] = lambda: None
        self._in_hand = 0
        # None: none waits, as far as the server knows.
        self._first: _First | None = None
        # What was used of the minute and is to be said, and what is given back to it.
        self._spent = 0
        self._back: list[tuple[int, float]] = []
        # What was said in the call under way: what was spent, the day and what is had of it; and
        # what was asked for, for the request that waits first and for the hand.
        self._said = 0, 0, 0
        self._asked = self._more = 0
        # The world whose bucket is counted, and whether it is to be told what is known of the day.
        self._incarnation = ("", "")
        self._restate = True
        # Whether the server is heard, and gives something.
        self._heard = False
        self._instances = 0
        # What this instance may use while it is not, for the day of that number.
        self._part: Budget | None = None
        self._part_day = 0
        # Whether the last call was answered.
        self._answered = False
        # Whether it was ever heard: before, nothing can have been used.
        self._met = False
        self._used_at = self._shown_at = self._refused_at = self._scarce_at = -inf
        self._closed_until = -inf

    # What the budget of the key asks.

    def serve(
        self,
        waiting: Callable[[], int],
        patience: Callable[[], float],
        on_tokens: Callable[[], None],
    ) -> None:
        """Work for the key that has these functions: see `SharedBudget`."""
        self._waiting, self._patience, self._on_tokens = waiting, patience, on_tokens
        self._calls.share_tokens(self)

    def drop(self) -> None:
        """Share the tokens no more."""
        self._calls.drop_tokens(self)

    @property
    def limits(self) -> tuple[int, int]:
        """The budgets of all instances together; 0: there is none."""
        return self._minute.limit, self._day.limit

    @property
    def quiet(self) -> bool:
        """Whether there is nothing in hand, and nothing to be said."""
        to_say = self._spent or self._back or self._day.mine != self._day.was
        return not (self._in_hand or self._first or to_say)

    def apply(self, per_minute: int, per_day: int) -> None:
        """Use other limits from now on, those of all instances together."""
        if self.limits == (per_minute, per_day):
            return
        self._leave_queue()
        self._release(self._in_hand)
        self._minute.limit, self._day.limit = per_minute, per_day
        if not per_minute:
            self._spent, self._back = 0, []
        if self._part is not None:
            self._make_part()
        if per_minute or per_day:
            self._ask()
        else:
            # Nothing has to come from the server any more.
            self._on_tokens()

    def begin_day(self, used: int) -> None:
        """Count at least *used* tokens of today, which the ledger knows."""
        self._turn()
        self._day.begin(used)
        self._restate = True
        if self._part is not None:
            self._make_part()
        self._ask()

    def shortage(self, tokens: int) -> Shortage | None:
        """Return why a request of *tokens* cannot start now, None if it can. Unless it is known, the
        server is asked, and the delay is 0.0.
        """
        self._turn()
        delay = self.delay(tokens)
        if delay == 0.0:
            return None
        if not self._heard:
            part = self._part_now()
            if part is None:
                return self._short(self._period, tokens, UNKNOWN)
            short = part.shortage(tokens)
            return None if short is None else self._short(short.period, tokens, short.delay)
        if delay < inf:
            return self._short(PER_MINUTE, tokens, delay)
        known = self.known_shortage(tokens)
        if known is None:
            self._ask()
        return self._short(self._period, tokens, 0.0) if known is None else known

    def known_shortage(self, tokens: int) -> Shortage | None:
        """Return why a request of *tokens* cannot start for some time, by what the server has just
        said; None if that is not known.
        """
        if self._clock() - self._refused_at > FRESH:
            return None
        minute, day = self.limits
        if day and self._day.total - self._in_hand + min(tokens, day) > day:
            return self._short(PER_DAY, tokens, self._day.rest)
        delay = self._closed_until - self._clock()
        if minute:
            missing = self._level + self._minute.held + min(tokens, minute) - minute
            delay = max(delay, missing * MINUTE / minute)
        return self._short(self._period, tokens, delay) if delay > 0 else None

    @property
    def _period(self) -> str:
        return PER_MINUTE if self._minute.limit else PER_DAY

    def _short(self, period: str, tokens: int, delay: float) -> Shortage:
        minute, day = self.limits
        limit, used = (minute, self._level) if period == PER_MINUTE else (day, self._used_today)
        return Shortage(period, limit, min(limit, round(used)), tokens, delay)

    @property
    def _level(self) -> float:
        """The tokens of the minute that all instances use and reserve, as far as is known."""
        return self._minute.level + self._spent

    @property
    def _used_today(self) -> int:
        return max(0, self._day.total - self._in_hand)

    def delay(self, tokens: int) -> float:
        """Return the seconds until a request of *tokens* may use what is in hand, or given for it,
        or until its turn comes; inf: that is not known.
        """
        if self._in_hand >= self._counts(tokens) or self._given(tokens) is not None:
            return 0.0
        first = self._first
        if first is None or not self._queued or first.tokens != tokens:
            return inf
        # The server is asked at that moment.
        return max(first.at - self._clock(), ROUNDING)

    @property
    def _queued(self) -> bool:
        return self._first is not None and self._first.taken is None

    def _given(self, tokens: int) -> _Taken | None:
        """Return what was taken for a request of *tokens*, which may still come."""
        first = self._first
        if first is None or first.tokens != tokens or first.taken is None:
            return None
        taken = first.taken
        whole = self._minute.left(taken.minute, taken.stood) == taken.minute
        late = self._clock() - first.at
        return taken if late <= (LATE if whole else PROMPT) else None

    def _counts(self, tokens: int) -> int:
        """Return for how many tokens in hand a request of *tokens* counts."""
        return min(tokens, max(self.limits))

    def reserve(self, reservation: SharedReservation) -> None:
        """Let *reservation* have its tokens: `shortage` has said that they are there."""
        self._turn()
        self._used_at = self._clock()
        self._take(reservation)
        self._look_ahead(reservation.tokens)

    def _take(self, reservation: SharedReservation) -> None:
        tokens, (minute, day) = reservation.tokens, self.limits
        most, least, number = min(tokens, minute), min(tokens, day), self._day.number
        of_part: Reservation | None = None
        if self._in_hand >= (count := self._counts(tokens)):
            self._in_hand -= count
        elif (given := self._given(tokens)) is not None:
            self._first = None
            reservation.have(given)
            return
        else:
            if not self._heard and (part := self._part_now()) is not None:
                of_part = part.reserve(tokens)
            self._day.mine += least
            if self._answered:
                # Before the server gives something again.
                self._calls.call_by(self._clock())
        self._spent += most
        stood = self._minute.comes(self._spent) if minute else 0.0
        reservation.have(_Taken(self._incarnation, most, stood, least, number), of_part)

    def settle(self, reservation: SharedReservation, tokens: int) -> None:
        """Let the request of *reservation* have cost so many *tokens*."""
        self._turn()
        if reservation.taken is None:
            return
        if reservation.part is not None:
            reservation.part.settle(tokens)
        self._correct(reservation.taken, tokens)
        waits = self._waiting()
        if (waits and self.delay(waits) == inf) or len(self._back) > MANY:
            self._ask()

    def _correct(self, taken: _Taken, tokens: int) -> None:
        """Let what was *taken* have cost so many *tokens*."""
        minute, day = self.limits
        today = day > 0 and taken.number == self._day.number
        spare = taken.day - tokens if today else 0
        room = max(0, self._kept - self._in_hand) if today or not day else 0
        if not minute:
            kept = min(room, max(0, spare))
        else:
            self._spent += max(0, tokens - taken.minute)
            left = 0
            if taken.incarnation == self._incarnation:
                left = self._minute.left(taken.minute - tokens, taken.stood)
            # What the server does not know to be used never left the hand.
            kept = min(left, self._spent, room)
            self._spent -= kept
            if left > kept:
                self._back.append((left - kept, taken.stood - self._minute.kept))
            self._minute.kept += kept
        self._in_hand += kept
        if today:
            self._day.mine += kept - spare

    def states(self, reserved: int) -> dict[str, BudgetState]:
        """Return the budgets as they are for all instances, of which this one has so many tokens
        *reserved*.
        """
        self._turn()
        self._shown_at = self._clock()
        minute, day = self.limits
        states = {}
        if minute:
            level = self._level
            states[PER_MINUTE] = _state(minute, level, reserved, level * MINUTE / minute)
        if day:
            used = self._used_today
            states[PER_DAY] = _state(day, used, reserved, self._day.rest if used else 0.0)
        return states

    # What `Leases` asks.

    def op(self, *, whole: bool, restate: bool, leaving: bool) -> BudgetOp | None:
        """Return what to ask for in a call that is sent now; None: nothing.

        *whole*: the call says everything. *restate*: say what is known of the day. *leaving*: have
        nothing in hand any more.
        """
        self._turn()
        now, (minute, day) = self._clock(), self.limits
        restate = restate or self._restate
        asks = self.ask_at <= now + ROUNDING
        if not (minute or day):
            self.ask_at = inf
            return None
        keep = 0 if leaving or now - self._used_at >= UNUSED else self._kept
        waits = self._waiting()
        if self._given(waits) is None and not self._queued:
            self._leave_queue()
        says = self._spent or self._back or self._in_hand or self._first
        if not (restate or asks or (whole and (says or now - self._shown_at < SHOWN))):
            return None
        self._asked = self._more = 0
        if asks or self._queued:
            self.ask_at = inf
            if waits and self.delay(waits) > 0.0:
                self._asked = waits
                # The tokens in hand are in the way of a large request.
                self._release(self._in_hand)
            if asks:
                self._more = max(0, keep - self._in_hand)
        self._release(self._in_hand - keep)
        if self._part is not None and minute:
            # As far as it has not drained.
            state = self._part.states()[PER_MINUTE]
            drained = max(0, self._spent - state.used - state.reserved)
            self._spent -= drained
            self._minute.kept += drained
        self._said = self._spent, self._day.number, self._day.mine
        spent, back = self._spent, self._back
        self._spent, self._back = 0, []
        return BudgetOp(
            self.name,
            minute,
            day,
            self._in_hand,
            [self._asked] if self._asked else [],
            self._patience() * SECOND,
            self._more,
            back,
            spent,
            self._day.number,
            self._day.mine,
            self._day.was,
            self._day.known,
            restate,
            self._met,
        )

    def answered(self, answer: Tokens | None, sent: float, incarnation: tuple[str, str]) -> None:
        """Take in the *answer* of the server in this *incarnation* to what was asked at *sent*; None: the
        call failed.
        """
        spent, number, mine = self._said
        self._answered = answer is not None
        if answer is None:
            self._spent += spent
            return
        if incarnation != self._incarnation:
            # Its bucket does not know of what was taken from another one.
            self._leave_queue()
            self._incarnation = incarnation
        minute, day = self.limits
        asked = self._asked
        given = asked if answer.granted else 0
        if minute:
            self._minute.answered(answer, sent)
        more = answer.more
        if day:
            self._turn()
            of_day = min(given, day) + more
            same = number == self._day.number
            if self._day.answered(answer, mine if same else 0, of_day):
                self._in_hand = 0
        self._in_hand += more
        now = self._clock()
        self._closed_until = now + answer.closed / SECOND
        self._restate = False
        if waited := self._queued:
            self._first = None
        if given:
            last = self._minute.last
            taken = _Taken(incarnation, min(given, minute), last, min(given, day), answer.day)
            self._first = _First(given, now, taken)
        elif asked and answer.wait:
            # What is in hand elsewhere comes back soon.
            wait = max(answer.wait / SECOND, FRESH if waited else 0.0)
            self._first = _First(asked, now + wait)
            self._ask(wait)
        elif asked:
            self._refused_at = now
        if answer.more < self._more:
            self._scarce_at = now
        if self._in_hand and not self._kept:
            self._ask()
        self._asked = 0
        self._on_tokens()

    def stand(self, instances: int, *, heard: bool) -> None:
        """Take in whether the server is *heard* and gives something, and that this instance is one
        of so many if it is alone; 0: of an unknown number.
        """
        before, self._heard = self._heard, heard
        self._instances = instances or self._instances
        if heard and not before:
            self._met, self._part = True, None
            self._ask()
            self._on_tokens()
        elif not heard and (before or self._part is None):
            self.ask_at = inf
            # The parts of all use the room for it.
            self._leave_queue()
            self._make_part()

    def _make_part(self) -> None:
        """Have an equal part of the minute, and of what is left of the day."""
        count, (minute, day) = self._instances, self.limits
        if not count:
            return
        part = max(1, minute // count) if minute else 0
        left = max(1, (day - self._day.total) // count) if day else 0
        self._part, self._part_day = (
            Budget(part, left, self._clock, self._wall_clock),
            self._day.number,
        )
        if self._met and part:
            # Others may use all of the bucket.
            full = Budget(part, 0, self._clock, self._wall_clock)
            full.reserve(part)
            self._part.take_over(full)
        self._on_tokens()

    def _part_now(self) -> Budget | None:
        if self._part is not None and self._part_day != self._day.number:
            self._make_part()
        return self._part

    def _turn(self) -> None:
        """Begin another day if it has come: what is in hand is of the one before."""
        if self._day.turn() and self._day.limit:
            self._in_hand, self._first = 0, None

    def _release(self, tokens: int) -> None:
        """Have so many *tokens* less in hand; of a negative number none."""
        if tokens > 0:
            self._in_hand -= tokens
            if self._day.limit:
                self._day.mine -= tokens

    def _leave_queue(self) -> None:
        """Wait no more, and give back what was given for the request that has waited."""
        first, self._first = self._first, None
        if first is not None and first.taken is not None:
            self._correct(first.taken, 0)

    def _ask(self, delay: float = 0.0) -> None:
        """Let a call ask for tokens in *delay* seconds."""
        at = self._clock() + delay
        if at < self.ask_at and self._heard and any(self.limits):
            self.ask_at = at
            self._calls.call_by(at)

    def _look_ahead(self, tokens: int) -> None:
        """Ask for more before there are none, where that is worth it."""
        kept = self._kept
        worth = 2 * tokens <= kept and 2 * self._in_hand <= kept
        if worth and self._clock() - self._scarce_at > SCARCE:
            self._ask()

    @property
    def _kept(self) -> int:
        """How many tokens are kept in hand: none while others wait for more than there is."""
        minute, _day = self.limits
        if minute and self._level + self._minute.held + self._in_hand > minute + ROUNDING:
            return 0
        parts = max(1, self._calls.instances)
        return min((int(limit * PREFETCH / parts) for limit in self.limits if limit), default=0)


class SharedBudget(Budget):
    """The tokens of a key, which all instances share: see `PrefetchedTokens`.

    Always: `reserved` is what requests of this instance have reserved.

    *waiting* returns the estimate of the first request that waits in the queue of the key, and
    *patience* for how many seconds it does; *on_tokens* is called when more may start than before.
    """

    look_again = LOOK_AGAIN

    def __init__(
        self,
        calls: TokenCalls,
        name: str,
        per_minute: int,
        per_day: int,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        *,
        waiting: Callable[[], int] = lambda: 0,
        patience: Callable[[], float] = lambda: PATIENT,
        on_tokens: Callable[[], None] = lambda: None,
    ) -> None:
        self.hand = PrefetchedTokens(calls, name, clock, wall_clock)
        # Whether another budget has taken over what this one counts.
        self.replaced = False
        self._served = waiting, patience, on_tokens
        super().__init__(per_minute, per_day, clock, wall_clock)
        self.hand.serve(*self._served)

    def apply(self, per_minute: int, per_day: int) -> None:
        """Use other limits from now on, those of all instances together."""
        self.hand.apply(per_minute, per_day)
        self.limited = per_minute > 0 or per_day > 0

    def take_over(self, old: Budget) -> None:
        """Go on with what *old* counts, by our own limits; it settles what it has reserved."""
        assert isinstance(old, SharedBudget)
        limits, self.hand = self.hand.limits, old.hand
        self.hand.apply(*limits)
        self.hand.serve(*self._served)
        old.replaced = True

    def drop(self) -> None:
        """Share the tokens no more."""
        if not self.replaced:
            self.hand.drop()

    @property
    def counts_days(self) -> bool:
        """Whether there is a limit of a day."""
        return self.hand.limits[1] > 0

    @property
    def whole(self) -> bool:
        """Whether another budget of this name would allow no more: the server remembers what it was
        told.
        """
        return self.hand.quiet

    def shortage(self, tokens: int) -> Shortage | None:
        """Return why a request of *tokens* cannot start now; a delay of 0.0: the server is asked
        first.
        """
        return self.hand.shortage(tokens)

    def reserve(self, tokens: int) -> SharedReservation:
        """Reserve *tokens*: `shortage` comes before it, without an `await` between the two."""
        reservation = SharedReservation(self, tokens, self.hand)
        self.reserved += tokens
        try:
            self.hand.reserve(reservation)
        except BaseException:
            reservation.release()
            raise
        return reservation

    def begin_day(self, used: int) -> None:
        """Count at least *used* tokens of today, those that the ledger knows."""
        self.hand.begin_day(used)

    def states(self) -> dict[str, BudgetState]:
        """Return the budgets of all instances, as far as is known."""
        return self.hand.states(self.reserved)


def _state(limit: int, level: float, reserved: int, reset: float) -> BudgetState:
    """Return a budget of which *level* tokens are used or *reserved*."""
    total = min(limit, ceil(level))
    reserved = min(reserved, total)
    return BudgetState(limit, total - reserved, reserved, limit - total, reset)
