"""The breaker: when it opens, for how long, and one trial at a time."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from aioserver.providers.breaker import (
    CLOSED,
    CONSECUTIVE_FAILURES,
    FIRST_WAIT,
    LONGEST_WAIT,
    MIN_ATTEMPTS,
    OPEN,
    TRIAL,
    Breaker,
)

if TYPE_CHECKING:
    from tests.support.clock import FakeClock


def ask(breaker: Breaker, *, failed: bool | None) -> None:
    assert breaker.allows
    breaker.attempt_ended(trial=breaker.enter(), failed=failed)


def opened(clock: FakeClock) -> Breaker:
    breaker = Breaker(clock)
    for _ in range(CONSECUTIVE_FAILURES):
        ask(breaker, failed=True)
    return breaker


def test_failures_in_a_row_open_it(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    for _ in range(CONSECUTIVE_FAILURES - 1):
        ask(breaker, failed=True)
    ask(breaker, failed=False)
    for _ in range(CONSECUTIVE_FAILURES - 1):
        ask(breaker, failed=True)
    assert breaker.state == CLOSED

    ask(breaker, failed=True)

    assert (breaker.state, breaker.allows, breaker.wait) == (OPEN, False, FIRST_WAIT)


def test_half_of_many_open_it(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    for number in range(MIN_ATTEMPTS):
        assert breaker.state == CLOSED
        ask(breaker, failed=number % 2 == 0)
    assert breaker.state == OPEN


def test_old_failures_are_forgotten(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    for number in range(10 * MIN_ATTEMPTS):
        ask(breaker, failed=number % 2 == 0)
        clock.now += 3.0  # ten in thirty seconds
    assert breaker.state == CLOSED


def test_attempts_that_prove_nothing_change_nothing(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    for _ in range(CONSECUTIVE_FAILURES - 1):
        ask(breaker, failed=True)
    for _ in range(100):
        ask(breaker, failed=None)
    assert breaker.state == CLOSED
    ask(breaker, failed=True)
    assert breaker.state == OPEN


def test_one_trial_at_a_time_and_an_answer_closes_it(clock: FakeClock) -> None:
    breaker = opened(clock)
    clock.now += FIRST_WAIT

    assert (breaker.state, breaker.allows) == (TRIAL, True)
    trial = breaker.enter()
    assert trial
    assert not breaker.allows
    breaker.attempt_ended(trial=trial, failed=False)

    assert (breaker.state, breaker.allows, breaker.wait) == (CLOSED, True, 0.0)


def test_the_first_event_of_a_trial_closes_it(clock: FakeClock) -> None:
    breaker = opened(clock)
    clock.now += FIRST_WAIT
    trial = breaker.enter()

    breaker.attempt_answered(trial=trial)

    assert breaker.allows
    breaker.attempt_ended(trial=trial, failed=True)  # it broke off later: one failure
    assert breaker.state == CLOSED


def test_a_failed_trial_opens_it_for_twice_as_long(clock: FakeClock) -> None:
    breaker = opened(clock)
    waits = []
    for _ in range(6):
        waits.append(breaker.wait)
        clock.now += breaker.wait
        ask(breaker, failed=True)
    assert waits == [5.0, 10.0, 20.0, 40.0, LONGEST_WAIT, LONGEST_WAIT]


def test_a_trial_that_says_nothing_lets_another_try(clock: FakeClock) -> None:
    breaker = opened(clock)
    clock.now += FIRST_WAIT
    ask(breaker, failed=None)  # its client left, or it was told 429
    assert (breaker.state, breaker.allows) == (TRIAL, True)
    ask(breaker, failed=False)
    assert breaker.state == CLOSED


def test_attempts_from_before_it_opened_neither_close_nor_prolong_it(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    running = [breaker.enter() for _ in range(3)]
    for _ in range(CONSECUTIVE_FAILURES):
        ask(breaker, failed=True)
    clock.now += 1.0
    for trial, failed in zip(running, (True, False, None), strict=True):
        breaker.attempt_ended(trial=trial, failed=failed)
    assert (breaker.state, breaker.wait) == (OPEN, FIRST_WAIT - 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_never_more_than_one_passes_while_it_is_not_closed(seed: int, clock: FakeClock) -> None:
    dice, breaker = random.Random(seed), Breaker(clock)
    running: list[bool] = []
    for _ in range(500):
        clock.now += dice.choice((0, 0, 0.5, 6.0))
        if dice.random() < 0.5 and breaker.allows:
            running.append(breaker.enter())
        elif running:
            trial = running.pop(dice.randrange(len(running)))
            if dice.random() < 0.3:
                breaker.attempt_answered(trial=trial)
            breaker.attempt_ended(trial=trial, failed=dice.choice((True, True, False, None)))
        if breaker.state != CLOSED:
            assert sum(running) <= 1 or breaker.state == CLOSED
    for trial in running:
        breaker.attempt_ended(trial=trial, failed=None)
    clock.now += LONGEST_WAIT
    assert breaker.allows
