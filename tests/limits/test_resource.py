"""A resource and its scheduler on an event loop: each of the ticks in which a place could get lost."""

from __future__ import annotations

import asyncio
import copy
import random
from typing import TYPE_CHECKING

import pytest

from aioserver.errors import AioserverError, ServerAtCapacity, ServerShutdown
from aioserver.limits.resource import Grant
from aioserver.limits.scheduler import REPORT_INTERVAL
from tests.support import fair_model
from tests.support.clock import FakeClock
from tests.support.fair_model import Job
from tests.support.jumping_loop import block
from tests.support.resources import FULL, LATE, Line
from tests.support.waiting import ticks, until

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

pytestmark = pytest.mark.both_loops


async def waiting(line: Line, caller: Hashable = None) -> asyncio.Task[Grant]:
    """A task that waits at *line*."""
    before = line.resource.waiting
    task = asyncio.create_task(line.enter(caller))
    await until(lambda: line.resource.waiting == before + 1 or task.done())
    return task


def hearing(heard: list[int]) -> Callable[[int, float], None]:
    """Writes the positions down."""

    def hear(position: int, eta: float) -> None:
        assert eta >= 0
        heard.append(position)

    return hear


async def given_up(*tasks: asyncio.Task[Grant]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# One place at a time.


async def test_a_free_place_is_taken_at_once() -> None:
    line = Line(2)

    first, second = line.try_enter(), await line.enter()

    assert first is not None
    assert line.try_enter() is None
    assert line.resource.stats().inside == line.resource.limit == 2
    first.release()
    second.release()
    assert line.resource.stats().inside == 0


async def test_a_place_released_twice_counts_once() -> None:
    line = Line(2)
    first, second = await line.enter(), await line.enter()

    first.release()
    first.release()
    assert line.resource.inside == 1
    second.release()
    assert line.resource.inside == 0


async def test_a_newcomer_cannot_overtake_a_waiter() -> None:
    line = Line()
    place = await line.enter()
    waiter = await waiting(line)

    place.release()  # handed over, though the waiter has not run yet

    assert line.try_enter() is None
    assert line.resource.inside == 1
    (await waiter).release()
    assert line.resource.inside == 0


# Bounds.


async def test_a_full_queue_refuses_at_once() -> None:
    line = Line(queue_size=1)
    place = await line.enter()
    waiter = await waiting(line)

    with pytest.raises(ServerAtCapacity, match=FULL) as caught:
        await line.enter()

    assert caught.value.retry_after is not None
    assert 1.0 <= caught.value.retry_after <= 60.0
    assert line.resource.stats().refused == 1
    assert line.resource.waiting == 1
    await given_up(waiter)
    place.release()


async def test_without_a_timeout_nobody_waits() -> None:
    line = Line(queue_timeout=0)
    place = await line.enter()

    with pytest.raises(ServerAtCapacity, match=FULL):
        await line.enter()

    place.release()
    assert line.resource.inside == 0


async def test_a_wait_ends_at_its_deadline() -> None:
    line = Line(queue_timeout=0.02)
    place = await line.enter()

    with pytest.raises(ServerAtCapacity, match=LATE):
        await line.enter()

    assert line.resource.waiting == 0
    assert line.resource.stats().refused == 1
    place.release()
    assert line.resource.inside == 0


async def test_a_waiter_keeps_the_deadline_it_came_with() -> None:
    line = Line(queue_timeout=0.02)
    place = await line.enter()
    waiter = await waiting(line)

    line.resource.queue_timeout = 600.0
    line.resize(1)

    with pytest.raises(ServerAtCapacity, match=LATE):
        await waiter
    place.release()


@pytest.mark.parametrize("clock", [(1e9, 1e-9), (1e-9, 1e9), (0.0, 0.0), (5.0, -5.0)])
async def test_the_estimate_stays_between_1_and_60_seconds(clock: tuple[float, float]) -> None:
    time = FakeClock()
    line = Line(clock=time)
    for _ in range(20):
        for step in clock:
            (await line.enter()).release()
            time.now += step
            assert 1.0 <= line.resource.retry_after() <= 60.0


async def test_the_estimate_grows_with_the_queue_and_has_jitter() -> None:
    clock = FakeClock()
    line = Line(clock=clock)
    place = await line.enter()
    for _ in range(50):  # a place becomes free every 4 seconds
        clock.now += 4.0
        place.release()
        place = await line.enter()
    waiters = [await waiting(line) for _ in range(4)]

    estimates = {line.resource.retry_after() for _ in range(20)}

    assert len(estimates) > 1
    assert all(19.0 <= estimate <= 31.0 for estimate in estimates)
    await given_up(*waiters)
    place.release()


async def test_an_hour_in_which_nobody_came_does_not_count_as_a_wait_for_a_place() -> None:
    clock = FakeClock()
    line = Line(2, clock=clock)
    for _ in range(20):  # one comes every minute, and there is a place
        (await line.enter()).release()
        clock.now += 60.0
    places = [await line.enter() for _ in range(2)]
    clock.now += 1.0
    places.pop().release()
    places.append(await line.enter())

    assert 1.0 <= line.resource.retry_after() <= 1.5
    for place in places:
        place.release()


@pytest.mark.virtual_time
async def test_the_oldest_wait_is_reported() -> None:
    line = Line()
    place = await line.enter()
    assert line.resource.stats().oldest_wait == 0.0

    first = await waiting(line, "a")
    await asyncio.sleep(2.0)
    second = await waiting(line, "b")
    await asyncio.sleep(3.0)

    assert line.resource.stats().oldest_wait == pytest.approx(5.0, abs=0.1)
    await given_up(first)
    assert line.resource.stats().oldest_wait == pytest.approx(3.0, abs=0.1)
    await given_up(second)
    place.release()


# Order.


async def test_within_one_caller_the_order_is_that_of_coming() -> None:
    line = Line()
    place = await line.enter()
    tasks = [await waiting(line, "a") for _ in range(5)]

    for served in range(5):
        place.release()
        await ticks()

        assert [task.done() for task in tasks] == [number <= served for number in range(5)]
        place = await tasks[served]
    place.release()


async def test_callers_take_turns() -> None:
    line = Line()
    served: list[str] = []

    async def ask(caller: str, name: str) -> None:
        place = await line.enter(caller)
        served.append(name)
        place.release()

    place = await line.enter()
    tasks = []
    for caller, name in (("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1")):
        tasks.append(asyncio.create_task(ask(caller, name)))
        await ticks()
    place.release()
    await asyncio.gather(*tasks)

    assert served == ["a1", "b1", "c1", "a2", "a3"]


async def test_a_caller_with_a_thousand_requests_delays_another_by_one_turn() -> None:
    line = Line()
    place = await line.enter()
    noisy = [asyncio.create_task(line.enter("noisy")) for _ in range(900)]
    await until(lambda: line.resource.waiting == 900)
    quiet = await waiting(line, "quiet")

    place.release()
    place = await noisy[0]
    place.release()

    place = await quiet
    assert not noisy[1].done()
    await given_up(*noisy[1:])
    place.release()
    assert line.resource.inside == line.resource.waiting == 0


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


# Closing, and new bounds.


async def test_waiters_can_be_refused_and_others_may_come() -> None:
    line = Line()
    inside = await line.enter()
    waiters = [await waiting(line, name) for name in "aab"]
    number = iter(range(9))

    line.scheduler.refuse(line.resource, lambda: ServerAtCapacity(f"away {next(number)}"))
    done = await asyncio.gather(*waiters, return_exceptions=True)

    assert sorted(str(outcome) for outcome in done) == ["away 0", "away 1", "away 2"]
    assert (line.resource.waiting, line.resource.inside) == (0, 1)
    later = await waiting(line)
    inside.release()
    (await later).release()


async def test_those_that_go_on_while_the_resource_closes_keep_their_order() -> None:
    line = Line()
    inside = await line.enter()
    order: list[int] = []

    async def goes_on(number: int) -> None:
        place = await line.enter("caller", goes_on=True)
        order.append(number)
        place.release()

    async with asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(goes_on(number))
            await ticks()
        line.scheduler.shut(line.resource, lambda: ServerAtCapacity(LATE), finishes=True)
        inside.release()

    assert order == [0, 1, 2, 3, 4]


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


async def test_a_raised_limit_lets_the_next_in() -> None:
    line = Line(1)
    places = [await line.enter()]
    waiters = [await waiting(line) for _ in range(3)]

    line.resize(3)

    places += [await waiters[0], await waiters[1]]
    assert line.resource.inside == 3
    assert line.resource.waiting == 1
    await given_up(waiters[2])
    for place in places:
        place.release()
    assert line.resource.inside == 0


async def test_a_lowered_limit_lets_nobody_in_until_enough_have_left() -> None:
    line = Line(3)
    places = [await line.enter() for _ in range(3)]
    line.resize(1)
    waiter = await waiting(line)

    for place in places[:2]:
        place.release()
        assert line.try_enter() is None
    await ticks()
    assert not waiter.done()
    assert line.resource.inside == 1

    places[2].release()
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


# Positions.


async def test_a_newcomer_hears_its_position_at_once() -> None:
    line = Line()
    place = await line.enter()
    heard: list[int] = []

    tasks = []
    # In the order of serving: a1 b1 c1 a2 b2 a3.
    for caller in "abbaca":
        tasks.append(asyncio.create_task(line.enter(caller, on_position=hearing(heard))))
        await ticks()

    assert heard == [1, 2, 3, 3, 3, 6]
    await given_up(*tasks)
    place.release()


async def test_positions_are_right_after_leavers_in_the_middle() -> None:
    # Takes a second: so often is the line told where it stands.
    line = Line()
    place = await line.enter()
    heard: dict[int, list[int]] = {number: [] for number in range(5)}
    tasks = []
    for positions in heard.values():
        tasks.append(asyncio.create_task(line.enter(on_position=hearing(positions))))
        await ticks()

    await given_up(tasks[1], tasks[2])
    await until(lambda: len(heard[4]) > 1, REPORT_INTERVAL * 5)

    assert heard == {0: [1], 1: [2], 2: [3], 3: [4, 2], 4: [5, 3]}  # told only what is new
    await given_up(*tasks)
    place.release()


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


# Random steps.


class Model:
    """A resource, as plainly as it can be written: one caller, whose flows share evenly. What has
    started *early* is charged once somebody waits.
    """

    def __init__(self, limit: int, queue_size: int) -> None:
        self.limit, self.queue_size = limit, queue_size
        self.early: list[Job] = []
        self.jobs: dict[int, Job] = {}
        self.fair = fair_model.Model({"": 1})

    @property
    def inside(self) -> set[int]:
        return {job.number for job in (*self.early, *self.fair.running)}

    @property
    def waiting(self) -> list[int]:
        return [job.number for job in self.fair.waiting]

    def enter(self, flow: int, name: int) -> bool:
        """Return whether the request is let in or may wait."""
        job = self.jobs[name] = Job(name, "", flow, 1, 1)
        if not self.waiting and len(self.inside) < self.limit:
            self.early.append(job)
        elif len(self.waiting) >= self.queue_size:
            return False
        else:
            for each in self.early:
                self.fair.start(each)
            self.early.clear()
            self.fair.add(job)
        return True

    def position(self, name: int) -> int:
        fair = copy.deepcopy(self.fair)
        order: list[int] = []
        while fair.waiting:
            order.append(fair.next().number)
            fair.start(fair.next())
        return order.index(name) + 1

    def admit(self) -> None:
        while self.waiting and len(self.inside) < self.limit:
            self.fair.start(self.fair.next())

    def leave(self, name: int) -> None:
        job = self.jobs[name]
        if job in self.early:
            self.early.remove(job)
        else:
            (self.fair.end if job in self.fair.running else self.fair.leave)(job)
        self.admit()


@pytest.mark.parametrize("run", range(6))
async def test_random_steps_agree_with_the_model(run: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    limit, queue_size = dice.randint(1, 4), dice.randint(1, 12)
    line, model = Line(limit, queue_size=queue_size), Model(limit, queue_size)
    resource = line.resource
    tasks: dict[int, asyncio.Task[Grant]] = {}

    for name in range(250):
        match dice.choices(("enter", "leave", "give up", "apply"), (6, 4, 2, 0.3))[0]:
            case "enter":
                flow = dice.randrange(4)
                heard: list[int] = []
                tasks[name] = asyncio.create_task(
                    line.enter("", flow=flow, on_position=hearing(heard))
                )
                if not model.enter(flow, name):
                    with pytest.raises(ServerAtCapacity, match=FULL):
                        await tasks.pop(name)
                await ticks()
                if name in tasks and name not in model.inside:
                    assert heard == [model.position(name)]
            case "leave" if model.inside:
                leaver = dice.choice(sorted(model.inside))
                (await tasks.pop(leaver)).release()
                model.leave(leaver)
            case "give up" if model.waiting:
                leaver = dice.choice(model.waiting)
                await given_up(tasks.pop(leaver))
                model.leave(leaver)
            case "apply":
                model.limit, model.queue_size = dice.randint(1, 6), dice.randint(1, 12)
                resource.queue_size = model.queue_size
                line.resize(model.limit)
                model.admit()
        await ticks()

        assert {name for name, task in tasks.items() if task.done()} == model.inside
        assert (resource.inside, resource.waiting) == (len(model.inside), len(model.waiting))

    for task in tasks.values():
        if task.done():
            (await task).release()
    await given_up(*(task for task in tasks.values() if not task.done()))
    for task in tasks.values():
        if not task.cancelled():
            (await task).release()
    assert resource.inside == resource.waiting == resource.slots == 0


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("run", range(4))
async def test_a_storm_in_which_everybody_may_give_up_at_any_tick_leaves_zero(
    run: int, *, bare: bool
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    limit = dice.randint(1, 5)
    line = Line(limit, queue_size=40, queue_timeout=dice.choice((30.0, 0.003)), bare=bare)
    most = 0

    async def client() -> None:
        await ticks(dice.randint(0, 3))
        try:
            place = await line.enter(dice.choice("abc"))
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
        assert not line.resource.waiting or line.resource.inside == limit
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
