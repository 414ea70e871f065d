"""The lag of the event loop, and its times: the part of a provider's silence that is our own.

A timer that is due every tenth of a second measures how late it is called. While the loop is late
nothing is read: the bytes of a provider wait in the kernel, and the provider seems silent for that
time. So the late periods are kept, and subtracted from the silences that they end.

Only the time after the timer was due is measured: a block of 150 ms is measured as 50 to 150 ms.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

    from aioserver.telemetry.counters import Histogram

# Seconds between two measurements.
INTERVAL = 0.1
# Seconds; a shorter lateness is normal for an event loop, and is not kept.
THRESHOLD = 0.005
# The late periods that are kept at least.
MAX_PERIODS = 1000


class LoopLag:
    """Measures the loop until it is closed.

    Always: `_due_at` and `_called_at` have the newest late periods in order, in the loop's time:
    between MAX_PERIODS of them and twice as many. They are numbers without an object for each,
    which would keep memory from being returned.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, histogram: Histogram) -> None:
        self._loop = loop
        self._histogram = histogram
        self._due_at, self._called_at = array("d"), array("d")
        self._sum = self._max = 0.0
        self._count = 0
        self._due = loop.time() + INTERVAL
        self._timer = loop.call_at(self._due, self._measure)

    def take(self) -> tuple[float, float]:
        """Return the mean and the maximum lateness since the last call of this method, in
        seconds.
        """
        mean, maximum = self._sum / max(1, self._count), self._max
        self._sum = self._max = 0.0
        self._count = 0
        return mean, maximum

    def before(self, until: float, since: float) -> float:
        """Return for how many seconds the loop was late just before *until*, a time of the loop.

        Bytes that came meanwhile were read at *until*. A late period that was over INTERVAL
        earlier has delayed nothing until then. The part before *since* does not count.
        """
        for due, called in self._periods():
            if called < until - INTERVAL:
                break
            if due < until and called > since:
                return min(called, until) - max(due, since)
        return 0.0

    def longest(self, since: float) -> float:
        """Return the length of the longest late period; only its part after *since* counts."""
        longest = 0.0
        if not self._called_at or self._called_at[-1] <= since:
            return longest
        for due, called in self._periods():
            if called <= since:
                break
            longest = max(longest, called - max(due, since))
        return longest

    def _periods(self) -> Iterator[tuple[float, float]]:
        """Return the late periods, the newest first, each as (due, called)."""
        return zip(reversed(self._due_at), reversed(self._called_at), strict=True)

    def close(self) -> None:
        """Stop measuring."""
        self._timer.cancel()

    def _measure(self) -> None:
        now = self._loop.time()
        lag = max(0.0, now - self._due)
        self._histogram.observe(lag)
        self._sum += lag
        self._count += 1
        self._max = max(self._max, lag)
        if lag > THRESHOLD:
            self._due_at.append(self._due)
            self._called_at.append(now)
            if len(self._due_at) > 2 * MAX_PERIODS:
                del self._due_at[:-MAX_PERIODS], self._called_at[:-MAX_PERIODS]
        self._due = now + INTERVAL
        self._timer = self._loop.call_at(self._due, self._measure)
