"""The two classes of a provider: interactive requests go first, and batch uses what they leave."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import pytest

from aioserver.errors import AioserverError, ServerAtCapacity
from aioserver.limits.fair_queue import BATCH
from aioserver.limits.resource import BOTH_CLASSES, Bid, Ticket
from aioserver.limits.scheduler import REPORT_INTERVAL
from tests.support.clock import FakeClock
from tests.support.resources import FULL, LATE, Line
from tests.support.waiting import ticks, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.limits.resource import Grant


def line_of(
    limit: int = 1,
    queue_size: int = 1000,
    queue_timeout: float = 30.0,
    clock: Callable[[], float] | None = None,
) -> Line:
    return Line(
        limit,
        queue_size=queue_size,
        queue_timeout=queue_timeout,
        clock=clock,
        classes=BOTH_CLASSES,
    )


def kind_of(batch: bool) -> str:
    return BATCH if batch else ""


class Started(NamedTuple):
    """A request that has started, or waits."""

    task: asyncio.Task[Grant]
    batch: bool
    work: int


class Load:
    """Requests at *line*, in the order in which they start; each ends when it is told to."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.order: list[tuple[bool, int]] = []
        self.running: list[Started] = []
        self.waiting: list[Started] = []

    async def come(self, *, batch: bool = False, work: int = 1, caller: str = "") -> None:
        task = asyncio.create_task(self.line.enter(caller, work=work, kind=kind_of(batch)))
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
        assert (self.line.resource.inside, self.line.resource.waiting) == (0, 0)


@pytest.mark.parametrize(
    ("limit", "places"), [(1, 1), (2, 1), (3, 2), (9, 8), (10, 9), (20, 18), (100, 90)]
)
async def test_batch_leaves_a_tenth_of_the_places_and_at_least_one(
    limit: int, places: int
) -> None:
    load = Load(line_of(limit))

    for _ in range(limit + 1):
        await load.come(batch=True)

    assert len(load.running) == places
    assert places == (limit - max(1, limit // 10) if limit > 1 else 1)
    if limit > 1:
        # One that comes alone starts at once.
        await load.come()
        assert len(load.running) == places + 1
    await load.close()


async def test_interactive_requests_are_first() -> None:
    load = Load(line_of(1))
    await load.come()
    for batch in (True, True, False, False):
        await load.come(batch=batch, work=10)

    for _ in range(4):
        await load.end(load.running[0])

    assert [batch for batch, _ in load.order] == [False, False, False, True, True]
    await load.close()


async def test_batch_gets_a_twentieth_of_the_work_while_both_wait() -> None:
    load = Load(line_of(10))
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
    load = Load(line_of(2))
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
    assert 19 * 1000 <= before <= 19 * 1000 + 200
    await load.close()


async def test_nothing_is_lent_to_those_who_do_not_wait() -> None:
    load = Load(line_of(1))
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
    load = Load(line_of(1))
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
    load = Load(line_of(1, queue_size=5))
    await load.come()
    for _ in range(3):
        await load.come(batch=True)

    with pytest.raises(ServerAtCapacity, match=FULL):
        await load.line.enter(kind=BATCH)
    resource = load.line.resource
    assert (resource.room(""), resource.room(BATCH)) == (2, 0)
    assert resource.stats().batch_waiting == 3
    for _ in range(2):
        await load.come()
    with pytest.raises(ServerAtCapacity, match=FULL):
        await load.line.enter()

    await load.close()


@pytest.mark.virtual_time
@pytest.mark.timeout(1000)
@pytest.mark.parametrize(("kind", "patience"), [("", 30.0), (BATCH, 300.0)])
async def test_batch_waits_ten_times_as_long(kind: str, patience: float) -> None:
    line = line_of(queue_timeout=30.0)
    place = await line.enter()
    loop = asyncio.get_running_loop()
    began = loop.time()

    with pytest.raises(ServerAtCapacity, match=LATE):
        await line.enter(kind=kind)
    assert loop.time() - began == pytest.approx(patience, abs=0.1)
    ticket = Ticket(kind=kind, waited={line.resource: 100.0})
    if kind == BATCH:
        began = loop.time()
        with pytest.raises(ServerAtCapacity, match=LATE):
            await line.scheduler.wait(ticket, [Bid(line.resource)])
        assert loop.time() - began == pytest.approx(patience - 100.0, abs=0.1)
    # It has had its time.
    with pytest.raises(ServerAtCapacity, match=LATE):
        line.scheduler.enter(ticket, [Bid(line.resource)])

    place.release()


@pytest.mark.virtual_time
async def test_a_batch_request_is_told_when_its_turn_is() -> None:
    line = line_of()
    place = await line.enter()
    heard: list[int] = []
    tasks = [asyncio.create_task(line.enter()) for _ in range(3)]
    await ticks()

    tasks.append(
        asyncio.create_task(
            line.enter(kind=BATCH, on_position=lambda position, _eta: heard.append(position))
        )
    )
    await ticks()

    assert heard == [4]
    tasks.pop(0).cancel()
    await asyncio.sleep(REPORT_INTERVAL * 1.5)
    assert heard == [4, 3]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    place.release()
    assert line.resource.inside == line.resource.waiting == 0


async def test_a_batch_request_behind_its_own_places_is_told_how_long_they_take() -> None:
    clock = FakeClock()
    line = line_of(3, clock=clock)
    load = Load(line)
    for _ in range(3):
        await load.come(batch=True)
    for _ in range(30):
        clock.advance(4.0)
        await load.end(load.running[0])
        await load.come(batch=True)
    heard: list[tuple[int, float]] = []

    task = asyncio.create_task(
        line.enter("", kind=BATCH, on_position=lambda *news: heard.append(news))
    )
    await until(lambda: bool(heard))

    # The resource has a free place, which is not for batch.
    assert line.resource.inside < line.resource.limit
    ((position, eta),) = heard
    assert position == 2
    assert 7.0 <= eta <= 9.0
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await load.close()


async def test_a_batch_request_at_several_providers_has_half_of_their_room_together() -> None:
    lines = [line_of(queue_size=4), line_of(queue_size=4)]
    resources = [line.resource for line in lines]
    scheduler = lines[0].scheduler
    for resource in resources:
        resource.serve = scheduler.serve
    places = [await line.enter() for line in lines]

    async def waits() -> Grant:
        ticket = Ticket("caller", work=7, kind=BATCH)
        return await scheduler.wait(ticket, [Bid(resource) for resource in resources])

    tasks = [asyncio.create_task(waits()) for _ in range(4)]
    await ticks()
    assert [resource.room(BATCH) for resource in resources] == [0, 0]
    assert [resource.room("") for resource in resources] == [2, 2]
    with pytest.raises(ServerAtCapacity, match=FULL):
        await waits()

    for place in places:
        place.release()
    while tasks:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            tasks.remove(task)
            (await task).release()
    for resource in resources:
        assert (resource.inside, resource.waiting, resource.slots) == (0, 0, 0)
        assert resource.room(BATCH) == 2


async def test_a_lowered_limit_holds_for_batch() -> None:
    load = Load(line_of(10))
    for _ in range(9):
        await load.come(batch=True)
    load.line.resize(4)
    await load.come(batch=True)

    while len(load.running) > 3:
        await load.end(load.running[0])
    assert len(load.waiting) == 1
    await load.end(load.running[0])

    assert not load.waiting
    await load.close()


class Model:
    """The rule of both classes, as plainly as it is said; all requests are of one caller.

    *started* is what each class has started while both wait, that of interactive requests divided
    by nineteen: the class whose next request would end first is next.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.started = {False: Fraction(0), True: Fraction(0)}
        self.last = Fraction(0)
        self.waiting: list[tuple[bool, int]] = []
        self.running: list[tuple[bool, int]] = []

    def of(self, *, batch: bool) -> list[tuple[bool, int]]:
        return [each for each in self.waiting if each[0] == batch]

    def come(self, each: tuple[bool, int]) -> None:
        own, others = self.of(batch=each[0]), self.of(batch=not each[0])
        # A newcomer passes requests of a lighter class alone, and those only if they cannot start.
        if not own and not (each[0] and others) and self.free(batch=each[0]):
            self.running.append(each)
            return
        if not others:
            self.started, self.last = {False: Fraction(0), True: Fraction(0)}, Fraction(0)
        if not own:
            self.started[each[0]] = max(self.started[each[0]], self.last)
        self.waiting.append(each)

    def free(self, *, batch: bool) -> bool:
        most = self.limit - max(1, self.limit // 10) if self.limit > 1 else 1
        taken = sum(each[0] for each in self.running)
        return len(self.running) < self.limit and not (batch and taken >= most)

    def finish(self, each: tuple[bool, int]) -> Fraction:
        return self.started[each[0]] + Fraction(each[1], 1 if each[0] else 19)

    def serve(self) -> None:
        while True:
            heads = [own[0] for batch in (False, True) if (own := self.of(batch=batch))]
            able = [each for each in heads if self.free(batch=each[0])]
            if not able:
                return
            each = min(able, key=self.finish)
            if len(heads) == 2:
                self.last = max(self.last, self.started[each[0]])
                self.started[each[0]] = self.finish(each)
                other = heads[0] if heads[1] is each else heads[1]
                # One that was passed over is owed one start, and no more.
                owed = self.started[each[0]] - Fraction(other[1], 1 if other[0] else 19)
                self.started[other[0]] = max(self.started[other[0]], owed)
            self.waiting.remove(each)
            self.running.append(each)


@pytest.mark.parametrize("run", range(8))
async def test_random_steps_agree_with_the_model(run: int) -> None:
    dice = random.Random(run)
    limit = dice.choice((1, 2, 3, 12))
    line, model = line_of(limit), Model(limit)
    load = Load(line)
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
        assert line.resource.next() is None

    await load.close()


async def test_a_storm_of_both_classes_leaves_zero() -> None:
    dice = random.Random(11)
    line = line_of(5, 40)

    async def client() -> None:
        await ticks(dice.randint(0, 3))
        try:
            place = await line.enter(
                dice.choice("abc"), work=dice.randint(1, 99), kind=kind_of(dice.random() < 0.5)
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

    assert line.resource.inside == line.resource.waiting == line.resource.slots == 0
    places = [line.try_enter(kind=BATCH) for _ in range(4)]
    assert None not in places
    assert line.try_enter(kind=BATCH) is None
    assert line.try_enter() is not None
