"""The breaker: who is sick, who is dead, and how trials find out that it is over."""

from __future__ import annotations

import random
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING

import pytest

from aioserver.providers.breaker import (
    DEAD,
    FEW,
    FLAPPING,
    LONG_PATIENCE,
    LONGEST_INTERVAL,
    MANY,
    MAX_TRIALS,
    MIN_ATTEMPTS,
    MOST_NEEDED,
    NEEDED,
    PATIENCE,
    SICK,
    SICK_INTERVAL,
    TRIAL_INTERVAL,
    TURN,
    WELL,
    WINDOW,
    Breaker,
    Trials,
)
from tests.support.failing import kill, sicken

if TYPE_CHECKING:
    from tests.support.clock import FakeClock


def fail(breaker: Breaker, clock: FakeClock, count: int, every: float) -> None:
    """Let *count* attempts fail at once, one each *every* seconds; the first fails now."""
    for number in range(count):
        if number:
            clock.now += every
        trial = breaker.start()
        breaker.failed(clock.now, trial=trial)


# Dead.


def test_many_failures_without_a_success_are_death(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    fail(breaker, clock, MANY, PATIENCE / (MANY - 1) * 0.99)
    assert not breaker.dead, "all failed, but in less than the time"

    clock.now += 0.1
    fail(breaker, clock, 1, 0)

    assert (breaker.state, breaker.delay()) == (DEAD, TRIAL_INTERVAL)


def test_a_few_failures_are_death_after_a_longer_time(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    fail(breaker, clock, FEW, LONG_PATIENCE / FEW)
    assert not breaker.dead

    clock.now += LONG_PATIENCE / FEW
    fail(breaker, clock, 1, 0)

    assert breaker.dead


def test_failures_that_are_more_than_trials_would_be_are_no_death_yet(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    fail(breaker, clock, MANY - 1, LONG_PATIENCE / (MANY - 2))
    assert not breaker.dead
    fail(breaker, clock, 1, 0)
    assert breaker.dead


def test_one_success_begins_the_count_anew(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    for _ in range(10):
        fail(breaker, clock, MANY - 1, 1.0)
        breaker.succeeded(0.1, trial=False)
    assert not breaker.dead


def test_a_failure_counts_from_the_beginning_of_its_attempt(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    breaker.succeeded(0.1, trial=False)
    clock.now += 1.0
    began = clock.now
    clock.now += LONG_PATIENCE
    for _ in range(FEW - 1):
        breaker.failed(began, trial=False)
    assert not breaker.dead

    assert breaker.failed(began, trial=False), "they all said nothing for as long as that"


def test_a_rest_before_the_first_failure_is_no_silence(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    breaker.succeeded(0.1, trial=False)
    clock.now += 3600.0
    fail(breaker, clock, MANY, 0)
    assert not breaker.dead


def test_a_provider_that_is_slow_has_longer(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    for _ in range(9):
        breaker.succeeded(20.0, trial=False)
    fail(breaker, clock, 36, 1.1)
    assert not breaker.dead, (
        "an answer takes twenty seconds, and those who asked may still get one"
    )

    clock.now += 2.0
    fail(breaker, clock, 1, 0)

    assert breaker.dead


def test_attempts_that_prove_nothing_change_nothing(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    fail(breaker, clock, FEW - 1, 5.0)
    for _ in range(100):
        breaker.unsure(trial=breaker.start())
    assert not breaker.dead
    fail(breaker, clock, 1, 0)
    assert breaker.dead


# Trials.


def test_trials_come_one_each_half_second_and_three_at_once(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    kill(breaker, clock=clock)
    started = []
    for _ in range(100):
        clock.now += TRIAL_INTERVAL / 10
        if breaker.delay() <= 0:
            assert breaker.start()
            started.append(clock.now)

    assert len(started) == MAX_TRIALS
    assert min(b - a for a, b in pairwise(started)) >= TRIAL_INTERVAL - 1e-9
    assert (breaker.delay(), breaker.next_trial()) == (inf, 0.0)
    breaker.failed(clock.now, trial=True)
    assert breaker.delay() == 0.0


def test_the_first_success_ends_it_and_empties_the_counts(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    sicken(breaker, clock)
    kill(breaker, clock=clock)
    clock.now += TRIAL_INTERVAL
    assert breaker.start()

    assert breaker.succeeded(0.1, trial=True)

    assert (breaker.state, breaker.delay()) == (WELL, 0.0)
    assert breaker.failed(clock.now, trial=False, answered=True) is False, "it broke off later"
    assert not breaker.start()


def test_an_attempt_from_before_its_death_ends_it_too(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    assert not breaker.start()
    kill(breaker, clock=clock)
    assert breaker.succeeded(30.0, trial=False)
    assert breaker.state == WELL


def test_where_there_is_another_provider_trials_are_rare(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    kill(breaker, clock=clock)
    intervals = []
    for _ in range(8):
        intervals.append(delay := breaker.delay(alternative=True))
        clock.now += delay
        assert breaker.start()
        assert breaker.delay(alternative=True) == inf, "one at a time"
        breaker.failed(clock.now, trial=True)
    assert intervals == [0.5, 1.0, 2.0, 4.0, 8.0, *[LONGEST_INTERVAL] * 3]
    assert breaker.delay() == TRIAL_INTERVAL, (
        "a request that has nobody else need not wait as long"
    )


def test_a_trial_that_proves_nothing_lets_another_try(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    kill(breaker, clock=clock)
    for _ in range(10):
        clock.now += TRIAL_INTERVAL
        assert breaker.start()
        breaker.unsure(trial=True)
    assert breaker.dead
    assert breaker.delay() == TRIAL_INTERVAL


def test_failures_from_before_its_death_prolong_nothing(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    kill(breaker, clock=clock)
    clock.now += TRIAL_INTERVAL
    breaker.failed(clock.now - 9.0, trial=False)
    assert (breaker.delay(), breaker.delay(alternative=True)) == (0.0, 0.0)


def test_another_address_is_another_provider(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    kill(breaker, clock=clock)
    clock.now += TRIAL_INTERVAL
    assert breaker.start()

    breaker.reset()

    assert (breaker.state, breaker.delay()) == (WELL, 0.0)
    breaker.unsure(trial=True)
    kill(breaker, clock=clock)
    clock.now += TRIAL_INTERVAL
    assert [breaker.start() for _ in range(MAX_TRIALS)] == [True] * MAX_TRIALS
    assert breaker.delay() == inf


# Sick.


def test_more_than_half_of_many_is_sick(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    for number in range(10 * MIN_ATTEMPTS):
        if number % 2:
            breaker.failed(clock.now, trial=False)
        else:
            breaker.succeeded(0.1, trial=False)
    assert breaker.state == WELL, "half is not more than half"

    fail(breaker, clock, MIN_ATTEMPTS, 0.1)
    breaker.succeeded(0.1, trial=False)

    assert (breaker.state, breaker.delay()) == (SICK, 0.0)


@pytest.mark.parametrize("seed", range(10))
def test_the_order_of_attempts_does_not_matter(clock: FakeClock, seed: int) -> None:
    breaker = Breaker(clock)
    good = [False] * (MIN_ATTEMPTS // 2 + 1) + [True] * (MIN_ATTEMPTS // 2 - 1)
    random.Random(seed).shuffle(good)
    for succeeds in good:
        assert breaker.state == WELL, "there are too few"
        if succeeds:
            breaker.succeeded(0.1, trial=False)
        else:
            breaker.failed(clock.now, trial=False)

    assert breaker.state == SICK


def test_failures_that_are_long_past_make_nobody_sick(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    for number in range(10 * MIN_ATTEMPTS):
        clock.now += WINDOW / MIN_ATTEMPTS * 1.1
        if number % 5:
            breaker.failed(clock.now, trial=False)
        else:
            breaker.succeeded(0.1, trial=False)
    assert breaker.state == WELL


def test_fewer_than_a_quarter_of_many_is_well_again(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    sicken(breaker, clock)
    for number in range(10 * MIN_ATTEMPTS):
        clock.now += 10.0  # they are few, and each counts however old it is
        if number % 4:
            breaker.succeeded(0.1, trial=False)
        else:
            breaker.failed(clock.now, trial=False)
    assert breaker.state == SICK, "a quarter is not fewer than a quarter"

    for _ in range(MIN_ATTEMPTS):
        breaker.succeeded(0.1, trial=False)

    assert breaker.state == WELL


def test_answers_that_break_off_are_failures_once(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    for _ in range(MIN_ATTEMPTS):
        breaker.succeeded(0.1, trial=False)
        breaker.failed(clock.now, trial=False, answered=True)
    assert breaker.state == SICK
    for _ in range(3 * MIN_ATTEMPTS):
        clock.now += 1.0
        breaker.succeeded(0.1, trial=False)
    assert breaker.state == WELL


def test_answers_that_break_off_never_make_it_dead(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    began = clock.now
    for _ in range(MANY):
        breaker.succeeded(0.1, trial=False)
    # All places have long answers, so nothing else begins; then the network takes all of them.
    clock.now += 10 * LONG_PATIENCE
    assert not any(breaker.failed(began, trial=False, answered=True) for _ in range(2 * MANY))
    assert breaker.state == SICK
    # Whoever comes next finds out whether it is there.
    clock.now += 2 * PATIENCE
    for _ in range(MANY - 1):
        assert not breaker.failed(clock.now - 2 * PATIENCE, trial=False)
    assert breaker.failed(clock.now, trial=False)


def test_the_first_trial_of_a_sick_provider_comes_after_a_second_and_each_that_fails_doubles_it(
    clock: FakeClock,
) -> None:
    breaker = Breaker(clock)
    sicken(breaker, clock)
    intervals = []

    for _ in range(7):
        assert breaker.trials is not None
        intervals.append(apart := breaker.trials.interval)
        clock.now += 0.99 * apart
        assert not breaker.start_spared()
        clock.now += 0.02 * apart
        assert breaker.start_spared()
        assert not breaker.start_spared(), "one at a time"
        # Somebody who asks for it by name is answered, so that it is not dead.
        breaker.succeeded(0.1, trial=False)
        breaker.failed(clock.now, trial=True)

    assert intervals == [1.0, 2.0, 4.0, 8.0, *[LONGEST_INTERVAL] * 3]


def test_each_twentieth_request_is_a_trial_whatever_the_time_is(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    sicken(breaker, clock)

    turns = [breaker.start_spared(by_time=False) for _ in range(TURN)]
    assert turns == [False] * (TURN - 1) + [True]
    assert not any(breaker.start_spared() for _ in range(TURN)), "one is under way"
    breaker.unsure(trial=True)
    assert breaker.start_spared()

    clock.now += 2 * SICK_INTERVAL
    breaker.unsure(trial=True)
    assert not breaker.start_spared(by_time=False)


def test_after_each_trial_that_succeeds_one_more_is_under_way_at_once(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    sicken(breaker, clock)
    clock.now += SICK_INTERVAL
    assert [breaker.start_spared() for _ in range(3)] == [True, False, False]

    breaker.succeeded(0.1, trial=True)
    assert [breaker.start_spared() for _ in range(3)] == [True, True, False]
    breaker.succeeded(0.1, trial=True)
    assert [breaker.start_spared() for _ in range(3)] == [True, True, False]
    breaker.failed(clock.now, trial=True)
    assert breaker.trials == Trials(2 * SICK_INTERVAL, 0, NEEDED), "one failure begins it anew"
    breaker.succeeded(0.1, trial=True)
    breaker.succeeded(0.1, trial=True)

    assert breaker.state == SICK
    assert breaker.start_spared()
    breaker.succeeded(0.1, trial=True)
    assert breaker.state == WELL
    assert breaker.trials is None
    breaker.failed(clock.now, trial=False)
    assert breaker.state == WELL, "it begins anew"


def test_an_answer_that_breaks_off_begins_the_row_of_good_trials_anew(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    sicken(breaker, clock)
    clock.now += SICK_INTERVAL
    assert breaker.start_spared()
    breaker.succeeded(0.1, trial=True)

    breaker.failed(clock.now, trial=False, answered=True)

    assert breaker.trials == Trials(SICK_INTERVAL, 0, NEEDED)


def test_one_that_falls_sick_again_soon_has_to_succeed_more_often(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    needed = []
    for _ in range(4):
        sicken(breaker, clock)
        assert breaker.trials is not None
        needed.append(breaker.trials.needed)
        clock.now += SICK_INTERVAL
        for _ in range(needed[-1]):
            assert breaker.start_spared()
            breaker.succeeded(0.1, trial=True)
        assert breaker.state == WELL
        clock.now += FLAPPING / 2
    assert needed == [NEEDED, 2 * NEEDED, MOST_NEEDED, MOST_NEEDED]

    clock.now += FLAPPING
    sicken(breaker, clock)
    assert breaker.trials is not None
    assert breaker.trials.needed == NEEDED


def test_a_sick_provider_that_dies_has_other_trials(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    sicken(breaker, clock)
    clock.now += SICK_INTERVAL
    assert breaker.start_spared()

    breaker.told_dead(unreachable=False)
    assert breaker.trials is None
    breaker.failed(clock.now, trial=True)
    clock.now += LONGEST_INTERVAL

    assert breaker.start()
    breaker.succeeded(0.1, trial=True)
    assert breaker.state == WELL


@pytest.mark.parametrize("instances", [1, 4, 40])
def test_instances_divide_the_trials_of_a_sick_provider_while_they_are_frequent(
    clock: FakeClock, instances: int
) -> None:
    breaker = Breaker(clock)
    breaker.instances = instances

    sicken(breaker, clock)

    assert breaker.trials is not None
    assert breaker.trials.interval == min(LONGEST_INTERVAL, instances * SICK_INTERVAL)
    assert not breaker.start_spared()
    clock.now += breaker.trials.interval
    assert breaker.start_spared()


@pytest.mark.parametrize("seed", range(20))
def test_trials_are_bounded_whatever_happens(seed: int, clock: FakeClock) -> None:
    dice, breaker = random.Random(seed), Breaker(clock)
    running: list[bool] = []
    last_trial = -inf
    deaths = 0
    for _ in range(3000):
        clock.now += dice.choice((0, 0, 0.1, 0.7))
        if dice.random() < 0.5 and breaker.delay(alternative=dice.random() < 0.3) <= 0:
            running.append(trial := breaker.start())
            assert trial == breaker.dead
            if trial:
                assert clock.now - last_trial >= TRIAL_INTERVAL
                last_trial = clock.now
        elif running:
            trial = running.pop(dice.randrange(len(running)))
            verdict = dice.random()
            if verdict < 0.01:
                breaker.succeeded(0.1, trial=trial)
            elif verdict < 0.2:
                breaker.unsure(trial=trial)
            else:
                deaths += breaker.failed(clock.now - 1.0, trial=trial)
        assert sum(running) <= MAX_TRIALS
    for trial in running:
        breaker.unsure(trial=trial)
    clock.now += LONGEST_INTERVAL
    assert breaker.delay(alternative=True) == 0.0
    assert deaths > 0


# Several instances, each with a breaker of its own.


def test_a_death_that_is_told_is_news_once_and_ends_by_being_told(clock: FakeClock) -> None:
    breaker = Breaker(clock)

    assert breaker.told_dead(unreachable=True)
    assert not breaker.told_dead(unreachable=False)
    assert (breaker.state, breaker.unreachable, breaker.delay()) == (DEAD, True, TRIAL_INTERVAL)

    assert breaker.told_alive()
    assert not breaker.told_alive()
    assert (breaker.state, breaker.delay()) == (WELL, 0.0)


def test_failures_before_another_instance_was_answered_do_not_count(clock: FakeClock) -> None:
    breaker = Breaker(clock)
    fail(breaker, clock, MANY - 1, PATIENCE / MANY * 1.2)
    breaker.told_alive()

    fail(breaker, clock, 1, 0)

    assert not breaker.dead


@pytest.mark.parametrize("instances", [1, 2, 4, 8])
def test_instances_together_try_as_often_as_one(clock: FakeClock, instances: int) -> None:
    breakers = [Breaker(clock) for _ in range(instances)]
    for breaker in breakers:
        breaker.instances = instances
        breaker.told_dead(unreachable=True)

    trials = under_way = 0
    for _ in range(1000):
        clock.now += TRIAL_INTERVAL / 10
        for breaker in breakers:
            if breaker.delay() == 0:
                trials += breaker.start()
                under_way = sum(each.delay() == inf for each in breakers)
                breaker.failed(clock.now, trial=True)

    assert trials <= 1000 / 10 + instances
    assert trials >= 1000 / 10 * 0.8
    assert under_way <= max(MAX_TRIALS, instances)


@pytest.mark.parametrize("seed", range(20))
def test_forgetting_makes_no_difference(clock: FakeClock, seed: int) -> None:
    rng = random.Random(seed)
    breakers = [Breaker(clock) for _ in range(2)]
    for _ in range(400):
        clock.now += rng.choice((0.01, 0.5, 5.0, 40.0))
        failing, began = rng.random() < rng.choice((0.1, 0.9)), clock.now - rng.random()
        for breaker in breakers:
            if failing:
                breaker.failed(began, trial=False)
            else:
                breaker.succeeded(0.5, trial=False)
        breakers[1].forget()
        states = [(each.state, each.deaths, each.trials is None) for each in breakers]
        assert states[0] == states[1]
