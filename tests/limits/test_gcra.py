"""The rate algorithm: the property of any window, under random steps."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from aioserver.limits.gcra import ROUNDING, Gcra

if TYPE_CHECKING:
    from tests.support.clock import FakeClock


def burst(rate: Gcra) -> int:
    """Start as often as is allowed now."""
    starts = 0
    while not rate.try_take():
        starts += 1
    return starts


def assert_bounded(starts: list[tuple[float, float]], interval: float, tolerance: float) -> None:
    """No window has more than its share, the tolerance and one start; each start has its worth."""
    for first, (begin, _) in enumerate(starts):
        total = 0.0
        for moment, seconds in starts[first:]:
            assert total <= moment - begin + tolerance + interval * 1e-6 + 1e-6
            total += seconds


@pytest.mark.parametrize("run", range(20))
def test_no_window_has_more_than_its_share_and_the_burst(run: int, clock: FakeClock) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    interval = dice.choice((0.001, 0.1, 1.0, 60 / 7, 60.0))
    tolerance = interval * dice.choice((0, 1, 4.5, 59))
    rate = Gcra(interval, tolerance, clock)
    starts: list[tuple[float, float]] = []

    for _ in range(400):
        match dice.choice(("step", "rest", "try", "try", "wait", "take")):
            case "step":
                clock.now += dice.expovariate(1 / interval)
            case "rest" if dice.random() < 0.1:
                clock.now += 10 * (interval + tolerance)
            case "try" if not rate.try_take():
                starts.append((clock.now, interval))
            case "wait":
                clock.now += rate.delay()
                assert rate.delay() <= 1e-9
                assert not rate.try_take(), "a start after the delay is allowed"
                starts.append((clock.now, interval))
            case "take" if not rate.delay():
                seconds = interval * dice.uniform(0.0, 3.0)
                rate.take(seconds)
                starts.append((clock.now, seconds))

    assert_bounded(starts, interval, tolerance)


@pytest.mark.parametrize("allowed", [1, 2, 7, 200])
def test_after_a_rest_the_burst_starts_at_once_and_then_one_each_interval(
    allowed: int, clock: FakeClock
) -> None:
    rate = Gcra(0.1, (allowed - 1) * 0.1, clock)

    assert rate.available == allowed
    assert burst(rate) == allowed
    assert rate.available == 0
    assert rate.try_take() == pytest.approx(0.1)
    for _ in range(5):
        clock.now += 0.1
        assert burst(rate) == 1
    clock.now += 3600.0
    assert burst(rate) == allowed, "an hour of rest is no more than one burst"


def test_refused_start_counts_for_nothing(clock: FakeClock) -> None:
    rate = Gcra(1.0, 0.0, clock)
    rate.try_take()

    for _ in range(100):
        assert rate.try_take() == pytest.approx(1.0)

    clock.now += 1.0
    assert not rate.try_take()


def test_start_may_be_early_by_the_rounding_alone(clock: FakeClock) -> None:
    rate = Gcra(1.0, 0.0, clock)
    rate.try_take()

    clock.now += 1.0 - ROUNDING / 2
    assert not rate.try_take()
    clock.now += 1.0 - 1e-6
    assert rate.try_take()


def test_delay_behind_others_is_that_of_their_starts(clock: FakeClock) -> None:
    rate = Gcra(0.1, 0.2, clock)
    delays = [rate.delay(number * 0.1) for number in range(6)]

    assert delays == pytest.approx([0.0, 0.0, 0.0, 0.1, 0.2, 0.3])


def test_a_cost_that_is_given_back_may_start_again(clock: FakeClock) -> None:
    rate = Gcra(1.0, 2.0, clock)
    assert burst(rate) == 3

    rate.take(-1.0)

    assert burst(rate) == 1
    rate.take(-100.0)
    assert burst(rate) == 3, "more than was taken cannot be given back"


def test_another_rate_counts_what_has_started(clock: FakeClock) -> None:
    rate = Gcra(1.0, 0.0, clock)
    rate.take(8.0)

    rate.apply(0.5, 0.0)
    assert rate.delay() == pytest.approx(8.0)
    rate.apply(0.25, 0.0, scale=0.5)
    assert rate.delay() == pytest.approx(4.0)
    clock.now += 100.0
    rate.apply(1.0, 3.0, scale=7.0)
    assert burst(rate) == 4


def test_nothing_starts_before_the_moment_to_which_it_was_postponed(clock: FakeClock) -> None:
    rate = Gcra(0.1, 0.5, clock)

    rate.postpone(clock.now + 10.0)
    rate.postpone(clock.now + 3.0)

    assert rate.delay() == pytest.approx(10.0)
    clock.now += 10.0
    assert burst(rate) == 1, "and no burst then"


def test_catching_up_leaves_one_interval_at_most(clock: FakeClock) -> None:
    rate = Gcra(0.1, 0.5, clock)
    rate.catch_up()
    assert rate.available == 6, "it adds nothing"

    rate.postpone(clock.now + 10.0)
    rate.catch_up()

    assert rate.delay() == pytest.approx(0.1)
