"""Time that passes only when a test says so."""

from __future__ import annotations

import heapq
import itertools
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


class FakeTimer:
    """The handle of a call that is due at *when*."""

    def __init__(self, when: float, call: Callable[[], object]) -> None:
        self.when = when
        self.call = call
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeClock:
    """A clock for whatever takes `clock` as an argument, and an event loop's timers with it.

    The time is `clock()`, and `clock.now += 1.0` moves it without any timer; `advance` runs the
    timers that come due.
    """

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self._timers: list[tuple[float, int, FakeTimer]] = []
        self._order = itertools.count()

    def __call__(self) -> float:
        return self.now

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The clock as an event loop of which only the time and the timers exist."""
        return cast("asyncio.AbstractEventLoop", self)

    @property
    def pending(self) -> int:
        """The number of timers that will run."""
        return sum(not timer.cancelled for _, _, timer in self._timers)

    @property
    def next_due(self) -> float:
        """When the next timer is due."""
        return min(timer.when for _, _, timer in self._timers if not timer.cancelled)

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Callable[..., object], *args: Any) -> FakeTimer:
        timer = FakeTimer(when, lambda: call(*args))
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def call_later(self, delay: float, call: Callable[..., object], *args: Any) -> FakeTimer:
        return self.call_at(self.now + delay, call, *args)

    def advance(self, seconds: float) -> None:
        """Let *seconds* pass, and run each timer at its time."""
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            when, _, timer = heapq.heappop(self._timers)
            self.now = max(self.now, when)
            if not timer.cancelled:
                timer.call()
        self.now = end

    def run_next(self, late: float = 0.0) -> None:
        """Run the next timer *late* seconds after its time, as a loop that was blocked would."""
        when, _, timer = heapq.heappop(self._timers)
        self.now = when + late
        if not timer.cancelled:
            timer.call()
