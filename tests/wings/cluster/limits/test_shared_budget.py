"""The tokens of a key over several instances: together they use no more than one would, and not
much less, wherever the requests come.
"""

from __future__ import annotations

from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

import pytest

from aioserver.limits.budget import (
    DAY,
    MINUTE,
    PER_DAY,
    PER_MINUTE,
    PER_MONTH,
    PER_WEEK,
    Budget,
)
from aioserver.wings.cluster.limits.shared_budget import AGAIN, SharedBudget
from tests.support import cluster_simulation
from tests.support.cluster_simulation import Asker, Load, Simulation

if TYPE_CHECKING:
    from aioserver.wings.cluster.limits.shared_budget import SharedReservation

IDLE = Load(rate=0.0)
BUDGET = 60_000
RATE = BUDGET / MINUTE
# The dearest request.
MOST = 3000
# A moment of the wall clock at noon.
NOON = 1_700_000_000 // DAY * DAY + DAY / 2


def at(moment: str) -> float:
    return datetime.fromisoformat(f"{moment}+00:00").timestamp()


class Used:
    """The tokens that all use of one budget: by estimates, less what was not used of them. Those of
    each request drain before those that were granted later; `most` is how full the bucket was.
    """

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.bucket: dict[tuple[float, int], float] = {}
        self.starts, self.most = 0, 0.0
        self.at = simulation.now

    def start(self, reservation: SharedReservation) -> tuple[float, int]:
        self.drain()
        self.starts += 1
        place = reservation.taken.stood, self.starts
        self.bucket[place] = reservation.tokens
        self.most = max(self.most, sum(self.bucket.values()))
        return place

    def end(self, place: tuple[float, int], unused: int) -> None:
        self.drain()
        if place in self.bucket:
            self.bucket[place] -= min(self.bucket[place], unused)

    def drain(self) -> None:
        out, self.at = (self.simulation.now - self.at) * RATE, self.simulation.now
        while out > 0 and self.bucket:
            first = min(self.bucket)
            gone = min(out, self.bucket[first])
            out -= gone
            self.bucket[first] -= gone
            if not self.bucket[first]:
                del self.bucket[first]


class Spender(Asker):
    """Requests of one key at an instance, *load* a second; they wait for nothing but tokens, and
    each costs *error* times what it is estimated to, at most.
    """

    def __init__(
        self,
        simulation: Simulation,
        load: float,
        *,
        error: float = 1.0,
        per_minute: int = BUDGET,
        per_day: int = 0,
        per_week: int = 0,
        per_month: int = 0,
        tokens: tuple[int, int] = (100, MOST),
    ) -> None:
        super().__init__(simulation, simulation.add(IDLE))
        self.load, self.error, self.tokens = load, error, tokens
        self.waiting: list[int] = []
        self.patience = 600.0
        self.asked: list[SharedReservation] = []
        # When something was started, its estimate, and what it has cost in the end.
        self.started: list[tuple[float, int, int]] = []
        self.used: Used | None = None
        self.budget: SharedBudget | None = None
        self.budget = SharedBudget(
            self.instance.leases,
            "web",
            per_minute,
            per_day,
            lambda: simulation.now,
            lambda: simulation.now,
            per_week=per_week,
            per_month=per_month,
            head=lambda: (self.waiting[0] if self.waiting else 0, self.patience),
            on_tokens=self.serve,
        )
        if load:
            self.arrive()

    def arrive(self) -> None:
        wait = self.simulation.chance.expovariate(self.load)
        self.simulation.later(wait, self.arrive, self.instance)
        if len(self.waiting) < 100:
            self.ask(self.simulation.chance.randrange(*self.tokens))

    def ask(self, tokens: int) -> None:
        self.waiting.append(tokens)
        self.serve()

    def serve(self) -> None:
        while self.budget is not None and self.waiting:
            self.instance.leases.check()
            if (shortage := self.budget.shortage(self.waiting[0])) is not None:
                self.look_again(max(0.001, shortage.delay))
                return
            tokens = self.waiting.pop(0)
            reservation = self.budget.reserve(tokens)
            cost = round(tokens * self.simulation.chance.uniform(min(1.0, self.error), self.error))
            self.started.append((self.simulation.now, tokens, cost))
            seconds = self.simulation.chance.uniform(0.1, 20.0)
            place = self.used.start(reservation) if self.used is not None else (0.0, 0)
            end = partial(self.end, reservation, cost, place)
            self.simulation.later(seconds, end, self.instance)

    def end(self, reservation: SharedReservation, cost: int, place: tuple[float, int]) -> None:
        reservation.settle(cost)
        if self.used is not None:
            self.used.end(place, max(0, reservation.tokens - cost))
        self.serve()


def spending(
    seed: int,
    *loads: float,
    delay: float = 0.0005,
    error: float = 1.0,
    per_day: int = 0,
    per_week: int = 0,
    per_month: int = 0,
    now: float = NOON,
) -> tuple[Simulation, list[Spender]]:
    simulation = Simulation(seed, delay=delay, now=now)
    per_minute = 0 if per_day or per_week or per_month else BUDGET
    spenders = [
        Spender(
            simulation,
            load,
            error=error,
            per_minute=per_minute,
            per_day=per_day,
            per_week=per_week,
            per_month=per_month,
        )
        for load in loads
    ]
    return simulation, spenders


def excess(started: list[tuple[float, int, int]]) -> float:
    """By how many tokens the worst span exceeds what a bucket allows."""
    taken = [(moment, tokens) for moment, tokens, _cost in sorted(started)]
    return cluster_simulation.excess(taken, RATE) - BUDGET


def started_by(spenders: list[Spender]) -> list[tuple[float, int, int]]:
    return sorted(start for each in spenders for start in each.started)


@pytest.mark.parametrize("loads", [(1.0, 1.0, 1.0), (3.0, 0.0, 0.0), (3.0, 0.2, 0.02)])
@pytest.mark.parametrize("delay", [0.0005, 0.03])
def test_all_instances_together_use_what_one_would(loads: tuple[float, ...], delay: float) -> None:
    simulation, spenders = spending(1, *loads, delay=delay)
    simulation.advance(90.0)
    calls = simulation.calls
    for each in spenders:
        each.started.clear()

    simulation.advance(150.0)

    started = started_by(spenders)
    total = sum(tokens for _, tokens, _ in started)
    print(f"{total / (150 * RATE):.3f} of the budget, {excess(started):.0f} beyond a full one")
    assert total >= 0.9 * 150 * RATE
    assert excess(started) <= RATE * 4 * simulation.delay
    assert simulation.calls - calls < 150 * 10 * len(loads)


@pytest.mark.parametrize("error", [0.0, 2.0])
def test_what_was_estimated_too_high_is_used_and_what_was_too_low_is_paid(error: float) -> None:
    simulation, spenders = spending(2, 3.0, 0.5, 3.0, error=error)
    simulation.advance(120.0)
    for each in spenders:
        each.started.clear()

    simulation.advance(300.0)

    started = started_by(spenders)
    estimated, cost = (sum(start[column] for start in started) for column in (1, 2))
    print(
        f"{estimated / (300 * RATE):.3f} estimated, {cost / (300 * RATE):.3f} of the budget used"
    )
    # What has drained before its request has ended is nobody's any more, as with one server.
    one = one_server(2, error)
    assert 0.85 * one <= cost <= 1.05 * max(one, 300 * RATE)


def one_server(seed: int, error: float) -> float:
    """What a single server, without others, lets requests cost in 300 s."""
    simulation = Simulation(seed, now=NOON)
    spender = Spender(simulation, 0.0, error=error)
    plain = Budget(BUDGET, 0, lambda: simulation.now, lambda: simulation.now)
    cost, chance = 0, simulation.chance

    def serve() -> None:
        nonlocal cost
        tokens = chance.randrange(100, MOST)
        if plain.shortage(tokens) is None:
            spent = round(tokens * chance.uniform(min(1.0, error), error))
            cost += spent
            simulation.later(
                chance.uniform(0.1, 20.0), partial(plain.reserve(tokens).settle, spent)
            )
        simulation.later(0.05, serve)

    serve()
    simulation.advance(120.0)
    assert not spender.started
    cost = 0
    simulation.advance(300.0)
    return cost


@pytest.mark.parametrize("loads", [(1.0, 1.0, 1.0), (3.0, 0.05, 0.01)])
def test_nearly_all_of_a_day_can_be_used_wherever_it_is_wanted(loads: tuple[float, ...]) -> None:
    limit = 300_000
    simulation, spenders = spending(3, *loads, per_day=limit, error=0.5)

    simulation.advance(1200.0)

    total = sum(cost for _, _, cost in started_by(spenders))
    print(f"{total / limit:.3f} of the day")
    assert 0.9 * limit <= total <= limit
    for each in spenders:
        assert each.budget is not None
        state = each.budget.states()[PER_DAY]
        assert state.limit == limit


def test_a_large_request_is_not_overtaken_for_ever_by_small_ones_elsewhere() -> None:
    simulation, (busy, _other) = spending(4, 0.0, 0.0)
    busy.load, busy.tokens = 50.0, (100, 200)
    large = Spender(simulation, 0.0)
    busy.arrive()
    simulation.advance(90.0)

    large.ask(BUDGET * 3 // 4)
    simulation.advance(MINUTE + 5)

    assert large.started
    assert excess(started_by([busy, large])) <= RATE * 4 * simulation.delay


def test_a_request_of_a_whole_budget_waits_until_nobody_has_any_of_it_in_hand() -> None:
    simulation, others = spending(16, 0.5, 0.5)
    for each in others:
        each.tokens = (1, 20)
    large = Spender(simulation, 0.0)
    simulation.advance(90.0)
    used = Used(simulation)
    for each in (large, *others):
        each.used = used
    asked = simulation.now

    large.ask(BUDGET)
    while not large.started:
        simulation.advance(0.01)
    assert simulation.now < asked + 10.0
    for each in others:
        each.ask(2000)
    simulation.advance(5.0)

    print(f"{used.most - BUDGET:.0f} beyond the budget")
    assert used.most <= BUDGET + RATE * 4 * simulation.delay


@pytest.mark.parametrize("error", [0.0, 0.5])
def test_what_is_given_back_or_in_hand_while_others_wait_is_used_once(error: float) -> None:
    simulation, spenders = spending(17, 0.5, 0.5, 0.5, error=error)
    used = Used(simulation)
    for each in spenders:
        each.tokens, each.used = (100, BUDGET), used

    simulation.advance(300.0)

    total = sum(tokens for _, tokens, _ in started_by(spenders))
    print(f"{used.most - BUDGET:.0f} beyond the budget, {total / (300 * RATE):.2f} estimated")
    assert total > 300 * RATE
    assert used.most <= BUDGET + RATE * 4 * simulation.delay


@pytest.mark.parametrize("kept", [False, True])
def test_what_has_drained_is_nobodys_any_more(kept: bool) -> None:
    simulation, (one, other) = spending(19, 0.0, 0.0)
    simulation.advance(10.0)
    used = one.used = other.used = Used(simulation)
    one.ask(100)
    simulation.advance(1.9)
    assert one.budget is not None
    # Of what is in hand, while nothing is used.
    first, then = one.budget.reserve(1000), one.budget.reserve(1000)
    places = used.start(first), used.start(then)
    if kept:
        first.settle(0)
        used.end(places[0], 1000)
    simulation.advance(2.5)
    other.ask(BUDGET - 10_000)
    simulation.advance(0.1)
    if not kept:
        first.settle(0)
        used.end(places[0], 1000)
    then.settle(0)
    used.end(places[1], 1000)

    for _ in range(100):
        other.ask(500)
    simulation.advance(5.0)

    print(f"{used.most - BUDGET:.0f} beyond the budget")
    assert used.most > BUDGET - 1000
    assert used.most <= BUDGET + RATE * 4 * simulation.delay


def test_what_was_given_and_drains_unused_is_used_no_more() -> None:
    simulation, (one, _other) = spending(20, 0.0, 0.0)
    simulation.advance(10.0)
    now = lambda: simulation.now  # noqa: E731 - a clock
    waiting = [BUDGET]
    budget = SharedBudget(
        one.instance.leases, "late", BUDGET, 0, now, now, head=lambda: (sum(waiting), 0.2)
    )
    simulation.advance(0.005)
    assert budget.shortage(BUDGET) is None

    waiting.clear()
    simulation.advance(0.05)

    assert budget.shortage(BUDGET) is not None


@pytest.mark.parametrize(
    ("end", "before", "within"),
    # It says so; its lease is over; its turn has come.
    [("leaves", 10.0, 3.0), ("is killed", 10.0, 11.0), ("is stopped", 57.0, 6.0)],
)
def test_who_waited_first_and_is_gone_is_in_nobodys_way(
    end: str, before: float, within: float
) -> None:
    simulation, (first, other) = spending(18, 0.0, 0.0)
    simulation.advance(10.0)
    other.ask(BUDGET)
    simulation.advance(before)
    first.ask(BUDGET)
    simulation.advance(0.1)
    other.ask(100)
    simulation.advance(0.1)
    assert not first.started
    assert len(other.started) == 1

    if end == "leaves":
        first.waiting.clear()
    elif end == "is killed":
        first.instance.kill()
    else:
        first.instance.stop()
    simulation.advance(within)

    assert len(other.started) == 2


def test_an_instance_that_starts_many_requests_asks_once_for_several_of_them() -> None:
    simulation, (busy, _other) = spending(5, 0.0, 0.0)
    busy.load, busy.tokens = 200.0, (1, 2)
    busy.arrive()
    simulation.advance(10.0)
    questions, started = simulation.questions, len(busy.started)

    simulation.advance(20.0)

    started = len(busy.started) - started
    print(f"{(simulation.questions - questions) / started:.2f} questions a start")
    assert started > 3000
    assert simulation.questions - questions < started / 4


@pytest.mark.parametrize("per_day", [0, 300_000])
def test_what_a_killed_instance_had_counts_as_used_and_the_rest_is_for_the_others(
    per_day: int,
) -> None:
    simulation, spenders = spending(6, 2.0, 2.0, 2.0, per_day=per_day)
    simulation.advance(20.0)
    spenders[0].instance.kill()

    simulation.advance(300.0)

    started = started_by(spenders)
    if per_day:
        total = sum(cost for _, _, cost in started)
        assert 0.9 * per_day <= total <= per_day
    else:
        late = [start for start in started if start[0] > NOON + 90]
        assert sum(tokens for _, tokens, _ in late) >= 0.9 * RATE * (320 - 90)
        assert excess(started) <= RATE * 4 * simulation.delay


@pytest.mark.parametrize("fault", ["away", "emptied", "put back", "killed"])
@pytest.mark.parametrize("per_day", [0, 300_000])
def test_a_server_that_is_away_or_forgets_gives_nothing_twice(fault: str, per_day: int) -> None:
    simulation, spenders = spending(7, 2.0, 0.2, 2.0, per_day=per_day)
    simulation.advance(10.0)
    simulation.keep()
    simulation.advance(20.0)
    if fault == "away":
        simulation.pause()
        simulation.advance(20.0)
        simulation.go_on()
    elif fault == "emptied":
        simulation.empty()
    elif fault == "killed":
        simulation.kill_server()
        simulation.advance(20.0)
        simulation.start_server()
    else:
        simulation.roll_back()

    simulation.advance(300.0)

    started = started_by(spenders)
    if per_day:
        total = sum(cost for _, _, cost in started)
        print(f"{total / per_day:.3f} of the day")
        assert 0.9 * per_day <= total <= per_day
    else:
        late = sum(tokens for moment, tokens, _ in started if moment > NOON + 150)
        print(f"{late / (RATE * 170):.3f} afterwards, {excess(started):.0f} beyond a full one")
        assert late >= 0.9 * RATE * 170
        assert excess(started) <= RATE * 4 * simulation.delay


@pytest.mark.parametrize("per_day", [0, 300_000])
def test_a_server_that_is_away_is_asked_again_in_peace(per_day: int) -> None:
    simulation, spenders = spending(21, 2.0, 0.2, 2.0, per_day=per_day)
    simulation.advance(30.0)
    simulation.kill_server()
    simulation.advance(1.0)
    questions, started = simulation.questions, len(started_by(spenders))

    simulation.advance(10.0)

    assert len(started_by(spenders)) > started, "there is something to report"
    assert 0 < simulation.questions - questions <= len(spenders) * (10.0 / AGAIN + 1)


def test_an_instance_that_is_cut_off_has_a_part_and_pays_for_it_later() -> None:
    simulation, (cut, *others) = spending(8, 3.0, 0.5, 0.5)
    simulation.advance(90.0)
    simulation.cut_off.add(0)
    cut.started.clear()
    simulation.advance(60.0)
    used = sum(tokens for _, tokens, _ in cut.started)
    # What was in hand, and a third of the rate.
    assert 0.8 * BUDGET / 3 <= used <= BUDGET / 3 + BUDGET / 8

    simulation.cut_off.clear()
    for each in (cut, *others):
        each.started.clear()
    simulation.advance(300.0)

    assert excess(started_by([cut, *others])) <= RATE * 4 * simulation.delay


def test_the_day_begins_at_what_the_ledger_knows_if_that_is_more() -> None:
    simulation, (one, other) = spending(9, 0.0, 0.0, per_day=10_000)
    for each, known in ((one, 6000), (other, 4000)):
        assert each.budget is not None
        each.budget.begin({PER_DAY: known})
    simulation.advance(10.0)

    for _ in range(50):
        other.ask(100)
        simulation.advance(0.2)

    assert len(other.started) == 40
    assert other.budget is not None
    shortage = other.budget.shortage(100)
    assert shortage is not None
    assert (shortage.period, shortage.limit, shortage.used) == (PER_DAY, 10_000, 10_000)


def test_a_day_ends_for_all_and_its_answers_count_no_more() -> None:
    evening = NOON + DAY / 2 - 20
    simulation, (one, other) = spending(10, 0.0, 0.0, per_day=1000, now=evening)
    simulation.advance(15.0)
    for each in (one, other):
        each.ask(500)
    simulation.advance(1.0)
    assert len(started_by([one, other])) == 2
    one.ask(600)
    simulation.advance(3.0)
    assert len(one.started) == 1

    simulation.advance(30.0)

    assert len(one.started) == 2
    assert other.budget is not None
    other.budget.states()
    simulation.advance(5.0)
    assert other.budget.states()[PER_DAY].remaining == 400


# Budgets, twenty seconds before the end of a period, the one that is named, and whether there is
# room for 600 tokens then, where 700 are used.
LONGER = [
    ({"per_week": 1000}, "2026-12-06T23:59:40", PER_WEEK, True),
    ({"per_day": 1000, "per_week": 1000}, "2026-12-06T23:59:40", PER_DAY, True),
    ({"per_month": 1000}, "2026-12-31T23:59:40", PER_MONTH, True),
    ({"per_week": 1000, "per_month": 1000}, "2024-02-29T23:59:40", PER_WEEK, False),
    ({"per_day": 700, "per_month": 1000}, "2024-02-28T23:59:40", PER_MONTH, False),
    ({"per_day": 700, "per_month": 1000}, "2024-02-29T23:59:40", PER_DAY, True),
]


@pytest.mark.parametrize(("limits", "moment", "named", "ends"), LONGER, ids=range(len(LONGER)))
def test_a_longer_period_is_spent_and_ends_for_all(
    limits: dict[str, int], moment: str, named: str, *, ends: bool
) -> None:
    simulation, (one, other) = spending(15, 0.0, 0.0, now=at(moment), **limits)
    simulation.advance(15.0)
    for each in (one, other):
        each.ask(350)
    simulation.advance(1.0)
    assert len(started_by([one, other])) == 2
    one.ask(600)
    simulation.advance(0.01)
    assert one.budget is not None
    shortage = one.budget.shortage(600)
    assert shortage is not None
    assert shortage.period == named
    simulation.advance(2.0)
    assert len(one.started) == 1

    simulation.advance(30.0)

    assert len(one.started) == 1 + ends
    assert other.budget is not None
    other.budget.states()
    simulation.advance(5.0)
    state = other.budget.states()[named]
    assert state.remaining == state.limit - (600 if ends else 700)


def test_longer_periods_begin_at_what_the_ledger_knows_beside_the_day() -> None:
    simulation, (one, other) = spending(16, 0.0, 0.0, per_day=5000, per_month=10_000)
    for each, known in ((one, 8000), (other, 4000)):
        assert each.budget is not None
        each.budget.begin({PER_DAY: 1000, PER_MONTH: known})
    simulation.advance(10.0)

    for _ in range(50):
        other.ask(100)
        simulation.advance(0.2)

    assert len(other.started) == 20
    assert other.budget is not None
    states = other.budget.states()
    assert (states[PER_DAY].remaining, states[PER_MONTH].remaining) == (2000, 0)


def test_an_answer_that_ends_after_its_day_gives_back_to_its_month() -> None:
    evening = at("2026-12-02T23:59:40")
    limits = {"per_day": 5000, "per_month": 9000}
    simulation, (one, other) = spending(17, 0.0, 0.0, error=0.25, now=evening, **limits)
    simulation.advance(18.5)
    one.ask(2000)
    simulation.advance(2.0)
    assert one.budget is not None
    assert one.budget.reserved == 2000, "it still runs, on the next day"
    assert other.budget is not None

    other.ask(2000)

    simulation.advance(25.0)
    other.budget.states()
    simulation.advance(3.0)

    states = other.budget.states()
    assert (states[PER_DAY].remaining, states[PER_MONTH].remaining) == (4500, 8000)


def test_an_estimate_above_a_longer_period_starts_once_nothing_of_it_is_used() -> None:
    simulation, (one, other) = spending(19, 0.0, 0.0, per_day=1000, per_month=4000)
    simulation.advance(10.0)

    one.ask(MOST)
    simulation.advance(1.0)
    other.ask(MOST)
    simulation.advance(1.0)

    assert (len(one.started), len(other.started)) == (1, 0)


def test_a_part_of_a_month_is_no_more_on_the_next_day() -> None:
    """While the server is away, and days go by."""
    simulation, spenders = spending(18, 0.5, 0.5, 0.5, per_month=300_000, now=NOON + DAY / 2 - 60)
    simulation.advance(30.0)
    simulation.pause()
    simulation.advance(400.0)
    simulation.go_on()

    simulation.advance(600.0)

    total = sum(cost for _, _, cost in started_by(spenders))
    assert 0.9 * 300_000 <= total <= 300_000


def test_all_instances_show_what_all_of_them_have_used() -> None:
    simulation, (one, other) = spending(11, 0.0, 0.0)
    simulation.advance(10.0)
    assert one.budget is not None
    assert other.budget is not None
    other.budget.states()
    one.ask(30_000)

    simulation.advance(5.0)

    state = other.budget.states()[PER_MINUTE]
    assert state.limit == BUDGET
    assert state.reserved == 0
    assert 20_000 <= state.used <= 38_000
    shortage = other.budget.shortage(60_000)
    assert shortage is not None


def test_another_key_of_the_same_caller_goes_on_with_what_is_counted() -> None:
    simulation, (one,) = spending(12, 0.0)
    leases, now = one.instance.leases, lambda: simulation.now
    waiting = [20_000]
    former = SharedBudget(leases, "web", BUDGET, 0, now, now, head=lambda: (sum(waiting), 0.2))
    simulation.advance(10.0)
    one.ask(20_000)
    assert former.shortage(20_000) is not None
    simulation.advance(0.01)
    running = former.reserve(waiting.pop())

    budget = SharedBudget(leases, "web", 30_000, 0, now, now)
    budget.take_over(former)
    leases.drop_budget(former)
    simulation.advance(1.0)

    assert budget.states()[PER_MINUTE].remaining == 0
    running.settle(0)
    simulation.advance(1.0)
    budget.states()
    simulation.advance(1.0)
    assert budget.states()[PER_MINUTE].remaining > 0


def test_an_instance_that_leaves_gives_back_what_it_has_in_hand() -> None:
    simulation, (one, other) = spending(13, 0.0, 0.0, per_day=100_000)
    simulation.advance(10.0)
    one.ask(100)
    simulation.advance(25.0)
    assert one.started

    one.instance.leases.leave()
    simulation.advance(3.0)
    for _ in range(20):
        other.ask(5000)
        simulation.advance(0.5)

    assert sum(tokens for _, tokens, _ in started_by([one, other])) == 95_100


def test_a_key_that_is_removed_and_comes_back_has_used_what_it_had() -> None:
    simulation, (one, other) = spending(14, 0.0, 0.0, per_day=10_000)
    simulation.advance(10.0)
    one.ask(6000)
    simulation.advance(15.0)
    assert one.started
    assert one.budget is not None

    one.instance.leases.drop_budget(one.budget)
    leases = one.instance.leases
    again = SharedBudget(leases, "web", 0, 10_000, lambda: simulation.now, lambda: simulation.now)
    simulation.advance(5.0)

    assert again.states()[PER_DAY].remaining == 4000
    other.ask(4001)
    simulation.advance(5.0)
    assert not other.started


def test_what_waits_or_runs_ends_as_ever_when_the_budget_is_taken_away() -> None:
    simulation, (one, _other) = spending(15, 0.0, 0.0)
    simulation.advance(10.0)
    assert one.budget is not None
    running = one.budget.reserve(5000)
    one.ask(60_000)
    simulation.advance(3.0)
    assert not one.started

    one.budget.apply(0, 0)

    assert len(one.started) == 1
    running.settle(100)
    simulation.advance(30.0)
    assert one.budget.reserved == 0
    assert not one.budget.limited
