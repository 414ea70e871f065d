"""The two classes of a gate: interactive requests go first, and batch uses what they leave."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import pytest

from aioserver.errors import AioserverError, ServerAtCapacity
from aioserver.limits.gate import BATCH_PATIENCE, LEFT, LENT, Gate, Place
from aioserver.limits.lines import Lines, Wish
from tests.support.clock import FakeClock
from tests.support.waiting import ticks, until

if TYPE_CHECKING:
    from collections.abc import Callable

FULL, LATE = "the line is full", "waited too long"


def gate_of(
    limit: int = 1,
    queue_size: int = 1000,
    queue_timeout: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
) -> Gate:
    return Gate(
        limit,
        queue_size=queue_size,
        queue_timeout=queue_timeout,
        full_error=lambda wait: ServerAtCapacity(FULL, retry_after=wait),
        timeout_error=lambda wait: ServerAtCapacity(LATE, retry_after=wait),
        clock=clock,
    )


class Started(NamedTuple):
    """A request that has started, or waits."""

    task: asyncio.Task[Place]
    batch: bool
    work: int


class Load:
    """Requests at *gate*, in the order in which they start; each ends when it is told to."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.order: list[tuple[bool, int]] = []
        self.running: list[Started] = []
        self.waiting: list[Started] = []

    async def come(self, *, batch: bool = False, work: int = 1, caller: str = "") -> None:
        task = asyncio.create_task(self.gate.enter(caller, work=work, batch=batch))
        self.waiting.append(Started(task, batch, work))
        await self.settle()

    async def settle(self) -> None:
        await ticks()
        for each in [each for each in self.waiting if each.task.done()]:
            self.waiting.remove(each)
            self.running.append(each)
            self.order.append((each.batch, each.work))

    async def end(self, each: Started) -> None:
        self.running.remove(each)
        (await each.task).release()
        await self.settle()

    async def close(self) -> None:
        for each in self.waiting:
            each.task.cancel()
        await asyncio.gather(*(each.task for each in self.waiting), return_exceptions=True)
        for each in self.running:
            (await each.task).release()
        assert (self.gate.inside, self.gate.waiting) == (0, 0)


@pytest.mark.parametrize(
    ("limit", "places"), [(1, 1), (2, 1), (3, 2), (9, 8), (10, 9), (20, 18), (100, 90)]
)
async def test_batch_leaves_a_tenth_of_the_places_and_at_least_one(
    limit: int, places: int
) -> None:
    load = Load(gate_of(limit))

    for _ in range(limit + 1):
        await load.come(batch=True)

    assert len(load.running) == places == load.gate.batch_limit
    assert places == (limit - max(1, limit // LEFT) if limit > 1 else 1)
    if limit > 1:
        # One that comes alone starts at once.
        await load.come()
        assert len(load.running) == places + 1
    await load.close()


async def test_interactive_requests_are_first() -> None:
    load = Load(gate_of(1))
    await load.come()
    for batch in (True, True, False, False):
        await load.come(batch=batch, work=10)

    for _ in range(4):
        await load.end(load.running[0])

    assert [batch for batch, _ in load.order] == [False, False, False, True, True]
    await load.close()


async def test_batch_gets_a_twentieth_of_the_work_while_both_wait() -> None:
    load = Load(gate_of(10))
    dice = random.Random(7)
    work: Counter[bool] = Counter()
    for _ in range(40):
        await load.come(work=100)
        await load.come(batch=True, work=100)

    for _ in range(4000):
        each = dice.choice(load.running)
        await load.end(each)
        await load.come(batch=each.batch, work=dice.randint(1, 400 if each.batch else 200))
    for batch, cost in load.order[100:]:
        work[batch] += cost

    assert 0.04 <= work[True] / work.total() <= 0.06
    await load.close()


async def test_a_dear_batch_request_starts_once_enough_is_lent() -> None:
    load = Load(gate_of(2))
    await load.come()
    await load.come()
    await load.come(batch=True, work=1000)
    for _ in range(300):
        await load.come(work=100)
        await load.end(load.running[0])
        if (True, 1000) in load.order:
            break

    # What interactive requests had done before it: nineteen times as much.
    before = sum(work for batch, work in load.order[2:] if not batch)
    assert LENT * 1000 <= before <= LENT * 1000 + 200
    await load.close()


async def test_nothing_is_lent_to_those_who_do_not_wait() -> None:
    load = Load(gate_of(1))
    await load.come()
    await load.come(batch=True, work=1000)
    for _ in range(5):
        await load.come(work=1000)
        await load.end(load.running[0])
    load.waiting[0].task.cancel()
    await ticks()
    del load.waiting[0]

    # It begins anew.
    await load.come(batch=True, work=300)
    for _ in range(5):
        await load.come(work=1000)
        await load.end(load.running[0])

    assert not any(batch for batch, _ in load.order)
    await load.close()


async def test_classes_are_fair_by_themselves() -> None:
    load = Load(gate_of(1))
    await load.come()
    # A caller that has had much as batch is nobody's debtor beside it, and the other way round.
    for number in range(3):
        await load.come(batch=True, work=10_000 + number, caller="a")
        await load.come(work=100 + number, caller="a")
        await load.come(work=200 + number, caller="b")

    for _ in range(9):
        await load.end(load.running[0])

    order = [100, 200, 101, 201, 102, 202, 10_000, 10_001, 10_002]
    assert [work for _, work in load.order[1:]] == order
    await load.close()


async def test_batch_fills_half_of_the_queue() -> None:
    load = Load(gate_of(1, queue_size=5))
    await load.come()
    for _ in range(3):
        await load.come(batch=True)

    with pytest.raises(ServerAtCapacity, match=FULL):
        await load.gate.enter(batch=True)
    assert (load.gate.room, load.gate.batch_room) == (2, 0)
    assert load.gate.stats().batch_waiting == 3
    for _ in range(2):
        await load.come()
    with pytest.raises(ServerAtCapacity, match=FULL):
        await load.gate.enter()

    await load.close()


async def test_batch_waits_ten_times_as_long() -> None:
    gate = gate_of(1, queue_timeout=30.0)
    place = await gate.enter()

    assert gate.time_left(100.0, room=True, batch=True) == BATCH_PATIENCE * 30.0 - 100.0
    with pytest.raises(ServerAtCapacity, match=LATE):
        gate.time_left(100.0, room=True)
    with pytest.raises(ServerAtCapacity, match=LATE):
        await gate.enter(batch=True, waited=300.0)

    place.release()


async def test_a_batch_request_is_told_when_its_turn_is() -> None:
    clock = FakeClock()
    gate = gate_of(1, clock=clock)
    place = await gate.enter()
    heard: list[int] = []
    tasks = [asyncio.create_task(gate.enter()) for _ in range(3)]
    await ticks()

    tasks.append(
        asyncio.create_task(
            gate.enter(batch=True, on_position=lambda position, _eta: heard.append(position))
        )
    )
    await until(lambda: bool(heard))

    assert heard == [4]
    tasks.pop(0).cancel()
    await ticks()
    gate._report_positions()  # noqa: SLF001 - as each second
    assert heard == [4, 3]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    place.release()
    assert gate.inside == gate.waiting == 0


async def test_a_batch_request_behind_its_own_places_is_told_how_long_they_take() -> None:
    clock = FakeClock()
    gate = gate_of(3, clock=clock)
    load = Load(gate)
    for _ in range(3):
        await load.come(batch=True)
    for _ in range(30):
        clock.advance(4.0)
        await load.end(load.running[0])
        await load.come(batch=True)
    heard: list[tuple[int, float]] = []

    task = asyncio.create_task(
        gate.enter("", batch=True, on_position=lambda *news: heard.append(news))
    )
    await until(lambda: bool(heard))

    # The gate has a free place, which is not for batch.
    assert gate.inside < gate.limit
    ((position, eta),) = heard
    assert position == 2
    assert 7.0 <= eta <= 9.0
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await load.close()


async def test_a_batch_request_in_several_lines_has_half_of_their_room() -> None:
    gates = [gate_of(1, queue_size=4), gate_of(1, queue_size=4)]
    places = [await gate.enter() for gate in gates]

    async def waits() -> Place:
        wishes = [Wish(gate, work=7) for gate in gates]
        return (await Lines("caller", None, batch=True).wait(wishes))[1]

    tasks = [asyncio.create_task(waits()) for _ in range(4)]
    await ticks()
    assert [gate.batch_room for gate in gates] == [0, 0]
    assert [gate.room for gate in gates] == [2, 2]
    with pytest.raises(ServerAtCapacity, match=FULL):
        await waits()

    for place in places:
        place.release()
    while tasks:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            tasks.remove(task)
            (await task).release()
    for gate in gates:
        assert (gate.inside, gate.waiting, gate.crowd, gate.batch_room) == (0, 0, 0, 2)


async def test_a_lowered_limit_holds_for_batch() -> None:
    load = Load(gate_of(10))
    for _ in range(9):
        await load.come(batch=True)
    load.gate.apply(4, queue_size=100, queue_timeout=30.0)
    await load.come(batch=True)

    while len(load.running) > 3:
        await load.end(load.running[0])
    assert len(load.waiting) == 1
    await load.end(load.running[0])

    assert not load.waiting
    await load.close()


class Model:
    """The rule of both classes, as plainly as it is said; all requests are of one caller."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.credit = 0
        self.waiting: list[tuple[bool, int]] = []
        self.running: list[tuple[bool, int]] = []

    def of(self, *, batch: bool) -> list[tuple[bool, int]]:
        return [each for each in self.waiting if each[0] == batch]

    def come(self, each: tuple[bool, int]) -> None:
        own = self.of(batch=each[0])
        if each[0] and not own:
            self.credit = 0
        self.waiting.append(each)
        if not own and not each[0] and len(self.running) < self.limit:
            # It has not waited, and lends nothing.
            self.waiting.remove(each)
            self.running.append(each)

    def serve(self) -> list[tuple[bool, int]]:
        started = []
        while self.waiting and len(self.running) < self.limit:
            interactive, batch = self.of(batch=False), self.of(batch=True)
            most = self.limit - max(1, self.limit // 10) if self.limit > 1 else 1
            may = batch and sum(each[0] for each in self.running) < most
            if may and (not interactive or self.credit >= 19 * batch[0][1]):
                each = batch[0]
                if interactive:
                    self.credit -= 19 * each[1]
            elif interactive:
                each = interactive[0]
                if batch and self.credit < 19 * batch[0][1]:
                    self.credit += each[1]
            else:
                break
            self.waiting.remove(each)
            self.running.append(each)
            started.append(each)
        return started


@pytest.mark.parametrize("run", range(8))
async def test_random_steps_agree_with_the_model(run: int) -> None:
    dice = random.Random(run)
    limit = dice.choice((1, 2, 3, 12))
    gate, model = gate_of(limit), Model(limit)
    load = Load(gate)
    for _ in range(300):
        match dice.choices(("come", "end", "leave"), (5, 4, 1))[0]:
            case "come":
                # Each has a work of its own, by which it is known.
                each = (dice.random() < 0.5, len(load.order) * 1000 + dice.randrange(1, 1000))
                model.come(each)
                await load.come(batch=each[0], work=each[1])
            case "end" if load.running:
                some = dice.choice(load.running)
                model.running.remove((some.batch, some.work))
                await load.end(some)
            case "leave" if load.waiting:
                some = dice.choice(load.waiting)
                load.waiting.remove(some)
                some.task.cancel()
                model.waiting.remove((some.batch, some.work))
                await ticks()
        model.serve()
        assert sorted((each.batch, each.work) for each in load.running) == sorted(model.running)
        # Nobody waits while a place is free for its class.
        assert gate._next() is None or gate.inside == limit  # noqa: SLF001

    await load.close()


async def test_a_storm_of_both_classes_leaves_zero() -> None:
    dice = random.Random(11)
    gate = gate_of(5, 40)

    async def client() -> None:
        await ticks(dice.randint(0, 3))
        try:
            place = await gate.enter(
                dice.choice("abc"), work=dice.randint(1, 99), batch=dice.random() < 0.5
            )
        except AioserverError:
            return
        try:
            await ticks(dice.randint(0, 3))
        finally:
            place.release(dice.randint(0, 500) if dice.random() < 0.5 else None)

    tasks = [asyncio.create_task(client()) for _ in range(600)]
    for task in tasks:
        if dice.random() < 0.3:
            task.cancel()
            await ticks(1)
    await asyncio.gather(*tasks, return_exceptions=True)

    assert gate.inside == gate.waiting == 0
    places = [gate.try_enter(batch=True) for _ in range(gate.batch_limit)]
    assert None not in places
    assert gate.try_enter(batch=True) is None
    assert gate.try_enter() is not None
