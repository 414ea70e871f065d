"""Workers as processes of their own, with one listening socket, and a server through which they
share their places.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import statistics
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple, Self

import aiohttp
import pytest

from aioserver.workers.balance import AT_ONCE, STOP
from aioserver.workers.loads import Loads
from tests.support.redis_server import RedisServer
from tests.support.server import CONCURRENCY, NOWHERE, UVICORN, write
from tests.support.waiting import LATE, until, until_result

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.real_time


class State(NamedTuple):
    """What a worker says of its gate."""

    inside: int
    limit: int
    waiting: int
    # Whether places move between the workers: not in the first seconds of a server.
    moves: int


class Parent:
    """The parent of *count* workers, which share *places*; they run the loop of the test."""

    def __init__(self, path: Path, count: int, places: int, url: str) -> None:
        self.count, self.places, self.config, self.url = count, places, path / "config.yaml", url
        sizes = {
            f"{CONCURRENCY}.max_connections": places,
            f"{CONCURRENCY}.connection_queue_size": 10 * places,
            f"{CONCURRENCY}.queue_timeout": 3 * LATE,
            f"{UVICORN}.backlog": 1024,
        }
        write(NOWHERE, sizes, self.config)
        self.loads = Loads.create(count)
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address = f"ws://127.0.0.1:{self.socket.getsockname()[1]}/ws/chat"
        self.workers: dict[int, asyncio.subprocess.Process] = {}
        self.seconds: list[float] = []
        # All clients, which would leave if nothing held them.
        self.clients: list[aiohttp.ClientWebSocketResponse] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=0)
        self.session = await self._stack.enter_async_context(
            aiohttp.ClientSession(connector=connector)
        )
        await asyncio.gather(*(self.start(slot, first=1) for slot in range(self.count)))
        return self

    async def joined(self) -> None:
        """Wait until places move between the workers."""
        await until_result(
            self.states, lambda states: all(state.moves for state in states), 2 * LATE
        )

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()
        for worker in self.workers.values():
            worker.terminate()
        try:
            ended = await asyncio.gather(*(worker.wait() for worker in self.workers.values()))
            assert not any(ended)
        finally:
            for worker in self.workers.values():
                if worker.returncode is None:
                    worker.kill()
            self.socket.close()
            self.loads.close()
            os.close(self.loads.fd)

    async def start(self, slot: int, first: int = 0) -> None:
        """Start the worker of *slot*."""
        loop = "uvloop" if "uvloop" in type(asyncio.get_running_loop()).__module__ else "asyncio"
        page, sock = self.loads.fd, self.socket.fileno()
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.support.worker", self.config, loop, self.url),
            *map(str, (page, slot, self.count, sock, first)),
            pass_fds=[page, sock],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        self.workers[slot] = worker
        assert worker.stdout is not None
        assert await worker.stdout.readline() == b"ready\n"

    async def state(self, slot: int) -> State:
        """What the worker of *slot* says of its gate."""
        worker = self.workers[slot]
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(b"\n")
        return State(*map(int, (await worker.stdout.readline()).split()))

    async def states(self) -> list[State]:
        """What all workers say."""
        return [await self.state(slot) for slot in self.workers]

    async def inside(self) -> list[int]:
        """The places of each worker that are taken."""
        return [state.inside for state in await self.states()]

    async def kill(self, slot: int) -> None:
        """Kill the worker of *slot*, and reap it."""
        worker = self.workers.pop(slot)
        worker.send_signal(signal.SIGKILL)
        await worker.wait()
        self.loads.reaped(slot)

    async def client(self) -> aiohttp.ClientWebSocketResponse:
        """A WebSocket that has its place."""
        began = time.perf_counter()
        client = await self.session.ws_connect(self.address)
        self.seconds.append(time.perf_counter() - began)
        self.clients.append(client)
        await client.send_json({"action": "ping"})
        while (frame := await client.receive_json())["status"] != "pong":
            assert frame["status"] == "queued", frame
        return client

    async def open(self, number: int) -> None:
        """Open *number* WebSockets that have their places."""
        await asyncio.gather(*(self.client() for _ in range(number)))

    async def alive(self) -> int:
        """How many clients are still connected; those of a killed process hear of its end."""
        await asyncio.sleep(0)
        return sum(not client.closed for client in self.clients)


@asynccontextmanager
async def parent_of(
    path: Path, count: int, places: int
) -> AsyncIterator[tuple[Parent, RedisServer]]:
    """A parent whose workers share their places through a server."""
    with RedisServer(path) as server:
        async with Parent(path, count, places, server.url) as parent:
            await parent.joined()
            yield parent, server


async def test_the_places_of_a_killed_worker_are_free_for_others_and_a_killed_server_costs_none(
    tmp_path: Path,
) -> None:
    async with parent_of(tmp_path, 2, 9) as (parent, server):
        await parent.open(3)
        server.kill()
        # What was granted is used without the server.
        async with asyncio.timeout(LATE):
            await parent.open(1)
        server.start()
        async with asyncio.timeout(2 * LATE):
            await parent.open(5)
        assert await parent.alive() == 9
        inside = await parent.inside()
        assert sum(inside) == 9

        await parent.kill(0)
        async with asyncio.timeout(LATE):
            await parent.open(inside[0])

        assert (await parent.state(1)).inside == 9
        await parent.start(0)
        await parent.clients[-1].close()
        async with asyncio.timeout(LATE):
            await parent.open(1)
        assert sum(await parent.inside()) == 9


async def test_a_worker_that_is_stopped_keeps_its_places_and_no_one_is_refused(
    tmp_path: Path,
) -> None:
    async with parent_of(tmp_path, 2, 20) as (parent, _server):
        await parent.open(10)
        stopped = parent.workers[0]
        mine = (await parent.state(0)).inside
        stopped.send_signal(signal.SIGSTOP)
        try:
            # The balance takes it for blocked; what it was given beyond its clients comes back
            # with its lease at the latest.
            await asyncio.sleep(2.0)
            async with asyncio.timeout(2 * LATE):
                await parent.open(4)
        finally:
            stopped.send_signal(signal.SIGCONT)

        async with asyncio.timeout(2 * LATE):
            await parent.open(6)
        states = await parent.states()
        assert sum(state.inside for state in states) == 20
        assert states[0].inside >= mine


async def test_without_a_server_each_worker_has_a_fixed_share(tmp_path: Path) -> None:
    async with Parent(tmp_path, 2, 41, "-") as parent:
        assert [state.limit for state in await parent.states()] == [21, 20]

        await parent.open(16)

        before = (await parent.state(0)).inside
        await parent.start(2)
        # Its successor has what is left of the share.
        assert (await parent.state(2)).limit == 21 - before


@pytest.mark.stress
async def test_600_sockets_are_all_held_and_spread_over_four_workers(tmp_path: Path) -> None:
    """Prints the spread: `pytest -m stress -s tests/workers/test_worker_processes.py`."""
    async with parent_of(tmp_path, 4, 600) as (parent, _server):
        began = time.perf_counter()
        await parent.open(600)
        seconds = time.perf_counter() - began

        connects = statistics.quantiles(parent.seconds, n=100)
        inside = await parent.inside()
        print(
            f"{inside} in {seconds:.2f} s; "
            f"connects: p50 {connects[49] * 1000:.0f} ms, p99 {connects[98] * 1000:.0f} ms"
        )
        assert sum(inside) == 600
        share, beyond = STOP
        assert max(inside) <= share * 150 + beyond + 2 * AT_ONCE
        await until(lambda: sum(parent.loads.connections()) == 600)
        assert await parent.alive() == 600
