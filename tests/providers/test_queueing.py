"""The queue of a provider that is away: what those who wait are told, and how they are counted."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.provider_errors import CircuitOpen
from aioserver.providers.breaker import MAX_TRIALS, TRIAL_INTERVAL
from aioserver.providers.health import Health
from aioserver.providers.queueing import ProviderGate
from aioserver.telemetry.metrics import ProviderMeter
from tests.support.clock import FakeClock
from tests.support.failing import kill
from tests.support.scripted_provider import LIMITS
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def health(clock: FakeClock) -> Health:
    """The health of a provider that is dead, since it cannot be reached."""
    health = Health("far", ProviderMeter(), clock)
    kill(health.breaker, unreachable=True, clock=clock)
    return health


@pytest.fixture
def gate(health: Health, clock: FakeClock) -> ProviderGate:
    return ProviderGate("far", LIMITS, health, clock)


async def waiting(
    gate: ProviderGate, *requests: Coroutine[None, None, object]
) -> list[asyncio.Task[object]]:
    """Start *requests*, and return when all wait."""
    tasks = [asyncio.create_task(request) for request in requests]
    await until(lambda: gate.waiting == len(tasks))
    return tasks


async def given_up(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_positions_say_when_the_next_trial_is_and_no_less_than_a_refusal_beyond(
    gate: ProviderGate,
) -> None:
    positions: list[tuple[int, float]] = []

    def on_position(position: int, eta: float) -> None:
        positions.append((position, eta))

    tasks = await waiting(
        gate, gate.enter(on_position=on_position), gate.enter(on_position=on_position)
    )
    await given_up(tasks)

    assert positions == [(1, TRIAL_INTERVAL), (2, 1.0)]
    assert 1.0 <= gate.retry_after() <= 1.5


async def test_a_position_while_no_trial_may_start_is_no_promise(
    gate: ProviderGate, health: Health
) -> None:
    positions: list[float] = []
    for _ in range(MAX_TRIALS):
        health.breaker.start()

    tasks = await waiting(
        gate, gate.enter(on_position=lambda _position, eta: positions.append(eta))
    )
    await given_up(tasks)

    assert positions == [1.0]


async def test_the_oldest_wait_is_reported_while_requests_are_parked(
    gate: ProviderGate, health: Health, clock: FakeClock
) -> None:
    for _ in range(MAX_TRIALS):
        health.breaker.start()  # so that nobody starts
    parked = await waiting(gate, gate.park(60.0), gate.park(60.0, waited=2.0))
    queueing = [asyncio.create_task(gate.enter(waited=1.0))]
    await until(lambda: gate.waiting == 3)

    clock.now += 3.0

    assert gate.stats().oldest_wait == 5.0
    await given_up(parked)
    assert gate.stats().oldest_wait == 4.0
    await given_up(queueing)


async def test_requests_that_are_refused_while_they_are_parked_are_counted(
    gate: ProviderGate, health: Health
) -> None:
    tasks = await waiting(gate, gate.park(60.0), gate.enter(), gate.park(60.0))

    gate.refuse_waiting(health.refusal)

    refused = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(refusal) for refusal in refused} == {CircuitOpen}
    assert gate.stats().refused == 3


async def test_a_waiter_keeps_its_room_until_its_task_hears_of_its_trial(
    health: Health, clock: FakeClock
) -> None:
    gate = ProviderGate("far", replace(LIMITS, queue_size=1), health, clock)
    for _ in range(MAX_TRIALS):
        health.breaker.start()  # so that nobody starts
    (task,) = await waiting(gate, gate.enter())
    assert gate.full

    health.breaker.unsure(trial=True)
    clock.now += TRIAL_INTERVAL
    gate.serve()

    assert (gate.waiting, gate.full) == (0, True)
    place: Any = await task
    assert not gate.full, "from now on its attempt keeps the room"
    place.release()


async def test_both_classes_wait_as_long_for_a_permit(gate: ProviderGate) -> None:
    permits = gate.permits

    assert permits.time_left(1.0, room=True, batch=True) == permits.time_left(1.0, room=True)
    assert gate.time_left(1.0, room=True, batch=True) > gate.time_left(1.0, room=True)


async def test_permits_are_fair_by_work(gate: ProviderGate) -> None:
    permits = gate.permits
    inside = [permits.try_enter() for _ in range(permits.limit)]
    order: list[str] = []

    async def wait(caller: str, work: int) -> None:
        place = await permits.enter(caller, work=work)
        order.append(caller)
        place.release(work)

    tasks = [
        asyncio.create_task(wait(caller, work))
        for caller, work in [("long", 500), ("short", 10), *[("short", 10)] * 8, ("long", 500)]
    ]
    await until(lambda: permits.waiting == len(tasks))
    for place in inside:
        assert place is not None
        place.release()
    await asyncio.gather(*tasks)

    assert order == ["long", *["short"] * 9, "long"]
