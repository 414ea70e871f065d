"""How many retries are affordable: a fifth of the requests, so that a bad provider makes no wave.

After "Handling Overload" in Beyer et al., "Site Reliability Engineering", 2016. A quiet house has
MINIMUM retries in each SPAN all the same.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SPAN = 10  # seconds
SHARE = 0.2
MINIMUM = 10


class Budget:
    """Counts requests and retries of the last ten seconds, second by second."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests = [0] * SPAN
        self._retries = [0] * SPAN
        self._second = int(clock())

    def request(self) -> None:
        """A request came."""
        self._turn()
        self._requests[self._second % SPAN] += 1

    def retry(self) -> bool:
        """Take a retry; False: too many already."""
        self._turn()
        if sum(self._retries) >= max(MINIMUM, SHARE * sum(self._requests)):
            return False
        self._retries[self._second % SPAN] += 1
        return True

    def _turn(self) -> None:
        second = int(self._clock())
        if second == self._second:
            return
        for passed in range(self._second + 1, min(second, self._second + SPAN) + 1):
            self._requests[passed % SPAN] = self._retries[passed % SPAN] = 0
        self._second = max(second, self._second)
