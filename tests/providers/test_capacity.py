"""The capacity of a provider: what those who wait are told while it is away, how they are counted,
whom its pace refuses, and the part for the background.
"""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.limits.fair_queue import BATCH
from aioserver.limits.gcra import ROUNDING
from aioserver.limits.resource import Bid, Grant, Ticket
from aioserver.limits.scheduler import Scheduler
from aioserver.provider_errors import (
    CircuitOpen,
    NoProvider,
    ProviderFault,
    ProviderFlagged,
    ProviderPaced,
)
from aioserver.providers.breaker import MAX_TRIALS, TRIAL_INTERVAL
from aioserver.providers.capacity import FAILOVER_WAIT, Capacity, Pace, ProviderRate
from aioserver.providers.health import Health
from aioserver.telemetry.metrics import ProviderMeter
from tests.support.clock import FakeClock
from tests.support.failing import kill
from tests.support.scripted_provider import LIMITS
from tests.support.waiting import ticks

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.limits.resource import PositionCallback

pytestmark = pytest.mark.virtual_time


class Place:
    """A provider's capacity and its scheduler, in the time of the loop."""

    def __init__(self, **limits: Any) -> None:
        loop = asyncio.get_running_loop()
        self.scheduler = Scheduler(loop)
        self.health = Health("far", ProviderMeter(), loop.time)
        self.capacity = Capacity(
            "far",
            replace(LIMITS, **limits),
            self.health,
            self.scheduler,
            loop.time,
        )

    @property
    def waiting(self) -> int:
        return self.capacity.waiting

    def kill(self) -> None:
        """Let it be dead, since it cannot be reached."""
        kill(self.health.breaker, unreachable=True, clock=self.scheduler.time)

    def stop_trials(self) -> None:
        """Let no trial start."""
        for _ in range(MAX_TRIALS):
            self.health.breaker.start()

    def wait(
        self,
        *,
        waited: float = 0.0,
        parked: float = 0.0,
        movable: bool = False,
        background: bool = False,
        on_position: PositionCallback | None = None,
        **options: Any,
    ) -> tuple[Ticket, Bid]:
        """A ticket that waits, and its bid."""
        part = self.capacity.part(background=background)
        ticket = Ticket("caller", **options)
        if waited:
            ticket.waited = {part: waited}
        bid = Bid(part, movable=movable)
        if parked:
            bid.parked, bid.not_before = True, self.scheduler.time() + parked
        assert self.scheduler.enter(ticket, [bid], on_position) is None
        return ticket, bid

    def leave(self, *tickets: Ticket) -> None:
        for ticket in tickets:
            self.scheduler.close(ticket)


def place_in(state: str) -> Place:
    """The capacity of a provider in one of the states that health.py names."""
    place = Place()
    place.health.reset(new_address=False, new_key=False, waits=state != "dead")
    if state == "cooling":
        place.capacity.cool_down(2 * FAILOVER_WAIT)
    elif state != "well":
        place.kill()
    if state == "flagged":
        place.health.flagged_until = place.scheduler.time() + 60.0
    elif state == "removed":
        place.health.remove()
    return place


@pytest.mark.parametrize(
    ("state", "fault", "movable_fault"),
    [
        ("well", None, None),
        ("cooling", None, ProviderPaced),
        ("away", None, CircuitOpen),
        ("dead", CircuitOpen, CircuitOpen),
        ("flagged", ProviderFlagged, ProviderFlagged),
        ("removed", NoProvider, NoProvider),
    ],
)
async def test_each_state_of_a_provider_says_who_is_refused(
    state: str, fault: type[ProviderFault] | None, movable_fault: type[ProviderFault] | None
) -> None:
    capacity = place_in(state).capacity

    for movable, refusal in ((False, fault), (True, movable_fault)):
        with nullcontext() if refusal is None else pytest.raises(refusal):
            capacity.check(movable=movable)

    assert capacity.well == (state == "well")


def hearing(heard: list[tuple[int, float]]) -> Callable[[object, int, float], None]:
    return lambda _resource, position, eta: heard.append((position, eta))


async def test_positions_say_when_the_next_trial_is_and_no_less_than_a_refusal_beyond() -> None:
    place = Place()
    place.kill()
    positions: list[tuple[int, float]] = []

    tickets = [place.wait(on_position=hearing(positions))[0] for _ in range(2)]

    assert positions == [(1, pytest.approx(TRIAL_INTERVAL, abs=0.01)), (2, 1.0)]
    assert 1.0 <= place.capacity.resource.retry_after() <= 1.5
    place.leave(*tickets)


async def test_a_position_while_no_trial_may_start_is_no_promise() -> None:
    place = Place()
    place.kill()
    place.stop_trials()
    positions: list[tuple[int, float]] = []

    ticket, _ = place.wait(on_position=hearing(positions))

    assert positions == [(1, 1.0)]
    place.leave(ticket)


async def test_the_oldest_wait_is_reported_while_requests_are_parked() -> None:
    place = Place(queue_timeout=600.0)
    place.kill()
    place.stop_trials()
    parked = [place.wait(parked=60.0)[0], place.wait(parked=60.0, waited=2.0)[0]]
    queueing, _ = place.wait(waited=1.0)
    assert place.waiting == 3

    await asyncio.sleep(3.0)

    assert place.capacity.stats().oldest_wait == pytest.approx(5.0, abs=0.1)
    place.leave(*parked)
    assert place.capacity.stats().oldest_wait == pytest.approx(4.0, abs=0.1)
    place.leave(queueing)


async def test_requests_that_are_refused_while_they_are_parked_are_counted() -> None:
    place = Place(queue_timeout=600.0)
    place.kill()
    tickets = [place.wait(parked=60.0)[0], place.wait()[0], place.wait(parked=60.0)[0]]

    place.capacity.refuse(place.health.refusal)

    assert {type(ticket.outcome) for ticket in tickets} == {CircuitOpen}
    assert len({id(ticket.outcome) for ticket in tickets}) == 3, "each has one of its own"
    assert place.capacity.stats().refused == 3


@pytest.mark.parametrize("hears", [True, False])
async def test_a_trial_keeps_its_room_from_the_hand_over_until_it_comes_back_no_more(
    *, hears: bool
) -> None:
    place = Place(queue_size=1)
    place.kill()
    place.stop_trials()
    ticket, bid = place.wait()
    assert bid.resource.room("") == 0

    place.health.breaker.unsure(trial=True)
    await asyncio.sleep(TRIAL_INTERVAL)
    place.scheduler.serve(bid.resource)

    assert (place.waiting, bid.resource.room("")) == (0, 0)
    if hears:
        grant = await place.scheduler.granted(ticket)
        assert bid.resource.room("") == 0
        ticket.free_slot()
        grant.release()
    else:
        place.scheduler.leave(ticket)
    assert (place.capacity.inside, bid.resource.room("")) == (0, 1)


async def test_a_trial_is_told_to_the_breaker_though_nobody_has_heard_of_its_start() -> None:
    place = Place()
    place.kill()
    ticket, _ = place.wait()
    await asyncio.sleep(TRIAL_INTERVAL)
    assert isinstance(ticket.outcome, Grant)

    place.leave(ticket)

    for _ in range(MAX_TRIALS):
        assert place.health.breaker.delay() < float("inf")
        place.health.breaker.start()


async def test_both_classes_wait_as_long_for_a_place_in_the_background() -> None:
    place = Place(queue_timeout=30.0)
    inside = [place.capacity.resource.try_start(Ticket()) for _ in range(place.capacity.places[1])]
    part = place.capacity.part(background=True)
    half = [part.try_start(Ticket()) for _ in range(part.limit)]
    assert None not in inside
    assert half == [None] * part.limit
    now = place.scheduler.time()

    waits = [
        place.wait(background=background, kind=kind)
        for background in (True, False)
        for kind in ("", BATCH)
    ]

    seconds = [round(bid.until - now) for _, bid in waits]
    assert seconds == [300, 300, 30, 300]
    place.leave(*(ticket for ticket, _ in waits))


async def test_places_in_the_background_are_fair_by_work() -> None:
    place = Place()
    part = place.capacity.part(background=True)
    inside = [part.try_start(Ticket()) for _ in range(part.limit)]
    order: list[str] = []

    async def wait(caller: str, work: int) -> None:
        grant = await place.scheduler.wait(Ticket(caller, work=work), [Bid(part)])
        order.append(caller)
        grant.release(work)

    tasks = [
        asyncio.create_task(wait(caller, work))
        for caller, work in [("long", 500), ("short", 10), *[("short", 10)] * 8, ("long", 500)]
    ]
    await ticks()
    assert part.waiting == len(tasks)
    for grant in inside:
        assert grant is not None
        grant.release()
    await asyncio.gather(*tasks)

    assert order == ["long", *["short"] * 9, "long"]


async def test_a_rest_of_the_pace_tells_those_whom_it_makes_too_late() -> None:
    place = Place(queue_timeout=30.0)
    capacity = place.capacity
    inside = [capacity.resource.try_start(Ticket()) for _ in range(capacity.places[1])]
    patient, _ = place.wait()
    hasty, _ = place.wait(waited=25.0)
    movable, _ = place.wait(movable=True)

    capacity.told_cooling(FAILOVER_WAIT / 2)  # not so long that anybody goes elsewhere
    assert place.waiting == 3
    capacity.told_cooling(10.0)

    for ticket in (hasty, movable):
        assert isinstance(ticket.outcome, ProviderPaced)
        assert ticket.outcome.retry_after is not None
        assert 9.0 <= ticket.outcome.retry_after <= 12.0
    assert (patient.outcome, place.waiting, capacity.stats().refused) == (None, 1, 2)
    place.leave(patient)
    for grant in inside:
        assert grant is not None
        grant.release()


def test_a_wait_that_only_rounding_has_made_is_none() -> None:
    # A timer may come so much too early. Another one would be due at once, over and over.
    clock = FakeClock()
    pace = Pace(60, 1, clock)
    rate = ProviderRate(pace, Health("far", ProviderMeter(), clock))
    assert rate.try_take(0) is True
    assert rate.try_take(0) is None
    clock.now += pace.delay() - ROUNDING / 2

    assert rate.try_take(0) is True
