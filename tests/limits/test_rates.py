"""A rate beside the places: who starts by it, who is too late for it, and what it is charged."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.errors import ServerAtCapacity
from tests.support.resources import SLOW, Line
from tests.support.waiting import ticks, until

if TYPE_CHECKING:
    from collections.abc import Hashable

    from aioserver.limits.resource import Grant


class Steps:
    """A rate that lets as many start as a test says."""

    def __init__(self, free: int = 0, step: float = 0.005) -> None:
        self.free, self.step, self.started = free, step, 0
        self.costs: list[int] = []

    def delay(self, _cost: int, ahead: int = 0) -> float:
        return 0.0 if ahead < self.free else self.step * (ahead + 1 - self.free)

    def try_take(self, cost: int) -> object:
        if self.free <= 0:
            return None
        self.free -= 1
        self.started += 1
        self.costs.append(cost)
        return (cost,)

    def settle(self, taken: object, spent: int | None) -> None:
        assert isinstance(taken, tuple)
        self.costs.append((spent or 0) - taken[0])


def paced(rate: Steps, limit: int = 10, **options: Any) -> Line:
    return Line(limit, queue_size=100, rate=rate, **options)


async def waiting(line: Line, caller: Hashable = None, **options: Any) -> asyncio.Task[Grant]:
    """A task that waits at *line*."""
    before = line.resource.waiting
    task = asyncio.create_task(line.enter(caller, **options))
    await until(lambda: line.resource.waiting == before + 1 or task.done())
    return task


async def given_up(*tasks: asyncio.Task[Grant]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_free_place_is_not_enough_where_the_pace_is_slow() -> None:
    rate = Steps(free=1)
    line = paced(rate)

    first = line.try_enter()
    assert first is not None
    assert line.try_enter() is None
    waiter = await waiting(line)
    rate.free = 1
    place = await waiter

    assert rate.started == 2
    assert line.resource.inside == 2
    first.release()
    place.release()
    assert line.resource.inside == 0


async def test_nobody_overtakes_a_waiter_for_the_pace() -> None:
    rate = Steps()
    line = paced(rate)
    waiter = await waiting(line)
    rate.free = 1

    assert line.try_enter() is None  # the next start is the waiter's
    (await waiter).release()
    assert rate.started == 1


async def test_a_place_that_becomes_free_waits_for_the_pace() -> None:
    rate = Steps(free=1)
    line = paced(rate, limit=1)
    first = await line.enter()
    waiter = await waiting(line)

    first.release()
    await ticks()
    assert not waiter.done()
    assert line.resource.inside == 0
    rate.free = 1

    (await waiter).release()


async def test_a_request_that_cannot_start_in_time_is_refused_at_once() -> None:
    line = paced(Steps(step=5.0), queue_timeout=12.0)
    waiters = [await waiting(line) for _ in range(2)]

    with pytest.raises(ServerAtCapacity, match=SLOW) as raised:
        await line.enter()

    assert raised.value.retry_after == pytest.approx(15.0)
    assert line.resource.waiting == 2
    assert line.resource.stats().refused == 1
    await given_up(*waiters)


async def test_another_caller_may_still_start_in_time() -> None:
    line = paced(Steps(step=5.0), queue_timeout=18.0)
    noisy = [await waiting(line, "noisy") for _ in range(3)]

    with pytest.raises(ServerAtCapacity, match=SLOW):
        await line.enter("noisy")
    other = await waiting(line, "quiet")  # its turn comes before the noisy one's second

    assert not other.done()
    await given_up(*noisy, other)


async def test_a_returning_waiter_is_not_late_because_of_its_callers_others() -> None:
    rate = Steps(free=1)
    line = paced(rate)
    first = line.try_enter()
    assert first is not None
    others = [asyncio.create_task(line.enter("a", flow=flow)) for flow in range(90)]
    await until(lambda: line.resource.waiting == len(others))

    again = await waiting(line, "a", flow="again", front=True, waited=29.6)
    rate.free = 1
    line.serve()

    (await again).release()
    first.release()
    await given_up(*others)


@pytest.mark.parametrize(("arrived", "refused"), [(1.0, False), (3.0, True)])
async def test_a_returning_waiter_is_late_because_of_those_that_came_before_it(
    arrived: float, *, refused: bool
) -> None:
    line = paced(Steps(step=5.0))
    others = [await waiting(line, "a", front=True, arrived=2.0) for _ in range(3)]

    again = await waiting(line, "a", front=True, arrived=arrived, waited=19.0)

    assert again.done() is refused
    await given_up(*others, again)


@pytest.mark.parametrize("run", range(5))
async def test_random_leavers_leave_no_start_behind(run: int) -> None:
    dice = random.Random(run)
    rate = Steps()
    line = paced(rate, limit=3)
    inside: list[Grant] = []

    async def leaving() -> None:
        inside.append(await line.enter(dice.randrange(3), cost=1))

    tasks = [asyncio.create_task(leaving()) for _ in range(40)]
    while not all(task.done() for task in tasks):
        if dice.random() < 0.4:
            rate.free += 1
        if dice.random() < 0.3:
            dice.choice(tasks).cancel()
        if inside and dice.random() < 0.5:
            inside.pop(dice.randrange(len(inside))).release()
        line.serve()
        await ticks()
        assert line.resource.inside <= 3
    for place in inside:
        place.release()
    assert (line.resource.inside, line.resource.waiting) == (0, 0)
    # Those of waiters that left in the very turn of the loop in which they were let in are taken
    # back.
    assert sum(rate.costs) == sum(not task.cancelled() for task in tasks)


async def test_a_cost_is_reported_when_its_start_is_taken() -> None:
    rate = Steps(free=1)
    line = paced(rate)
    first = line.try_enter(cost=7)
    assert first is not None
    waiter = await waiting(line, cost=9)
    rate.free = 1
    line.serve()

    place = await waiter
    assert rate.costs == [7, 9]
    first.release()
    place.release(spent=12)
    assert rate.costs == [7, 9, 3]


async def test_a_cost_is_given_back_where_its_place_is() -> None:
    rate = Steps(free=1)
    line = paced(rate, limit=1)
    first = line.try_enter()
    assert first is not None
    waiter = await waiting(line, cost=9)
    rate.free = 1

    first.release()  # hands the place to the waiter …
    waiter.cancel()  # … which gives up before it runs again
    with pytest.raises(asyncio.CancelledError):
        await waiter

    assert (line.resource.inside, rate.costs) == (0, [0, 9, -9])
