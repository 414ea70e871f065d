"""Rates that instances share: slots in hand.

A slot is a moment at which a request may start. The server gives slots by GCRA (limits/gcra.py), and only those that begin
within the *horizon*, so that an instance that vanishes takes little with it. A slot is used at its time, or later by at most
the horizon; else it is let go. As a start may be late by the horizon, the burst that the server allows is smaller by as much.

Where the burst is large, an instance keeps some slots of it in hand for as long as it likes, so that a request after a rest
asks nobody. They are a part of the burst as well: all that instances may keep is taken off what the server allows. So in any
window of t seconds at most `t * rate + burst` requests start, by all instances together.

An instance that the server does not answer has its part of the rate, without a burst at first.
"""

from __future__ import annotations

import time
from math import inf
from typing import TYPE_CHECKING, Protocol

from aioserver.cluster.holding import State
from aioserver.cluster.messages import SECOND, PaceOp
from aioserver.limits.gcra import ROUNDING, Gcra

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.cluster.messages import Slots

# Slots that are kept in hand at most; of the burst, all instances together keep this share.
MOST_KEPT, SHARE_KEPT = 32, 0.5
# Seconds after which a request looks again whether a slot has come; an answer lets it look at once.
LOOK_AGAIN = 0.05
# Seconds that an instance waits which does not know how many others there are.
UNKNOWN = 1.0


class PaceUser(Protocol):
    """The user of a pace, which takes its slots; its *name* is that of the pace. It asks for some at *ask_at*; inf: for none."""

    name: str
    ask_at: float

    def op(self) -> PaceOp | None:
        """Return what to ask for in a call that is sent now; None: nothing."""

    def answered(self, slots: Slots | None, sent: float) -> None:
        """Take in the answer to what was asked for at *sent*; None: the call failed."""

    def stand(self, state: State, instances: int) -> None:
        """Take in that this instance is in *state*, and one of so many if it is alone; 0: of an unknown number."""


class Caller(Protocol):
    """The object that carries the calls: `Shares`."""

    def pace(self, user: PaceUser) -> None:
        """Share the pace of *user*."""

    def call_by(self, moment: float) -> None:
        """Make the next call at *moment* at the latest."""

    @property
    def instances(self) -> int:
        """How many instances are members."""


class SharedRate(Gcra):
    """A rate that is shared under *name*; it stands where a `Gcra` of the whole rate would.

    Always: a start is counted on a slot in hand while the server is heard, and else on a part of the rate.

    *waiting* tells how many requests wait for a start; *on_slots* is called when more may start than before. *rested*: a
    server that knows nothing of the rate allows the whole burst at once, and not one start after another. Of the burst,
    all instances together keep *share_kept* in hand: the others can start so much less at once.
    """

    __slots__ = (
        *("_caller", "_local", "_next_at", "_no_burst", "_not_before", "_on_slots", "_slots"),
        *(
            "_rested",
            "_share_kept",
            "_state",
            "_step",
            "_waiting",
            "_instances",
            "_horizon",
            "_served",
        ),
        *("ask_at", "name"),
    )

    def __init__(
        self,
        caller: Caller,
        name: str,
        interval: float,
        tolerance: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        horizon: float = 0.1,
        waiting: Callable[[], int] = lambda: 1,
        on_slots: Callable[[], None] = lambda: None,
        rested: bool = False,
        share_kept: float = SHARE_KEPT,
    ) -> None:
        super().__init__(interval, tolerance, clock)
        self.name = name
        self.ask_at = inf
        self._caller = caller
        self._waiting = waiting
        self._on_slots = on_slots
        self._rested = rested
        self._share_kept = share_kept
        self._horizon = horizon
        # When each slot begins and ends, in this order; one that is kept does not end.
        self._slots: list[tuple[float, float]] = []
        # When the next slot begins, as far as is known.
        self._next_at = 0.0
        # What a start is worth now, in seconds: more than the interval while the provider wants it.
        self._step = interval
        # Whether the last answer brought slots.
        self._served = False
        self._not_before = -inf
        self._no_burst = False
        self._state = State.ALONE
        self._instances = 0
        self._local = Gcra(interval, 0.0, clock)
        caller.pace(self)

    # What the pace of a provider, and a quota, ask.

    def delay(self, ahead: float = 0.0) -> float:
        """Return the seconds until a start is allowed after others that are worth *ahead* seconds."""
        now = self._clock()
        wait = max(0.0, self._not_before - now)
        if self._state is not State.JOINED:
            count = self._instances
            return max(wait, self._local.delay(ahead * count) if count else UNKNOWN + ahead)
        slots = self._usable(now)
        others = int(ahead / self._step + ROUNDING) if ahead else 0
        if len(slots) <= self._kept() // 2:
            self._ask(now)
        if others < len(slots):
            return max(wait, slots[others][0] - now, 0.0)
        self._ask(now)
        # Nobody knows how many others wait elsewhere.
        next_at = max(self._next_at - now, LOOK_AGAIN)
        return max(wait, next_at + (others - len(slots)) * self._step)

    def take(self, seconds: float) -> None:
        """Count a start that is worth *seconds*, whether it is allowed or not; a negative number takes one back."""
        now = self._clock()
        if self._state is not State.JOINED:
            self._local.take(seconds * max(1, self._instances))
        elif seconds < 0:
            self._slots.insert(0, (now, now + self._horizon))
        else:
            self._step = seconds
            slots = self._usable(now)
            begun = [slot for slot in slots if slot[0] <= now + ROUNDING]
            if begun or slots:
                # Of those that have begun the one that ends first.
                self._slots.remove(min(begun, key=lambda slot: slot[1]) if begun else slots[0])

    def try_take(self) -> float:
        """Count a start if it is allowed, and return 0; otherwise return the seconds until it is."""
        if (delay := self.delay()) > ROUNDING:
            return delay
        self.take(self.interval)
        return 0.0

    @property
    def available(self) -> int:
        """How many starts are allowed now, without a question to anybody."""
        now = self._clock()
        if now < self._not_before:
            return 0
        if self._state is not State.JOINED:
            return self._local.available if self._instances else 0
        return sum(begins <= now for begins, _ends in self._usable(now))

    def apply(self, interval: float, tolerance: float, *, scale: float = 1.0) -> None:
        """Use another rate from now on; what is counted locally ahead of now is multiplied by *scale*."""
        self._tolerance = tolerance
        self.interval = self._step = interval
        if self._instances:
            self._local.apply(interval * self._instances, tolerance / self._instances, scale=scale)

    def postpone(self, moment: float) -> None:
        """Allow no start before *moment*, a time of the clock, and no burst at that moment."""
        self._not_before = max(self._not_before, moment)
        self._no_burst = True
        self._slots.clear()
        self._local.postpone(moment)

    def catch_up(self) -> None:
        """Allow the next start soon, whatever has been counted."""
        self._not_before = -inf
        self._local.catch_up()

    # What `Shares` asks.

    def op(self) -> PaceOp | None:
        """Return what to ask for in a call that is sent now."""
        now = self._clock()
        if self.ask_at > now + ROUNDING or self._state is not State.JOINED:
            return None
        self.ask_at = inf
        members = max(1, self._caller.instances)
        chunk = max(1, int(self._horizon / self._step / members))
        slots = self._usable(now)
        kept = self._kept()
        count = max(min(self._waiting() - len(slots), chunk), kept - len(slots), 1)
        slack = 0.0
        if not self._no_burst:
            slack = max(0.0, self._tolerance - self._horizon - kept * members * self.interval)
        return PaceOp(
            self.name,
            count,
            self._step * SECOND,
            slack * SECOND,
            self._horizon * SECOND,
            slack * SECOND if self._rested else 0.0,
        )

    def answered(self, slots: Slots | None, sent: float) -> None:
        """Take in the slots that the server has given for what was asked for at *sent*."""
        if slots is None:
            return
        now = self._clock()
        self._no_burst = False
        kept, endless = self._kept(), sum(ends == inf for _begins, ends in self._slots)
        for delay in slots.delays:
            begins = now + delay / SECOND
            # The server counted from a moment between the two.
            ends = max(sent + delay / SECOND + self._horizon, begins + self._horizon / 4)
            if endless < kept:
                ends = inf
                endless += 1
            self._slots.append((begins, ends))
        self._slots.sort()
        self._next_at = now + slots.next / SECOND
        self._served = bool(slots.delays)
        self._on_slots()

    def stand(self, state: State, instances: int) -> None:
        """Take in how this instance stands with the server."""
        before, self._state = self._state, state
        if instances and instances != self._instances:
            self._local.apply(self.interval * instances, self._tolerance / instances)
        self._instances = instances or self._instances
        if (state is State.JOINED) == (before is State.JOINED):
            return
        self._slots.clear()
        self.ask_at = inf
        self._local.postpone(self._clock())
        self._on_slots()

    def _ask(self, now: float) -> None:
        """Ask for slots once the next ones are well within the horizon: for several of a fast pace in one call.

        An instance that was given some at last asks later than those that were not.
        """
        before = self._horizon / (4 if self._served else 2)
        moment = max(now, self._next_at - before, self._not_before)
        if moment < self.ask_at:
            self.ask_at = moment
            self._caller.call_by(moment)

    def _usable(self, now: float) -> list[tuple[float, float]]:
        if any(ends < now for _begins, ends in self._slots):
            self._slots = [slot for slot in self._slots if slot[1] >= now]
        return self._slots

    def _kept(self) -> int:
        """Return how many slots of the burst are kept in hand."""
        burst = (self._tolerance - self._horizon) / self.interval
        return max(
            0, min(MOST_KEPT, int(burst * self._share_kept / max(1, self._caller.instances)))
        )
