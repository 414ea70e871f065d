"""The gate against a simple model, and each of the ticks in which a place could get lost."""

from __future__ import annotations

import asyncio
import copy
import random
import time
from typing import TYPE_CHECKING

import pytest

from aioserver.errors import AioserverError, ServerAtCapacity, ServerShutdown
from aioserver.limits.gate import POSITION_INTERVAL, Gate, Place
from tests.support import fair_model
from tests.support.clock import FakeClock
from tests.support.fair_model import Job
from tests.support.jumping_loop import block
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


# One place at a time.


async def test_a_free_place_is_taken_at_once() -> None:
    gate = gate_of(2)

    first, second = gate.try_enter(), await gate.enter()

    assert first is not None
    assert gate.try_enter() is None
    assert gate.stats().inside == gate.limit == 2
    first.release()
    second.release()
    assert gate.stats().inside == 0


async def test_a_place_released_twice_counts_once() -> None:
    gate = gate_of(2)
    first, second = await gate.enter(), await gate.enter()

    first.release()
    first.release()
    with first:
        pass

    assert gate.inside == 1
    second.release()
    assert gate.inside == 0


async def test_a_with_gives_the_place_back_when_its_body_raises() -> None:
    gate = gate_of()

    with pytest.raises(KeyError), await gate.enter():
        raise KeyError

    assert gate.inside == 0


async def test_a_newcomer_cannot_overtake_a_waiter() -> None:
    gate = gate_of()
    place = await gate.enter()
    waiter = await waiting(gate)

    place.release()  # handed over, though the waiter has not run yet

    assert gate.try_enter() is None
    assert gate.inside == 1
    (await waiter).release()
    assert gate.inside == 0


# Bounds.


async def test_a_full_queue_refuses_at_once() -> None:
    gate = gate_of(queue_size=1)
    place = await gate.enter()
    waiter = await waiting(gate)

    with pytest.raises(ServerAtCapacity, match=FULL) as caught:
        await gate.enter()

    assert caught.value.retry_after is not None
    assert 1.0 <= caught.value.retry_after <= 60.0
    assert gate.stats().refused == 1
    assert gate.waiting == 1
    await given_up(waiter)
    place.release()


async def test_without_a_timeout_nobody_waits() -> None:
    gate = gate_of(queue_timeout=0)
    place = await gate.enter()

    with pytest.raises(ServerAtCapacity, match=FULL):
        await gate.enter()

    place.release()
    assert gate.inside == 0


async def test_a_wait_ends_at_its_deadline() -> None:
    gate = gate_of(queue_timeout=0.02)
    place = await gate.enter()

    with pytest.raises(ServerAtCapacity, match=LATE):
        await gate.enter()

    assert gate.waiting == 0
    assert gate.stats().refused == 1
    place.release()
    assert gate.inside == 0


async def test_a_waiter_keeps_the_deadline_it_came_with() -> None:
    gate = gate_of(queue_timeout=0.02)
    place = await gate.enter()
    waiter = await waiting(gate)

    gate.apply(1, queue_size=1000, queue_timeout=600.0)

    with pytest.raises(ServerAtCapacity, match=LATE):
        await waiter
    place.release()


@pytest.mark.parametrize("clock", [(1e9, 1e-9), (1e-9, 1e9), (0.0, 0.0), (5.0, -5.0)])
async def test_the_estimate_stays_between_1_and_60_seconds(clock: tuple[float, float]) -> None:
    time = FakeClock()
    gate = gate_of(clock=time)
    for _ in range(20):
        for step in clock:
            (await gate.enter()).release()
            time.now += step
            assert 1.0 <= gate.retry_after() <= 60.0


async def test_the_estimate_grows_with_the_queue_and_has_jitter() -> None:
    clock = FakeClock()
    gate = gate_of(clock=clock)
    place = await gate.enter()
    for _ in range(50):  # a place becomes free every 4 seconds
        clock.now += 4.0
        place.release()
        place = await gate.enter()
    waiters = [await waiting(gate) for _ in range(4)]

    estimates = {gate.retry_after() for _ in range(20)}

    assert len(estimates) > 1
    assert all(19.0 <= estimate <= 31.0 for estimate in estimates)
    await given_up(*waiters)
    place.release()


async def test_an_hour_in_which_nobody_came_does_not_count_as_a_wait_for_a_place() -> None:
    clock = FakeClock()
    gate = gate_of(limit=2, clock=clock)
    for _ in range(20):  # one comes every minute, and there is a place
        (await gate.enter()).release()
        clock.now += 60.0
    places = [await gate.enter() for _ in range(2)]
    clock.now += 1.0
    places.pop().release()
    places.append(await gate.enter())

    assert 1.0 <= gate.retry_after() <= 1.5
    for place in places:
        place.release()


async def test_the_oldest_wait_is_reported() -> None:
    clock = FakeClock()
    gate = gate_of(clock=clock)
    place = await gate.enter()
    assert gate.stats().oldest_wait == 0.0

    first = await waiting(gate, "a")
    clock.now += 2.0
    second = await waiting(gate, "b")
    clock.now += 3.0

    assert gate.stats().oldest_wait == 5.0
    await given_up(first)
    assert gate.stats().oldest_wait == 3.0
    await given_up(second)
    place.release()


# Order.


async def test_within_one_caller_the_order_is_that_of_coming() -> None:
    gate = gate_of()
    place = await gate.enter()
    tasks = [await waiting(gate, "a") for _ in range(5)]

    for served in range(5):
        place.release()
        await ticks()

        assert [task.done() for task in tasks] == [number <= served for number in range(5)]
        place = await tasks[served]
    place.release()


async def test_callers_take_turns() -> None:
    gate = gate_of()
    served: list[str] = []

    async def ask(caller: str, name: str) -> None:
        with await gate.enter(caller):
            served.append(name)

    place = await gate.enter()
    tasks = []
    for caller, name in (("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1")):
        tasks.append(asyncio.create_task(ask(caller, name)))
        await ticks()
    place.release()
    await asyncio.gather(*tasks)

    assert served == ["a1", "b1", "c1", "a2", "a3"]


async def test_a_caller_with_a_thousand_requests_delays_another_by_one_turn() -> None:
    gate = gate_of()
    place = await gate.enter()
    noisy = [asyncio.create_task(gate.enter("noisy")) for _ in range(900)]
    await until(lambda: gate.waiting == 900)
    quiet = await waiting(gate, "quiet")

    place.release()
    place = await noisy[0]
    place.release()

    place = await quiet
    assert not noisy[1].done()
    await given_up(*noisy[1:])
    place.release()
    assert gate.inside == gate.waiting == 0


async def test_a_waiter_that_gives_up_leaves_the_turn_to_its_caller() -> None:
    gate = gate_of()
    place = await gate.enter()
    a1, a2 = await waiting(gate, "a"), await waiting(gate, "a")
    b1 = await waiting(gate, "b")

    a1.cancel()
    place.release()  # in the same tick: a1 still stands in the line

    place = await a2
    assert not b1.done()
    await given_up(a1, b1)
    place.release()
    assert gate.inside == gate.waiting == 0


# The ticks in which a place could get lost.


async def test_place_handed_over_in_the_tick_of_cancellation_is_passed_on() -> None:
    gate = gate_of()
    place = await gate.enter()
    first, second = await waiting(gate), await waiting(gate)

    place.release()  # hands the place to the first …
    first.cancel()  # … which gives up before it runs again
    with pytest.raises(asyncio.CancelledError):
        await first

    (await second).release()
    assert gate.inside == gate.waiting == 0


async def test_place_freed_in_the_tick_after_cancellation_goes_to_the_next() -> None:
    gate = gate_of()
    place = await gate.enter()
    first, second = await waiting(gate), await waiting(gate)

    first.cancel()
    place.release()

    (await second).release()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert gate.inside == gate.waiting == 0


@pytest.mark.parametrize("freed_first", [True, False])
async def test_place_handed_over_in_the_tick_of_the_deadline_is_not_lost(
    freed_first: bool,
) -> None:
    gate = gate_of(queue_timeout=0.01)
    loop = asyncio.get_running_loop()
    place = await gate.enter()
    if freed_first:
        loop.call_later(0.005, place.release)
    waiter = await waiting(gate)
    if not freed_first:
        loop.call_later(0.012, place.release)
    block(0.02)  # both timers become due in one turn of the loop

    (outcome,) = await asyncio.gather(waiter, return_exceptions=True)

    if isinstance(outcome, Place):
        outcome.release()
    else:
        assert isinstance(outcome, ServerAtCapacity)
    await until(lambda: gate.inside == 0)
    assert gate.waiting == 0
    (await gate.enter()).release()


async def test_a_task_cancelled_before_its_first_step_holds_nothing() -> None:
    gate = gate_of()
    task = asyncio.create_task(gate.enter())
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task

    assert gate.inside == gate.waiting == 0


async def test_a_place_held_for_a_leaver_goes_back_when_the_queue_is_empty() -> None:
    gate = gate_of()
    place = await gate.enter()
    tasks = [await waiting(gate) for _ in range(10)]

    for task in tasks:
        task.cancel()
    place.release()  # ten stand in the line, nobody wants the place

    assert gate.inside == gate.waiting == 0
    assert gate.try_enter() is not None
    await given_up(*tasks)
    assert gate.inside == 1


# Closing, and new bounds.


async def test_close_refuses_waiters_and_newcomers() -> None:
    gate = gate_of()
    place = await gate.enter()
    waiters = [await waiting(gate, caller) for caller in "aab"]

    gate.close(lambda: ServerShutdown("the server is stopping"))

    for waiter in waiters:
        with pytest.raises(ServerShutdown):
            await waiter
    with pytest.raises(ServerShutdown):
        await gate.enter()
    place.release()
    assert gate.try_enter() is None
    assert gate.inside == gate.waiting == 0


async def test_close_in_the_tick_of_cancellation_leaves_no_lost_exception() -> None:
    gate = gate_of()
    place = await gate.enter()
    waiter = await waiting(gate)

    gate.close(lambda: ServerShutdown("the server is stopping"))
    waiter.cancel()

    with pytest.raises((asyncio.CancelledError, ServerShutdown)):
        await waiter
    place.release()
    assert gate.inside == 0


async def test_giving_up_in_the_tick_of_the_close_is_no_trouble() -> None:
    gate = gate_of()
    place = await gate.enter()
    first, second = await waiting(gate), await waiting(gate)

    first.cancel()
    gate.close(lambda: ServerShutdown("the server is stopping"))

    with pytest.raises(asyncio.CancelledError):
        await first
    with pytest.raises(ServerShutdown):
        await second
    place.release()
    assert gate.inside == gate.waiting == 0


async def test_a_place_handed_over_before_the_close_is_kept() -> None:
    gate = gate_of()
    place = await gate.enter()
    waiter = await waiting(gate)

    place.release()
    gate.close(lambda: ServerShutdown("the server is stopping"))

    (await waiter).release()
    assert gate.inside == 0


async def test_a_raised_limit_lets_the_next_in() -> None:
    gate = gate_of(1)
    places = [await gate.enter()]
    waiters = [await waiting(gate) for _ in range(3)]

    gate.apply(3, queue_size=1000, queue_timeout=30.0)

    places += [await waiters[0], await waiters[1]]
    assert gate.inside == 3
    assert gate.waiting == 1
    await given_up(waiters[2])
    for place in places:
        place.release()
    assert gate.inside == 0


async def test_a_lowered_limit_lets_nobody_in_until_enough_have_left() -> None:
    gate = gate_of(3)
    places = [await gate.enter() for _ in range(3)]
    gate.apply(1, queue_size=1000, queue_timeout=30.0)
    waiter = await waiting(gate)

    for place in places[:2]:
        place.release()
        assert gate.try_enter() is None
    await ticks()
    assert not waiter.done()
    assert gate.inside == 1

    places[2].release()
    (await waiter).release()
    assert gate.inside == 0


async def test_a_limit_raised_for_a_queue_of_leavers_invents_no_place() -> None:
    gate = gate_of(1)
    place = await gate.enter()
    waiters = [await waiting(gate) for _ in range(3)]
    for waiter in waiters:
        waiter.cancel()

    gate.apply(5, queue_size=1000, queue_timeout=30.0)

    assert gate.inside == 1
    await given_up(*waiters)
    place.release()
    assert gate.inside == gate.waiting == 0


# Positions.


async def test_a_newcomer_hears_its_position_at_once() -> None:
    gate = gate_of()
    place = await gate.enter()
    heard: list[int] = []

    tasks = []
    # In the order of serving: a1 b1 c1 a2 b2 a3.
    for caller in "abbaca":
        tasks.append(asyncio.create_task(gate.enter(caller, on_position=hearing(heard))))
        await ticks()

    assert heard == [1, 2, 3, 3, 3, 6]
    await given_up(*tasks)
    place.release()


async def test_positions_are_right_after_leavers_in_the_middle() -> None:
    # Takes a second: so often is the line told where it stands.
    gate = gate_of()
    place = await gate.enter()
    heard: dict[int, list[int]] = {number: [] for number in range(5)}
    tasks = []
    for positions in heard.values():
        tasks.append(asyncio.create_task(gate.enter(on_position=hearing(positions))))
        await ticks()

    await given_up(tasks[1], tasks[2])
    await until(lambda: len(heard[4]) > 1, POSITION_INTERVAL * 5)

    assert heard == {0: [1], 1: [2], 2: [3], 3: [4, 2], 4: [5, 3]}  # told only what is new
    await given_up(*tasks)
    place.release()


async def test_a_waiter_whose_callback_raises_does_not_stay_in_the_queue() -> None:
    gate = gate_of()
    place = await gate.enter()

    def hear(position: int, eta: float) -> None:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await gate.enter(on_position=hear)

    assert gate.waiting == 0
    place.release()
    assert gate.inside == 0


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


@pytest.mark.parametrize("run", range(4))
async def test_a_storm_in_which_everybody_may_give_up_at_any_tick_leaves_zero(run: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    limit = dice.randint(1, 5)
    gate = gate_of(limit, 40, dice.choice((30.0, 0.003)))
    most = 0

    async def client() -> None:
        await ticks(dice.randint(0, 3))
        try:
            place = await gate.enter(dice.choice("abc"))
        except AioserverError:
            return
        try:
            nonlocal most
            most = max(most, gate.inside)
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
        assert gate.inside <= limit
        assert not gate.waiting or gate.inside == limit
        tasks = [task for task in tasks if not task.done()]
    for task in tasks:
        if dice.random() < 0.5:
            task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)

    assert all(
        outcome is None or isinstance(outcome, asyncio.CancelledError) for outcome in outcomes
    )
    assert most <= limit
    assert gate.inside == gate.waiting == 0
    places = [gate.try_enter() for _ in range(limit)]
    assert None not in places
    assert gate.try_enter() is None


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
