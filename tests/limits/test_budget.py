"""The budgets of a key: what is reserved fits each of them, and is given back once."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from aioserver.limits.budget import (
    DAY,
    MINUTE,
    PER_DAY,
    PER_MINUTE,
    PER_MONTH,
    PER_WEEK,
    PERIODS,
    WEEK,
    Budget,
    Period,
)

if TYPE_CHECKING:
    from aioserver.limits.budget import Reservation
    from tests.support.clock import FakeClock

# A second before a day ends.
LATE = datetime(2026, 11, 28, 23, 59, 59, tzinfo=UTC).timestamp()


DAYS, WEEKS, MONTHS = PERIODS


def at(text: str) -> float:
    return datetime.fromisoformat(f"{text}+00:00").timestamp()


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
    budget.begin({PER_DAY: 700})
    budget.begin({PER_DAY: 600})

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


# A moment, when its period began, and when the next one begins.
TURNS = [
    (DAYS, "2026-12-31T23:59:59", "2026-12-31", "2027-01-01"),
    (DAYS, "1970-01-01T00:00:00", "1970-01-01", "1970-01-02"),
    (WEEKS, "2026-12-06T23:59:59", "2026-11-30", "2026-12-07"),
    (WEEKS, "2026-12-07T00:00:00", "2026-12-07", "2026-12-14"),
    (WEEKS, "2027-01-01T12:00:00", "2026-12-28", "2027-01-04"),
    (WEEKS, "2024-02-29T12:00:00", "2024-02-26", "2024-03-04"),
    (WEEKS, "1970-01-02T12:00:00", "1969-12-29", "1970-01-05"),
    (MONTHS, "2024-02-29T23:59:59", "2024-02-01", "2024-03-01"),
    (MONTHS, "2026-02-28T23:59:59", "2026-02-01", "2026-03-01"),
    (MONTHS, "2000-02-29T00:00:00", "2000-02-01", "2000-03-01"),
    (MONTHS, "2026-12-31T23:59:59", "2026-12-01", "2027-01-01"),
    (MONTHS, "2027-01-01T00:00:00", "2027-01-01", "2027-02-01"),
    (MONTHS, "1970-01-01T00:00:00", "1970-01-01", "1970-02-01"),
]


@pytest.mark.parametrize(("period", "moment", "began", "ends"), TURNS, ids=range(len(TURNS)))
def test_a_period_is_that_of_the_calendar(
    period: Period, moment: str, began: str, ends: str
) -> None:
    number = period.number_of(at(moment))

    assert period.begins(number) == period.since(at(moment)) == at(began)
    assert period.begins(number + 1) == at(ends)
    assert period.number_of(at(ends)) == number + 1
    assert period.number_of(at(ends) - 0.001) == number


@pytest.mark.parametrize(("period", "moment", "began", "ends"), TURNS, ids=range(len(TURNS)))
def test_a_period_that_is_spent_says_when_the_next_one_begins(
    period: Period, moment: str, began: str, ends: str
) -> None:
    now = at(moment)
    budget = Budget(wall_clock=lambda: now)
    budget.apply(0, *(1000 if each is period else 0 for each in PERIODS))
    running = budget.reserve(1000)

    shortage = budget.shortage(1)
    assert shortage is not None
    assert shortage[:4] == (period.setting, 1000, 1000, 1)
    now += shortage.delay - 0.001
    assert budget.shortage(1) is not None
    now += 0.001
    assert now == pytest.approx(at(ends))
    assert budget.shortage(1000) is None
    budget.reserve(400)
    # What was reserved in the former period is given back there.
    running.settle(0)
    state = budget.states()[period.setting]
    assert (state.used, state.reserved, state.remaining) == (0, 400, 600)
    now = at(began)
    assert budget.states()[period.setting].remaining == 1000


def test_a_start_needs_room_in_each_period_and_the_one_that_ends_last_is_named(
    clock: FakeClock,
) -> None:
    now = at("2026-11-28T12:00")
    limits = {"per_week": 200, "per_month": 300}
    budget = Budget(0, 100, clock, lambda: now, **limits)

    def named() -> tuple[str, float] | None:
        shortage = budget.shortage(50)
        return None if shortage is None else (shortage.period, now + shortage.delay)

    assert named() is None
    budget.reserve(100).settle(100)
    assert named() == (PER_DAY, at("2026-11-29"))
    now += DAY
    assert named() is None
    budget.reserve(100).settle(100)
    # The week has 200 of 200, and ends in the same moment as the day: the shorter one is named.
    assert named() == (PER_DAY, at("2026-11-30"))
    now += DAY
    assert named() is None
    budget.reserve(100).settle(100)
    assert named() == (PER_DAY, at("2026-12-01"))
    budget.begin({PER_WEEK: 151})
    assert named() == (PER_WEEK, at("2026-12-07"))
    now += DAY
    assert named() == (PER_WEEK, at("2026-12-07"))
    assert budget.states()[PER_MONTH].remaining == 300, "a month has begun"
    assert not budget.states()[PER_DAY].used


def test_a_month_goes_on_when_days_and_weeks_have_turned(clock: FakeClock) -> None:
    now = at("2024-02-01T12:00")
    budget = Budget(0, 100, clock, lambda: now, per_week=300, per_month=1000)
    spent = 0
    while now < at("2024-03-01"):
        if budget.shortage(60) is None:
            budget.reserve(60).settle(60)
            spent += 60
        now += DAY / 4

    # Five weeks have a day of February 2024, and none takes more than five times 60.
    assert 900 < spent <= 1000
    assert budget.shortage(60) is None, "it is March"


def test_a_restart_goes_on_with_every_period(clock: FakeClock) -> None:
    now = at("2026-12-02T12:00")
    old = Budget(0, 1000, clock, lambda: now, per_month=3000)
    old.reserve(700).settle(700)
    new = Budget(0, 1000, clock, lambda: now, per_week=2000, per_month=3000)
    new.reserve(10)

    new.begin({PER_DAY: 700, PER_WEEK: 900, PER_MONTH: 700})

    assert [state.remaining for state in new.states().values()] == [300, 1100, 2300]
    new.take_over(old)
    assert {name: state.remaining for name, state in new.states().items()} == {
        PER_DAY: 300,
        PER_WEEK: 2000,
        PER_MONTH: 2300,
    }


@pytest.mark.parametrize("period", PERIODS, ids=lambda period: period.setting)
@pytest.mark.parametrize("back", [DAY, WEEK, 31 * DAY])
def test_a_clock_that_was_ahead_for_a_moment_takes_nothing_from_any_period(
    clock: FakeClock, period: Period, back: int
) -> None:
    now = at("2026-12-31T23:59:30")
    budget = Budget(0, 100, clock, lambda: now, per_week=100, per_month=100)
    budget.reserve(60).settle(60)

    now += back
    budget.shortage(1)
    now -= back

    assert budget.states()[period.setting].used == 60


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
