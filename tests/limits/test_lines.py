"""One request in the lines of several gates: it starts once, at the first place that is offered,
and stands nowhere afterwards.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from aioserver.errors import AioserverError, ServerAtCapacity, ServerShutdown
from aioserver.limits.gate import POSITION_INTERVAL, Gate, Place
from aioserver.limits.gcra import Gcra
from aioserver.limits.lines import Lines, Wish
from tests.support.virtual_loop import run_virtually
from tests.support.waiting import ticks

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

FULL, LATE = "the line is full", "waited too long"


def gate_of(
    limit: int = 1, queue_size: int = 100, queue_timeout: float = 30.0, per_minute: int = 0
) -> Gate:
    clock = asyncio.get_running_loop().time
    return Gate(
        limit,
        queue_size=queue_size,
        queue_timeout=queue_timeout,
        full_error=lambda wait: ServerAtCapacity(FULL, retry_after=wait),
        timeout_error=lambda wait: ServerAtCapacity(LATE, retry_after=wait),
        pace=Rate(per_minute, clock) if per_minute else None,
        clock=clock,
    )


class Rate:
    """So many starts per minute, evenly."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._interval = 60 / per_minute
        self._gcra = Gcra(self._interval, 0.0, clock)

    def delay(self, ahead: int = 0) -> float:
        return self._gcra.delay(ahead)

    def start(self, cost: int = 0) -> None:
        self._gcra.take(self._interval)

    def charge(self, cost: int) -> None:
        pass


async def begin(
    *gates: Gate,
    caller: Hashable = None,
    heard: list[tuple[int, float]] | None = None,
    delays: tuple[float, ...] = (),
) -> asyncio.Task[tuple[Wish, Place]]:
    """A task that waits at all *gates*."""
    hear = None if heard is None else lambda position, eta: heard.append((position, eta))
    wishes = [
        Wish(gate, delay=delay)
        for gate, delay in zip(gates, delays or [0.0] * len(gates), strict=True)
    ]

    async def wait() -> tuple[Wish, Place]:
        return await Lines(caller, None, on_position=hear).wait(wishes)

    task = asyncio.create_task(wait())
    await ticks(2)
    return task


def full(*gates: Gate) -> list[Place]:
    """All places of *gates*, taken."""
    places = []
    for gate in gates:
        while (place := gate.try_enter()) is not None:
            places.append(place)
    return places


def nothing_waits(*gates: Gate) -> None:
    assert [gate.waiting for gate in gates] == [0] * len(gates)
    assert [gate.crowd for gate in gates] == [0] * len(gates)


def test_a_request_starts_at_the_first_place_and_stands_nowhere_else() -> None:
    async def scene() -> None:
        a, b, c = gates = [gate_of() for _ in range(3)]
        places = full(*gates)
        task = await begin(*gates)
        assert [gate.waiting for gate in gates] == [1, 1, 1]

        places[1].release()

        # In this very moment, before its task has run.
        nothing_waits(*gates)
        wish, place = await task
        assert wish.gate is b
        assert [gate.inside for gate in (a, b, c)] == [1, 1, 1]
        place.release()
        assert b.inside == 0

    run_virtually(scene())


def test_two_places_in_one_turn_of_the_loop_start_it_once() -> None:
    async def scene() -> None:
        a, b = gate_of(), gate_of()
        places = full(a, b)
        task = await begin(a, b)

        for place in places:
            place.release()

        (await task)[1].release()
        assert (a.inside, b.inside) == (0, 0)
        nothing_waits(a, b)

    run_virtually(scene())


def test_the_place_of_one_that_starts_elsewhere_goes_to_the_next_in_line() -> None:
    async def scene() -> None:
        a, b = gate_of(), gate_of()
        (of_a, of_b) = full(a, b)
        both = await begin(a, b, caller="both")
        alone = asyncio.create_task(a.enter("alone"))
        await ticks(2)

        of_b.release()
        of_a.release()

        assert (await both)[0].gate is b
        (await alone).release()

    run_virtually(scene())


@pytest.mark.parametrize("when", ["waiting", "handed over"])
def test_giving_up_loses_no_place_and_leaves_no_line(when: str) -> None:
    async def scene() -> None:
        a, b = gate_of(), gate_of()
        (of_a, of_b) = full(a, b)
        task = await begin(a, b)
        if when == "handed over":
            of_a.release()
        task.cancel()
        await asyncio.wait([task])

        assert task.cancelled()
        nothing_waits(a, b)
        of_a.release()
        of_b.release()
        assert (a.inside, b.inside) == (0, 0)

    run_virtually(scene())


def test_lines_of_different_sizes_are_full_together() -> None:
    async def scene() -> None:
        a, b = gate_of(queue_size=1), gate_of(queue_size=3)
        full(a, b)
        tasks = [await begin(a, b, caller=number) for number in range(4)]
        assert (a.full, b.full) == (True, True)

        with pytest.raises(ServerAtCapacity, match=FULL):
            await (await begin(a, b))

        # One that is in a line by itself takes all of its own room.
        with pytest.raises(ServerAtCapacity, match=FULL):
            await a.enter("alone")
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        nothing_waits(a, b)

    run_virtually(scene())


def test_room_in_one_line_is_enough() -> None:
    async def scene() -> None:
        a, b = gate_of(queue_size=1), gate_of(queue_size=1)
        (_, of_b) = full(a, b)
        alone = asyncio.create_task(a.enter("alone"))
        await ticks(2)
        assert (a.full, b.full) == (True, False)

        task = await begin(a, b)
        of_b.release()

        assert (await task)[0].gate is b
        alone.cancel()

    run_virtually(scene())


def test_whoever_leaves_a_line_takes_all_of_its_room_in_the_others() -> None:
    def refusal() -> AioserverError:
        return ServerAtCapacity("away")

    async def scene() -> None:
        a, b = gate_of(queue_size=2), gate_of(queue_size=2)
        full(a, b)
        tasks = [await begin(a, b, caller=number) for number in range(3)]
        assert (a.crowd, b.crowd) == (1.5, 1.5)

        a.refuse_waiting(refusal)
        await ticks(2)

        assert (a.waiting, b.waiting) == (0, 3)
        assert (a.crowd, b.crowd) == (0, 3)
        # There is room for four together.
        tasks.append(await begin(a, b, caller=3))
        with pytest.raises(ServerAtCapacity, match=FULL):
            await (await begin(a, b))
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        nothing_waits(a, b)

    run_virtually(scene())


def test_a_line_is_left_at_its_time_and_the_last_one_refuses() -> None:
    async def scene() -> float:
        loop = asyncio.get_running_loop()
        a, b = gate_of(queue_timeout=5.0), gate_of(queue_timeout=9.0)
        full(a, b)
        began = loop.time()
        task = await begin(a, b)
        await asyncio.sleep(6)
        assert (a.waiting, b.waiting) == (0, 1)

        with pytest.raises(ServerAtCapacity, match=LATE):
            await task
        nothing_waits(a, b)
        assert [gate.stats().refused for gate in (a, b)] == [0, 1]
        return loop.time() - began

    assert run_virtually(scene()) == pytest.approx(9.0)


def test_a_gate_that_refuses_all_leaves_the_other_lines() -> None:
    def shutdown() -> AioserverError:
        return ServerShutdown("over")

    async def scene() -> None:
        a, b = gate_of(), gate_of()
        (_, of_b) = full(a, b)
        task = await begin(a, b)
        a.refuse_waiting(shutdown)
        await ticks(2)
        assert not task.done()
        of_b.release()
        assert (await task)[0].gate is b

        both = await begin(a, b)
        a.close(shutdown)
        b.close(shutdown)
        with pytest.raises(ServerShutdown):
            await both
        with pytest.raises(ServerShutdown):
            await (await begin(a, b))
        nothing_waits(a, b)

    run_virtually(scene())


def test_the_pace_of_the_fastest_line_decides() -> None:
    async def scene() -> None:
        loop = asyncio.get_running_loop()
        slow, fast = gate_of(9, per_minute=2), gate_of(9, per_minute=30)
        for gate in (slow, fast):
            (await gate.enter()).release()
        began = loop.time()

        wish, _ = await (await begin(slow, fast))
        assert wish.gate is fast
        assert loop.time() - began == pytest.approx(2.0)

        # Neither lets it start in time.
        for gate in (slow, fast):
            gate.apply(9, queue_size=100, queue_timeout=1.0)
        with pytest.raises(ServerAtCapacity, match=LATE) as caught:
            await (await begin(slow, fast))
        assert caught.value.retry_after == pytest.approx(2.0)

    run_virtually(scene())


def test_the_timer_of_a_pace_is_set_anew_when_the_head_starts_elsewhere() -> None:
    async def scene() -> None:
        loop = asyncio.get_running_loop()
        paced, other = gate_of(9, per_minute=30), gate_of()
        (await paced.enter()).release()
        (place,) = full(other)
        began = loop.time()
        head = await begin(paced, other, caller="head")
        behind = asyncio.create_task(paced.enter("behind"))
        await ticks(2)

        place.release()

        assert (await head)[0].gate is other
        (await behind).release()
        assert loop.time() - began == pytest.approx(2.0)

    run_virtually(scene())


def test_the_position_is_the_best_and_the_time_that_of_all_together() -> None:
    async def scene() -> None:
        a, b = gate_of(), gate_of()
        (of_a, of_b) = full(a, b)
        before = [asyncio.create_task(a.enter(number)) for number in range(3)]
        await ticks(2)
        heard: list[tuple[int, float]] = []
        task = await begin(a, b, caller="me", heard=heard)

        position, eta = heard[-1]
        # Fourth there and first here: 4 s and 1 s, side by side.
        assert position == 1
        assert eta == pytest.approx(1 / (1 / 4 + 1 / 1))
        of_b.release()
        await task
        of_a.release()
        for other in before:
            (await other).release()

    run_virtually(scene())


def test_a_change_in_all_lines_is_told_once() -> None:
    async def scene() -> None:
        loop = asyncio.get_running_loop()
        gates = [gate_of() for _ in range(4)]
        inside = [place for gate in gates for place in full(gate)]
        before = []
        for gate in gates:
            # Each tells its positions at a time of its own.
            before += [
                asyncio.create_task(gate.enter(n, on_position=lambda _position, _eta: None))
                for n in range(2)
            ]
            await asyncio.sleep(0.2)
        heard: list[tuple[int, float]] = []
        times: list[float] = []

        def hear_all(position: int, eta: float) -> None:
            heard.append((position, eta))
            times.append(loop.time())

        lines = Lines("me", None, on_position=hear_all)
        task = asyncio.create_task(lines.wait([Wish(gate) for gate in gates]))
        await ticks(2)

        # Third in each of four lines, which serve it side by side.
        ((position, eta),) = heard
        assert position == 3
        assert eta == pytest.approx(3 / 4)
        for place in inside:
            place.release()
        await asyncio.sleep(5.0)
        assert [position for position, _ in heard[1:]] == [2] * (len(heard) - 1)
        assert len(heard) > 1
        assert all(late - early >= POSITION_INTERVAL for early, late in pairwise(times))

        task.cancel()
        for waiter in before:
            if waiter.done():
                waiter.result().release()
            else:
                waiter.cancel()
        await asyncio.wait([task, *before])
        for waiter in before:
            if not waiter.cancelled():
                waiter.result().release()
        nothing_waits(*gates)

    run_virtually(scene())


def test_a_line_is_joined_late_behind_those_who_stand_there() -> None:
    async def scene() -> None:
        loop = asyncio.get_running_loop()
        home, other = gate_of(), gate_of()
        full(home)
        (place,) = full(other)
        began = loop.time()
        task = await begin(home, other, delays=(0.0, 3.0))
        assert (home.waiting, other.waiting) == (1, 0)
        await asyncio.sleep(1)
        behind = asyncio.create_task(other.enter("came later"))
        await asyncio.sleep(1)
        place.release()
        first = await behind
        await asyncio.sleep(2)
        assert (home.waiting, other.waiting) == (1, 1)

        first.release()

        assert (await task)[0].gate is other
        assert loop.time() - began == pytest.approx(4.0)
        nothing_waits(home, other)

    run_virtually(scene())


def test_a_free_place_is_taken_when_the_line_is_joined_late() -> None:
    async def scene() -> None:
        loop = asyncio.get_running_loop()
        home, other = gate_of(), gate_of()
        full(home)
        began = loop.time()

        wish, _ = await (await begin(home, other, delays=(0.0, 3.0)))

        assert wish.gate is other
        assert loop.time() - began == pytest.approx(3.0)

    run_virtually(scene())


@pytest.mark.parametrize("free", [True, False])
def test_one_more_line_is_joined_while_a_request_waits(*, free: bool) -> None:
    async def scene() -> None:
        a, b = gate_of(queue_size=10), gate_of(queue_size=30)
        full(a)
        places = [] if free else full(b)
        lines = Lines(None, None)
        task = asyncio.create_task(lines.wait([Wish(a)]))
        await ticks(2)
        wish = Wish(b)

        lines.join(wish)

        if not free:
            assert (a.waiting, b.waiting) == (1, 1)
            assert (a.crowd, b.crowd) == (0.25, 0.75)
            places[0].release()
        # In this very moment, before its task has run.
        nothing_waits(a, b)
        taken, place = await task
        assert taken is wish
        place.release()
        # Whoever has started joins no line.
        lines.join(Wish(a))
        nothing_waits(a, b)

    run_virtually(scene())


def test_a_line_without_room_or_time_is_not_joined() -> None:
    async def scene() -> None:
        a, crowded, slow = gate_of(), gate_of(queue_size=0), gate_of(9, per_minute=1)
        full(a, crowded)
        (await slow.enter()).release()
        lines = Lines(None, None)
        task = asyncio.create_task(lines.wait([Wish(a)]))
        await ticks(2)

        # There is room for both together.
        lines.join(Wish(crowded))
        lines.join(Wish(slow))

        assert (a.waiting, crowded.waiting, slow.waiting) == (1, 1, 0)
        task.cancel()
        await asyncio.wait([task])
        nothing_waits(a, crowded, slow)

    run_virtually(scene())


def test_a_line_is_left_and_the_last_one_ends_the_wait() -> None:
    def removed() -> AioserverError:
        return ServerShutdown("removed")

    async def scene() -> None:
        a, b, later = gates = [gate_of() for _ in range(3)]
        full(*gates)
        wishes = [Wish(a), Wish(b), Wish(later, delay=5.0)]
        lines = Lines(None, None)
        task = asyncio.create_task(lines.wait(wishes))
        await ticks(2)

        lines.quit(wishes[0], removed)
        lines.quit(wishes[1], removed)
        assert (a.waiting, b.waiting) == (0, 0)
        await ticks(2)
        assert not task.done()
        lines.quit(wishes[2], removed)

        with pytest.raises(ServerShutdown):
            await task
        await asyncio.sleep(10)
        nothing_waits(*gates)

    run_virtually(scene())


def test_callers_share_each_line_whatever_name_they_use() -> None:
    async def scene() -> Counter[str]:
        a, b = gate_of(), gate_of()
        places = full(a, b)
        served: Counter[str] = Counter()

        async def ask(caller: str, *gates: Gate) -> None:
            _, place = await Lines(caller, None).wait([Wish(gate) for gate in gates])
            served[caller] += 1
            if sum(served.values()) > 40:
                raise asyncio.CancelledError
            await asyncio.sleep(1)
            place.release()

        tasks = [
            asyncio.create_task(ask(caller, *gates))
            for _ in range(100)
            for caller, gates in (("group", (a, b)), ("direct", (a,)), ("other", (a, b)))
        ]
        await asyncio.sleep(0)
        for place in places:
            place.release()
        await asyncio.sleep(19.5)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        nothing_waits(a, b)
        return served

    served = run_virtually(scene())
    # One line serves three callers, the other two of them.
    assert served["direct"] == pytest.approx(20 / 3, abs=1)
    assert served["group"] == pytest.approx(20 / 3 + 10, abs=2)
    assert served["other"] == pytest.approx(20 / 3 + 10, abs=2)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_places_and_room_are_kept(seed: int) -> None:
    """Random arrivals, ends, cancels, refusals and new bounds, at gates of their own and at some
    together.
    """

    async def scene() -> None:
        dice = random.Random(seed)
        gates = [
            gate_of(dice.randint(1, 3), dice.randint(1, 6), dice.uniform(1, 5))
            for _ in range(dice.randint(2, 4))
        ]
        inside: Counter[Gate] = Counter()
        running: set[asyncio.Task[None]] = set()
        waiting: list[tuple[Lines, list[Wish]]] = []

        async def client(number: int) -> None:
            some = dice.sample(gates, dice.randint(1, len(gates)))
            hear = (lambda position, eta: None) if dice.random() < 0.5 else None
            lines = Lines(number % 3, None, on_position=hear, weight=dice.randint(1, 3))
            delays = [0.0, *(dice.choice((0.0, 0.7)) for _ in some[1:])]
            wishes = [Wish(gate, delay=delay) for gate, delay in zip(some, delays, strict=True)]
            waiting.append((lines, wishes))
            try:
                wish, place = await lines.wait(wishes)
            except ServerAtCapacity:
                return
            finally:
                waiting.remove((lines, wishes))
            assert wish in wishes
            inside[wish.gate] += 1
            try:
                await asyncio.sleep(dice.expovariate(2))
            finally:
                inside[wish.gate] -= 1
                place.release()

        for number in range(300):
            task = asyncio.create_task(client(number))
            running.add(task)
            task.add_done_callback(running.discard)
            await asyncio.sleep(dice.expovariate(8))
            if running and dice.random() < 0.2:
                dice.choice(list(running)).cancel()
            gate = dice.choice(gates)
            if waiting and dice.random() < 0.3:
                # A reload: another member, or one less.
                lines, wishes = dice.choice(waiting)
                if all(wish.gate is not gate for wish in wishes):
                    wishes.append(Wish(gate))
                    lines.join(wishes[-1])
                else:
                    lines.quit(dice.choice(wishes), lambda: ServerAtCapacity("removed"))
            if dice.random() < 0.03:
                gate.refuse_waiting(lambda: ServerAtCapacity("refused"))
            elif dice.random() < 0.05:
                gate.apply(dice.randint(1, 3), queue_size=6, queue_timeout=dice.uniform(1, 5))
            for gate in gates:
                assert gate.inside >= inside[gate]
                assert not (gate.waiting and gate.inside < gate.limit), "a place is free"
                assert 0 <= gate.crowd <= gate.waiting
        await asyncio.gather(*running, return_exceptions=True)
        nothing_waits(*gates)
        assert [gate.inside for gate in gates] == [0] * len(gates)

    run_virtually(scene())
