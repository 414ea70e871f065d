"""The tokens a minute of a provider, which all instances share.

The cost of a request is known only after the end of its answer, so an instance runs into debt. A
start is counted with its expected cost, and nothing more starts until this debt is paid. It is
paid with slots of a shared rate (wings/cluster/limits/rates.py), each worth CHUNK seconds of the
rate, which the server grants to all instances together. So in any span of t seconds all instances
together pay for at most the tokens of t seconds and the burst. They may owe the cost of one
request of each instance beyond that. An instance without a debt makes no call.

All amounts are in seconds of the rate, as in `Gcra`.
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

# Seconds of the rate that a slot is worth. An instance that vanishes takes one slot with it, and its
# prefetched slots.
CHUNK = 0.5


class SharedTokens(Gcra):
    """A token each *interval* seconds, and up to *tolerance* seconds early, shared under *name*. It
    replaces a `Gcra` of the whole rate.

    Always: a slot is paid once for each CHUNK that `take` has counted, and at most a CHUNK of the
    revoked seconds is kept.

    *on_slots* is called when more may start than before.
    """

    def __init__(
        self,
        leases: LeaseCalls,
        name: str,
        interval: float,
        tolerance: float,
        clock: Callable[[], float] = time.monotonic,
        on_slots: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(interval, tolerance, clock)
        # The seconds that were counted and not paid; below 0: the seconds that were paid in advance.
        self._debt = 0.0
        self.rate = SharedRate(
            leases,
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
        """Count *seconds*, whether they are allowed or not; a negative number revokes some."""
        self._debt += seconds
        while self._debt <= -2 * CHUNK:
            self.rate.take(-CHUNK)
            self._debt += CHUNK

    def apply(self, interval: float, tolerance: float, *, scale: float = 1.0) -> None:
        """Use another rate from now on; the debt is multiplied by *scale*."""
        self._debt *= scale
        self.interval = interval
        self.rate.apply(CHUNK, tolerance - CHUNK)
