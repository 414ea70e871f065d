"""What is remembered of a load is numbers in arrays, or ends soon: no objects outlive the load.

An object that does keeps a megabyte around it from going back to the system.
"""

from __future__ import annotations

import gc
import sys
from array import array
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.monitoring.alerts import Alerts
from aioserver.monitoring.history import Past
from aioserver.monitoring.interval import ATTEMPTS, Interval, Total
from aioserver.providers.breaker import WINDOW, Breaker
from aioserver.telemetry.counters import Histogram, RecentValues
from aioserver.telemetry.loop_lag import MAX_PERIODS, LoopLag
from tests.support.clock import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable

# Numbers that each takes, and the objects that may come with that: far fewer.
NUMBERS, OBJECTS = 900, 60


def recent_values() -> Callable[[int], object]:
    recent = RecentValues()

    def add(number: int) -> None:
        recent.add(1000.5 + number / 100, number / 7)
        if number % 100 == 99:
            recent.percentiles(1000.5 + number / 100)

    return add


def breaker() -> Callable[[int], object]:
    clock = FakeClock()
    breaker = Breaker(clock)

    def succeed(number: int) -> None:
        breaker.succeeded(number / 7, trial=False)
        if number % 100 == 99:
            clock.now += WINDOW
            breaker.forget()

    return succeed


def loop_lag() -> Callable[[int], object]:
    clock = FakeClock()
    lag = LoopLag(clock.loop, Histogram())

    def late(_: int) -> LoopLag:
        clock.run_next(0.02)
        return lag

    return late


def history() -> Callable[[int], object]:
    past = Past()

    def add(number: int) -> None:
        value = number + 0.5
        state: Any = {
            "time": value,
            "connections": {"active": 300, "waiting": 300, "rejected_per_second": value},
            "requests": {"per_second": value},
            "tokens_per_second": value,
            "first_token": {"p50": value, "p95": value},
            "loop": {"lag_max": value},
            "providers": {},
        }
        past.add(state)

    return add


def attempts() -> Callable[[int], object]:
    troubles = Alerts()

    def tick(number: int) -> None:
        growth = {Total(ATTEMPTS, "ok", "one"): 300.5 + number}
        state: Any = {"time": 0.0, "providers": {}, "fallbacks": [], "groups": {}}
        state |= {"active_group": None, "active_provider": "one"}
        troubles.observe(state, Interval(growth, {}, 0.0, 0.0, 0.0, 0))

    return tick


@pytest.mark.parametrize(
    "window", [recent_values, breaker, loop_lag, history, attempts], ids=lambda make: make.__name__
)
def test_a_window_keeps_no_objects(window: Callable[[], Callable[[int], object]]) -> None:
    take = window()
    for number in range(50):
        take(number)
    gc.collect()
    gc.disable()
    try:
        before = sys.getallocatedblocks()
        for number in range(50, NUMBERS):
            take(number)
        gc.collect()
        made = sys.getallocatedblocks() - before
    finally:
        gc.enable()

    assert made < OBJECTS


def test_late_periods_are_bounded() -> None:
    clock = FakeClock()
    lag = LoopLag(clock.loop, Histogram())
    for _ in range(10 * MAX_PERIODS):
        clock.run_next(0.02)

    sizes = [sys.getsizeof(value) for value in gc.get_referents(lag) if isinstance(value, array)]
    assert len(sizes) == 2
    # Two windows of a thousand numbers of 8 bytes, and what an array has in reserve.
    assert max(sizes) < 2.2 * 8 * MAX_PERIODS
