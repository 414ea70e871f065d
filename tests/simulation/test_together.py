"""What is looked at of all instances together: the starts of a rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.simulation.clock import Clock
from tests.simulation.together import Starts

if TYPE_CHECKING:
    from collections.abc import Iterator

INTERVAL = 0.1


@pytest.fixture(autouse=True)
def clock() -> Iterator[None]:
    now, Clock.now = Clock.now, 1000.0
    yield
    Clock.now = now


def excess(starts: Starts, burst: float) -> float:
    level, most = starts.add(1, INTERVAL, burst)
    return round(level - most, 9)


def test_no_more_may_start_at_once_than_the_burst() -> None:
    starts = Starts()

    assert [excess(starts, 2.0) > 0 for _ in range(3)] == [False, False, True]


def test_a_burst_comes_back_with_time() -> None:
    starts = Starts()
    for _ in range(2):
        excess(starts, 2.0)
    Clock.now += INTERVAL

    assert [excess(starts, 2.0) > 0 for _ in range(2)] == [False, True]


def test_a_lowered_burst_holds_from_then_on() -> None:
    starts = Starts()
    for _ in range(6):
        excess(starts, 6.0)

    # One each interval goes on, though more than the new burst have started not long before.
    for _ in range(10):
        Clock.now += INTERVAL
        assert excess(starts, 2.0) <= 0
    # The former burst bounds the time that began before.
    assert [excess(starts, 2.0) > 0 for _ in range(2)] == [True, True]


def test_a_lowered_burst_does_not_come_beside_the_former_one() -> None:
    starts = Starts()
    for _ in range(6):
        excess(starts, 6.0)

    assert excess(starts, 2.0) > 0
