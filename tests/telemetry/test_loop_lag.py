"""The lag of the event loop, from looks that come late."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aioserver.telemetry.counters import SHORT_BOUNDS, Histogram
from aioserver.telemetry.loop_lag import INTERVAL, LoopLag

if TYPE_CHECKING:
    from tests.support.clock import FakeClock


@pytest.fixture
def lag(clock: FakeClock) -> LoopLag:
    return LoopLag(clock.loop, Histogram(SHORT_BOUNDS))


def test_a_late_look_tells_when_the_loop_was_late(clock: FakeClock, lag: LoopLag) -> None:
    clock.run_next(0.0)
    due = clock.next_due
    clock.run_next(0.5)

    assert lag.before(due + 0.5, 0.0) == pytest.approx(0.5)
    assert lag.before(due + 0.2, 0.0) == pytest.approx(0.2)
    assert lag.before(due + 0.5, due + 0.2) == pytest.approx(0.3)
    assert lag.before(due + 0.5 + INTERVAL / 2, 0.0) == pytest.approx(0.5), "it runs once more"
    assert lag.before(due, due - 1.0) == lag.before(due + 9.0, due + 0.5) == 0.0
    assert lag.longest(0.0) == pytest.approx(0.5)
    assert lag.longest(due + 0.4) == pytest.approx(0.1)
    assert lag.longest(due + 0.5) == 0.0


def test_a_late_period_hides_nothing_that_comes_after_it(clock: FakeClock, lag: LoopLag) -> None:
    for _ in range(250):
        clock.run_next(0.008)
    assert lag.before(clock.now, 0.0) == pytest.approx(0.008), "not all of them"
    assert lag.before(clock.now + 2 * INTERVAL, 0.0) == 0.0


def test_small_moments_do_not_count(clock: FakeClock, lag: LoopLag) -> None:
    for late in (0.2, 0.001, 0.3, 0.0):
        clock.run_next(late)

    assert lag.longest(0.0) == pytest.approx(0.3)
    mean, most = lag.take()
    assert (round(mean, 6), round(most, 6)) == (0.12525, 0.3)
    assert lag.take() == (0.0, 0.0)
    assert clock.next_due == pytest.approx(clock.now + INTERVAL)
