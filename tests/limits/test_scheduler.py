"""The scheduler on a clock that is moved by hand: each behaviour by itself."""

from __future__ import annotations

from collections import Counter

import pytest

from aioserver.limits.resource import BOTH_CLASSES, Bid, Class, Reason, Resource, Supply
from tests.support.resources import Refused, Spaced, World, error, granted


class Lease(Supply):
    """A supply, which counts what it hears."""

    def __init__(self) -> None:
        self.heard: Counter[str] = Counter()

    def changed(self) -> None:
        self.heard["changed"] += 1

    def freed(self) -> None:
        self.heard["freed"] += 1


def test_a_free_place_is_taken_at_once_and_given_back_once(world: World) -> None:
    one = world.resource(1)
    grant = world.start(world.ticket(), one)
    assert one.inside == 1
    grant.release()
    grant.release()
    grant.cancel()
    assert (one.inside, world.clock.pending) == (0, 0)


def test_a_freed_place_goes_to_the_next_and_nobody_overtakes(world: World) -> None:
    one = world.resource(1)
    grant = world.start(world.ticket(), one)
    first = world.wait(world.ticket(), one)
    second = world.wait(world.ticket(), one)
    grant.release()
    assert one.inside == 1
    assert second.outcome is None
    granted(first).release()
    assert one.inside == 1
    granted(second).release()
    assert one.inside == 0


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(world: World) -> None:
    one = world.resource(1, queue_size=2)
    world.start(world.ticket(), one)
    for _ in range(2):
        world.wait(world.ticket(), one)
    refusal = world.refused(world.ticket(), one)
    assert refusal.reason is Reason.FULL
    assert 1.0 <= refusal.retry_after <= 60.0
    assert (one.refused, one.slots) == (1, 2)


def test_a_wait_ends_at_its_deadline_and_leaves_nothing(world: World) -> None:
    one = world.resource(1, queue_timeout=5.0)
    grant = world.start(world.ticket(), one)
    late = world.wait(world.ticket(), one)
    hurried = world.wait(world.ticket(deadline=world.clock.now + 2.0), one)
    world.clock.advance(2.0)
    assert error(hurried).reason is Reason.DEADLINE
    assert late.outcome is None
    world.clock.advance(3.0)
    assert error(late).reason is Reason.LATE
    assert (one.slots, one.queue.size, world.clock.pending) == (0, 0, 0)
    grant.release()


@pytest.mark.parametrize("waits", [True, False], ids=["waits", "starts at once"])
@pytest.mark.parametrize("dead", [True, False], ids=["a trial", "no trial"])
def test_a_trial_keeps_its_slot_and_takes_it_nowhere_else(
    world: World, *, waits: bool, dead: bool
) -> None:
    one, other = world.resource(1, keeps=lambda: True), world.resource(1, keeps=lambda: dead)
    busy = world.start(world.ticket(), one)
    ticket = world.wait(world.ticket("b"), one)
    busy.release()
    trial = granted(ticket)
    assert (ticket.slot, one.slots) == (one, 1)
    trial.release()
    if not waits:
        world.start(ticket, other)
        assert (one.slots, other.slots) == (0, 0)
        return
    world.start(world.ticket(), other)
    world.wait(ticket, other)
    assert (one.slots, other.slots) == (0, 1)


def test_patience_is_over_all_waits_at_one_resource_and_each_has_its_own(world: World) -> None:
    one, other = world.resource(1, queue_timeout=5.0), world.resource(1, queue_timeout=5.0)
    grant = world.start(world.ticket(), one)
    world.start(world.ticket(), other)
    ticket = world.wait(world.ticket(), one)
    world.clock.advance(4.0)
    grant.release()
    attempt = granted(ticket)
    blocker = world.start(world.ticket(), world.resource(1))
    rival = world.wait(world.ticket("b"), one)
    attempt.release()
    again = granted(rival)
    world.wait(ticket, Bid(one, front=True))
    world.clock.advance(1.0)
    assert error(ticket).reason is Reason.LATE
    ticket.outcome = None
    assert world.refused(ticket, one).reason is Reason.LATE
    world.wait(ticket, other)
    world.clock.advance(4.5)
    assert ticket.outcome is None
    for each in (again, blocker):
        each.release()


def test_a_patient_ticket_waits_until_its_deadline_and_no_longer(world: World) -> None:
    one = world.resource(1, queue_timeout=5.0, queue_size=1)
    grant = world.start(world.ticket(), one)
    patient = world.ticket()
    patient.patient, patient.deadline = True, world.clock() + 7200.0
    world.wait(patient, one)
    # It needs room as any other.
    other = world.ticket()
    other.patient = True
    assert world.refused(other, one).reason is Reason.FULL
    world.clock.advance(7000.0)
    assert patient.outcome is None
    world.clock.advance(200.0)
    assert error(patient).reason is Reason.DEADLINE
    grant.release()


def test_a_rate_that_is_too_slow_refuses_at_once_with_the_true_time(world: World) -> None:
    rate = Spaced(world, 10.0)
    slow = world.resource(9, rate=rate, queue_timeout=25.0)
    world.start(world.ticket(), slow)
    tickets = [world.wait(world.ticket(), slow) for _ in range(2)]
    refusal = world.refused(world.ticket(), slow)
    assert (refusal.reason, refusal.retry_after) == (Reason.SLOW, 30.0)
    hurried = world.refused(world.ticket("b", deadline=world.clock.now + 5.0), slow)
    assert (hurried.reason, hurried.retry_after) == (Reason.SLOW, 10.0), "another caller"
    world.clock.advance(9.9)
    assert tickets[0].outcome is None
    rate.next = world.clock.now
    assert slow.try_start(world.ticket("b")) is None, "the next start is not for a newcomer"
    world.clock.advance(0.1)
    granted(tickets[0])
    world.clock.advance(10.0)
    granted(tickets[1])


def test_a_rate_that_slows_down_refuses_who_cannot_start_in_time(world: World) -> None:
    rate = Spaced(world, 1.0)
    slow = world.resource(9, rate=rate, queue_timeout=25.0)
    world.start(world.ticket(), slow)
    patient = world.wait(world.ticket(), slow)
    movable = world.wait(world.ticket("b"), Bid(slow, movable=True))
    rate.next = world.clock.now + 20.0
    world.refuse_late(slow)
    assert (error(movable).reason, error(movable).retry_after) == (Reason.SLOW, 20.0)
    assert patient.outcome is None
    rate.next = world.clock.now + 30.0
    world.scheduler.serve(slow)
    assert (error(patient).reason, error(patient).retry_after) == (Reason.SLOW, 30.0)


def test_a_key_holds_its_place_while_the_ticket_waits_for_a_provider(world: World) -> None:
    key, provider = world.resource(1), world.resource(1)
    busy = world.start(world.ticket("b"), provider)
    ticket = world.ticket()
    held = world.start(ticket, key)
    world.wait(ticket, provider)
    second = world.wait(world.ticket(), key)
    # The provider's queue has only who may start: a key at its limit blocks nobody there.
    assert provider.queue.size == 1
    busy.release()
    granted(ticket).release()
    assert second.outcome is None
    held.release()
    granted(second)


def test_a_budget_of_tokens_is_not_overtaken_by_small_requests(world: World) -> None:
    budget = Spaced(world, 0.0, budget=100)
    key = world.resource(10, rate=budget, classes=BOTH_CLASSES)
    first = world.start(world.ticket(kind="batch"), Bid(key, 80))
    large = world.wait(world.ticket(kind="batch"), Bid(key, 90))
    small = world.wait(world.ticket(kind="batch"), Bid(key, 10))
    assert key.inside == 1
    first.release(spent=80)
    granted(large)
    granted(small)
    assert budget.reserved == 100


def test_without_a_queue_the_refusal_names_what_is_missing(world: World) -> None:
    rate = Spaced(world, 10.0)
    key = world.resource(2, rate=rate, queue_size=0)
    world.start(world.ticket(), key)
    assert world.refused(world.ticket(), key).reason is Reason.SLOW
    world.clock.advance(10.0)
    world.start(world.ticket(), key)
    assert world.refused(world.ticket(), key).reason is Reason.FULL


def test_a_ticket_starts_at_the_first_place_of_several_and_stands_nowhere_else(
    world: World,
) -> None:
    one, two = world.resource(1), world.resource(1)
    first, second = world.start(world.ticket(), one), world.start(world.ticket(), two)
    ticket = world.wait(world.ticket(), one, two)
    behind = world.wait(world.ticket(), one)
    assert (one.queue.size, two.queue.size) == (2, 1)
    second.release()
    assert granted(ticket).resource is two
    assert (one.queue.size, two.queue.size, two.inside) == (1, 0, 1)
    first.release()
    assert granted(behind).resource is one


def test_two_places_in_one_turn_start_it_once(world: World) -> None:
    one, two = world.resource(0), world.resource(0)
    ticket, other = world.wait(world.ticket(), one, two), world.wait(world.ticket(), two)
    world.scheduler.resize(one, 1)
    world.scheduler.resize(two, 1)
    assert granted(ticket).resource is one
    assert granted(other).resource is two


def test_a_group_has_room_for_as_many_as_its_members_together(world: World) -> None:
    small, large = world.resource(0, queue_size=1), world.resource(0, queue_size=3)
    tickets = [world.wait(world.ticket(), small, large) for _ in range(4)]
    assert world.refused(world.ticket(), small, large).reason is Reason.FULL
    assert (small.slots, large.slots) == (1, 3)
    at_small = next(each for each in tickets if each.slot is small)
    world.scheduler.leave(at_small)
    world.wait(world.ticket(), small)
    world.refused(world.ticket(), large)


@pytest.mark.parametrize("rests", [False, True], ids=["new", "returning"])
def test_room_at_a_queue_that_refuses_its_bid_is_no_room(world: World, *, rests: bool) -> None:
    slow = world.resource(9, rate=Spaced(world, 90.0), queue_timeout=5.0, queue_size=3)
    full = world.resource(1, queue_size=1)
    for each in (slow, full):
        world.start(world.ticket(), each)
    world.wait(world.ticket(), full)
    # A rest needs no room before its end.
    bids = [Bid(slow), Bid(full, not_before=world.clock.now + rests, front=rests)]
    if rests:
        ticket = world.wait(world.ticket(), *bids)
        assert (ticket.slot, [bid.resource for bid in ticket.bids]) == (None, [full])
        world.clock.advance(1.0)
        assert error(ticket).reason is Reason.FULL
    else:
        assert world.refused(world.ticket(), *bids).reason is Reason.FULL
    assert (slow.slots, full.slots) == (0, 1)


def test_whoever_leaves_a_queue_takes_its_slot_to_another(world: World) -> None:
    quick, slow = world.resource(0, queue_timeout=1.0), world.resource(0, queue_timeout=9.0)
    quick.queue_size = 200
    ticket = world.wait(world.ticket(), quick, slow)
    assert (quick.slots, slow.slots) == (1, 0)
    world.clock.advance(1.0)
    assert (quick.slots, slow.slots, quick.queue.size) == (0, 1, 0)
    world.clock.advance(8.0)
    assert error(ticket).reason is Reason.LATE
    assert slow.slots == 0


def test_a_delayed_bid_joins_behind_those_who_stand_there(world: World) -> None:
    home, other = world.resource(1), world.resource(1)
    world.start(world.ticket(), home)
    away = world.start(world.ticket(), other)
    ticket = world.wait(world.ticket(), home, Bid(other, not_before=world.clock.now + 2.0))
    later = world.wait(world.ticket(), other)
    assert (other.queue.size, other.slots) == (1, 1)
    world.clock.advance(2.0)
    assert other.queue.size == 2
    away.release()
    granted(later).release()
    assert granted(ticket).resource is other


def test_a_rest_has_no_slot_and_needs_room_when_it_is_over(world: World) -> None:
    one = world.resource(1, queue_size=1)
    grant = world.start(world.ticket(), one)
    resting = world.wait(world.ticket(), Bid(one, not_before=world.clock.now + 2.0, front=True))
    assert one.slots == 0
    waiting = world.wait(world.ticket(), one)
    world.clock.advance(2.0)
    assert error(resting).reason is Reason.FULL
    resting.outcome = None
    grant.release()
    granted(waiting).release()
    world.wait(resting, Bid(one, not_before=world.clock.now + 2.0, front=True))
    world.clock.advance(2.0)
    granted(resting).release()
    assert not resting.waited
    # It may be longer than what is left of the patience.
    one.queue_timeout = 1.0
    world.wait(resting, Bid(one, not_before=world.clock.now + 5.0, front=True))
    world.clock.advance(5.0)
    granted(resting)


def test_a_parked_ticket_keeps_its_slot_and_comes_back_when_the_provider_does(
    world: World,
) -> None:
    alive = False
    one = world.resource(5, queue_size=1, keeps=lambda: not alive)
    first = world.ticket()
    grant = world.start(first, one)
    grant.release()
    world.wait(first, Bid(one, not_before=world.clock.now + 2.0, front=True, parked=True))
    world.scheduler.resize(one, 0)
    world.refused(world.ticket(), one)
    world.clock.advance(2.0)
    # A trial: it may have to come back.
    world.scheduler.resize(one, 1)
    trial = granted(first)
    assert one.slots == 1
    world.refused(world.ticket(), one)
    trial.release()
    world.wait(first, Bid(one, not_before=world.clock.now + 2.0, front=True, parked=True))
    alive = True
    world.scheduler.recover(one)
    granted(first)
    assert one.slots == 1
    # It has its answer, and does not come back.
    first.free_slot()
    world.clock.advance(2.0)
    assert (one.slots, world.clock.pending) == (0, 0)


@pytest.mark.parametrize("delay", [0.0, 5.0], ids=["now", "later"])
def test_the_queues_of_all_bids_have_room_together(world: World, *, delay: float) -> None:
    home, other = world.resource(1, queue_size=1), world.resource(1, queue_size=2)
    busy = world.start(world.ticket(), home)
    world.start(world.ticket(), other)
    first = world.wait(world.ticket(), home)
    ticket = world.ticket()
    later = Bid(other, not_before=world.clock.now + delay if delay else 0.0)
    world.wait(ticket, home, later)
    assert (home.slots, other.slots) == (1, 1)
    busy.release()
    granted(first).release()
    granted(ticket).release()
    assert (home.slots, other.slots, home.inside) == (0, 0, 0)


@pytest.mark.parametrize("size", [1, 2])
def test_who_has_lost_the_queue_that_let_it_in_needs_room_in_another(
    world: World, size: int
) -> None:
    home, other = world.resource(1, queue_size=size), world.resource(1, queue_size=2)
    world.start(world.ticket(), home)
    world.start(world.ticket(), other)
    world.wait(world.ticket(), home)
    ticket = world.ticket()
    bids = [Bid(home), Bid(other)]
    world.wait(ticket, *bids)
    assert ticket.slot is other
    world.scheduler.withdraw(bids[1], lambda: pytest.fail("it waits elsewhere"))
    assert (home.slots, home.queue.size, other.slots) == (size, size, 0)
    assert (ticket in world.scheduler.waiting) == (size == 2)
    if size == 1:
        assert isinstance(ticket.outcome, Refused)
        assert (ticket.outcome.reason, home.refused) == (Reason.FULL, 1)


def test_the_first_of_those_that_join_later_is_known_without_its_timer(
    world: World,
) -> None:
    one = world.resource(2)
    tickets = [world.ticket() for _ in range(2)]
    for ticket, seconds in zip(tickets, (2.0, 1.0), strict=True):
        world.wait(ticket, Bid(one, not_before=world.clock.now + seconds))
    world.clock.advance(1.0)
    assert tickets[0].outcome is None
    granted(tickets[1]).release()
    world.clock.advance(1.0)
    granted(tickets[0]).release()


def test_a_ticket_that_is_parked_within_a_provider_comes_back_with_it(world: World) -> None:
    outer = world.resource(4)
    part = world.resource(2, within=outer)
    ticket = world.ticket()
    world.wait(ticket, Bid(part, not_before=world.clock.now + 2.0, front=True, parked=True))
    world.scheduler.recover(outer)
    granted(ticket).release()
    assert (part.inside, outer.inside, part.waiting) == (0, 0, 0)


def test_who_comes_back_stands_before_its_callers_others_by_its_first_arrival(
    world: World,
) -> None:
    one = world.resource(0)
    tickets = []
    for _ in range(3):
        world.clock.advance(1.0)
        tickets.append(world.ticket())
    newcomer = world.wait(world.ticket(), one)
    for ticket in (tickets[2], tickets[0], tickets[1]):
        world.wait(ticket, Bid(one, front=True))
    order = world.order(one)
    assert order == [*tickets, newcomer]


def test_background_has_half_of_the_places_and_both_are_released_together(world: World) -> None:
    outer = world.resource(4)
    inner = world.background(outer)
    grants = [world.start(world.ticket(), inner) for _ in range(2)]
    waiting = world.wait(world.ticket(), inner)
    assert (inner.inside, outer.inside, outer.slots) == (2, 2, 1)
    others = [world.start(world.ticket("b"), outer) for _ in range(2)]
    grants[0].release(5)
    granted(waiting).release()
    assert (inner.inside, outer.inside, outer.slots) == (1, 3, 0)
    world.scheduler.resize(outer, 2)
    world.scheduler.resize(inner, 1)
    for each in (*others, *grants):
        each.release()
    assert (inner.inside, outer.inside) == (0, 0)


def test_patience_of_the_background_counts_what_was_waited_outside_of_its_part(
    world: World,
) -> None:
    outer = world.resource(2)
    inner = world.background(outer)
    others = [world.start(world.ticket("b"), outer) for _ in range(2)]
    ticket = world.wait(world.ticket(), inner)
    assert (inner.inside, outer.waiting) == (1, 1), "it has its part, and waits for a place"
    world.clock.advance(400.0)
    others.pop().release()
    granted(ticket).release()
    world.start(world.ticket("b"), outer)

    # It was started, has failed, and comes back.
    began = world.clock.now - 400.0
    world.wait(ticket, Bid(inner, front=True))
    assert ticket.bids[0].began() == began
    world.clock.advance(199.0)
    assert ticket.outcome is None
    world.clock.advance(1.0)

    assert error(ticket).reason is Reason.LATE


def test_background_that_has_its_part_waits_at_the_front_and_leaves_nothing(world: World) -> None:
    outer = world.resource(2)
    inner = world.background(outer)
    busy = [world.start(world.ticket("b"), outer) for _ in range(2)]
    normal = world.wait(world.ticket(), outer)
    waiting = world.wait(world.ticket(), inner)
    assert (inner.inside, outer.queue.size) == (1, 2)
    assert world.order(outer) == [waiting, normal]
    world.scheduler.leave(waiting)
    assert (inner.inside, outer.queue.size, outer.slots, inner.slots) == (0, 1, 1, 0)
    again = world.wait(world.ticket(), inner)
    world.scheduler.refuse(
        outer, lambda: Refused("gone", "", 0.0), lambda bid: bid.ticket is again
    )
    assert (error(again).reason, inner.inside) == ("gone", 0)
    for each in busy:
        each.release()


def test_positions_and_etas_are_told_at_once_and_each_second(world: World) -> None:
    told: list[tuple[str, int, float]] = []

    def hear(resource: Resource, position: int, eta: float) -> None:
        told.append((resource.name, position, eta))

    one, two = world.resource(1), world.resource(1)
    first = world.start(world.ticket(), one)
    world.start(world.ticket(), two)
    ahead = [world.wait(world.ticket(), one) for _ in range(2)]
    ticket = world.wait(world.ticket(), one, two, on_position=hear)
    assert told == [("r1", 1, 1 / (1 / 3.0 + 1 / 1.0))]
    alone = world.wait(world.ticket(), one, on_position=hear)
    assert told[-1][:2] == ("r0", 4)
    world.clock.advance(0.5)
    first.release()
    granted(ahead[0])
    world.clock.advance(0.5)
    assert told[-1][:2] == ("r0", 3)
    before = len(told)
    world.clock.advance(5.0)
    assert len(told) == before, "nothing has changed"
    for each in (ticket, alone, ahead[1]):
        world.scheduler.leave(each)
    before = len(told)
    world.clock.advance(5.0)
    assert (len(told), world.clock.pending) == (before, 0)


def test_a_shut_resource_refuses_all_but_what_goes_on(world: World) -> None:
    one = world.resource(1)
    grant = world.start(world.ticket(), one)
    waiting = world.wait(world.ticket(), one)
    going_on = world.wait(world.ticket(goes_on=True), one)
    world.scheduler.shut(one, lambda: Refused("shut", "", 1.0), finishes=True)
    assert error(waiting).reason == "shut"
    assert world.refused(world.ticket(), one).reason == "shut"
    later = world.wait(world.ticket(goes_on=True), one)
    grant.release()
    granted(going_on).release()
    granted(later)


def test_another_candidate_can_join_and_quit(world: World) -> None:
    one, two = world.resource(0), world.resource(0)
    ticket = world.wait(world.ticket(), one)
    world.scheduler.join(ticket, Bid(two))
    world.scheduler.refuse(one, lambda: Refused("gone", "", 0.0))
    assert (one.queue.size, two.queue.size, one.slots, two.slots) == (0, 1, 0, 1)
    assert (one.refused, two.refused) == (1, 0)
    world.scheduler.resize(two, 1)
    assert granted(ticket).resource is two


def test_a_connection_slot_is_lent_while_its_request_waits_at_its_key(world: World) -> None:
    door = world.resource(
        1, queue_size=4, classes=(Class("", 1), Class("lent", 1_000_000, room=0.5))
    )
    client = world.ticket()
    slot = world.start(client, door)
    arriving = [world.wait(world.ticket(), door) for _ in range(2)]
    world.scheduler.suspend(slot, "lent")
    served = granted(arriving[0])
    assert (door.inside, door.slots) == (1, 2)
    back = world.wait(client, door)
    served.release()
    granted(back)
    assert arriving[1].outcome is None, "who returns comes first"
    others = [world.ticket() for _ in range(3)]
    world.scheduler.resize(door, 9)
    lent = [world.start(other, door) for other in others]
    for each in lent[:2]:
        world.scheduler.suspend(each, "lent")
    with pytest.raises(Refused):
        world.scheduler.suspend(lent[2], "lent")
    for other in others:
        world.scheduler.close(other)
    assert door.slots == 0


def test_a_supply_says_how_many_places_there_are_and_hears_of_wants(world: World) -> None:
    lease = Lease()
    one = world.resource(1, supply=lease, queue_size=0, queue_timeout=0.0)
    one.elsewhere, one.grace = 1, 0.25
    grant = world.start(world.ticket(), one)
    undecided = world.wait(world.ticket(), one)
    assert lease.heard["changed"] == 1
    one.elsewhere, one.grace = 0, 0.0
    assert world.refused(world.ticket(), one).reason is Reason.FULL
    world.clock.advance(0.25)
    assert error(undecided).reason is Reason.LATE
    assert lease.heard["changed"] == 2
    one.elsewhere, one.grace = 1, 0.25
    lucky = world.wait(world.ticket(), one)
    world.scheduler.resize(one, 2)
    granted(lucky).release()
    grant.release()
    assert lease.heard["freed"] == 2


def test_closing_a_ticket_releases_all_that_it_holds(world: World) -> None:
    key, outer = world.resource(1), world.resource(2)
    inner = world.background(outer)
    ticket = world.ticket()
    world.start(ticket, key)
    world.start(ticket, inner)
    world.scheduler.close(ticket)
    assert (key.inside, inner.inside, outer.inside, ticket.grants) == (0, 0, 0, {})


def test_a_bug_in_a_rate_ends_the_ticket_that_waits_and_no_other(world: World) -> None:
    rate = Spaced(world, 0.0)
    one = world.resource(0, rate=rate)
    first, second = world.wait(world.ticket(), one), world.wait(world.ticket(), one)
    take, failing = rate.try_take, iter((True, False))

    def once(cost: int) -> object:
        if next(failing):
            raise ZeroDivisionError
        return take(cost)

    rate.try_take = once  # type: ignore[method-assign]
    world.scheduler.resize(one, 1)
    assert isinstance(first.outcome, ZeroDivisionError)
    granted(second)
    assert (one.inside, one.slots) == (1, 0)


def test_a_deadline_is_that_with_which_a_ticket_has_come(world: World) -> None:
    one = world.resource(1, queue_timeout=5.0)
    world.start(world.ticket(), one)
    ticket = world.wait(world.ticket(), one)
    one.queue_timeout = 600.0
    world.scheduler.resize(one, 1)
    world.clock.advance(5.0)
    assert error(ticket).reason is Reason.LATE


def test_without_a_timeout_nobody_waits(world: World) -> None:
    one = world.resource(1, queue_timeout=0.0)
    world.start(world.ticket(), one)
    assert world.refused(world.ticket(), one).reason is Reason.FULL


@pytest.mark.parametrize("clock", [(1e9, 1e-9), (1e-9, 1e9), (0.0, 0.0), (5.0, -5.0)])
def test_the_estimate_stays_between_1_and_60_seconds(
    world: World, clock: tuple[float, float]
) -> None:
    one = world.resource(1)
    for _ in range(20):
        for step in clock:
            world.start(world.ticket(), one).release()
            world.clock.now += step
            assert 1.0 <= one.retry_after() <= 60.0


def test_the_estimate_grows_with_the_queue_and_has_jitter(world: World) -> None:
    one = world.resource(1)
    grant = world.start(world.ticket(), one)
    for _ in range(50):  # a place becomes free every 4 seconds
        world.clock.now += 4.0
        grant.release()
        grant = world.start(world.ticket(), one)
    for _ in range(4):
        world.wait(world.ticket(), one)
    estimates = {one.retry_after() for _ in range(20)}
    assert len(estimates) > 1
    assert all(19.0 <= estimate <= 31.0 for estimate in estimates)


def test_an_hour_in_which_nobody_came_does_not_count_as_a_wait_for_a_place(world: World) -> None:
    one = world.resource(2)
    for _ in range(20):  # one comes every minute, and there is a place
        world.start(world.ticket(), one).release()
        world.clock.now += 60.0
    grants = [world.start(world.ticket(), one) for _ in range(2)]
    world.clock.now += 1.0
    grants.pop().release()
    world.start(world.ticket(), one)
    assert 1.0 <= one.retry_after() <= 1.5


def test_the_oldest_wait_is_reported(world: World) -> None:
    one = world.resource(1)
    world.start(world.ticket(), one)
    assert one.stats().oldest_wait == 0.0
    first = world.wait(world.ticket("a"), one)
    world.clock.advance(2.0)
    world.wait(world.ticket("b"), one)
    world.clock.advance(3.0)
    assert one.stats().oldest_wait == 5.0
    world.scheduler.leave(first)
    assert one.stats().oldest_wait == 3.0


@pytest.mark.parametrize("waits", [True, False], ids=["another waits", "nobody waits"])
def test_the_real_cost_of_a_start_without_a_wait_counts_for_its_caller(
    world: World, *, waits: bool
) -> None:
    one = world.resource(2)
    estimates = {"a": 1, "b": 5}
    grants = [world.start(world.ticket(name, work=work), one) for name, work in estimates.items()]
    others = [world.wait(world.ticket("c"), one) for _ in range(2 * waits)]
    for grant, cost in zip(grants, (1000, 5), strict=True):
        grant.release(cost)
    if not others:
        for _ in range(2):
            world.start(world.ticket("c"), one)
    tickets = [world.wait(world.ticket(caller), one) for caller in "ab"]
    assert world.order(one) == tickets[::-1]


def test_another_caller_may_still_start_in_time(world: World) -> None:
    slow = world.resource(10, rate=Spaced(world, 5.0), queue_timeout=18.0)
    world.start(world.ticket(), slow)
    for _ in range(3):
        world.wait(world.ticket("noisy"), slow)
    assert world.refused(world.ticket("noisy"), slow).reason is Reason.SLOW
    # Its turn comes before the second one of the other.
    world.wait(world.ticket("quiet"), slow)


def test_a_returning_ticket_is_not_late_because_of_its_callers_others(world: World) -> None:
    rate = Spaced(world, 0.01)
    one = world.resource(10, rate=rate, queue_timeout=30.0)
    world.start(world.ticket(), one)
    for number in range(90):
        world.wait(world.ticket("a", str(number)), one)
    again = world.ticket("a", "again", waited={one: 29.8})
    world.wait(again, Bid(one, front=True))
    world.clock.advance(0.01)
    granted(again)


@pytest.mark.parametrize(("arrived", "refused"), [(1.0, False), (3.0, True)])
def test_a_returning_ticket_is_late_because_of_those_that_came_before_it(
    world: World, arrived: float, *, refused: bool
) -> None:
    one = world.resource(10, rate=Spaced(world, 5.0), queue_timeout=30.0)
    world.start(world.ticket("b"), one)
    for _ in range(3):
        world.wait(world.ticket(arrived=2.0), Bid(one, front=True))
    again = world.ticket(arrived=arrived, waited={one: 19.0})
    if refused:
        assert world.refused(again, Bid(one, front=True)).reason is Reason.SLOW
    else:
        world.wait(again, Bid(one, front=True))


def test_a_lowered_capacity_lets_nobody_in_until_enough_have_left(world: World) -> None:
    one = world.resource(3)
    grants = [world.start(world.ticket(), one) for _ in range(3)]
    world.scheduler.resize(one, 1)
    ticket = world.wait(world.ticket(), one)
    for grant in grants[:2]:
        grant.release()
    assert (ticket.outcome, one.inside) == (None, 1)
    grants[2].release()
    granted(ticket)
