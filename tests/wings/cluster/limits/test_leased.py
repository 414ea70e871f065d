"""A resource whose capacity is leased: what it takes, gives back and asks for, with the reference
model as the server.
"""

from __future__ import annotations

import asyncio
from math import inf
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.errors import ServerAtCapacity
from aioserver.limits.resource import BOTH_CLASSES, Grant
from aioserver.wings.cluster.limits.lease_messages import TIMES
from aioserver.wings.cluster.limits.leased import GRACE, MOMENT, LeasedCapacity
from tests.support.lease_cluster import Cluster
from tests.support.resources import Line
from tests.support.waiting import ticks, until

if TYPE_CHECKING:
    from aioserver.wings.cluster.limits.leases import Leases


class LeasedLine(Line):
    """A line of which several instances share *limit* places."""

    def __init__(
        self,
        cluster: Cluster,
        leases: Leases,
        limit: int,
        *,
        queue_size: int = 100,
        **options: Any,
    ) -> None:
        options.setdefault("clock", cluster.clock)
        super().__init__(0, queue_size=queue_size, classes=BOTH_CLASSES, **options)
        name = "p:provider"
        self.leased = LeasedCapacity(leases, self.scheduler, self.resource, name, limit)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
async def lines(cluster: Cluster) -> list[LeasedLine]:
    """The lines of two instances, which share four places."""
    lines = [LeasedLine(cluster, cluster.add(name), 4) for name in ("one", "two")]
    cluster.advance(TIMES.grace + 3 * TIMES.beat)
    return lines


async def full(cluster: Cluster, line: Line, count: int) -> list[Grant]:
    """So many places of *line*."""
    tasks = [asyncio.create_task(line.enter()) for _ in range(count)]
    await ticks()
    cluster.renew()
    await asyncio.gather(*tasks)
    return [task.result() for task in tasks]


async def waiting(line: Line) -> asyncio.Task[Grant]:
    before = line.resource.waiting
    task = asyncio.create_task(line.enter())
    await until(lambda: line.resource.waiting > before)
    return task


async def test_place_in_hand_is_taken_without_a_call(
    cluster: Cluster, lines: list[LeasedLine]
) -> None:
    calls = cluster.instances["one"].calls

    place = lines[0].try_enter()

    assert place is not None
    place.release()
    assert cluster.instances["one"].calls == calls
    assert cluster.instances["one"].due > cluster.clock()


async def test_waiter_gets_a_place_that_nobody_uses(
    cluster: Cluster, lines: list[LeasedLine]
) -> None:
    places = await full(cluster, lines[0], 4)

    assert lines[0].resource.inside == 4
    assert lines[1].resource.limit == 0
    for place in places:
        place.release()


async def test_place_that_ends_goes_to_the_instance_whose_turn_it_is(
    cluster: Cluster, lines: list[LeasedLine]
) -> None:
    places = await full(cluster, lines[0], 4)
    other = await waiting(lines[1])
    cluster.renew()
    mine = await waiting(lines[0])

    places.pop().release()
    await ticks()

    # It is not used here before the server has said so.
    assert not mine.done()
    cluster.renew()
    await ticks()
    assert other.done()
    assert not mine.done()

    places.pop().release()
    cluster.renew()
    await ticks()
    assert mine.done()
    for place in (*places, other.result(), mine.result()):
        place.release()


async def test_place_that_ends_is_used_at_once_while_nobody_else_waits(
    cluster: Cluster, lines: list[LeasedLine]
) -> None:
    places = await full(cluster, lines[0], 4)
    mine = await waiting(lines[0])
    calls = cluster.instances["one"].calls

    places.pop().release()
    await ticks()

    assert mine.done()
    assert cluster.instances["one"].calls == calls
    for place in (*places, mine.result()):
        place.release()


@pytest.mark.parametrize("under_way", [True, False])
async def test_place_that_ends_is_used_at_once_while_a_call_is_in_doubt(
    cluster: Cluster, lines: list[LeasedLine], under_way: bool
) -> None:
    places = await full(cluster, lines[0], 4)
    other = await waiting(lines[1])
    cluster.renew()
    mine = await waiting(lines[0])
    first = cluster.instances["one"]
    first.request("run")
    if not under_way:
        first.failed("no answer")

    places.pop().release()
    await ticks()

    assert mine.done()
    for place in (*places, mine.result()):
        place.release()
    other.cancel()


async def test_nothing_starts_on_a_lease_that_is_over_though_no_timer_has_run(
    cluster: Cluster, lines: list[LeasedLine]
) -> None:
    assert lines[0].resource.limit > 0
    cluster.clock.now += TIMES.lease

    assert lines[0].try_enter() is None


async def test_nothing_that_waits_starts_on_a_lease_that_is_over(
    cluster: Cluster, lines: list[LeasedLine]
) -> None:
    places = await full(cluster, lines[0], 4)
    mine = await waiting(lines[0])
    cluster.clock.now += TIMES.lease

    places.pop().release()
    await ticks()

    assert not mine.done()
    for place in places:
        place.release()
    mine.cancel()


async def test_instance_whose_server_is_away_goes_on_with_its_share(
    cluster: Cluster, lines: list[LeasedLine]
) -> None:
    cluster.away = True
    places = await full_of_grants(lines[0])
    waiters = [await waiting(lines[0]) for _ in range(4)]
    cluster.advance(TIMES.lease + TIMES.beat + 2 * TIMES.bound)
    await ticks()

    assert lines[0].resource.limit == 2
    assert lines[0].resource.inside == 2
    for task in waiters:
        task.cancel()
    await asyncio.wait(waiters)
    for task in waiters:
        if not task.cancelled():
            task.result().release()
    for place in places:
        place.release()


async def full_of_grants(line: LeasedLine) -> list[Grant]:
    places = []
    while (place := line.try_enter()) is not None:
        places.append(place)
    return places


async def test_limit_that_a_reload_lowers_holds_for_all_at_once(
    cluster: Cluster, lines: list[LeasedLine]
) -> None:
    places = await full(cluster, lines[0], 3)

    for line in lines:
        line.leased.apply(2)
    cluster.renew()

    assert lines[0].leased.limit == 2
    assert lines[0].resource.limit <= 2
    places.pop().release()
    places.pop().release()
    cluster.renew()
    again = await full(cluster, lines[1], 1)
    assert lines[1].try_enter() is None
    for place in (*places, *again):
        place.release()


async def test_full_queue_takes_what_may_have_places_elsewhere(cluster: Cluster) -> None:
    line = LeasedLine(cluster, cluster.add("one"), 4, queue_size=0)
    other = LeasedLine(cluster, cluster.add("two"), 4, queue_size=0)
    cluster.advance(TIMES.grace + 3 * TIMES.beat)

    places = await full(cluster, line, 4)

    with pytest.raises(ServerAtCapacity, match="full"):
        await line.enter()
    assert other.resource.waiting == 0
    for place in places:
        place.release()


async def test_who_waits_as_batch_alone_asks_with_the_least_weight(
    lines: list[LeasedLine],
) -> None:
    line = lines[0]
    tasks = [
        asyncio.create_task(line.enter(str(number), weight=5, kind="batch")) for number in range(6)
    ]
    await until(lambda: line.resource.waiting > 0)
    assert (line.leased.weight, line.leased.wanting) == (1, line.resource.waiting)

    tasks += [asyncio.create_task(line.enter("web", weight=5)) for _ in range(6)]
    await until(lambda: bool(line.resource.queue.queues[0].size))
    assert line.leased.weight == 5

    for task in tasks:
        task.cancel()
    for done in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(done, Grant):
            done.release()
    assert line.resource.inside == line.resource.waiting == 0


async def test_an_instance_leaves_a_place_of_two_and_none_of_one(lines: list[LeasedLine]) -> None:
    line = lines[0]

    line.resize(1)
    place = line.try_enter(kind="batch")
    assert place is not None
    place.release()
    line.resize(2)
    places = [line.try_enter(kind="batch"), line.try_enter(kind="batch"), line.try_enter()]

    assert [taken is not None for taken in places] == [True, False, True]
    for taken in places:
        if taken is not None:
            taken.release()


async def test_a_place_that_batch_must_leave_is_given_to_who_wants_it_elsewhere(
    cluster: Cluster, lines: list[LeasedLine]
) -> None:
    here, there = lines
    waiting = [asyncio.create_task(here.enter(kind="batch")) for _ in range(6)]
    await ticks()
    cluster.renew()
    await ticks()
    # All places are here, and one of them is not for those that wait here.
    assert (here.resource.inside, here.resource.stats().waiting) == (3, 3)

    interactive = asyncio.create_task(there.enter())
    await ticks()
    cluster.renew()
    await ticks()

    assert interactive.done()
    assert (here.resource.inside, there.resource.inside) == (3, 1)
    # What ends is for both, in turns, and nothing is passed to and fro meanwhile.
    interactive.result().release()
    cluster.renew()
    cluster.advance(3 * TIMES.beat)
    assert here.resource.inside + there.resource.inside == 3
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


class Rare:
    """A rate that lets nobody start before *seconds* have passed, nor the next ones before twice as
    many.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def delay(self, _cost: int, ahead: int = 0) -> float:
        return self.seconds * (ahead + 1)

    def try_take(self, _cost: int) -> object:
        return None if self.seconds else True

    def settle(self, taken: object, spent: int | None) -> None:
        pytest.fail("nothing was taken")


@pytest.mark.parametrize(("seconds", "wanted"), [(0.0, 4), (0.05, 2), (1.0, 0), (inf, 0)])
async def test_only_those_whom_the_rate_lets_start_soon_want_a_place(
    cluster: Cluster, seconds: float, wanted: int
) -> None:
    rate = Rare()
    line = LeasedLine(cluster, cluster.add("one"), 4, rate=rate)
    # Nothing is granted yet.
    tasks = [await waiting(line) for _ in range(4)]

    rate.seconds = seconds

    assert line.leased.wanting == wanted
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.virtual_time
async def test_who_may_not_wait_does_so_while_a_place_may_be_on_its_way(cluster: Cluster) -> None:
    line = LeasedLine(cluster, cluster.add("one"), 4)
    other = LeasedLine(cluster, cluster.add("two"), 4, queue_size=0, queue_timeout=0.0)
    cluster.advance(TIMES.grace + 3 * TIMES.beat)
    places = await full(cluster, line, 4)
    loop = asyncio.get_running_loop()

    async def refused() -> float:
        since = loop.time()
        with pytest.raises(ServerAtCapacity):
            await other.enter()
        return loop.time() - since

    assert await refused() == pytest.approx(GRACE, abs=0.02)
    waits = asyncio.create_task(refused())
    await ticks()
    cluster.renew()
    await waits
    # The other instance has none to give: one that has just ended may be on its way.
    assert await refused() == pytest.approx(MOMENT, abs=0.02)
    for place in places:
        place.release()
