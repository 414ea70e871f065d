"""Several servers in the test's own loop, which share limits and a listening socket as workers
do.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import aiohttp

from aioserver.gateway.contracts.commands import Commands
from aioserver.limits.fixed_share import Scope
from aioserver.server.listener import ListeningSocket, Site
from aioserver.wings.cluster.answers.remote_streams import RemoteStreams
from aioserver.wings.cluster.limits.lease_messages import Times
from aioserver.wings.cluster.limits.limits import SharedLimits
from aioserver.workers.balance import Balance
from aioserver.workers.loads import Loads
from tests.support.instances import (
    SECRET,
    MemoryStore,
    NamedNetwork,
    StreamsOnly,
    World,
)
from tests.support.reference_server import ReferenceServer
from tests.support.server import CONCURRENCY, QUICK, UVICORN, RunningServer, running
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aioserver.limits.resource import Resource
    from aioserver.wings.cluster.limits.leases import Leases

# A new server shares the limits after a tenth of the usual time, in which all are there; calls come
# as ever, since a place that ends behind one is used at once.
TIMES = Times(grace=0.35)


class Workers:
    """The parent's page and socket, the server that the workers share limits through, and the
    workers by their slots.
    """

    def __init__(self, path: Path, count: int, changes: dict[str, Any]) -> None:
        self.path, self.count, self.changes = path, count, changes
        self.total: int = changes[f"{CONCURRENCY}.max_connections"]
        self.loads = Loads.create(count)
        self.reference = ReferenceServer()
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        # By slot; the ports lead to that worker alone.
        self.servers: dict[int, RunningServer] = {}
        self.balances: dict[int, Balance] = {}
        self.leases: dict[int, Leases] = {}
        self.ports: dict[int, int] = {}
        # All clients, which would leave if nothing held them.
        self.clients: list[aiohttp.ClientWebSocketResponse] = []
        self._world = World()
        self._started = 0
        self._blocks: dict[int, AsyncExitStack] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self.session = await self._stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        )
        for slot in range(self.count):
            await self.start(slot, first=True)
        await self.joined()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()
        for slot in list(self.servers):
            await self.end(slot)
        self.reference.close()
        self.socket.close()
        self.loads.close()
        os.close(self.loads.fd)

    async def start(self, slot: int, *, first: bool = False) -> RunningServer:
        """Start a worker in *slot*."""
        loads = Loads(self.loads.fd, slot)
        block = AsyncExitStack()
        block.callback(loads.close)
        self._started += 1
        name, rank = f"i{self._started}", slot % self.count
        leases = self.reference.join(name, fixed=(rank, self.count), times=TIMES)
        limits = SharedLimits(leases, Scope("host", rank, self.count, first))
        commands, balance = Commands(MemoryStore(self._world, name), ""), Balance(loads)
        world = self._world
        network = NamedNetwork(world, name, self.path)
        make = partial(
            RemoteStreams,
            name,
            commands,
            network,
            lambda: SECRET,
            lambda _what: b"",
            lambda: world.members,
        )
        server = await block.enter_async_context(
            running(
                self.path / f"{slot}.yaml",
                QUICK,
                self.changes,
                cluster=StreamsOnly(commands, make, limits.make_quota, limits.share_door),
                balance=balance,
                inherited=[self.socket.dup()],
            )
        )
        # Accepted from whatever the balance is.
        own = ListeningSocket()
        own.bind(("127.0.0.1", 0))
        own.setblocking(False)
        await Site(server.http_server, own, backlog=1024).start()
        self.ports[slot] = own.getsockname()[1]
        self.servers[slot], self._blocks[slot] = server, block
        self.balances[slot], self.leases[slot] = balance, leases
        return server

    async def joined(self) -> None:
        """Wait until the server shares the limits among the workers."""
        await until(
            lambda: all(
                len(each.members) == len(self.leases) and not each.standing.grace
                for each in self.leases.values()
            )
        )

    async def end(self, slot: int) -> None:
        """End the worker of *slot* in good order."""
        del self.servers[slot]
        self.leases.pop(slot).leave()
        await self._blocks.pop(slot).aclose()
        self.loads.reaped(slot)

    async def change(self, places: int) -> None:
        """Reload all workers with another number of places, as the parent does."""
        self.changes[f"{CONCURRENCY}.max_connections"] = places
        for server in self.servers.values():
            assert await server.change(**self.changes)

    async def beats(self) -> None:
        """Wait until each worker has looked at the loads once more."""
        for slot in self.servers:
            balance = self.balances[slot]
            await until(partial(_has_beaten, balance, balance.beats))

    def gate(self, slot: int) -> Resource:
        """The gate of the worker in *slot*."""
        return self.servers[slot].context.admission.gate

    @property
    def limits(self) -> list[int]:
        """The limits of all gates."""
        return [self.gate(slot).limit for slot in self.servers]

    @property
    def inside(self) -> list[int]:
        """The places of all gates that are taken."""
        return [self.gate(slot).inside for slot in self.servers]

    async def open(
        self, number: int, slot: int | None = None, headers: dict[str, str] | None = None
    ) -> list[aiohttp.ClientWebSocketResponse]:
        """Open *number* WebSockets at once, all of them at the worker in *slot* if that is
        given.
        """
        server = next(iter(self.servers.values()))
        port = self.socket.getsockname()[1] if slot is None else self.ports[slot]
        address = server.ws.replace(f":{server.port}/", f":{port}/")
        clients = await asyncio.gather(
            *(self.session.ws_connect(address, headers=headers) for _ in range(number))
        )
        self.clients += clients
        return clients


def _has_beaten(balance: Balance, before: int) -> bool:
    return balance.beats > before


@asynccontextmanager
async def workers_of(
    path: Path, count: int, places: int, **changes: Any
) -> AsyncIterator[Workers]:
    """Run *count* workers that share *places*, with a provider that answers at once."""
    sizes = {
        f"{CONCURRENCY}.max_connections": places,
        f"{CONCURRENCY}.connection_queue_size": max(places, 50),
        f"{UVICORN}.backlog": 1024,
    }
    async with Workers(path, count, {**sizes, **changes}) as workers:
        yield workers
