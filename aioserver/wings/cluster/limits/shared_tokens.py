"""The tokens a minute of a provider, which all instances share.

What a request costs is known once its answer has ended, so an instance runs into debt: a start is
counted with what it is expected to cost, and nothing more starts until that is paid. It is paid
with slots of a shared rate (rates.py), each worth CHUNK seconds of the rate, which the server
gives to all instances together. So in any span of t seconds all together pay for at most t
seconds' tokens and the burst; they may owe what one request of each has cost beyond it. An
instance without a debt asks nobody.

All of it counts in seconds of the rate, as `Gcra` does.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from aioserver.limits.gcra import ROUNDING, Gcra
from aioserver.wings.cluster.limits.rates import SharedRate

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.wings.cluster.limits.rates import LeaseCalls

# Seconds of the rate that a slot is worth. An instance that vanishes takes one with it, and those
# that it kept in hand.
CHUNK = 0.5


class SharedTokens(Gcra):
    """A token a *interval* seconds, and up to *tolerance* seconds early, under *name*; it stands
    where a `Gcra` of the whole rate would.

    Always: a slot is paid once for each CHUNK of what `take` has counted, and of what was taken
    back at most a CHUNK is kept.

    *on_slots* is called when more may start than before.
    """

    def __init__(
        self,
        calls: LeaseCalls,
        name: str,
        interval: float,
        tolerance: float,
        clock: Callable[[], float] = time.monotonic,
        on_slots: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(interval, tolerance, clock)
        # What has been counted and not paid; below 0: paid before.
        self._debt = 0.0
        self.rate = SharedRate(
            calls,
            name,
            CHUNK,
            tolerance - CHUNK,
            clock,
            horizon=CHUNK,
            waiting=lambda: max(1, math.ceil(self._debt / CHUNK)),
            on_slots=on_slots,
        )

    def delay(self, ahead: float = 0.0) -> float:
        """Return the seconds until a start is allowed after others that are worth *ahead*
        seconds.
        """
        while self._debt > ROUNDING and not self.rate.try_take():
            self._debt -= CHUNK
        owed = self._debt + ahead
        return self.rate.delay(max(0.0, owed - CHUNK)) if owed > ROUNDING else 0.0

    def take(self, seconds: float) -> None:
        """Count what is worth *seconds*, whether it is allowed or not; a negative number takes
        some back.
        """
        self._debt += seconds
        while self._debt <= -2 * CHUNK:
            self.rate.take(-CHUNK)
            self._debt += CHUNK

    def apply(self, interval: float, tolerance: float, *, scale: float = 1.0) -> None:
        """Use another rate from now on; what is owed is multiplied by *scale*."""
        self._debt *= scale
        self.interval = interval
        self.rate.apply(CHUNK, tolerance - CHUNK)
