"""The two classes of a provider: interactive requests go first, and batch uses what they leave."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from aioserver.limits.resource import BOTH_CLASSES, Bid, Grant, Reason
from tests.support.resources import error, granted, last

if TYPE_CHECKING:
    from aioserver.limits.resource import Resource, Ticket
    from tests.support.resources import World


@pytest.mark.parametrize(
    ("limit", "places"), [(1, 1), (2, 1), (3, 2), (9, 8), (10, 9), (20, 18), (100, 90)]
)
def test_batch_leaves_a_tenth_of_the_places_and_at_least_one(
    world: World, limit: int, places: int
) -> None:
    one = world.resource(limit, classes=BOTH_CLASSES)
    for _ in range(places):
        world.start(world.ticket(kind="batch"), one)
    world.wait(world.ticket(kind="batch"), one)
    if limit > 1:
        # An interactive request that comes alone starts at once.
        world.start(world.ticket(), one)


def test_batch_leaves_a_tenth_and_interactive_comes_first(world: World) -> None:
    one = world.resource(10, classes=BOTH_CLASSES)
    for _ in range(9):
        world.start(world.ticket(kind="batch"), one)
    batch = world.wait(world.ticket(kind="batch"), one)
    grant = world.start(world.ticket(), one)
    interactive = world.wait(world.ticket(), one)
    grant.release()
    granted(interactive).release()
    assert batch.outcome is None
    world.scheduler.resize(one, 20)
    granted(batch)


def test_batch_gets_a_twentieth_of_the_work_while_both_wait(world: World) -> None:
    one = world.resource(10, classes=BOTH_CLASSES, queue_size=1000)
    dice = random.Random(7)
    running: list[Ticket] = []
    waiting: list[Ticket] = []
    work: Counter[str] = Counter()

    def come(kind: str) -> None:
        most = 400 if kind else 200
        ticket = world.ticket(kind=kind, work=dice.randint(1, most))
        if (grant := world.scheduler.enter(ticket, [Bid(one)])) is None:
            waiting.append(ticket)
        else:
            del grant
            running.append(ticket)

    for _ in range(40):
        come("")
        come("batch")
    for step in range(4000):
        ended = running.pop(dice.randrange(len(running)))
        last(ended).release(ended.work)
        for ticket in [each for each in waiting if each.outcome is not None]:
            granted(ticket)
            waiting.remove(ticket)
            running.append(ticket)
            if step > 100:
                work[ticket.kind] += ticket.work
        come(ended.kind)
        world.clock.advance(0.01)
    assert 0.04 <= work["batch"] / work.total() <= 0.06


def test_a_dear_batch_request_starts_after_nineteen_times_its_work(world: World) -> None:
    one = world.resource(2, classes=BOTH_CLASSES, queue_size=1000)
    running = [world.start(world.ticket(), one) for _ in range(2)]
    dear = world.wait(world.ticket(kind="batch", work=1000), one)
    before = 0
    for _ in range(300):
        ticket = world.wait(world.ticket(work=100), one)
        running.pop(0).release()
        if isinstance(dear.outcome, Grant):
            break
        running.append(granted(ticket))
        before += 100
    assert 19_000 <= before <= 19_200


@pytest.mark.parametrize("alone", [True, False], ids=["nobody waits", "interactive waits"])
def test_nothing_is_lent_to_a_class_that_does_not_wait(world: World, *, alone: bool) -> None:
    one = world.resource(1, classes=BOTH_CLASSES)
    grant = world.start(world.ticket(), one)
    batch = world.wait(world.ticket(kind="batch", work=1000), one)
    waiting = [] if alone else [world.wait(world.ticket(work=1000), one)]

    def starts(count: int) -> None:
        nonlocal grant
        for _ in range(count):
            waiting.append(world.wait(world.ticket(work=1000), one))
            grant.release()
            grant = granted(waiting.pop(0))

    starts(5)
    world.scheduler.leave(batch)
    anew = world.wait(world.ticket(kind="batch", work=300), one)
    starts(4)
    assert anew.outcome is None


def test_batch_has_half_of_the_queue_and_waits_ten_times_as_long(world: World) -> None:
    one = world.resource(0, classes=BOTH_CLASSES, queue_size=5, queue_timeout=10.0)
    batch = [world.wait(world.ticket(kind="batch"), one) for _ in range(3)]
    assert world.refused(world.ticket(kind="batch"), one).reason is Reason.FULL
    assert (one.room(""), one.room("batch"), one.stats().batch_waiting) == (2, 0, 3)
    interactive = [world.wait(world.ticket(), one) for _ in range(2)]
    world.refused(world.ticket(), one)
    world.clock.advance(10.0)
    assert {error(each).reason for each in interactive} == {Reason.LATE}
    world.clock.advance(89.0)
    assert batch[0].outcome is None
    world.clock.advance(1.0)
    assert {error(each).reason for each in batch} == {Reason.LATE}


def test_a_class_that_is_passed_over_is_owed_one_start(world: World) -> None:
    one = world.resource(2, classes=BOTH_CLASSES, queue_size=1000)
    held = world.start(world.ticket(kind="batch", work=10), one)
    grant = world.start(world.ticket(work=10), one)
    batch = [world.wait(world.ticket(kind="batch", work=10), one) for _ in range(5)]
    for _ in range(200):
        ticket = world.wait(world.ticket(work=10), one)
        grant.release()
        grant = granted(ticket)
    interactive = [world.wait(world.ticket(work=10), one) for _ in range(30)]
    held.release()
    # Its turn has come long ago.
    ended = granted(batch[0])
    for _ in range(10):
        ended.release()
        following = next(each for each in interactive if each.outcome is not None)
        interactive.remove(following)
        ended = granted(following)
    assert [each.outcome is None for each in batch[1:]] == [True] * 4


def test_classes_are_fair_by_themselves(world: World) -> None:
    one = world.resource(1, classes=BOTH_CLASSES)
    grant = world.start(world.ticket("c"), one)
    # A caller that has had much as batch is nobody's debtor beside it, and the other way round.
    for number in range(3):
        world.wait(world.ticket("a", kind="batch", work=10_000 + number), one)
        world.wait(world.ticket("a", work=100 + number), one)
        world.wait(world.ticket("b", work=200 + number), one)
    served = []
    while one.waiting:
        ticket = world.order(one)[0]
        grant.release()
        grant = granted(ticket)
        served.append(ticket.work)
    assert served == [100, 200, 101, 201, 102, 202, 10_000, 10_001, 10_002]


def test_a_batch_request_is_told_its_position_among_all(world: World) -> None:
    one = world.resource(1, classes=BOTH_CLASSES)
    world.start(world.ticket(), one)
    others = [world.wait(world.ticket(), one) for _ in range(3)]
    told: list[int] = []

    def hear(_resource: Resource, position: int, _eta: float) -> None:
        told.append(position)

    world.wait(world.ticket(kind="batch"), one, on_position=hear)
    world.scheduler.leave(others[0])
    world.clock.advance(1.0)
    assert told == [4, 3]


def test_a_batch_request_behind_its_own_places_is_told_how_long_they_take(world: World) -> None:
    one = world.resource(3, classes=BOTH_CLASSES)
    grants = [world.start(world.ticket(kind="batch"), one) for _ in range(2)]
    waiting = world.wait(world.ticket(kind="batch"), one)
    for _ in range(30):
        world.clock.advance(4.0)
        grants.pop(0).release()
        grants.append(granted(waiting))
        waiting = world.wait(world.ticket(kind="batch"), one)
    told: list[tuple[int, float]] = []

    def hear(_resource: Resource, position: int, eta: float) -> None:
        told.append((position, eta))

    world.wait(world.ticket(kind="batch"), one, on_position=hear)
    # The resource has a free place, which is not for batch.
    assert one.inside < one.limit
    ((position, eta),) = told
    assert position == 2
    assert 7.0 <= eta <= 9.0


def test_a_batch_request_at_several_providers_has_half_of_their_room_together(
    world: World,
) -> None:
    both = [world.resource(0, classes=BOTH_CLASSES, queue_size=4) for _ in range(2)]
    tickets = [world.wait(world.ticket(kind="batch"), *both) for _ in range(4)]
    assert [one.room("batch") for one in both] == [0, 0]
    assert [one.room("") for one in both] == [2, 2]
    assert world.refused(world.ticket(kind="batch"), *both).reason is Reason.FULL
    for one in both:
        world.scheduler.resize(one, 9)
    for ticket in tickets:
        granted(ticket).release()
    assert [(one.inside, one.waiting, one.room("batch")) for one in both] == [(0, 0, 2)] * 2


def test_a_lowered_capacity_holds_for_batch(world: World) -> None:
    one = world.resource(10, classes=BOTH_CLASSES)
    grants = [world.start(world.ticket(kind="batch"), one) for _ in range(9)]
    world.scheduler.resize(one, 4)
    waiting = world.wait(world.ticket(kind="batch"), one)
    for grant in grants[:6]:
        grant.release()
    assert waiting.outcome is None
    grants[6].release()
    granted(waiting)
