"""Several servers in the test's own loop, which share a page and a listening socket as workers
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

from aioserver.server.listener import ListeningSocket, Site
from aioserver.workers.shared_page import SharedPage
from aioserver.workers.slot import Slot
from tests.support.server import CONCURRENCY, QUICK, UVICORN, RunningServer, running
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aioserver.limits.gate import Gate


class Workers:
    """The parent's page and socket, and the servers by their slots."""

    def __init__(self, path: Path, count: int, changes: dict[str, Any]) -> None:
        self.path, self.count, self.changes = path, count, changes
        self.total: int = changes[f"{CONCURRENCY}.max_connections"]
        self.page = SharedPage.create(count, self.total)
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        # By slot; the ports lead to that worker alone.
        self.servers: dict[int, RunningServer] = {}
        self.ports: dict[int, int] = {}
        # All clients, which would leave if nothing held them.
        self.clients: list[aiohttp.ClientWebSocketResponse] = []
        self._blocks: dict[int, AsyncExitStack] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self.session = await self._stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        )
        for slot in range(self.count):
            await self.start(slot)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()
        for slot in list(self.servers):
            await self.end(slot)
        self.socket.close()
        self.page.close()
        os.close(self.page.fd)

    async def start(self, slot: int) -> RunningServer:
        """Start a worker in *slot*."""
        page = SharedPage(self.page.fd, slot)
        block = AsyncExitStack()
        block.callback(page.close)
        server = await block.enter_async_context(
            running(
                self.path / f"{slot}.yaml",
                QUICK,
                self.changes,
                slot=Slot(page, self.count),
                inherited=[self.socket.dup()],
            )
        )
        # Accepted from whatever the balance is.
        own = ListeningSocket()
        own.bind(("127.0.0.1", 0))
        own.setblocking(False)
        await Site(server.runner, own, backlog=1024).start()
        self.ports[slot] = own.getsockname()[1]
        self.servers[slot], self._blocks[slot] = server, block
        return server

    async def end(self, slot: int) -> None:
        """End the worker of *slot* in good order."""
        del self.servers[slot]
        await self._blocks.pop(slot).aclose()
        self.page.reaped(slot)

    async def change(self, places: int) -> None:
        """Reload all workers with another number of places, as the parent does."""
        self.changes[f"{CONCURRENCY}.max_connections"] = places
        self.page.resize(places, list(self.servers))
        for server in self.servers.values():
            assert await server.change(**self.changes)

    async def beats(self) -> None:
        """Wait until each worker has looked at the page once more."""
        for server in self.servers.values():
            slot = server.owners.slot
            assert slot is not None
            await until(partial(_has_beaten, slot, slot.beats))

    def gate(self, slot: int) -> Gate:
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


def _has_beaten(slot: Slot, before: int) -> bool:
    return slot.beats > before


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
