"""The renewer carries what `Leases` says to a real server, and notices when it is gone."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from aioserver.wings.cluster.connection import AccessDenied
from aioserver.wings.cluster.limits.grants import State
from aioserver.wings.cluster.limits.lease_messages import Times
from aioserver.wings.cluster.limits.leased import LeasedCapacity
from aioserver.wings.cluster.limits.leases import Leases
from aioserver.wings.cluster.limits.renewer import Renewer
from tests.support.resources import Line
from tests.support.waiting import ticks, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.real_time
LIMIT = 8
# A tenth of the real times, but for the bound of a call: the machine may be busy.
TIMES = Times(lease=0.9, margin=0.1, beat=0.15, bound=0.2, pause=0.4, grace=0.4, gone=3.0)


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


@pytest.mark.parametrize(
    ("command", "user", "error"),
    [
        (("CONFIG", "SET", "requirepass", "right"), ":wrong", "WRONGPASS"),
        (
            ("ACL", "SETUSER", "little", "on", ">right", "~*", "&*", "+info", "+subscribe"),
            "little:right",
            "NOPERM",
        ),
    ],
    ids=["wrong password", "no permission for the script"],
)
async def test_server_that_refuses_the_user_ends_the_start(
    redis: RedisServer, command: tuple[str, ...], user: str, error: str
) -> None:
    redis.call(*command)
    instance = Instance(f"unix://{user}@{redis.path}", 0, Referee())

    with pytest.raises(AccessDenied, match=error):
        await instance.open()

    await instance.close()
