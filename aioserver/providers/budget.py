"""The retry budget: a fifth of the requests, so that a failing provider causes no wave of retries.

After "Handling Overload" in Beyer et al., "Site Reliability Engineering", 2016. A provider with
few requests may have MIN_RETRIES in each WINDOW nevertheless.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

# Seconds.
WINDOW = 10
# Retries for each request.
SHARE = 0.2
MIN_RETRIES = 10


class BudgetStats(NamedTuple):
    """A snapshot of a budget: the retries of the last WINDOW seconds, and the most that it allows
    in them.
    """

    used: int
    limit: int


class Budget:
    """Counts the requests and retries of the last WINDOW seconds, second by second.

    Always: a retry is taken only while there are fewer than `max(MIN_RETRIES, SHARE * requests)`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests = [0] * WINDOW
        self._retries = [0] * WINDOW
        # The second of the newest count.
        self._second = int(clock())

    def add_request(self) -> None:
        """Count a request."""
        if (second := int(self._clock())) != self._second:
            self._pass_to(second)
        self._requests[second % WINDOW] += 1

    def take_retry(self) -> bool:
        """Count a retry if the budget has room for it; return whether it has."""
        used, limit = self.stats()
        if used >= limit:
            return False
        self._retries[self._second % WINDOW] += 1
        return True

    def stats(self) -> BudgetStats:
        """Return a snapshot."""
        self._pass_to(int(self._clock()))
        limit = max(MIN_RETRIES, math.ceil(SHARE * sum(self._requests)))
        return BudgetStats(sum(self._retries), limit)

    def _pass_to(self, second: int) -> None:
        """Forget the counts of seconds that are too old, now that *second* has come."""
        for passed in range(self._second + 1, min(second, self._second + WINDOW) + 1):
            self._requests[passed % WINDOW] = self._retries[passed % WINDOW] = 0
        self._second = second
