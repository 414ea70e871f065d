"""The gate against a simple model, and each of the ticks in which a place could get lost."""

from __future__ import annotations

import asyncio
import copy
import random
import time
from typing import TYPE_CHECKING

import pytest

from aioserver.errors import ServerAtCapacity
from aioserver.limits.gate import Gate, Place
from tests.support import fair_model
from tests.support.fair_model import Job
from tests.support.waiting import ticks, until

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

FULL, LATE = "the line is full", "waited too long"


def gate_of(
    limit: int = 1,
    queue_size: int = 1000,
    queue_timeout: float = 30.0,
    clock: Callable[[], float] | None = None,
) -> Gate:
    return Gate(
        limit,
        queue_size=queue_size,
        queue_timeout=queue_timeout,
        full_error=lambda wait: ServerAtCapacity(FULL, retry_after=wait),
        timeout_error=lambda wait: ServerAtCapacity(LATE, retry_after=wait),
        clock=clock or time.monotonic,
    )


async def waiting(gate: Gate, caller: Hashable = None) -> asyncio.Task[Place]:
    """A task that waits at *gate*."""
    before = gate.waiting
    task = asyncio.create_task(gate.enter(caller))
    await until(lambda: gate.waiting == before + 1 or task.done())
    return task


def hearing(heard: list[int]) -> Callable[[int, float], None]:
    """Writes the positions down."""

    def hear(position: int, eta: float) -> None:
        assert eta >= 0
        heard.append(position)

    return hear


async def given_up(*tasks: asyncio.Task[Place]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# Random steps.


class Model:
    """The gate, as plainly as it can be written: one caller, whose flows share evenly. What has
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
    gate, model = gate_of(limit, queue_size), Model(limit, queue_size)
    tasks: dict[int, asyncio.Task[Place]] = {}

    for name in range(250):
        match dice.choices(("enter", "leave", "give up", "apply"), (6, 4, 2, 0.3))[0]:
            case "enter":
                flow = dice.randrange(4)
                heard: list[int] = []
                tasks[name] = asyncio.create_task(gate.enter("", flow, on_position=hearing(heard)))
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
                gate.apply(model.limit, queue_size=model.queue_size, queue_timeout=30.0)
                model.admit()
        await ticks()

        assert {name for name, task in tasks.items() if task.done()} == model.inside
        assert (gate.inside, gate.waiting) == (len(model.inside), len(model.waiting))

    for task in tasks.values():
        if task.done():
            (await task).release()
    await given_up(*(task for task in tasks.values() if not task.done()))
    for task in tasks.values():
        if not task.cancelled():
            (await task).release()
    assert gate.inside == gate.waiting == 0


# A pace beside the places.


class Steps:
    """A pace that lets as many start as a test says."""

    def __init__(self, free: int = 0, step: float = 0.005) -> None:
        self.free = free
        self.step = step
        self.started = 0
        self.costs: list[int] = []

    def delay(self, ahead: int = 0) -> float:
        return 0.0 if ahead < self.free else self.step * (ahead + 1 - self.free)

    def start(self, cost: int = 0) -> None:
        assert self.free > 0
        self.costs.append(cost)
        self.free -= 1
        self.started += 1

    def charge(self, cost: int) -> None:
        self.costs.append(cost)


def paced_gate(pace: Steps, limit: int = 10, *, queue_timeout: float = 30.0) -> Gate:
    return Gate(
        limit,
        queue_size=100,
        queue_timeout=queue_timeout,
        full_error=lambda wait: ServerAtCapacity(FULL, retry_after=wait),
        timeout_error=lambda wait: ServerAtCapacity(LATE, retry_after=wait),
        pace=pace,
        pace_error=lambda wait: ServerAtCapacity(PACED, retry_after=wait),
    )


PACED = "the pace is too slow"


async def test_a_free_place_is_not_enough_where_the_pace_is_slow() -> None:
    pace = Steps(free=1)
    gate = paced_gate(pace)

    first = gate.try_enter()
    assert first is not None
    assert gate.try_enter() is None
    waiter = await waiting(gate)
    pace.free = 1
    place = await waiter

    assert pace.started == 2
    assert gate.inside == 2
    first.release()
    place.release()
    assert gate.inside == 0


async def test_a_wait_that_only_rounding_has_made_is_none() -> None:
    # A timer may come so much too early. Another one would be due at once, over and over.
    pace = Steps(step=60.0)
    gate = paced_gate(pace, queue_timeout=90.0)
    waiter = await waiting(gate)
    pace.free, pace.delay = 1, lambda ahead=0: 1e-13  # type: ignore[method-assign]

    gate.serve()

    (await waiter).release()
    assert pace.started == 1


async def test_nobody_overtakes_a_waiter_for_the_pace() -> None:
    pace = Steps()
    gate = paced_gate(pace)
    waiter = await waiting(gate)
    pace.free = 1

    assert gate.try_enter() is None  # the next start is the waiter's
    (await waiter).release()
    assert pace.started == 1


async def test_a_place_that_becomes_free_waits_for_the_pace() -> None:
    pace = Steps(free=1)
    gate = paced_gate(pace, limit=1)
    first = await gate.enter()
    waiter = await waiting(gate)

    first.release()
    await ticks()
    assert not waiter.done()
    assert gate.inside == 0
    pace.free = 1

    (await waiter).release()


async def test_a_request_that_cannot_start_in_time_is_refused_at_once() -> None:
    gate = paced_gate(Steps(step=5.0), queue_timeout=12.0)
    waiters = [await waiting(gate) for _ in range(2)]

    with pytest.raises(ServerAtCapacity, match=PACED) as raised:
        await gate.enter()

    assert raised.value.retry_after == pytest.approx(15.0)
    assert gate.waiting == 2
    assert gate.stats().refused == 1
    await given_up(*waiters)


async def test_another_caller_may_still_start_in_time() -> None:
    gate = paced_gate(Steps(step=5.0), queue_timeout=18.0)
    noisy = [await waiting(gate, "noisy") for _ in range(3)]

    with pytest.raises(ServerAtCapacity, match=PACED):
        await gate.enter("noisy")
    other = await waiting(gate, "quiet")  # its turn comes before the noisy one's second

    assert not other.done()
    await given_up(*noisy, other)


async def test_a_rest_of_the_pace_tells_those_whom_it_makes_too_late() -> None:
    pace = Steps()
    gate = paced_gate(pace, queue_timeout=30.0)
    patient = await waiting(gate)
    hasty = asyncio.create_task(gate.enter(waited=25.0))
    other = asyncio.create_task(gate.enter(may_fail_over=True))
    await until(lambda: gate.waiting == 3)

    pace.delay = lambda ahead=0: 10.0 + ahead  # type: ignore[method-assign]
    gate.refuse_late(failover_wait=20.0)  # not so long that one goes elsewhere
    with pytest.raises(ServerAtCapacity, match=PACED) as raised:
        await hasty
    assert raised.value.retry_after == 10.0
    assert (other.done(), gate.waiting, gate.stats().refused) == (False, 2, 1)
    gate.refuse_late(failover_wait=1.0)
    with pytest.raises(ServerAtCapacity, match=PACED):
        await other

    assert (patient.done(), gate.waiting, gate.stats().refused) == (False, 1, 2)
    await given_up(patient)


async def test_a_returning_waiter_stands_in_front_of_its_callers_others() -> None:
    gate = gate_of()
    inside = await gate.enter()
    order: list[str] = []

    async def waiting(name: str, *, again: bool = False) -> None:
        with await gate.enter("caller", came=0.0 if again else None):
            order.append(name)

    async with asyncio.TaskGroup() as group:
        for name in ("first", "second"):
            group.create_task(waiting(name))
            await ticks()
        group.create_task(waiting("retry", again=True))
        await ticks()
        inside.release()

    assert order == ["retry", "first", "second"]


async def test_those_that_go_on_while_the_gate_closes_keep_their_order() -> None:
    gate = gate_of()
    inside = await gate.enter()
    order: list[int] = []

    async def waiting(number: int) -> None:
        with await gate.enter("caller", goes_on=True):
            order.append(number)

    async with asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(waiting(number))
            await ticks()
        gate.close(lambda: ServerAtCapacity(LATE), finishes=True)
        inside.release()

    assert order == [0, 1, 2, 3, 4]


async def test_a_returning_waiter_is_not_late_because_of_its_callers_others() -> None:
    pace = Steps(free=1)
    gate = paced_gate(pace)
    first = gate.try_enter()
    assert first is not None
    others = [asyncio.create_task(gate.enter("a", line)) for line in range(90)]
    await until(lambda: gate.waiting == len(others))

    again = asyncio.create_task(gate.enter("a", "again", came=0.0, waited=29.6))
    await until(lambda: again.done() or gate.waiting == len(others) + 1)
    pace.free = 1
    gate.serve()

    (await again).release()
    first.release()
    await given_up(*others)


async def test_a_shorter_patience_than_the_queues() -> None:
    gate = gate_of(queue_timeout=30.0)
    with await gate.enter():
        with pytest.raises(ServerAtCapacity, match=LATE):
            await gate.enter(waited=29.99)
        with pytest.raises(ServerAtCapacity, match=LATE):
            await gate.enter(waited=30.0)  # it has had its time elsewhere
    assert gate.waiting == 0


@pytest.mark.parametrize("run", range(5))
async def test_random_leavers_leave_no_start_behind(run: int) -> None:
    dice = random.Random(run)
    pace = Steps()
    gate = paced_gate(pace, limit=3)
    inside: list[Place] = []

    async def leaving() -> None:
        inside.append(await gate.enter(dice.randrange(3), cost=1))

    tasks = [asyncio.create_task(leaving()) for _ in range(40)]
    while not all(task.done() for task in tasks):
        if dice.random() < 0.4:
            pace.free += 1
        if dice.random() < 0.3:
            dice.choice(tasks).cancel()
        if inside and dice.random() < 0.5:
            inside.pop(dice.randrange(len(inside))).release()
        gate.serve()
        await ticks()
        assert gate.inside <= 3
    for place in inside:
        place.release()
    assert (gate.inside, gate.waiting) == (0, 0)
    # Those of waiters that left in the very turn of the loop in which they were let in are taken back.
    assert sum(pace.costs) == sum(not task.cancelled() for task in tasks)


async def test_a_cost_is_reported_when_its_start_is_taken() -> None:
    pace = Steps(free=1)
    gate = paced_gate(pace)
    first = gate.try_enter(7)
    assert first is not None
    waiter = asyncio.create_task(gate.enter(cost=9))
    await ticks()
    pace.free = 1
    gate.serve()

    place = await waiter
    assert pace.costs == [7, 9]
    first.release()
    place.release()


async def test_a_cost_is_given_back_where_its_place_is() -> None:
    pace = Steps(free=1)
    gate = paced_gate(pace, limit=1)
    first = gate.try_enter()
    assert first is not None
    waiter = asyncio.create_task(gate.enter(cost=9))
    await until(lambda: gate.waiting == 1)
    pace.free = 1

    first.release()  # hands the place to the waiter …
    waiter.cancel()  # … which gives up before it runs again
    with pytest.raises(asyncio.CancelledError):
        await waiter

    assert (gate.inside, pace.costs) == (0, [0, 9, -9])


async def test_waiters_can_be_refused_and_others_may_come() -> None:
    gate = gate_of()
    inside = await gate.enter()
    waiters = [await waiting(gate, name) for name in "aab"]
    number = iter(range(9))

    gate.refuse_waiting(lambda: ServerAtCapacity(f"away {next(number)}"))
    done = await asyncio.gather(*waiters, return_exceptions=True)

    assert sorted(str(outcome) for outcome in done) == ["away 0", "away 1", "away 2"]
    assert (gate.waiting, gate.inside) == (0, 1)
    later = await waiting(gate)
    inside.release()
    (await later).release()
