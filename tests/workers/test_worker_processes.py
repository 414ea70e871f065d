"""Workers as processes of their own, on one page and one listening socket."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import statistics
import sys
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Self

import aiohttp
import pytest

from aioserver.workers.balance import AT_ONCE, STOP
from aioserver.workers.shared_page import SharedPage
from tests.support.server import CONCURRENCY, NOWHERE, UVICORN, write
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path


class Parent:
    """The parent of *count* workers, which share *places*; they run the loop of the test."""

    def __init__(self, path: Path, count: int, places: int) -> None:
        self.count, self.places, self.config = count, places, path / "config.yaml"
        sizes = {
            f"{CONCURRENCY}.max_connections": places,
            f"{CONCURRENCY}.connection_queue_size": places,
            f"{UVICORN}.backlog": 1024,
        }
        write(NOWHERE, sizes, self.config)
        self.page = SharedPage.create(count, places)
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address = f"ws://127.0.0.1:{self.socket.getsockname()[1]}/ws/chat"
        self.workers: dict[int, asyncio.subprocess.Process] = {}
        self.seconds: list[float] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=0)
        self.session = await self._stack.enter_async_context(
            aiohttp.ClientSession(connector=connector)
        )
        await asyncio.gather(*map(self.start, range(self.count)))
        return self

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
            self.page.close()
            os.close(self.page.fd)

    async def start(self, slot: int) -> None:
        """Start the worker of *slot*."""
        loop = "uvloop" if "uvloop" in type(asyncio.get_running_loop()).__module__ else "asyncio"
        page, sock = self.page.fd, self.socket.fileno()
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.support.worker", self.config, loop),
            *map(str, (page, slot, self.count, sock)),
            pass_fds=[page, sock],
            stdout=asyncio.subprocess.PIPE,
        )
        self.workers[slot] = worker
        assert worker.stdout is not None
        assert await worker.stdout.readline() == b"ready\n"

    async def kill(self, slot: int) -> None:
        """Kill the worker of *slot*, and reap it."""
        worker = self.workers.pop(slot)
        worker.send_signal(signal.SIGKILL)
        await worker.wait()
        self.page.reaped(slot)

    async def client(self) -> aiohttp.ClientWebSocketResponse:
        """A WebSocket that has its place."""
        began = time.perf_counter()
        client = await self.session.ws_connect(self.address)
        self.seconds.append(time.perf_counter() - began)
        await client.send_json({"action": "ping"})
        while (await client.receive_json())["status"] != "pong":
            pass
        return client

    @property
    def inside(self) -> list[int]:
        """The places of each worker that are taken."""
        return [self.page.inside(slot) for slot in range(self.count)]


def test_a_worker_that_is_killed_leaves_its_places_to_the_next_one(tmp_path: Path) -> None:
    # On one loop: a process takes half a second to start.
    asyncio.run(kill_and_start_again(tmp_path))


async def kill_and_start_again(tmp_path: Path) -> None:
    async with Parent(tmp_path, 2, 9) as parent:
        clients = await asyncio.gather(*(parent.client() for _ in range(9)))
        assert sum(parent.inside) == 9
        mine = parent.inside[0]

        await parent.kill(0)
        assert parent.page.places(0) == mine
        await parent.start(0)

        more = await asyncio.gather(*(parent.client() for _ in range(mine)))
        assert sum(parent.inside) == 9
        limits, bound = parent.page.collect()
        assert sum(limits) == bound == 9
        assert len([client for client in (*clients, *more) if not client.closed]) >= 9


@pytest.mark.stress
@pytest.mark.timeout(120)
async def test_600_sockets_are_all_held_and_spread_over_four_workers(tmp_path: Path) -> None:
    """Prints the spread: `pytest -m stress -s tests/workers/test_worker_processes.py`."""
    async with Parent(tmp_path, 4, 600) as parent:
        began = time.perf_counter()
        clients = await asyncio.gather(*(parent.client() for _ in range(600)))
        seconds = time.perf_counter() - began

        connects = statistics.quantiles(parent.seconds, n=100)
        print(
            f"{parent.inside} in {seconds:.2f} s; "
            f"connects: p50 {connects[49] * 1000:.0f} ms, p99 {connects[98] * 1000:.0f} ms"
        )
        assert sum(parent.inside) == 600
        share, beyond = STOP
        assert max(parent.inside) <= share * 150 + beyond + 2 * AT_ONCE
        await until(lambda: sum(parent.page.connections()) == 600)
        assert not any(client.closed for client in clients)
