"""How late the event loop is, and when it was: what of a silence is ours.

A timer that is due every tenth of a second sees how late it is called. While the loop is late nobody
reads: what a provider has sent lies in the kernel, and its silence is as much longer as the loop was
late. So the late moments are remembered, and taken out of the silences in which they fall.

A block is seen as long as it lasts beyond the moment at which the timer was due: one of 150 ms as
50 to 150.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from aioserver.telemetry.counters import Histogram

EVERY = 0.1  # seconds between two looks
WORTH = 0.005  # seconds; less is no lateness, but how a loop works
REMEMBERED = 1000  # late moments


class LoopLag:
    """Looks at the loop as long as the server lives.

    Always: `_late` has the newest late moments, in order, as (due, called), in the loop's time.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, histogram: Histogram) -> None:
        self._loop = loop
        self._histogram = histogram
        self._late: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)
        self._sum = self._max = 0.0
        self._count = 0
        self._due = loop.time() + EVERY
        self._timer = loop.call_at(self._due, self._look)

    def take(self) -> tuple[float, float]:
        """The mean and the greatest lateness since this was asked last, in seconds."""
        mean, most = self._sum / max(1, self._count), self._max
        self._sum = self._max = 0.0
        self._count = 0
        return mean, most

    def within(self, since: float, until: float) -> float:
        """For how many of these seconds (of the loop's time) the loop was late."""
        found = 0.0
        for due, called in reversed(self._late):
            if called <= since:
                break
            found += max(0.0, min(called, until) - max(due, since))
        return found

    def longest(self, since: float) -> float:
        """The greatest lateness since then; 0.0 where there was none worth a word."""
        most = 0.0
        for due, called in reversed(self._late):
            if called <= since:
                break
            most = max(most, called - max(due, since))
        return most

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        lag = max(0.0, now - self._due)
        self._histogram.observe(lag)
        self._sum += lag
        self._count += 1
        self._max = max(self._max, lag)
        if lag > WORTH:
            self._late.append((self._due, now))
        self._due = now + EVERY
        self._timer = self._loop.call_at(self._due, self._look)
