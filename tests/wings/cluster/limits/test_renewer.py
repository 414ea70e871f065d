"""Instances with a real server between them: whatever happens to it, no more is in flight than the
limit.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from aioserver.wings.cluster.connection import AccessDenied
from aioserver.wings.cluster.limits.grants import State
from aioserver.wings.cluster.limits.lease_messages import Times
from aioserver.wings.cluster.limits.leased import LeasedCapacity
from aioserver.wings.cluster.limits.leases import Leases
from aioserver.wings.cluster.limits.renewer import Renewer
from tests.support.redis_server import RedisServer, away, full, paused, replica
from tests.support.resources import Line
from tests.support.waiting import ticks, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.both_loops, pytest.mark.real_time]
LIMIT = 8
# A tenth of the real times, but for the bound of a call: the machine may be busy.
TIMES = Times(lease=0.9, margin=0.1, beat=0.15, bound=0.2, pause=0.4, grace=0.4, gone=3.0)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


class Referee:
    """Counts what is in flight of all instances."""

    def __init__(self) -> None:
        self.inside = self.peak = self.starts = 0


class Instance:
    """An instance with more clients than there are places."""

    def __init__(self, url: str, number: int, referee: Referee) -> None:
        self.referee = referee
        self.states: list[State] = []
        self.starts = 0
        self.renewer = Renewer(
            lambda on_due: Leases(
                f"host-{number}",
                times=TIMES,
                on_due=on_due,
                on_state=lambda _old, new, _why: self.states.append(new),
            ),
            url,
            "test",
        )
        self.leases = self.renewer.leases
        self.line = Line(0, queue_size=100)
        self.resource = self.line.resource
        LeasedCapacity(self.leases, self.line.scheduler, self.resource, "p:provider", LIMIT)
        self.clients: list[asyncio.Task[None]] = []

    async def open(self, clients: int = LIMIT) -> None:
        await self.renewer.open()
        self.clients = [asyncio.create_task(self.client()) for _ in range(clients)]

    async def client(self) -> None:
        referee = self.referee
        while True:
            grant = await self.line.enter()
            self.starts += 1
            referee.starts += 1
            referee.inside += 1
            referee.peak = max(referee.peak, referee.inside)
            try:
                await asyncio.sleep(0.02)
            finally:
                referee.inside -= 1
                grant.release()

    async def stop_clients(self) -> None:
        for client in self.clients:
            client.cancel()
        if self.clients:
            await asyncio.wait(self.clients)

    async def close(self) -> None:
        await self.stop_clients()
        await self.renewer.close()


@asynccontextmanager
async def three(url: str) -> AsyncIterator[tuple[Referee, list[Instance]]]:
    """Three instances that have joined and work."""
    referee = Referee()
    instances = [Instance(url, number, referee) for number in range(3)]
    try:
        for each in instances:
            await each.open()
        await until(lambda: all(working(each) for each in instances), state=lambda: instances)
        yield referee, instances
    finally:
        for each in instances:
            await each.close()


def working(instance: Instance) -> bool:
    return instance.leases.state is State.JOINED and instance.starts > 2


async def work_again(instances: list[Instance]) -> None:
    """Wait until all of *instances* are joined, and start again."""
    before = [each.starts for each in instances]

    def back() -> bool:
        return all(
            each.leases.state is State.JOINED and each.starts > starts + 2
            for each, starts in zip(instances, before, strict=True)
        )

    await until(back, state=lambda: [(each.leases.state, each.starts) for each in instances])


async def test_place_of_an_instance_that_leaves_is_free_at_once(redis: RedisServer) -> None:
    async with three(redis.url) as (referee, instances):
        leaving, *others = instances
        await leaving.stop_clients()
        await leaving.renewer.leave(5.0)

        assert leaving.leases.left
        await until(lambda: sum(each.resource.limit for each in others) == LIMIT)
        assert referee.peak == LIMIT


async def test_places_of_a_killed_instance_are_free_after_its_lease(redis: RedisServer) -> None:
    async with three(redis.url) as (referee, instances):
        killed, *others = instances
        await killed.close()

        await until(lambda: sum(each.resource.limit for each in others) == LIMIT)
        assert referee.peak == LIMIT


async def test_instances_work_through_whatever_happens_to_the_server(redis: RedisServer) -> None:
    async with three(redis.url) as (referee, instances):
        redis.call("SCRIPT", "FLUSH")
        await work_again(instances)
        redis.call("FLUSHALL")
        await work_again(instances)
        redis.kill()
        redis.start()
        await work_again(instances)

        assert referee.peak == LIMIT


async def test_nothing_is_given_away_while_there_is_no_connection(redis: RedisServer) -> None:
    async with three(redis.url) as (referee, instances):
        redis.kill()
        await until(lambda: not any(each.renewer.connection.connected for each in instances))
        await ticks()

        # A place that ends is used at once: nobody can be given it.
        assert not any(each.leases.state is State.JOINED for each in instances)
        redis.start()
        await work_again(instances)
        assert referee.peak == LIMIT


async def test_instances_go_on_with_what_they_have_while_calls_fail(redis: RedisServer) -> None:
    async with three(redis.url) as (referee, instances):
        for fault in (full, replica):
            undo = fault(redis)
            await until(lambda: all(each.leases.state is State.UNHEARD for each in instances))
            before = referee.starts
            await until(lambda before=before: referee.starts > before + LIMIT)  # type: ignore[misc]

            undo()
            await work_again(instances)

        assert referee.peak == LIMIT


async def test_instances_go_on_alone_while_the_server_is_away_and_come_back(
    redis: RedisServer,
) -> None:
    async with three(redis.url) as (referee, instances):
        # The shares are those of three.
        await asyncio.sleep(2 * TIMES.beat)
        for fault in (paused, away):
            undo = fault(redis)
            await until(lambda: all(each.leases.state is State.ALONE for each in instances))
            await until(lambda: sum(each.resource.limit for each in instances) == LIMIT)
            before = referee.starts
            await until(lambda before=before: referee.starts > before + LIMIT)  # type: ignore[misc]

            undo()
            await work_again(instances)

        assert referee.peak == LIMIT


async def test_stopped_process_costs_what_it_had_and_starts_nothing_when_it_goes_on(
    redis: RedisServer,
) -> None:
    referee = Referee()
    here = Instance(redis.url, 1, referee)
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "tests.support.cluster_instance",
            redis.url,
            str(LIMIT),
            str(LIMIT),
        ),
        *map(str, TIMES),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    counts: list[int] = []
    # Ends that it was not answered keep their places.
    inside = unanswered = 0
    answering = True

    async def follow() -> None:
        nonlocal inside, unanswered
        assert process.stdout is not None
        while line := await process.stdout.readline():
            change = 1 if line == b"+\n" else -1
            inside += change
            referee.inside += change
            referee.peak = max(referee.peak, referee.inside)
            if change > 0:
                counts.append(referee.inside)
            if change < 0:
                unanswered += 1
                answer()

    def answer() -> None:
        nonlocal unanswered
        assert process.stdin is not None
        if answering and not process.stdin.is_closing():
            process.stdin.write(b"\n" * unanswered)
            unanswered = 0

    following = asyncio.create_task(follow())
    try:
        await here.open()
        await until(lambda: len(counts) > 5 and working(here))
        assert referee.peak == LIMIT

        process.send_signal(signal.SIGSTOP)
        await until(lambda: here.resource.inside == LIMIT)
        stopped = inside
        assert referee.peak <= LIMIT + stopped
        counts.clear()
        answering = False
        process.send_signal(signal.SIGCONT)
        # The server knows of it again, and so the others have given way.
        await until(lambda: here.resource.inside <= LIMIT - inside - unanswered)
        # One start may have been under way already; alone, an instance has its share.
        assert max(counts, default=0) <= LIMIT + max(stopped + 1, LIMIT // 2)
        counts.clear()
        answering = True
        answer()
        await until(lambda: len(counts) > 5)

        # Each start after that was within the limit.
        assert max(counts) <= LIMIT
    finally:
        # A loop of uvloop does not close before its child has ended.
        process.kill()
        await process.wait()
        await following
        await here.close()


async def test_stranger_starts_nothing_before_the_server_has_answered(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path)
    referee = Referee()
    instance = Instance(redis.url, 0, referee)
    await instance.open()
    await asyncio.sleep(TIMES.lease + TIMES.beat)
    assert referee.starts == 0

    with redis:
        await work_again([instance])
        await instance.close()


async def test_wrong_password_ends_the_start(redis: RedisServer) -> None:
    redis.call("CONFIG", "SET", "requirepass", "right")
    instance = Instance(f"unix://:wrong@{redis.path}", 0, Referee())

    with pytest.raises(AccessDenied, match="WRONGPASS"):
        await instance.open()

    await instance.close()


async def test_user_who_may_not_run_the_script_ends_the_start(redis: RedisServer) -> None:
    redis.call("ACL", "SETUSER", "little", "on", ">right", "~*", "&*", "+info", "+subscribe")
    instance = Instance(f"unix://little:right@{redis.path}", 0, Referee())

    with pytest.raises(AccessDenied, match="NOPERM"):
        await instance.open()

    await instance.close()
