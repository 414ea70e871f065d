"""Rates that instances share: prefetched slots.

This file is long, but it is one concept: one algorithm asks for slots, grants them and uses them.

A slot is a moment at which a request may start. The server grants slots by GCRA (limits/gcra.py),
and only slots that begin within the *horizon*, so that an instance that vanishes takes few with
it. A slot may be used at its time, or later by at most the horizon. Then it expires, even if it
arrives only after that time. If the server is so far away that most slots would expire, a slot may
be late by two round trips. As a start may be late, the server allows a burst that is smaller by the
same time.

An instance asks for as many slots as it used within the last horizon, but for no more than its
part of the horizon. So few requests of a busy instance wait for an answer. If the burst is large,
an instance keeps some of its slots without expiry, so that a request after a rest needs no call.
These slots belong to the burst as well: the most slots that instances may keep are subtracted from
the burst that the server allows. So in any window of t seconds all instances together start at most
`t * rate + burst` requests. Here the burst is at least the number of starts that the rate allows in
the time by which a start may be late.

If a server has lost its state, or has an older one, each instance tells it the time of the next
slot, as far as it knows. The server allows no burst until all instances have had the time to do so.
Starts of an instance that is partitioned at this time are forgotten, as no instance reports them.

A partitioned instance has its part of the rate, without a burst at first.
"""

from __future__ import annotations

import math
import time
from collections import deque
from heapq import merge
from itertools import chain, islice
from math import inf
from typing import TYPE_CHECKING, Protocol

from aioserver.limits.gcra import ROUNDING, Gcra
from aioserver.wings.cluster.limits.grants import State
from aioserver.wings.cluster.limits.lease_messages import SECOND, UNKNOWN_PACE, PaceOp

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.wings.cluster.limits.lease_messages import Slots


class PrefetchedSlots:
    """Slots with an expiry, each with its end, and slots without one.

    All times are seconds of one clock. Always: each group is in the order of its beginnings. An
    expired slot is dropped once it is the first of its group, so each operation costs the same
    however many slots there are.
    """

    def __init__(self) -> None:
        self._passing: deque[tuple[float, float]] = deque()
        self._lasting: deque[float] = deque()

    def count(self, now: float) -> int:
        """Return the number of slots at *now*."""
        passing = self._passing
        while passing and passing[0][1] < now:
            passing.popleft()
        return len(passing) + len(self._lasting)

    @property
    def lasting(self) -> int:
        """The number of slots without expiry."""
        return len(self._lasting)

    def begins(self, before: int) -> float:
        """Return the beginning of the slot with *before* others in front of it. It must exist."""
        passing, lasting = self._passing, self._lasting
        if not lasting:
            return passing[before][0]
        if not passing:
            return lasting[before]
        if not before:
            # The fast path, for a request with no other in front of it.
            return min(passing[0][0], lasting[0])
        in_order = merge((begins for begins, _ends in passing), lasting)
        return next(islice(in_order, before, None))

    def begun(self, now: float) -> int:
        """Return the number of slots that have begun at *now*."""
        self.count(now)
        return sum(
            begins <= now
            for begins in chain((begins for begins, _ends in self._passing), self._lasting)
        )

    def take(self, now: float) -> None:
        """Use one slot. Slots that have begun come first, and of these the slots with an expiry."""
        passing, lasting = self._passing, self._lasting
        while passing and passing[0][1] < now:
            passing.popleft()
        if passing and (
            not lasting or passing[0][0] <= now + ROUNDING or passing[0][0] <= lasting[0]
        ):
            passing.popleft()
        elif lasting:
            lasting.popleft()

    def add(self, begins: float, ends: float) -> None:
        """Add a slot that expires at *ends*.

        It begins no earlier than the one before it.
        """
        passing = self._passing
        self._passing.append((max(begins, passing[-1][0]) if passing else begins, ends))

    def add_lasting(self, begins: float) -> None:
        """Add a slot without expiry. It begins no earlier than the one before it."""
        lasting = self._lasting
        lasting.append(max(begins, lasting[-1]) if lasting else begins)

    def drop_lasting(self, more_than: int) -> None:
        """Keep at most *more_than* slots without expiry, and drop those that begin last."""
        while len(self._lasting) > more_than:
            self._lasting.pop()

    def clear(self) -> None:
        """Drop all slots."""
        self._passing.clear()
        self._lasting.clear()


# An instance asks for more slots once it has no more than this share of the slots of a horizon.
ASK_BELOW = 0.25
# The most slots of the burst that an instance keeps; and the share of the burst that all instances
# together keep.
MOST_KEPT, SHARE_KEPT = 32, 0.5
# Seconds after which a waiting request checks again for a slot; an answer lets it check at once.
LOOK_AGAIN = 0.05
# Seconds that a request waits at an instance which does not know the number of the others.
UNKNOWN = 1.0


class LeaseCalls(Protocol):
    """The object that carries the calls: `Leases`, which imports this module."""

    instance: str

    def pace(self, user: SharedRate) -> None:
        """Share the pace of *user*."""

    def call_by(self, moment: float) -> None:
        """Make the next call at *moment* at the latest."""

    @property
    def instances(self) -> int:
        """The number of instances that are members."""

    @property
    def round_trip(self) -> float:
        """The seconds of the quickest recent call."""


class SharedRate(Gcra):
    """A rate that is shared under *name*; it replaces a `Gcra` of the whole rate.

    Always: while the instance is joined, a start is counted on a prefetched slot, and otherwise on
    a part of the rate.

    *waiting* returns the number of requests that wait for a start. *on_slots* is called when more
    requests may start than before. All instances together prefetch *share_kept* of the burst,
    which is then not available to others at once.

    *ask_at* is the time at which it asks for slots; inf: it needs none.
    """

    def __init__(
        self,
        leases: LeaseCalls,
        name: str,
        interval: float,
        tolerance: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        horizon: float = 0.1,
        waiting: Callable[[], int] = lambda: 1,
        on_slots: Callable[[], None] = lambda: None,
        share_kept: float = SHARE_KEPT,
    ) -> None:
        super().__init__(interval, tolerance, clock)
        self.name = name
        self.ask_at = inf
        self._leases = leases
        self._waiting = waiting
        self._on_slots = on_slots
        self._share_kept = share_kept
        self._horizon = horizon
        # Slots of the burst have no expiry; all others have one.
        self._slots = PrefetchedSlots()
        # The beginning of the next slot, as far as this instance knows.
        self._next_at = -inf
        # The number of revoked starts that the server does not know of yet.
        self._taken_back = 0
        # The seconds for which a start counts now. They are more than the interval while a provider
        # asks for a lower rate.
        self._step = interval
        # Whether the last answer brought slots.
        self._served = False
        # The starts since a moment, and those of a horizon before it.
        self._starts, self._starts_since, self._starts_before = 0, -inf, 0.0
        # The number of slots at which this instance asks for more.
        self._too_few = 0
        self._not_before = -inf
        self._no_burst = False
        self._state = State.ALONE
        self._instances = 0
        self._local = Gcra(interval, 0.0, clock)
        leases.pace(self)

    # The interface for the pace of a provider, and for a quota.

    def delay(self, ahead: float = 0.0) -> float:
        """Return the seconds until a start is allowed after others that count for *ahead* seconds."""
        now = self._clock()
        wait = max(0.0, self._not_before - now)
        if self._state is not State.JOINED:
            count = self._instances
            return max(wait, self._local.delay(ahead * count) if count else UNKNOWN + ahead)
        count = self._slots.count(now)
        others = int(ahead / self._step + ROUNDING) if ahead else 0
        if count <= others or count <= self._too_few:
            self._ask(now)
        if others < count:
            return max(wait, self._slots.begins(others) - now, 0.0)
        # The number of requests that wait at other instances is not known.
        next_at = max(self._next_at - now, LOOK_AGAIN)
        return max(wait, next_at + (others - count) * self._step)

    def take(self, seconds: float) -> None:
        """Count a start for *seconds*, whether it is allowed or not.

        A negative number revokes a start.
        """
        now = self._clock()
        if self._state is not State.JOINED:
            self._local.take(seconds * max(1, self._instances))
        elif seconds < 0:
            # The slot of the start may have expired or belong to another request by now.
            self._starts -= 1
            self._taken_back += 1
            self._ask_by(now)
        else:
            self._step = seconds
            self._starts += 1
            self._slots.take(now)

    def try_take(self) -> float:
        """Count a start if it is allowed, and return 0; otherwise return the seconds until it is."""
        if (delay := self.delay()) > ROUNDING:
            return delay
        self.take(self.interval)
        return 0.0

    @property
    def available(self) -> int:
        """The number of starts that are allowed now, without a call."""
        now = self._clock()
        if now < self._not_before:
            return 0
        if self._state is not State.JOINED:
            return self._local.available if self._instances else 0
        return self._slots.begun(now)

    def apply(self, interval: float, tolerance: float, *, scale: float = 1.0) -> None:
        """Use another rate from now on.

        Starts that are counted locally ahead of now are multiplied by *scale*.
        """
        self._tolerance = tolerance
        self.interval = self._step = interval
        # The kept slots are a part of the burst, which may be smaller now.
        self._slots.drop_lasting(self._kept())
        if self._instances:
            self._local.apply(interval * self._instances, tolerance / self._instances, scale=scale)

    def postpone(self, moment: float) -> None:
        """Allow no start before *moment*, a time of the clock, and no burst at that moment."""
        self._not_before = max(self._not_before, moment)
        self._no_burst = True
        self._slots.clear()
        self._local.postpone(moment)

    def catch_up(self) -> None:
        """Allow the next start soon, regardless of the starts counted so far."""
        self._not_before = -inf
        self._local.catch_up()

    # The interface for `Leases`.

    def op(self, *, restate: bool) -> PaceOp | None:
        """Return the request for slots in a call that is sent now; None if none is needed.

        *restate*: include the known time of the next slot.
        """
        now = self._clock()
        asks = self.ask_at <= now + ROUNDING and self._state is State.JOINED
        # With more instances than before, each may keep fewer slots.
        self._slots.drop_lasting(self._kept())
        # The server may forget a rate without starts for as long as the burst.
        restate = restate and self._next_at > now - self._tolerance
        if not (asks or restate):
            return None
        members, kept = max(1, self._leases.instances), self._kept()
        count = 0
        if asks:
            self.ask_at = inf
            chunk = max(1, int(self._horizon / self._step / members))
            there = self._slots.count(now)
            wanted = max(self._waiting(), math.ceil(self._used(now)))
            count = max(min(wanted - there, chunk), kept - there, 1)
            if self._taken_back:
                # The next call asks for slots, after this one has given the revoked starts back.
                count, self._taken_back = -self._taken_back, 0
        slack = 0.0
        if not self._no_burst:
            slack = max(0.0, self._tolerance - self._late - kept * members * self.interval)
        return PaceOp(
            self.name,
            count,
            self._step * SECOND,
            slack * SECOND,
            self._horizon * SECOND,
            (self._next_at - now) * SECOND if restate else UNKNOWN_PACE,
        )

    def answered(self, slots: Slots | None, sent: float) -> None:
        """Add the slots that the server has granted for the request sent at *sent*.

        None: the call failed.
        """
        if slots is None:
            return
        now = self._clock()
        self._no_burst = False
        held, kept, late = self._slots, self._kept(), self._late
        self._too_few = max(kept // 2, int(self._used(now) * ASK_BELOW))
        for delay in slots.delays:
            begins = now + delay / SECOND
            # The server granted the slot between *sent* and now. The end counts from the earlier of
            # these moments, and the beginning from the later.
            ends = sent + delay / SECOND + late
            if held.lasting < kept:
                held.add_lasting(begins)
            elif begins <= ends:
                held.add(begins, ends)
        self._next_at = now + slots.next / SECOND
        self._served = bool(slots.delays)
        if held.count(now) > max(self._too_few, self._waiting()):
            # The slots that were missing while this call was under way have come with it.
            self.ask_at = inf
        self._on_slots()

    def stand(self, state: State, instances: int) -> None:
        """Note the *state* of this instance, and the number of *instances* by which it divides the
        rate when it is partitioned; 0 if that is unknown.
        """
        before, self._state = self._state, state
        if instances and instances != self._instances:
            self._local.apply(self.interval * instances, self._tolerance / instances)
        self._instances = instances or self._instances
        if (state is State.JOINED) == (before is State.JOINED):
            return
        self._slots.clear()
        self.ask_at, self._taken_back = inf, 0
        self._local.postpone(self._clock())
        self._on_slots()

    def _ask(self, now: float) -> None:
        """Ask for slots once the next ones are well within the horizon, so that one call gets several
        slots of a fast rate.

        An instance that got slots from the last call asks later than an instance that got none.
        """
        before = self._horizon / (4 if self._served else 2)
        self._ask_by(max(now, self._next_at - before, self._not_before))

    def _ask_by(self, moment: float) -> None:
        """Ask at *moment* at the latest."""
        if moment < self.ask_at:
            self.ask_at = moment
            self._leases.call_by(moment)

    @property
    def _late(self) -> float:
        """The seconds by which a start may be later than its slot."""
        return max(self._horizon, 2 * self._leases.round_trip)

    def _used(self, now: float) -> float:
        """Return the number of starts in a horizon, at the present rate."""
        elapsed = now - self._starts_since
        if elapsed >= self._horizon:
            self._starts_before = max(0, self._starts) * self._horizon / elapsed
            self._starts, self._starts_since = 0, now
        return max(self._starts_before, self._starts)

    def _kept(self) -> int:
        """Return the number of slots of the burst that this instance may keep."""
        burst = (self._tolerance - self._horizon) / self.interval
        return max(
            0, min(MOST_KEPT, int(burst * self._share_kept / max(1, self._leases.instances)))
        )
