"""The limits of a provider over several instances: places, pace, tokens, and what is told of its
health.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.config.settings import Streams
from aioserver.errors import ServerAtCapacity
from aioserver.limits.fixed_share import Scope
from aioserver.limits.resource import Bid, Ticket
from aioserver.limits.scheduler import Scheduler
from aioserver.provider_errors import ProviderQueueTimeout
from aioserver.providers.backpressure import LOOK, RATE_SECONDS, ClientPace
from aioserver.providers.provider import Provider
from aioserver.streams.entries import CANCELLED
from aioserver.streams.lifetime import Lifetime
from aioserver.wings.cluster.limits.limits import SharedLimits
from tests.support.failing import kill
from tests.support.resources import Line
from tests.support.server import NOWHERE, configured
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from aioserver.config.settings import Provider as ProviderSettings
    from aioserver.limits.resource import Grant, Resource
    from aioserver.providers.capacity import Capacity
    from tests.support.reference_server import ReferenceServer

# Waits for long times.
pytestmark = [pytest.mark.virtual_time, pytest.mark.timeout(2000)]


class One:
    """One instance with one provider."""

    def __init__(
        self, reference: ReferenceServer, number: int, count: int, settings: ProviderSettings
    ) -> None:
        self.lifetime = Lifetime(Streams())
        self.leases = reference.join(
            f"i{number}",
            fixed=(number, count),
            on_members=lambda: self.limits.instances_changed(),
            on_announced=lambda *news: self.limits.announced(*news),
        )
        self.limits: SharedLimits = SharedLimits(self.leases)
        loop = asyncio.get_running_loop()
        self.provider = Provider(
            settings,
            NOWHERE,
            max_response_bytes=1000,
            clock=loop.time,
            share=self.limits.share_provider,
            observer=self.limits.observe(settings.name),
            lifetime=self.lifetime,
        )
        self.limits.serve(lambda: {settings.name: self.provider})

    @property
    def capacity(self) -> Capacity:
        return self.provider.capacity

    async def wait(self, resource: Resource) -> Grant:
        return await self.provider.scheduler.wait(Ticket(), [Bid(resource)])

    @property
    def breaker(self) -> Any:
        return self.provider.health.breaker


def settings_of(tmp_path: Path, **limits: Any) -> ProviderSettings:
    whole = configured(NOWHERE, {}, tmp_path / "c.yaml").settings.llm.providers["sim"]
    return dataclasses.replace(whole, http_client=dataclasses.replace(whole.http_client, **limits))


async def joined(reference: ReferenceServer, count: int, settings: ProviderSettings) -> list[One]:
    ones = [One(reference, number, count, settings) for number in range(count)]
    # Longer than the grace period of a new epoch; polling would stop the time from jumping.
    await asyncio.sleep(6)
    assert all(
        len(each.members) == count and not each.standing.grace
        for each in [instance.leases for instance in ones]
    )
    await asyncio.sleep(5)
    return ones


async def close(*ones: One) -> None:
    for instance in ones:
        instance.lifetime.close()
        await instance.provider.close()


async def enter(instance: One, seconds: float = 1.0) -> Grant | None:
    try:
        async with asyncio.timeout(seconds):
            return await instance.wait(instance.capacity.resource)
    except (TimeoutError, ProviderQueueTimeout):
        return None


async def test_places_are_those_of_all_instances_and_move_to_who_needs_them(
    reference: ReferenceServer, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, concurrent_requests=6, queue_timeout=5.0)
    a, b = await joined(reference, 2, settings)

    taken = [await enter(a) for _ in range(7)]
    assert [place is not None for place in taken] == [True] * 6 + [False]
    assert await enter(b) is None

    waiting = asyncio.ensure_future(enter(b))
    await asyncio.sleep(0.1)
    assert taken[0] is not None
    taken[0].release()
    place = await waiting

    assert place is not None
    assert a.capacity.inside + b.capacity.inside == 6
    for each in (*taken[1:], place):
        if each is not None:
            each.release()
    await close(a, b)


async def test_a_slow_client_gives_its_place_to_a_request_of_another_instance(
    reference: ReferenceServer, tmp_path: Path
) -> None:
    a, b = await joined(reference, 2, settings_of(tmp_path, concurrent_requests=2))
    places = [await enter(a), await enter(a)]
    given_up: list[int] = []

    async def upload(number: int) -> None:
        """Send nothing more of a body that is passed on, and so keep a place."""
        place, over = places[number], asyncio.Event()
        assert place is not None
        pace = ClientPace()
        a.provider.backpressure.watch(pace)
        try:
            with pace.waited_for(lambda: 0, over.set):
                await over.wait()
                given_up.append(number)
        finally:
            place.release()
            a.provider.backpressure.unwatch(pace)

    uploads = [asyncio.ensure_future(upload(number)) for number in range(2)]
    await asyncio.sleep(100.0)
    assert not given_up, "nobody waits"

    place = await enter(b, LOOK + 1.0)

    assert place is not None
    # Longer than any look, and than an answer of the server may be old.
    await asyncio.sleep(RATE_SECONDS)
    assert len(given_up) == 1, "nobody waits any more"
    for task in uploads:
        task.cancel()
    place.release()
    await close(a, b)


async def test_a_paused_exchange_reads_on_for_a_request_of_another_instance(
    reference: ReferenceServer, tmp_path: Path
) -> None:
    a, b = await joined(reference, 2, settings_of(tmp_path, concurrent_requests=1))
    backpressure = a.provider.backpressure

    class Exchange:
        def pause(self) -> None:
            assert backpressure.add(self), "nobody waits"

        def resume(self) -> None:
            backpressure.discard(self)
            if place is not None:
                place.release()

        def complete(self) -> bool:
            return False

    place = await enter(a)
    exchange = Exchange()
    exchange.pause()
    await asyncio.sleep(10.0)
    assert backpressure.paused

    got = await enter(b)

    assert got is not None
    got.release()
    await close(a, b)


async def test_answers_that_nobody_reads_give_way_to_the_requests_of_another_instance(
    reference: ReferenceServer, tmp_path: Path
) -> None:
    count = 4
    a, b = await joined(reference, 2, settings_of(tmp_path, concurrent_requests=count))

    class Placed:
        """An attempt that has a place."""

        place, unread = a.provider.name, True

        def __init__(self, number: int) -> None:
            self.stream = a.lifetime.store.open(f"r{number}", "demo", window=1000.0)
            self.stream.attempt = self
            self.stream.producer = asyncio.ensure_future(self.run())

        @property
        def waiting(self) -> int:
            return a.provider.capacity.held_up

        def let_go(self) -> None:
            pass

        def received_content(self) -> None:
            pass

        def first_event(self) -> None:
            pass

        async def run(self) -> None:
            got = await enter(a)
            assert got is not None
            try:
                await asyncio.sleep(10_000.0)
            finally:
                got.release()
                self.stream.attempt = None
                self.stream.end(CANCELLED, {})

    attempts = [Placed(number) for number in range(count)]
    await asyncio.sleep(1.0)
    for attempt in attempts:
        a.lifetime.detach(attempt.stream)
    await asyncio.sleep(100.0)
    assert a.capacity.inside == count, "nobody waits"

    first = await enter(b)
    await asyncio.sleep(10.0)
    assert a.capacity.inside == count - 1, "nobody waits any more"
    others = await asyncio.gather(*(enter(b) for _ in range(count - 1)))

    assert first is not None
    assert all(others)
    for place in (first, *others):
        if place is not None:
            place.release()
    await close(a, b)


async def test_starts_a_minute_are_those_of_all_instances(
    reference: ReferenceServer, tmp_path: Path
) -> None:
    settings = settings_of(
        tmp_path, concurrent_requests=100, max_connections=100, requests_per_minute=600
    )
    ones = await joined(reference, 3, settings)
    loop = asyncio.get_running_loop()
    starts: list[float] = []

    async def ask(instance: One) -> None:
        while loop.time() < end:
            place = await enter(instance, 5.0)
            if place is not None:
                starts.append(loop.time())
                place.release()

    began = loop.time()
    end = began + 10
    await asyncio.gather(*(ask(instance) for instance in ones for _ in range(4)))

    burst = min(100, 600 // 60)
    within = [start for start in starts if start < end]
    assert len(within) <= 10 * 10 + burst + 1
    assert len(within) >= 0.9 * 10 * 10
    await close(*ones)


async def test_tokens_a_minute_are_those_of_all_instances_together(
    reference: ReferenceServer, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, tokens_per_minute=6000)
    a, b = await joined(reference, 2, settings)
    await asyncio.sleep(20)

    # A burst of 10 s is free: what one has not used of it the other may use.
    a.capacity.pace.charge(500)
    await until(lambda: not a.capacity.pace.delay())
    a.capacity.pace.charge(1500)
    b.capacity.pace.charge(1500)
    # Both pay by turns: 3,000 tokens take half a minute less the rest of the burst.
    began = asyncio.get_running_loop().time()
    for _ in range(2500):
        if not (a.capacity.pace.delay() or b.capacity.pace.delay()):
            break
        # As often as requests ask, which come and go.
        await asyncio.sleep(0.02)
    took = asyncio.get_running_loop().time() - began

    assert 20 <= took <= 36
    await close(a, b)


async def test_a_death_and_its_end_reach_all(reference: ReferenceServer, tmp_path: Path) -> None:
    a, b = await joined(reference, 2, settings_of(tmp_path))
    loop = asyncio.get_running_loop()
    kill(a.breaker, unreachable=True, clock=loop.time)
    a.provider.health.observer.died(unreachable=True)

    await until(lambda: b.breaker.dead)
    assert b.breaker.unreachable
    assert b.breaker.instances == 2

    b.provider.health.answered(0.1, trial=False)
    await until(lambda: not a.breaker.dead)
    await asyncio.sleep(30)
    assert not a.breaker.dead
    assert not b.breaker.dead
    a.provider.health.observer.died(unreachable=True)
    await until(lambda: b.breaker.dead)
    await close(a, b)


async def test_a_rest_that_a_provider_asks_for_is_kept_by_all_and_by_who_comes_later(
    reference: ReferenceServer, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path)
    a, b = await joined(reference, 2, settings)

    a.capacity.pace.cool_down(30.0)
    await until(lambda: b.capacity.pace.cooling > 0)
    late = One(reference, 9, 2, settings)
    await until(lambda: late.capacity.pace.cooling > 0)

    assert 25 < b.capacity.pace.cooling <= 33.1
    await asyncio.sleep(40)
    assert a.capacity.pace.cooling == b.capacity.pace.cooling == 0
    await close(a, b, late)


async def test_another_limit_is_that_of_all_instances_at_once(
    reference: ReferenceServer, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, concurrent_requests=6)
    a, b = await joined(reference, 2, settings)
    taken = [await enter(a) for _ in range(3)] + [await enter(b) for _ in range(3)]
    assert None not in taken

    for instance in (a, b):
        instance.capacity.apply_limits(
            dataclasses.replace(settings.http_client, concurrent_requests=2)
        )
    for place in taken[:3]:
        assert place is not None
        place.release()
    assert await enter(a) is None
    for place in taken[3:]:
        assert place is not None
        place.release()
    places = [await enter(instance) for instance in (a, b, a)]

    assert [place is not None for place in places] == [True, True, False]
    await close(a, b)


class Pair:
    """One instance with the two members of a group."""

    def __init__(
        self, reference: ReferenceServer, number: int, settings: ProviderSettings
    ) -> None:
        self.leases = reference.join(
            f"i{number}",
            fixed=(number, 2),
            on_members=lambda: self.limits.instances_changed(),
            on_announced=lambda *news: self.limits.announced(*news),
        )
        self.limits: SharedLimits = SharedLimits(self.leases)
        loop = asyncio.get_running_loop()
        self.scheduler = Scheduler(loop)
        self.providers = {
            name: Provider(
                dataclasses.replace(settings, name=name),
                NOWHERE,
                max_response_bytes=1000,
                clock=loop.time,
                share=self.limits.share_provider,
                observer=self.limits.observe(name),
                scheduler=self.scheduler,
            )
            for name in ("a", "b")
        }
        self.limits.serve(lambda: self.providers)

    @property
    def resources(self) -> list[Resource]:
        return [provider.capacity.resource for provider in self.providers.values()]


@pytest.mark.parametrize("seed", range(2))
async def test_places_of_members_go_to_whoever_waits_for_any_of_them_at_any_instance(
    reference: ReferenceServer, tmp_path: Path, seed: int
) -> None:
    """Whoever starts at one member leaves the other's queue; some give up while they wait."""
    dice = random.Random(seed)
    settings = settings_of(tmp_path, concurrent_requests=2, queue_size=100, queue_timeout=300.0)
    pairs = [Pair(reference, number, settings) for number in range(2)]
    await asyncio.sleep(11)
    inside: Counter[int] = Counter()
    loop = asyncio.get_running_loop()

    async def ask(pair: Pair, patience: float) -> bool:
        resources = pair.resources
        async with asyncio.timeout(patience) as bound:
            bids = [Bid(resource) for resource in resources]
            place = await pair.scheduler.wait(Ticket("caller"), bids)
            bound.reschedule(None)
            number = resources.index(place.resource)
            inside[number] += 1
            assert inside[number] <= 2
            await asyncio.sleep(dice.uniform(0.2, 2.0))
            inside[number] -= 1
            place.release()
            return True

    tasks = []
    began = loop.time()
    for _ in range(40):
        pair = dice.choice(pairs)
        patience = dice.choice((0.5, 1000.0, 1000.0))
        tasks.append(asyncio.create_task(ask(pair, patience)))
        await asyncio.sleep(dice.choice((0.0, 0.1, 0.5)))
    ends = await asyncio.gather(*tasks, return_exceptions=True)

    assert all(end is True or isinstance(end, TimeoutError) for end in ends)
    # Four places, and 1.1 s each: 11 s, and more for places on their way.
    assert loop.time() - began < 33
    await asyncio.sleep(10)
    for pair in pairs:
        assert [(each.inside, each.waiting) for each in pair.resources] == [(0, 0)] * 2
        bids = [Bid(resource) for resource in pair.resources for _ in range(2)]
        places = [await pair.scheduler.wait(Ticket(), [bid]) for bid in bids]
        for place in places:
            place.release()
        await asyncio.sleep(5)
    for pair in pairs:
        for provider in pair.providers.values():
            await provider.close()


async def test_all_instances_have_half_of_the_places_for_the_background(
    tmp_path: Path, reference: ReferenceServer
) -> None:
    settings = settings_of(tmp_path, concurrent_requests=5, queue_timeout=1.0)
    ones = await joined(reference, 3, settings)

    async def permit(instance: One) -> Grant | None:
        part = instance.capacity.part(background=True)
        try:
            async with asyncio.timeout(3):
                return await instance.wait(part)
        except TimeoutError:
            return None

    permits = await asyncio.gather(*(permit(one) for one in ones for _ in range(2)))
    taken = [each for each in permits if each is not None]
    assert len(taken) == 2

    waiting = [asyncio.create_task(permit(one)) for one in ones]
    await asyncio.sleep(0.5)
    for each in taken:
        each.release()
    got = [each for each in await asyncio.gather(*waiting) if each is not None]
    assert len(got) == 2
    for each in got:
        each.release()
    await close(*ones)


async def test_what_the_workers_of_a_host_admit_together_is_what_is_configured(
    reference: ReferenceServer,
) -> None:
    """At no moment is that the sum of what they have: a place may be on its way."""
    workers = [
        SharedLimits(
            reference.join(f"i{rank}", fixed=(rank, 2)), Scope("host", rank, 2, first=True)
        )
        for rank in range(2)
    ]
    doors = [Line(0, queue_size=10, queue_timeout=10.0) for _ in workers]
    for worker, door in zip(workers, doors, strict=True):
        worker.share_door(door.scheduler, door.resource, 9)
    granted = set()
    for turn in range(40):
        places = [await doors[turn % 2].enter() for _ in range(8)]
        granted.add(sum(door.resource.limit for door in doors))
        assert [each.connections for each in workers] == [("host", 9)] * 2
        for place in places:
            place.release()

    assert min(granted) < max(granted) <= 9
    for door in doors:
        assert door.resource.supply is not None
        door.resource.supply.apply(7)
    assert [each.connections for each in workers] == [("host", 7)] * 2
    alone = SharedLimits(reference.join("i9"))
    own = Line(5)
    alone.share_door(own.scheduler, own.resource, 5)
    assert alone.connections == ("i9", 5)
    for door in doors:
        door.close(lambda: ServerAtCapacity("the end"))
