"""A gate whose places are shared: what it takes, gives back and asks for, with the reference model
as the server.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from aioserver.errors import ServerAtCapacity
from aioserver.limits.gate import Place
from aioserver.limits.lines import Lines, Wish
from aioserver.providers.health import Health
from aioserver.providers.queueing import ProviderGate
from aioserver.telemetry.metrics import ProviderMeter
from aioserver.wings.cluster.lease_messages import TIMES
from aioserver.wings.cluster.shared_gate import SharedGate
from tests.support.failing import kill
from tests.support.lease_cluster import Cluster
from tests.support.scripted_provider import LIMITS
from tests.support.waiting import ticks, until

if TYPE_CHECKING:
    from aioserver.limits.gate import Gate
    from aioserver.wings.cluster.leases import Leases


def gate_of(
    cluster: Cluster,
    leases: Leases,
    limit: int,
    queue_size: int = 100,
    name: str = "p:provider",
) -> SharedGate:
    gate = SharedGate(
        limit,
        queue_size=queue_size,
        queue_timeout=30.0,
        full_error=lambda wait: ServerAtCapacity("full", retry_after=wait),
        timeout_error=lambda wait: ServerAtCapacity("late", retry_after=wait),
        clock=cluster.clock,
    )
    gate.share(leases, name)
    return gate


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def gates(cluster: Cluster) -> list[SharedGate]:
    """The gates of two instances, which share four places."""
    gates = [gate_of(cluster, cluster.add(name), 4) for name in ("one", "two")]
    cluster.advance(TIMES.grace + 3 * TIMES.beat)
    return gates


async def entered(gate: Gate) -> Place:
    """A place of *gate*, for which it may ask the server."""
    task = asyncio.create_task(gate.enter())
    await ticks()
    assert task.done()
    return task.result()


async def full(cluster: Cluster, gate: Gate, count: int) -> list[Place]:
    """So many places of *gate*."""
    tasks = [asyncio.create_task(gate.enter()) for _ in range(count)]
    await ticks()
    cluster.renew()
    await asyncio.gather(*tasks)
    return [task.result() for task in tasks]


async def waiting(gate: Gate) -> asyncio.Task[Place]:
    before = gate.waiting
    task = asyncio.create_task(gate.enter())
    await until(lambda: gate.waiting > before)
    return task


async def test_place_in_hand_is_taken_without_a_call(
    cluster: Cluster, gates: list[SharedGate]
) -> None:
    calls = cluster.instances["one"].calls

    place = gates[0].try_enter()

    assert place is not None
    place.release()
    assert cluster.instances["one"].calls == calls
    assert cluster.instances["one"].due > cluster.clock()


async def test_waiter_gets_a_place_that_nobody_uses(
    cluster: Cluster, gates: list[SharedGate]
) -> None:
    places = await full(cluster, gates[0], 4)

    assert gates[0].inside == 4
    assert gates[1].limit == 0
    for place in places:
        place.release()


async def test_place_that_ends_goes_to_the_instance_whose_turn_it_is(
    cluster: Cluster, gates: list[SharedGate]
) -> None:
    places = await full(cluster, gates[0], 4)
    other = await waiting(gates[1])
    cluster.renew()
    mine = await waiting(gates[0])

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
    cluster: Cluster, gates: list[SharedGate]
) -> None:
    places = await full(cluster, gates[0], 4)
    mine = await waiting(gates[0])
    calls = cluster.instances["one"].calls

    places.pop().release()
    await ticks()

    assert mine.done()
    assert cluster.instances["one"].calls == calls
    for place in (*places, mine.result()):
        place.release()


@pytest.mark.parametrize("under_way", [True, False])
async def test_place_that_ends_is_used_at_once_while_a_call_is_in_doubt(
    cluster: Cluster, gates: list[SharedGate], under_way: bool
) -> None:
    places = await full(cluster, gates[0], 4)
    other = await waiting(gates[1])
    cluster.renew()
    mine = await waiting(gates[0])
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
    cluster: Cluster, gates: list[SharedGate]
) -> None:
    assert gates[0].limit > 0
    cluster.clock.now += TIMES.lease

    assert gates[0].try_enter() is None


async def test_nothing_that_waits_starts_on_a_lease_that_is_over(
    cluster: Cluster, gates: list[SharedGate]
) -> None:
    places = await full(cluster, gates[0], 4)
    mine = await waiting(gates[0])
    cluster.clock.now += TIMES.lease

    places.pop().release()
    await ticks()

    assert not mine.done()
    for place in places:
        place.release()
    mine.cancel()


async def test_instance_whose_server_is_away_goes_on_with_its_share(
    cluster: Cluster, gates: list[SharedGate]
) -> None:
    cluster.away = True
    places = await full_of_grants(gates[0])
    waiters = [await waiting(gates[0]) for _ in range(4)]
    cluster.advance(TIMES.lease + TIMES.beat + 2 * TIMES.bound)
    await ticks()

    assert gates[0].limit == 2
    assert gates[0].inside == 2
    for task in waiters:
        task.cancel()
    await asyncio.wait(waiters)
    for task in waiters:
        if not task.cancelled():
            task.result().release()
    for place in places:
        place.release()


async def full_of_grants(gate: SharedGate) -> list[Place]:
    places = []
    while (place := gate.try_enter()) is not None:
        places.append(place)
    return places


async def test_limit_that_a_reload_lowers_holds_for_all_at_once(
    cluster: Cluster, gates: list[SharedGate]
) -> None:
    places = await full(cluster, gates[0], 3)

    for gate in gates:
        gate.apply(2, queue_size=100, queue_timeout=30.0)
    cluster.renew()

    assert gates[0].shared_limit == 2
    assert gates[0].limit <= 2
    places.pop().release()
    places.pop().release()
    cluster.renew()
    again = await full(cluster, gates[1], 1)
    assert gates[1].try_enter() is None
    for place in (*places, *again):
        place.release()


async def test_full_queue_takes_what_may_have_places_elsewhere(cluster: Cluster) -> None:
    gate = gate_of(cluster, cluster.add("one"), 4, queue_size=0)
    other = gate_of(cluster, cluster.add("two"), 4, queue_size=0)
    cluster.advance(TIMES.grace + 3 * TIMES.beat)

    places = await full(cluster, gate, 4)

    with pytest.raises(ServerAtCapacity, match="full"):
        await gate.enter()
    assert other.waiting == 0
    for place in places:
        place.release()


class SharedProviderGate(SharedGate, ProviderGate):
    """What a provider has."""


async def test_requests_that_the_provider_would_not_start_want_no_place(cluster: Cluster) -> None:
    health = Health("far", ProviderMeter(), cluster.clock)
    kill(health.breaker, unreachable=True, clock=cluster.clock)
    gate = SharedProviderGate("far", LIMITS, health, cluster.clock)
    gate.share(cluster.add("one"), "p:far")
    cluster.advance(TIMES.grace + 3 * TIMES.beat)
    (trial,) = await full(cluster, gate, 1)
    task = await waiting(gate)

    assert gate.wanting == 0

    trial.release()
    task.cancel()


class Members:
    """Two instances that share two members of a group, of one place each, both taken by the second
    instance.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.one, self.two = (
            [gate_of(cluster, leases, 1, name=f"p:{member}") for member in "ab"]
            for leases in (cluster.add("one"), cluster.add("two"))
        )
        cluster.advance(TIMES.grace + 3 * TIMES.beat)
        self.places: list[Place] = []

    async def fill(self) -> None:
        for gate in self.two:
            self.places += await full(self.cluster, gate, 1)

    async def ask(self, *gates: SharedGate) -> asyncio.Task[tuple[Wish, Place]]:
        """A request that waits at all *gates*."""

        async def wait() -> tuple[Wish, Place]:
            return await Lines("caller", None).wait([Wish(gate) for gate in gates])

        task = asyncio.create_task(wait())
        await until(lambda: all(gate.waiting for gate in gates))
        self.cluster.renew()
        return task

    def wanted(self) -> list[int]:
        """How many places of each member the first instance wants, as the server knows it."""
        world = self.cluster.model.world
        assert world is not None
        wants = [world.limits[f"p:{member}"].wants.get("one") for member in "ab"]
        return [0 if want is None else want.need for want in wants]

    def used(self) -> list[int]:
        """How many places of each member are taken by both."""
        return [a.inside + b.inside for a, b in zip(self.one, self.two, strict=True)]


async def test_who_starts_elsewhere_takes_its_wish_back_at_once(cluster: Cluster) -> None:
    members = Members(cluster)
    await members.fill()
    asking = await members.ask(*members.one)
    assert members.wanted() == [1, 1]

    members.places[0].release()
    # The calls that are due; no time passes.
    cluster.renew()

    wish, place = await asking
    assert wish.gate is members.one[0]
    cluster.renew()
    assert members.wanted() == [0, 0]
    assert [gate.waiting for gate in members.one] == [0, 0]
    # What ends at the other member stays with those who wait there.
    behind = await waiting(members.two[1])
    members.places[1].release()
    cluster.renew()
    await until(behind.done)
    assert (members.one[1].limit, members.two[1].limit) == (0, 1)
    behind.result().release()
    place.release()
    cluster.advance(2 * TIMES.beat)
    assert members.used() == [0, 0]
    nothing_is_left(members)


async def test_who_gives_up_takes_its_wish_back_at_once(cluster: Cluster) -> None:
    members = Members(cluster)
    await members.fill()
    asking = await waiting(members.one[0])
    cluster.renew()
    assert members.wanted() == [1, 0]

    asking.cancel()
    await asyncio.wait([asking])
    # The calls that are due; no time passes.
    cluster.renew()

    assert members.wanted() == [0, 0]
    for place in members.places:
        place.release()
    cluster.advance(2 * TIMES.beat)
    nothing_is_left(members)


async def test_who_has_nothing_any_more_takes_its_wish_back_too(cluster: Cluster) -> None:
    one, two, three = (gate_of(cluster, cluster.add(name), 1) for name in ("one", "two", "three"))
    cluster.advance(TIMES.grace + 3 * TIMES.beat)
    place = await entered(one)
    asking, other = await waiting(two), await waiting(three)
    cluster.renew()

    # It has no place, wants none, and knows that another one starves.
    other.cancel()
    await asyncio.wait([other])
    place.release()
    cluster.advance(2 * TIMES.beat)
    await ticks()
    asking.result().release()
    asking = await waiting(one)
    cluster.advance(2 * TIMES.beat)
    await ticks()

    # Nobody has been given what nobody waits for.
    asking.result().release()


async def test_a_lease_for_one_line_is_used_by_who_is_first_there(cluster: Cluster) -> None:
    members = Members(cluster)
    await members.fill()
    both = await members.ask(*members.one)
    alone = await members.ask(members.one[1])
    other = await members.ask(*members.one)

    for place in members.places:
        place.release()
    cluster.renew()

    # The first has started at one member, so that the second is the first in line at the other.
    wish, first = await both
    second_wish, second = await alone
    assert (wish.gate, second_wish.gate) == (members.one[0], members.one[1])
    assert not other.done()
    assert members.used() == [1, 1]
    second.release()
    cluster.renew()
    wish, third = await other
    assert wish.gate is members.one[1]
    for place in (first, third):
        place.release()
    cluster.advance(2 * TIMES.beat)
    assert members.used() == [0, 0]
    nothing_is_left(members)


async def test_two_leases_that_come_with_one_answer_start_a_request_once(
    cluster: Cluster,
) -> None:
    members = Members(cluster)
    await members.fill()
    asking = await members.ask(*members.one)

    # Both places are free before the first instance calls again.
    for place in members.places:
        place.release()
    cluster.advance(TIMES.beat)

    _, place = await asking
    assert members.used() in ([1, 0], [0, 1])
    # The other one is there for whoever asks.
    free = members.two[members.used().index(0)]
    await full(cluster, free, 1)
    assert members.used() == [1, 1]
    place.release()


def nothing_is_left(members: Members) -> None:
    """Neither in a line, nor wanted of the server, nor taken: each instance may have all."""
    for gate in (*members.one, *members.two):
        assert (gate.waiting, gate.inside) == (0, 0)
    assert members.wanted() == [0, 0]


async def test_who_waits_as_batch_alone_asks_with_the_least_weight(
    gates: list[SharedGate],
) -> None:
    gate = gates[0]
    tasks = [
        asyncio.create_task(gate.enter(str(number), weight=5, batch=True)) for number in range(6)
    ]
    await until(lambda: gate.waiting > 0)
    assert (gate.weight, gate.wanting) == (1, gate.waiting)

    tasks += [asyncio.create_task(gate.enter("web", weight=5)) for _ in range(6)]
    await until(lambda: bool(gate._queue.size))  # noqa: SLF001
    assert gate.weight == 5

    for task in tasks:
        task.cancel()
    for done in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(done, Place):
            done.release()
    assert gate.inside == gate.waiting == 0


async def test_an_instance_leaves_a_place_of_two_and_none_of_one(gates: list[SharedGate]) -> None:
    gate = gates[0]

    gate.resize(1)
    place = gate.try_enter(batch=True)
    assert place is not None
    place.release()
    gate.resize(2)
    places = [gate.try_enter(batch=True), gate.try_enter(batch=True), gate.try_enter()]

    assert [taken is not None for taken in places] == [True, False, True]
    for taken in places:
        if taken is not None:
            taken.release()


async def test_a_place_that_batch_must_leave_is_given_to_who_wants_it_elsewhere(
    cluster: Cluster, gates: list[SharedGate]
) -> None:
    here, there = gates
    waiting = [asyncio.create_task(here.enter(batch=True)) for _ in range(6)]
    await ticks()
    cluster.renew()
    await ticks()
    # All places are here, and one of them is not for those that wait here.
    assert (here.inside, here.stats().waiting) == (3, 3)

    interactive = asyncio.create_task(there.enter())
    await ticks()
    cluster.renew()
    await ticks()

    assert interactive.done()
    assert (here.inside, there.inside) == (3, 1)
    # What ends is for both, in turns, and nothing is passed to and fro meanwhile.
    interactive.result().release()
    cluster.renew()
    cluster.advance(3 * TIMES.beat)
    assert here.inside + there.inside == 3
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
