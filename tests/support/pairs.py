"""Two instances with a real Redis or Valkey server between them, each with a road of its own to
it.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aioserver.wings.cluster.limits.grants import State
from aioserver.wings.cluster.limits.lease_messages import Times
from aioserver.wings.cluster.membership import join
from tests.support.redis_server import RedisServer, Road
from tests.support.server import running
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aioserver.wings.cluster.membership import Membership
    from tests.support.server import RunningServer

TIMES = Times(lease=4.0, margin=0.3, beat=0.5, bound=1.0, pause=2.0, grace=0.3, gone=6.0)
FORGETFUL = Behaviour(ttft=0, interval=0, forgets=(404, "Response with id 'x' not found."))


@dataclass
class Pair:
    """Two instances, and their roads to *redis*."""

    redis: RedisServer
    servers: list[RunningServer] = field(default_factory=list)
    roads: list[Road] = field(default_factory=list)
    members: list[Membership] = field(default_factory=list)


@asynccontextmanager
async def pair_in(path: Path, **changes: Any) -> AsyncIterator[Pair]:
    """Run both; *changes* as those of `make_server`."""
    with RedisServer(path) as redis:
        async with AsyncExitStack() as stack:
            made = Pair(redis)
            for name in "ab":
                road = await stack.enter_async_context(Road(path, redis, name))
                member = await stack.enter_async_context(join(road.url, "test", times=TIMES))
                server = running(path / f"{name}.yaml", FORGETFUL, changes, cluster=member)
                made.servers.append(await stack.enter_async_context(server))
                made.roads.append(road)
                made.members.append(member)
            await until(
                lambda: all(
                    each.leases.state is State.JOINED and len(each.leases.members) == 2
                    for each in made.members
                )
            )
            yield made
