"""The wheel on a clock that is moved by hand."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from aioserver.limits.timer_wheel import TimerWheel

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.clock import FakeClock

GRAIN = 0.5


class Visited:
    """A member that writes its visits down, and calls *do* at each."""

    def __init__(
        self, delay: float | None = None, do: Callable[[], object] = lambda: None
    ) -> None:
        self.bucket = 0
        self.delay = delay
        self.do = do
        self.visits: list[float] = []

    def visit(self, now: float) -> float | None:
        self.visits.append(now)
        self.do()
        return self.delay


@pytest.fixture
def wheel(clock: FakeClock) -> TimerWheel:
    return TimerWheel(clock.loop, GRAIN)


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.5, 0.74, 20.0, 1e6])
def test_a_visit_is_at_most_one_grain_late(
    clock: FakeClock, wheel: TimerWheel, delay: float
) -> None:
    clock.now += 0.3
    member = Visited()
    due = clock.now + delay

    wheel.add(member, delay)
    clock.advance(delay + GRAIN)

    (visit,) = member.visits
    assert due <= visit <= due + GRAIN
    assert member.bucket == 0
    assert clock.pending == 0


def test_a_member_comes_again_as_often_as_it_asks(clock: FakeClock, wheel: TimerWheel) -> None:
    member = Visited(2.0)
    wheel.add(member, 2.0)

    clock.advance(100.0)
    assert 40 <= len(member.visits) <= 50
    member.delay = None
    clock.advance(10.0)

    seen = len(member.visits)
    clock.advance(100.0)
    assert len(member.visits) == seen
    assert clock.pending == 0


def test_a_member_that_asks_for_no_delay_gets_one(clock: FakeClock, wheel: TimerWheel) -> None:
    member = Visited(0.0)
    wheel.add(member, 0.0)

    clock.advance(100.0)

    assert 100 <= len(member.visits) <= 201


def test_thousands_of_members_share_one_timer(clock: FakeClock, wheel: TimerWheel) -> None:
    dice = random.Random(1)
    members = [Visited() for _ in range(5000)]
    due = []
    for member in members:
        delay = dice.uniform(0.0, 30.0)
        due.append(clock.now + delay)
        wheel.add(member, delay)
        assert clock.pending == 1

    clock.advance(31.0)

    for at, member in zip(due, members, strict=True):
        (visit,) = member.visits
        assert at <= visit <= at + GRAIN


def test_an_earlier_member_moves_the_timer_forward(clock: FakeClock, wheel: TimerWheel) -> None:
    late, early = Visited(), Visited()
    wheel.add(late, 100.0)
    wheel.add(early, 1.0)

    clock.advance(2.0)

    assert (len(early.visits), len(late.visits)) == (1, 0)
    clock.advance(100.0)
    assert len(late.visits) == 1


def test_a_removed_member_is_not_visited(clock: FakeClock, wheel: TimerWheel) -> None:
    member, other = Visited(1.0), Visited(1.0)
    wheel.add(member, 1.0)
    wheel.add(other, 1.0)

    wheel.remove(member)
    wheel.remove(member)
    clock.advance(3.0)

    assert member.visits == []
    assert len(other.visits) == 2


def test_a_member_added_twice_is_in_the_wheel_once(clock: FakeClock, wheel: TimerWheel) -> None:
    member = Visited()
    wheel.add(member, 1.0)
    wheel.add(member, 5.0)

    clock.advance(3.0)
    assert member.visits == []
    clock.advance(3.0)
    assert len(member.visits) == 1


def test_a_member_removed_by_anothers_visit_in_the_same_bucket_is_not_visited(
    clock: FakeClock, wheel: TimerWheel
) -> None:
    members: list[Visited] = []

    def remove_the_rest() -> None:
        for member in members:
            wheel.remove(member)

    members += [Visited(1.0, remove_the_rest) for _ in range(5)]
    for member in members:
        wheel.add(member, 1.0)

    clock.advance(50.0)

    assert sum(len(member.visits) for member in members) == 1
    assert clock.pending == 0


def test_a_member_removed_in_its_own_visit_does_not_come_back(
    clock: FakeClock, wheel: TimerWheel
) -> None:
    member = Visited(1.0)
    member.do = lambda: wheel.remove(member)
    wheel.add(member, 1.0)

    clock.advance(50.0)

    assert len(member.visits) == 1


def test_a_member_added_in_its_own_visit_is_in_the_wheel_once(
    clock: FakeClock, wheel: TimerWheel
) -> None:
    member = Visited(1.0)
    member.do = lambda: wheel.add(member, 10.0)
    wheel.add(member, 1.0)

    clock.advance(25.0)

    assert len(member.visits) == 3


def test_members_added_by_a_visit_have_their_turn(clock: FakeClock, wheel: TimerWheel) -> None:
    added: list[Visited] = []

    def add() -> None:
        added.append(Visited())
        wheel.add(added[-1], 0.0)

    adder = Visited(1.0, add)
    wheel.add(adder, 1.0)

    clock.advance(20.0)
    wheel.remove(adder)
    clock.advance(1.0)

    assert len(added) >= 10
    assert all(len(member.visits) == 1 for member in added)


def test_a_visit_that_raises_stops_nobody_else(clock: FakeClock, wheel: TimerWheel) -> None:
    def fail() -> None:
        raise KeyError

    members = [Visited(1.0), Visited(1.0, fail), Visited(1.0), Visited(1.0, fail), Visited(1.0)]
    for member in members:
        wheel.add(member, 1.0)

    for _ in range(2):
        with pytest.raises(KeyError):
            clock.advance(10.0)
    clock.advance(20.0)

    assert [len(member.visits) > 5 for member in members] == [True, False, True, False, True]
    assert len(members[1].visits) == len(members[3].visits) == 1


def test_a_closed_wheel_visits_nobody(clock: FakeClock, wheel: TimerWheel) -> None:
    members = [Visited(1.0) for _ in range(10)]
    for member in members:
        wheel.add(member, 1.0)

    wheel.close()
    clock.advance(10.0)

    assert clock.pending == 0
    assert all(member.visits == [] for member in members)
    for member in members:
        wheel.remove(member)
