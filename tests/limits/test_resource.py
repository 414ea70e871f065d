"""A resource and its scheduler on an event loop: each of the ticks in which a place could get lost."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.errors import AioserverError, ServerAtCapacity, ServerShutdown
from aioserver.limits.resource import BOTH_CLASSES, Grant
from tests.support.jumping_loop import block
from tests.support.resources import Line
from tests.support.waiting import ticks, until

if TYPE_CHECKING:
    from collections.abc import Hashable

pytestmark = pytest.mark.both_loops


async def waiting(line: Line, caller: Hashable = None) -> asyncio.Task[Grant]:
    """A task that waits at *line*."""
    before = line.resource.waiting
    task = asyncio.create_task(line.enter(caller))
    await until(lambda: line.resource.waiting == before + 1 or task.done())
    return task


async def given_up(*tasks: asyncio.Task[Grant]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_waiter_that_gives_up_leaves_the_turn_to_its_caller() -> None:
    line = Line()
    place = await line.enter()
    a1, a2 = await waiting(line, "a"), await waiting(line, "a")
    b1 = await waiting(line, "b")

    a1.cancel()
    place.release()  # in the same tick: a1 still stands in the line

    place = await a2
    assert not b1.done()
    await given_up(a1, b1)
    place.release()
    assert line.resource.inside == line.resource.waiting == 0


# The ticks in which a place could get lost.


async def test_place_handed_over_in_the_tick_of_cancellation_is_passed_on() -> None:
    line = Line()
    place = await line.enter()
    first, second = await waiting(line), await waiting(line)

    place.release()  # hands the place to the first …
    first.cancel()  # … which gives up before it runs again
    with pytest.raises(asyncio.CancelledError):
        await first

    (await second).release()
    assert line.resource.inside == line.resource.waiting == 0


async def test_place_freed_in_the_tick_after_cancellation_goes_to_the_next() -> None:
    line = Line()
    place = await line.enter()
    first, second = await waiting(line), await waiting(line)

    first.cancel()
    place.release()

    (await second).release()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert line.resource.inside == line.resource.waiting == 0


@pytest.mark.parametrize("freed_first", [True, False])
async def test_place_handed_over_in_the_tick_of_the_deadline_is_not_lost(
    freed_first: bool,
) -> None:
    line = Line(queue_timeout=0.01)
    loop = asyncio.get_running_loop()
    place = await line.enter()
    if freed_first:
        loop.call_later(0.005, place.release)
    waiter = await waiting(line)
    if not freed_first:
        loop.call_later(0.012, place.release)
    block(0.02)  # both timers become due in one turn of the loop

    (outcome,) = await asyncio.gather(waiter, return_exceptions=True)

    if isinstance(outcome, Grant):
        outcome.release()
    else:
        assert isinstance(outcome, ServerAtCapacity)
    await until(lambda: line.resource.inside == 0)
    assert line.resource.waiting == 0
    (await line.enter()).release()


async def test_a_task_cancelled_before_its_first_step_holds_nothing() -> None:
    line = Line()
    task = asyncio.create_task(line.enter())
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task

    assert line.resource.inside == line.resource.waiting == 0


async def test_a_place_held_for_a_leaver_goes_back_when_the_queue_is_empty() -> None:
    line = Line()
    place = await line.enter()
    tasks = [await waiting(line) for _ in range(10)]

    for task in tasks:
        task.cancel()
    place.release()  # ten stand in the line, nobody wants the place

    assert line.resource.inside == line.resource.waiting == 0
    assert line.try_enter() is not None
    await given_up(*tasks)
    assert line.resource.inside == 1


class Starts:
    """A rate that lets *free* tickets start, and adds up what they cost."""

    def __init__(self, free: int) -> None:
        self.free, self.costs = free, 0

    def delay(self, _cost: int, ahead: int = 0) -> float:
        return 0.0 if ahead < self.free else 0.005

    def try_take(self, cost: int) -> object:
        if self.free <= 0:
            return None
        self.free -= 1
        self.costs += cost
        return (cost,)

    def settle(self, taken: object, spent: int | None) -> None:
        assert isinstance(taken, tuple)
        self.costs += (spent or 0) - taken[0]


async def test_a_cost_is_given_back_where_its_place_is() -> None:
    rate = Starts(1)
    line = Line(rate=rate)
    first = line.try_enter(cost=7)
    assert first is not None
    waiter = asyncio.create_task(line.enter(cost=9))
    await until(lambda: line.resource.waiting == 1)
    rate.free = 1

    first.release(spent=8)  # hands the place to the waiter …
    assert rate.costs == 8 + 9
    waiter.cancel()  # … which gives up before it runs again
    with pytest.raises(asyncio.CancelledError):
        await waiter

    assert (line.resource.inside, rate.costs) == (0, 8)


# Closing, and new bounds.


async def test_close_refuses_waiters_and_newcomers() -> None:
    line = Line()
    place = await line.enter()
    waiters = [await waiting(line, caller) for caller in "aab"]

    line.close(lambda: ServerShutdown("the server is stopping"))

    for waiter in waiters:
        with pytest.raises(ServerShutdown):
            await waiter
    with pytest.raises(ServerShutdown):
        await line.enter()
    place.release()
    assert line.try_enter() is None
    assert line.resource.inside == line.resource.waiting == 0


async def test_close_in_the_tick_of_cancellation_leaves_no_lost_exception() -> None:
    line = Line()
    place = await line.enter()
    waiter = await waiting(line)

    line.close(lambda: ServerShutdown("the server is stopping"))
    waiter.cancel()

    with pytest.raises((asyncio.CancelledError, ServerShutdown)):
        await waiter
    place.release()
    assert line.resource.inside == 0


async def test_giving_up_in_the_tick_of_the_close_is_no_trouble() -> None:
    line = Line()
    place = await line.enter()
    first, second = await waiting(line), await waiting(line)

    first.cancel()
    line.close(lambda: ServerShutdown("the server is stopping"))

    with pytest.raises(asyncio.CancelledError):
        await first
    with pytest.raises(ServerShutdown):
        await second
    place.release()
    assert line.resource.inside == line.resource.waiting == 0


async def test_a_place_handed_over_before_the_close_is_kept() -> None:
    line = Line()
    place = await line.enter()
    waiter = await waiting(line)

    place.release()
    line.close(lambda: ServerShutdown("the server is stopping"))

    (await waiter).release()
    assert line.resource.inside == 0


async def test_a_limit_raised_for_a_queue_of_leavers_invents_no_place() -> None:
    line = Line(1)
    place = await line.enter()
    waiters = [await waiting(line) for _ in range(3)]
    for waiter in waiters:
        waiter.cancel()

    line.resize(5)

    assert line.resource.inside == 1
    await given_up(*waiters)
    place.release()
    assert line.resource.inside == line.resource.waiting == 0


async def test_a_waiter_whose_callback_raises_does_not_stay_in_the_queue() -> None:
    line = Line()
    place = await line.enter()

    def hear(position: int, eta: float) -> None:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await line.enter(on_position=hear)

    assert line.resource.waiting == 0
    place.release()
    assert line.resource.inside == 0


@pytest.mark.parametrize(
    "options",
    [{}, {"bare": True}, {"classes": BOTH_CLASSES}],
    ids=["one class", "bare", "both classes"],
)
@pytest.mark.parametrize("queue_timeout", [30.0, 0.003])
async def test_a_storm_in_which_everybody_may_give_up_at_any_tick_leaves_zero(
    queue_timeout: float, options: dict[str, Any]
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    limit = dice.randint(1, 5)
    line = Line(limit, queue_size=40, queue_timeout=queue_timeout, **options)
    kinds = ("", "batch") if "classes" in options else ("",)
    most = 0

    async def client() -> None:
        await ticks(dice.randint(0, 3))
        try:
            place = await line.enter(dice.choice("abc"), kind=dice.choice(kinds))
        except AioserverError:
            return
        try:
            nonlocal most
            most = max(most, line.resource.inside)
            await ticks(dice.randint(0, 3))
        finally:
            place.release()
            if dice.random() < 0.3:
                place.release()

    tasks: list[asyncio.Task[None]] = []
    for _ in range(300):
        tasks += [asyncio.create_task(client()) for _ in range(dice.randint(0, 5))]
        for task in tasks:
            if dice.random() < 0.02:
                task.cancel()
        if dice.random() < 0.5:
            await asyncio.sleep(0)
        assert line.resource.inside <= limit
        assert line.resource.next() is None, "nobody waits while a place is free"
        tasks = [task for task in tasks if not task.done()]
    for task in tasks:
        if dice.random() < 0.5:
            task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)

    assert all(
        outcome is None or isinstance(outcome, asyncio.CancelledError) for outcome in outcomes
    )
    assert most <= limit
    assert line.resource.inside == line.resource.waiting == 0
    places = [line.try_enter() for _ in range(limit)]
    assert None not in places
    assert line.try_enter() is None
