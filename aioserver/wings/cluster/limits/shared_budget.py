"""The tokens of one key (limits/budget.py), which all instances share: prefetched tokens.

This file is long, but it is one concept: one algorithm asks for tokens, prefetches them, uses them,
corrects them and gives them back.

The server has a bucket of the minute and a count of the day, for all instances. It grants tokens
with the renewals of the leases: for requests that need them, and a few more, so that most starts
need no call. The tokens in the bucket and the prefetched tokens of all instances are at most the
budget. So in any span of t seconds all instances together start no more than a single instance
would. They prefetch at most the part PREFETCH of the budget.

If the bucket has no room for a request of a queue, the request also waits in a queue of the server,
behind all requests that came before. So small requests of other instances cannot overtake a large
request for ever. The server says when the turn of the request comes, as far as it knows, and the
instance asks again at that moment. An instance gives prefetched tokens back while requests of other
instances wait for more tokens than there are.

The tokens that a request has not used are given back with the next renewal, if they have not
drained, and so are prefetched tokens that are too many. Tokens above the estimate are charged with
that renewal. The prefetched tokens of a killed instance, and the tokens of its running requests,
count as used.

If the server does not answer, an instance goes on with its prefetched tokens, and then with an equal
part of the budget of a minute and of the rest of the day. It reports these tokens when the server
answers again.
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

# The part of a budget that all instances together prefetch.
PREFETCH = 1 / 8
# Seconds after its last start at which an instance gives its prefetched tokens back.
UNUSED = 10.0
# Seconds for which a shortage is taken to last before the server is asked again.
FRESH = 0.05
# Seconds after a shortage in which no tokens are prefetched.
SCARCE = 1.0
# Seconds for which an instance keeps asking for the use of the others, after it was asked for it.
SHOWN = 60.0
# Seconds that a request waits at an instance which does not know the number of the others.
UNKNOWN = 1.0
# Seconds for which a request of a queue may wait for its tokens: more than any request waits. And
# seconds by which it may be late to use granted tokens, before some of them have drained and after.
PATIENT, LATE, PROMPT = 3600.0, 0.1, 0.01
# The number of requests whose returned tokens are reported in one call at most.
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
    """The tokens of a request: *minute* tokens of the bucket of this *incarnation*, the last of them
    at the position *stood*, and *day* tokens of the day *number*.
    """

    incarnation: tuple[str, str]
    minute: int
    stood: float
    day: int
    number: int


class _First(NamedTuple):
    """The first waiting request of this instance, for *tokens*. Its turn at the server comes at the
    moment *at*, unless tokens were *taken* for it already.
    """

    tokens: int
    at: float
    taken: _Taken | None = None


class SharedReservation(Reservation):
    """The tokens of one request: the tokens *taken* for it, or *part*, its reservation in the part of
    a partitioned instance.
    """

    __slots__ = ("_hand", "part", "taken")

    def __init__(self, budget: Budget, tokens: int, hand: PrefetchedTokens) -> None:
        super().__init__(budget, tokens)
        self._hand: PrefetchedTokens | None = hand
        self.taken: _Taken | None = None
        self.part: Reservation | None = None

    def have(self, taken: _Taken, part: Reservation | None = None) -> None:
        """Set the tokens *taken* for the request, or its reservation in the *part* of the instance."""
        self.taken, self.part = taken, part

    def settle(self, tokens: int) -> None:
        """Correct the count to *tokens*, the cost of the request, which has ended."""
        hand, self._hand = self._hand, None
        if hand is not None:
            hand.settle(self, tokens)
        super().settle(tokens)


class PrefetchedTokens:
    """The tokens of the key *name* at one instance: prefetched tokens, tokens for the first waiting
    request, and tokens to report.

    Always: while the server answers, requests take only tokens that it has granted.

    *ask_at* is the time at which it asks for tokens; inf: it needs none.
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
        # The first waiting request; None if the server knows of no waiting request.
        self._first: _First | None = None
        # The tokens of the minute that were used, and those that are given back, both to report.
        self._spent = 0
        self._back: list[tuple[int, float]] = []
        # The content of the call under way: the spent tokens, the day and its tokens here; and the
        # tokens that it asks for, for the first waiting request and in advance.
        self._said = 0, 0, 0
        self._asked = self._more = 0
        # The incarnation of the server whose bucket is counted.
        self._incarnation = ("", "")
        self._restate = True
        # Whether the server answers, and grants tokens.
        self._heard = False
        self._instances = 0
        # The part of the budget that this instance may use while the server does not answer.
        self._part: Budget | None = None
        self._part_day = 0
        # Whether the last call was answered.
        self._answered = False
        # Whether the server has ever answered: before that no token can have been used.
        self._met = False
        self._used_at = self._shown_at = self._refused_at = self._scarce_at = -inf
        self._closed_until = -inf

    # The interface for the budget of the key.

    def serve(
        self,
        waiting: Callable[[], int],
        patience: Callable[[], float],
        on_tokens: Callable[[], None],
    ) -> None:
        """Serve the key with these functions: see `SharedBudget`."""
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
        """Whether no tokens are prefetched, and nothing is to be reported."""
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
            # No tokens have to come from the server any more.
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
        """Return the shortage for which a request of *tokens* cannot start now; None if it can start.
        If this is not known, the server is asked, and the delay is 0.0.
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
        """Return the shortage for which a request of *tokens* cannot start for some time, by a recent
        answer of the server; None if that is not known.
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
        """Return the seconds until a request of *tokens* may use prefetched tokens or those granted
        for it, or until its turn comes; inf: that is not known.
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
        """Return the tokens that were taken for a request of *tokens*, which may still come."""
        first = self._first
        if first is None or first.tokens != tokens or first.taken is None:
            return None
        taken = first.taken
        whole = self._minute.left(taken.minute, taken.stood) == taken.minute
        late = self._clock() - first.at
        return taken if late <= (LATE if whole else PROMPT) else None

    def _counts(self, tokens: int) -> int:
        """Return the number of prefetched tokens that a request of *tokens* needs."""
        return min(tokens, max(self.limits))

    def reserve(self, reservation: SharedReservation) -> None:
        """Give *reservation* its tokens, after `shortage` has found that there are enough."""
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
        """Correct the count to *tokens*, the cost of the request of *reservation*."""
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
        """Correct the count after a request: *taken* tokens were taken for it, and it cost *tokens*."""
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
            # Tokens that were not yet reported as used become prefetched tokens again.
            kept = min(left, self._spent, room)
            self._spent -= kept
            if left > kept:
                self._back.append((left - kept, taken.stood - self._minute.kept))
            self._minute.kept += kept
        self._in_hand += kept
        if today:
            self._day.mine += kept - spare

    def states(self, reserved: int) -> dict[str, BudgetState]:
        """Return the budgets of all instances; this instance has *reserved* so many tokens."""
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

    # The interface for `Leases`.

    def op(self, *, whole: bool, restate: bool, leaving: bool) -> BudgetOp | None:
        """Return the request for tokens in a call that is sent now; None if none is needed.

        With *whole*, the call reports every limit. With *restate*, the request has the known count
        of the day. With *leaving*, all prefetched tokens are given back.
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
                # A large request needs the room of the prefetched tokens.
                self._release(self._in_hand)
            if asks:
                self._more = max(0, keep - self._in_hand)
        self._release(self._in_hand - keep)
        if self._part is not None and minute:
            # Only tokens that have not drained are given back.
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
        """Take in the *answer* of the server in this *incarnation* to the call that was sent at *sent*;
        None: the call failed.
        """
        spent, number, mine = self._said
        self._answered = answer is not None
        if answer is None:
            self._spent += spent
            return
        if incarnation != self._incarnation:
            # The new bucket does not include tokens that were taken from another bucket.
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
            # The prefetched tokens of other instances come back soon.
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
        """Take in whether the server answers (*heard*), and the number of *instances*; 0: unknown.

        While the server does not answer, each instance uses an equal part of the budgets.
        """
        before, self._heard = self._heard, heard
        self._instances = instances or self._instances
        if heard and not before:
            self._met, self._part = True, None
            self._ask()
            self._on_tokens()
        elif not heard and (before or self._part is None):
            self.ask_at = inf
            # The parts of all instances include the tokens for which a request waits.
            self._leave_queue()
            self._make_part()

    def _make_part(self) -> None:
        """Use an equal part of the minute, and of the rest of the day."""
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
            # The tokens of this minute may be used up by others: the part begins empty.
            full = Budget(part, 0, self._clock, self._wall_clock)
            full.reserve(part)
            self._part.take_over(full)
        self._on_tokens()

    def _part_now(self) -> Budget | None:
        if self._part is not None and self._part_day != self._day.number:
            self._make_part()
        return self._part

    def _turn(self) -> None:
        """Begin another day if it has come. Prefetched tokens belong to the day before."""
        if self._day.turn() and self._day.limit:
            self._in_hand, self._first = 0, None

    def _release(self, tokens: int) -> None:
        """Give back so many prefetched *tokens*; none if the number is negative."""
        if tokens > 0:
            self._in_hand -= tokens
            if self._day.limit:
                self._day.mine -= tokens

    def _leave_queue(self) -> None:
        """Leave the queue, and give back the tokens that were granted for the waiting request."""
        first, self._first = self._first, None
        if first is not None and first.taken is not None:
            self._correct(first.taken, 0)

    def _ask(self, delay: float = 0.0) -> None:
        """Ask for tokens by a call in *delay* seconds."""
        at = self._clock() + delay
        if at < self.ask_at and self._heard and any(self.limits):
            self.ask_at = at
            self._calls.call_by(at)

    def _look_ahead(self, tokens: int) -> None:
        """Ask for more tokens before there are none, if it is worth a call."""
        kept = self._kept
        worth = 2 * tokens <= kept and 2 * self._in_hand <= kept
        if worth and self._clock() - self._scarce_at > SCARCE:
            self._ask()

    @property
    def _kept(self) -> int:
        """The number of tokens to prefetch: 0 while other instances wait for more than there are."""
        minute, _day = self.limits
        if minute and self._level + self._minute.held + self._in_hand > minute + ROUNDING:
            return 0
        parts = max(1, self._calls.instances)
        return min((int(limit * PREFETCH / parts) for limit in self.limits if limit), default=0)


class SharedBudget(Budget):
    """The tokens of a key, which all instances share: see `PrefetchedTokens`.

    Always: `reserved` are the tokens that requests of this instance have reserved.

    *waiting* returns the estimate of the first request that waits in the queue of the key, and
    *patience* the seconds for which it may wait. *on_tokens* is called when more requests may start
    than before.
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
        """Take over the counts of *old*, with our own limits. *old* still settles its reservations."""
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
        """Whether another budget of this name would allow no more, since the server remembers the
        reported tokens.
        """
        return self.hand.quiet

    def shortage(self, tokens: int) -> Shortage | None:
        """Return the shortage for which a request of *tokens* cannot start now; with a delay of 0.0
        the server is asked first.
        """
        return self.hand.shortage(tokens)

    def reserve(self, tokens: int) -> SharedReservation:
        """Reserve *tokens*. The caller must have called `shortage` before, without an `await` since."""
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
