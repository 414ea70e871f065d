"""The budgets of a key: what is reserved fits each of them, and is given back once."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from aioserver.limits.budget import DAY, MINUTE, PER_DAY, PER_MINUTE, Budget

if TYPE_CHECKING:
    from aioserver.limits.budget import Reservation
    from tests.support.clock import FakeClock

# A second before a day ends.
LATE = datetime(2026, 11, 28, 23, 59, 59, tzinfo=UTC).timestamp()


def used(budget: Budget, period: str = PER_MINUTE) -> int:
    return budget.states()[period].used


def test_a_minutes_tokens_at_once_then_evenly(clock: FakeClock) -> None:
    budget = Budget(600, 0, clock)
    budget.reserve(600)

    shortage = budget.shortage(20)

    assert shortage is not None
    assert shortage.delay == pytest.approx(2.0)
    clock.now += 2.0
    assert budget.shortage(20) is None
    assert budget.shortage(21) is not None


def test_neither_budget_is_charged_where_one_is_short(clock: FakeClock) -> None:
    budget = Budget(1000, 1000, clock, lambda: LATE)
    budget.reserve(900).settle(900)
    clock.now += MINUTE

    shortage = budget.shortage(200)

    assert shortage is not None
    assert shortage.period == PER_DAY
    states = budget.states()
    assert states[PER_MINUTE].remaining == 1000
    assert states[PER_DAY].remaining == 100


def test_the_budget_into_which_it_fits_last_is_named(clock: FakeClock) -> None:
    budget = Budget(1000, 1000, clock, lambda: LATE)
    budget.reserve(1000)

    shortage = budget.shortage(1000)

    assert shortage is not None
    assert shortage.period == PER_MINUTE
    assert shortage.delay == pytest.approx(MINUTE)


def test_an_estimate_above_a_whole_budget_starts_once_nothing_is_used(clock: FakeClock) -> None:
    budget = Budget(100, 0, clock)
    small = budget.reserve(1)
    assert budget.shortage(5000) is not None

    small.release()

    assert budget.shortage(5000) is None
    large = budget.reserve(5000)
    assert budget.states()[PER_MINUTE].remaining == 0
    large.release()
    assert budget.states()[PER_MINUTE].remaining == 100
    assert budget.reserved == 0


def test_an_estimate_is_corrected_both_ways_and_once(clock: FakeClock) -> None:
    budget = Budget(1000, 10_000, clock, lambda: LATE)
    for cost in (100, 500):
        reservation = budget.reserve(300)
        reservation.settle(cost)
        reservation.settle(999)
        reservation.release()

    assert used(budget) == used(budget, PER_DAY) == 600
    assert budget.reserved == 0
    assert budget.states()[PER_MINUTE].reserved == budget.states()[PER_DAY].reserved == 0


def test_what_cost_more_than_the_budget_has_to_drain_first(clock: FakeClock) -> None:
    budget = Budget(600, 0, clock)
    budget.reserve(10).settle(1200)

    shortage = budget.shortage(600)

    assert shortage is not None
    assert shortage.delay == pytest.approx(120.0)


def test_what_has_drained_is_not_given_back(clock: FakeClock) -> None:
    budget = Budget(1000, 0, clock)
    long = budget.reserve(1000)
    clock.now += 30
    budget.reserve(500)

    long.release()

    assert budget.shortage(500) is None
    assert budget.shortage(501) is not None


def test_what_others_have_given_back_is_not_given_back_again(clock: FakeClock) -> None:
    budget = Budget(1000, 0, clock)
    first, second = budget.reserve(500), budget.reserve(500)
    first.release()
    clock.now += 30
    budget.reserve(500)

    second.release()

    # What the second has reserved has drained; the third has all that it has reserved.
    assert budget.shortage(501) is not None


def test_a_day_ends_at_midnight_utc(clock: FakeClock) -> None:
    now = LATE
    budget = Budget(0, 1000, clock, lambda: now)
    running = budget.reserve(1000)

    shortage = budget.shortage(1)
    assert shortage is not None
    assert shortage.delay == pytest.approx(1.0)
    now += 1.0
    assert budget.shortage(1000) is None
    budget.reserve(400)
    running.settle(5000)

    state = budget.states()[PER_DAY]
    assert (state.used, state.reserved, state.remaining) == (0, 400, 600)
    assert state.reset == pytest.approx(DAY)
    assert budget.reserved == 400


def test_a_clock_that_is_put_back_brings_no_second_budget(clock: FakeClock) -> None:
    now = LATE + 1.0
    budget = Budget(0, 100, clock, lambda: now)
    running = budget.reserve(100)

    for later in (LATE - 2 * DAY, LATE + 1.0):
        now = later
        shortage = budget.shortage(1)
        assert shortage is not None
        assert 0 < shortage.delay <= DAY
    running.settle(10)
    assert budget.shortage(90) is None


@pytest.mark.parametrize("days", [-30, -1, 1, 30])
def test_a_clock_that_comes_back_finds_the_day_as_it_was(clock: FakeClock, days: int) -> None:
    now = LATE
    budget = Budget(0, 100, clock, lambda: now)
    budget.reserve(60).settle(60)

    now += days * DAY
    budget.reserve(100).settle(100)
    running = budget.reserve(7)
    now -= days * DAY

    assert budget.shortage(40) is None
    assert budget.shortage(41) is not None
    running.settle(3)
    state = budget.states()[PER_DAY]
    assert (state.used, state.reserved) == (60, 0)
    assert state.reset == pytest.approx(1.0)
    assert budget.reserved == 0


def test_a_clock_that_was_ahead_at_the_start_ends_no_day(clock: FakeClock) -> None:
    now = LATE + 30 * DAY
    budget = Budget(0, 100, clock, lambda: now)
    budget.reserve(100).settle(100)

    now = LATE
    assert budget.shortage(1) is not None, "it was used on this day"
    now += 1.0
    assert budget.shortage(100) is None


def test_a_day_begins_with_what_the_ledger_knows(clock: FakeClock) -> None:
    budget = Budget(0, 1000, clock, lambda: LATE)
    budget.begin_day(700)
    budget.begin_day(600)

    assert budget.shortage(300) is None
    assert budget.shortage(301) is not None


def test_new_limits_keep_what_is_used_and_reserved(clock: FakeClock) -> None:
    budget = Budget(1000, 2000, clock, lambda: LATE)
    budget.reserve(300).settle(300)
    running = budget.reserve(200)

    budget.apply(600, 600)

    states = budget.states()
    assert [states[period].remaining for period in (PER_MINUTE, PER_DAY)] == [100, 100]
    running.settle(0)
    assert [budget.states()[period].used for period in (PER_MINUTE, PER_DAY)] == [300, 300]
    budget.apply(0, 0)
    assert not budget.limited
    assert budget.shortage(10**9) is None


def test_a_reservation_outlives_its_limit(clock: FakeClock) -> None:
    budget = Budget(1000, 0, clock)
    running = budget.reserve(500)
    budget.apply(0, 0)
    budget.apply(1000, 0)

    running.settle(800)

    assert budget.reserved == 0
    assert budget.states()[PER_MINUTE].remaining == 1000


@pytest.mark.parametrize("seed", range(20))
def test_what_is_admitted_fits_every_window(clock: FakeClock, seed: int) -> None:
    """With exact estimates: requests that end when they like, some of them with nothing."""
    rng = random.Random(seed)
    limit, day = rng.choice((60, 1000, 100_000)), 3 * 10**6
    budget = Budget(limit, day, clock, lambda: LATE - DAY / 2 + clock.now)
    running: list[tuple[int, float, Reservation]] = []
    # When, and how many tokens, of each request that has cost any.
    spent: list[tuple[float, int]] = []
    for _ in range(400):
        clock.now += rng.choice((0.0, 0.01, 1.0, 7.0))
        tokens = rng.randrange(1, limit + 1)
        if (shortage := budget.shortage(tokens)) is None:
            running.append((tokens, clock.now, budget.reserve(tokens)))
        elif rng.random() < 0.2:
            clock.now += shortage.delay
            assert budget.shortage(tokens) is None, "a request that comes then finds room"
        while running and rng.random() < 0.5:
            tokens, began, reservation = running.pop(rng.randrange(len(running)))
            if rng.random() < 0.5:
                reservation.release()
            else:
                reservation.settle(tokens)
                spent.append((began, tokens))
        assert budget.reserved == sum(tokens for tokens, _, _ in running)
    spent += [(began, tokens) for tokens, began, _ in running]
    spent.sort()
    for first in range(len(spent)):
        total = 0
        for began, tokens in spent[first:]:
            total += tokens
            assert total <= limit * (1 + (began - spent[first][0]) / MINUTE) + 1e-3, seed
    for _, _, reservation in running:
        reservation.release()
    assert budget.reserved == 0
