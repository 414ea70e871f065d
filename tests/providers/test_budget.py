"""The budget of retries: a fifth of the requests, but some always."""

from __future__ import annotations

from aioserver.providers.capacity import MIN_RETRIES, WINDOW, RetryBudget
from tests.support.clock import FakeClock


def retries(budget: RetryBudget, most: int = 10_000) -> int:
    return next(number for number in range(most) if not budget.take_retry())


def test_a_quiet_server_has_some() -> None:
    assert retries(RetryBudget(FakeClock())) == MIN_RETRIES


def test_a_busy_server_has_a_fifth() -> None:
    budget = RetryBudget(FakeClock())
    for _ in range(1000):
        budget.add_request()
    assert retries(budget) == 200


def test_they_come_back_after_their_span() -> None:
    clock = FakeClock()
    budget = RetryBudget(clock)
    assert retries(budget) == MIN_RETRIES
    clock.now += WINDOW - 1
    assert retries(budget) == 0
    clock.now += 1
    assert retries(budget) == MIN_RETRIES
    clock.now += 10_000
    assert retries(budget) == MIN_RETRIES


def test_a_wave_of_failures_makes_no_wave_of_retries() -> None:
    clock = FakeClock()
    budget = RetryBudget(clock)
    done = 0
    for _ in range(10_000):  # a hundred a second, each fails and wants three retries
        clock.now += 0.01
        budget.add_request()
        done += sum(budget.take_retry() for _ in range(3))
    assert done <= 0.25 * 10_000
