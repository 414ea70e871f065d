"""A circuit breaker that costs no more than the fault: a provider that still answers some requests
gets all of them.

After Michael T. Nygard, "Release It!", 2007, but with two levels of ill health, sick and dead:

    well    every request is sent
    sick    many attempts fail, and some succeed: every request is sent, but a provider that is
            well comes first, except for trials; several successes in a row end it
    dead    nothing succeeds: no request is sent but for trials, and the first success ends it

                  more than half fail            nothing succeeds any more
        well ◀──────────────────────▶ sick ──────────────────────────────▶ dead
          ▲   trials succeed in a row, or                                    │
          │   fewer than a quarter fail                                      │
          └──────────────────────── any success ─────────────────────────────┘

A sick provider recovers by time and not by count alone: at two requests a second, one trial in
twenty took minutes. Trials begin soon, and each that fails doubles the time until the next one.
After each success one more trial may be under way at once, so that a recovering provider does not
get every request at once. A provider that falls sick again soon needs more successes.

A success counts at the first event of an answer, and a failure at its end. An answer that breaks
off after its beginning counts as a failure for the share of a sick provider. It does not count for
a dead one: while long answers hold all places, nothing begins for minutes. A breaker that opens at
a share of failures would refuse requests that retries can still answer. If half of all attempts
fail, a request with three retries is answered 15 times out of 16.
"""

from __future__ import annotations

import random
import time
from array import array
from collections import deque
from math import inf
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

WELL, SICK, DEAD = "well", "sick", "dead"
# A provider is dead if for PATIENCE seconds nothing has succeeded and at least MANY attempts have
# failed. If a provider answers one attempt in twenty, so many fail in a row once in 400 attempts.
PATIENCE, MANY = 5.0, 60
# It is also dead if nothing has succeeded for LONG_PATIENCE seconds and at least FEW attempts have
# failed, but at most MAX_RATE of them a second. Then there can be as many trials, and no request
# is lost.
LONG_PATIENCE, FEW, MAX_RATE = 15.0, 5, 1.0
# A patience is at least this multiple of the median time to the first event: slow is not dead.
USUAL = 2.0
# Times to a first event from which the median is computed.
FIRST_EVENTS = 100
# A provider is sick if more than SICK_ABOVE of at least MIN_ATTEMPTS in the last WINDOW seconds
# failed, and well again if fewer than WELL_BELOW of at least MIN_ATTEMPTS did. Between the two it
# keeps its state.
WINDOW, MIN_ATTEMPTS = 30.0, 20
SICK_ABOVE, WELL_BELOW = 0.5, 0.25
# Attempts that are kept for these shares, and the seconds by which WINDOW may be shorter.
MAX_REMEMBERED, GRAIN = 1000, 1.0
# Of the requests that would go to a sick provider first, every twentieth is a trial at any time.
TURN = 20
# Seconds from when a provider falls sick to its first trial; they double with each failed trial,
# up to LONGEST_INTERVAL.
SICK_INTERVAL = 1.0
# The successful trials in a row that end the sickness. They double each time that the provider
# falls sick again within FLAPPING seconds, up to MOST_NEEDED.
NEEDED, MOST_NEEDED, FLAPPING = 3, 12, 300.0
# Seconds between two trials of a dead provider, and how many may be under way. A request that
# another provider can answer is a trial only if no other trial is under way, and these seconds
# double up to LONGEST_INTERVAL.
TRIAL_INTERVAL, MAX_TRIALS = 0.5, 3
LONGEST_INTERVAL = 10.0


class Trials(msgspec.Struct, frozen=True):
    """The trials of a sick provider: the seconds between two that fail, the successes in a row,
    and the number needed.
    """

    interval: float
    row: int
    needed: int


class Breaker:
    """Decides which attempts may start, by the results of earlier ones.

    Always: while the provider is dead, trials start TRIAL_INTERVAL apart or more, and at most
    MAX_TRIALS are under way; while it is sick, at most one more than have succeeded in a row.
    Every attempt that `start` has let pass, and every trial that `start_spared` has begun, has one
    verdict: `succeeded`, `failed`, or `unsure` if it proves nothing. A failure may follow a
    success: the answer has broken off.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.dead = self.sick = False
        # The number of times that it has died.
        self.deaths = 0
        # Whether the provider could not be reached, or was not ready, at the newest failure. For a
        # dead provider: at any failure since its death, or at the failure by which it died.
        self.unreachable = False
        # The number of instances that use the provider, each with its own breaker: they share the
        # trials.
        self.instances = 1
        # The times to a first event since the last call of `forget`, and those before.
        self._first_events: deque[float] = deque(maxlen=FIRST_EVENTS)
        self._former_first_events = array("d")
        self._last_success = -inf
        # The failures since the last success, and the time at which the first of them began.
        self._failures = 0
        self._failing_since = 0.0
        # The number of attempts so far, and how many of them are too old to count for the share of
        # failures.
        self._attempts = self._too_old = 0
        # The number of attempts at times in the last WINDOW, GRAIN apart or more; and the time of
        # the next such mark.
        self._marks: deque[tuple[float, int]] = deque()
        self._next_mark = -inf
        # The numbers of the failed attempts that are not too old.
        self._failed: deque[int] = deque()
        # While it is sick: the requests since the last trial, the successful trials in a row, and
        # the number of them that is needed.
        self._requests_since_trial = 0
        self._row, self._needed = 0, NEEDED
        # When it last got well.
        self._well_at = -inf
        # The trials under way, of a sick provider or of a dead one.
        self._trials = 0
        # The times from which on the next trial may start: for a request that only this provider can
        # answer, and for any other request.
        self._next_trial = self._next_spared_trial = 0.0
        self._interval = TRIAL_INTERVAL

    @property
    def state(self) -> str:
        """`well`, `sick` or `dead`."""
        if self.dead:
            return DEAD
        return SICK if self.sick else WELL

    def delay(self, *, alternative: bool = False) -> float:
        """Return the seconds until an attempt may start: 0.0 now, inf once a trial has ended.

        *alternative* says that another provider can answer the request.
        """
        if not self.dead:
            return 0.0
        if self._trials >= (1 if alternative else max(1, MAX_TRIALS // self.instances)):
            return inf
        due = self._next_spared_trial if alternative else 0.0
        return max(0.0, max(due, self._next_trial) - self._clock())

    def next_trial(self, *, alternative: bool = False) -> float:
        """Return the seconds until the next trial may start; 0.0 also while one is under way.

        *alternative* says that another provider can answer the requests that come.
        """
        return 0.0 if self._trials else self.delay(alternative=alternative)

    @property
    def trials(self) -> Trials | None:
        """The trials of a sick provider, otherwise None."""
        if self.dead or not self.sick:
            return None
        return Trials(self._apart(), self._row, self._needed)

    def start_spared(self, *, by_time: bool = True) -> bool:
        """Count a request that would go to the sick provider first, and that another one can
        answer; return whether it goes there as a trial, whose result must be reported.

        Without *by_time* only each twentieth does.
        """
        self._requests_since_trial += 1
        if self._trials > self._row:
            return False
        due = by_time and (self._row > 0 or self._clock() >= self._next_spared_trial)
        if not due and self._requests_since_trial < TURN:
            return False
        self._requests_since_trial = 0
        self._trials += 1
        return True

    def start(self) -> bool:
        """Note that an attempt starts, which `delay` must have allowed; return whether it is a
        trial.
        """
        if not self.dead:
            return False
        self._trials += 1
        self._next_trial = self._clock() + TRIAL_INTERVAL * self.instances
        return True

    def succeeded(self, seconds: float, *, trial: bool) -> bool:
        """Note the first event of an answer, after *seconds*; return whether the provider was
        dead.
        """
        was_dead = self.dead
        if trial:
            self._trials -= 1
            self._row += self.sick
        if was_dead or self._row >= self._needed:
            self._get_well()
        self._last_success = now = self._clock()
        self._failures = 0
        self.unreachable = False
        self._first_events.append(seconds)
        if now >= self._next_mark:
            self._mark(now)
        self._attempts += 1
        # A provider without a failure is well.
        if self.sick or self._failed:
            self._judge(now)
        return was_dead

    def failed(
        self, began: float, *, trial: bool, answered: bool = False, unreachable: bool = False
    ) -> bool:
        """Note the failure of an attempt that *began* at that time; return whether the provider has
        died by it.

        *answered*: the attempt has succeeded before, and its answer broke off. *unreachable*:
        there was no connection, or the provider said that it is not ready.
        """
        self._trials -= trial
        now = self._clock()
        if trial and (self.dead or self.sick):
            self._interval = min(LONGEST_INTERVAL, 2 * self._interval)
            self._next_spared_trial = now + (self._interval if self.dead else self._apart())
        if self.dead:
            self.unreachable = self.unreachable or unreachable
            return False
        if trial or answered:
            self._row = 0
        if now >= self._next_mark:
            self._mark(now)
        self._failed.append(self._attempts + 1)
        # An answer was counted as an attempt when it began, if that is still kept.
        self._attempts += not (answered and began > now - WINDOW)
        self._judge(now)
        if answered:
            # The provider may be sick. An answer that has begun never shows that it is dead.
            return False
        self.unreachable = unreachable
        began = max(began, self._last_success)
        self._failing_since = min(self._failing_since, began) if self._failures else began
        self._failures += 1
        if not self._lifeless():
            return False
        self._die()
        return True

    def told_dead(self, *, unreachable: bool) -> bool:
        """Learn that another instance has found the provider dead; return whether that is news."""
        if self.dead:
            return False
        self.unreachable = unreachable
        self._die()
        return True

    def told_alive(self) -> bool:
        """Learn that the provider has answered another instance; return whether it was dead."""
        was_dead = self.dead
        if was_dead:
            self._get_well()
        self._failures = 0
        return was_dead

    def unsure(self, *, trial: bool) -> None:
        """Note the end of an attempt that proves nothing: its client left, or the fault is not the
        provider's.
        """
        self._trials -= trial

    def reset(self) -> None:
        """Forget everything but the trials under way: the address has changed."""
        self._get_well()
        self._first_events.clear()
        self._former_first_events = array("d")
        self._last_success = self._well_at = -inf
        self._needed = NEEDED

    def _die(self) -> None:
        self.dead = True
        self.deaths += 1
        self._row, self._interval = 0, TRIAL_INTERVAL
        # Instances that learn of the fault together do not all try at the same time.
        first = TRIAL_INTERVAL * random.uniform(1, self.instances)  # noqa: S311 - jitter
        self._next_trial = self._next_spared_trial = self._clock() + first

    def _lifeless(self) -> bool:
        """Return whether the provider is dead: it has failed for long enough, and often enough."""
        seconds, failures = self._clock() - self._failing_since, self._failures
        if not (
            (failures >= MANY and seconds >= PATIENCE)
            or (failures >= FEW and seconds >= max(LONG_PATIENCE, failures / MAX_RATE))
        ):
            return False
        ordered = sorted(self._newest_first_events())
        return not ordered or seconds >= USUAL * ordered[len(ordered) // 2]

    def forget(self) -> None:
        """Release the objects of a load that is over, without changing a decision; call it each
        second.

        Otherwise they would keep the memory around them from being returned to the system.
        """
        self._drop_old(self._clock())
        if self._first_events:
            self._former_first_events = array("d", self._newest_first_events())
            self._first_events.clear()

    def _newest_first_events(self) -> list[float]:
        return [*self._former_first_events, *self._first_events][-FIRST_EVENTS:]

    def _mark(self, now: float) -> None:
        """Record the number of attempts before *now*."""
        self._marks.append((now, self._attempts))
        self._next_mark = now + GRAIN
        self._drop_old(now)

    def _drop_old(self, now: float) -> None:
        """Forget the attempts that are too old to count for the share of failures."""
        marks, failed, attempts = self._marks, self._failed, self._attempts
        while marks and marks[0][0] <= now - WINDOW:
            marks.popleft()
        too_old = marks[0][1] if marks else attempts
        if self.sick:
            # With few requests it gets well by the newest of them, however old they are.
            too_old = min(too_old, attempts - MIN_ATTEMPTS)
        self._too_old = too_old = max(too_old, attempts - MAX_REMEMBERED, self._too_old)
        while failed and failed[0] <= too_old:
            failed.popleft()

    def _judge(self, now: float) -> None:
        """Decide by the share of failures whether the provider is sick."""
        self._drop_old(now)
        attempts = self._attempts - self._too_old
        if attempts < MIN_ATTEMPTS:
            return
        share = len(self._failed) / attempts
        if not self.sick and share > SICK_ABOVE:
            self._sicken()
        elif self.sick and share < WELL_BELOW:
            self.sick, self._row, self._well_at = False, 0, now

    def _sicken(self) -> None:
        now = self._clock()
        flaps = now - self._well_at < FLAPPING
        self._needed = min(MOST_NEEDED, 2 * self._needed) if flaps else NEEDED
        self.sick = True
        self._row = self._requests_since_trial = 0
        self._interval = SICK_INTERVAL
        self._next_spared_trial = now + self._apart()
        self._clear_recent()

    def _apart(self) -> float:
        """Return the seconds between two trials of a sick provider at this instance.

        Instances divide frequent trials among them: the provider gets well at each of them
        separately, and at none of them much later than at a single instance.
        """
        return min(LONGEST_INTERVAL, self._interval * self.instances)

    def _get_well(self) -> None:
        self.dead = self.sick = self.unreachable = False
        self._failures = self._row = 0
        self._well_at = self._clock()
        self._clear_recent()

    def _clear_recent(self) -> None:
        self._marks.clear()
        self._failed.clear()
        self._too_old, self._next_mark = self._attempts, -inf
