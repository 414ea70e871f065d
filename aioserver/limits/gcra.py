"""The one rate algorithm: GCRA, the generic cell rate algorithm (ITU-T I.371).

The state is one number, the theoretical arrival time (TAT): the moment at which the next start
would be exactly on schedule. A start is allowed while the TAT is at most a tolerance ahead of now,
and moves the TAT ahead by an interval (from now, if the TAT has passed). So after a rest
`1 + tolerance / interval` starts may follow each other at once, then one each interval. Nothing is
stored per start, and nothing is reset at the edge of a minute, where a counter would allow two
bursts. See also Brandur Leach, "Rate limiting, cells, and GCRA", 2015.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# Seconds by which a start may be early, for the rounding errors of a minute's additions: a client
# that comes back after exactly the delay of its refusal is not refused again.
ROUNDING = 1e-9


class Gcra:
    """A start each *interval* seconds, and up to *tolerance* seconds early.

    Always: at most `(t + tolerance) / interval + 1` starts in any span of t seconds, if each start
    is counted by `try_take`, or by `take` when `delay` is 0.

    Waiting is the caller's business. The whole state is one number, so that several instances of
    the server can share it as one key.
    """

    __slots__ = ("_clock", "_tat", "_tolerance", "interval")

    def __init__(
        self, interval: float, tolerance: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._tat = 0.0
        self._tolerance = tolerance
        self.interval = interval

    def delay(self, ahead: float = 0.0) -> float:
        """Return the seconds until a start is allowed after earlier starts that are worth *ahead*
        seconds.
        """
        wait = ahead - self._tolerance
        if (counted := self._tat - self._clock()) > 0:
            wait += counted
        return wait if wait > 0 else 0.0

    def take(self, seconds: float) -> None:
        """Count a start that is worth *seconds*, allowed or not.

        An ordinary start is worth `interval`. A negative number takes an earlier start back.
        """
        self._tat = max(self._tat, self._clock()) + seconds

    def try_take(self) -> float:
        """Count a start if it is allowed, and return 0; otherwise return the seconds until it
        is.
        """
        now, tat = self._clock(), self._tat
        if tat <= now:
            tat = now
        elif (delay := tat - now - self._tolerance) > ROUNDING:
            return delay
        self._tat = tat + self.interval
        return 0.0

    @property
    def available(self) -> int:
        """How many starts are allowed now."""
        ahead = max(0.0, self._tat - self._clock())
        return max(0, int((self._tolerance - ahead) / self.interval + 1 + ROUNDING))

    def apply(self, interval: float, tolerance: float, *, scale: float = 1.0) -> None:
        """Set another rate.

        The time that is counted ahead of now is multiplied by *scale*. A scale of 1 keeps the
        seconds until the next start; the new interval divided by the old one keeps the number of
        starts.
        """
        now = self._clock()
        if self._tat > now:
            self._tat = now + (self._tat - now) * scale
        self.interval, self._tolerance = interval, tolerance

    def postpone(self, moment: float) -> None:
        """Allow no start before *moment*, a time of the clock, and no burst then."""
        self._tat = max(self._tat, moment + self._tolerance)

    def catch_up(self) -> None:
        """Allow the next start within one interval, whatever has been counted."""
        self._tat = min(self._tat, self._clock() + self._tolerance + self.interval)
