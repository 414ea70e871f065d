"""A minute of churn: three servers as processes, clients of two keys, everything that can happen,
and a provider that counts.

Run by hand; it prints a table: `pytest -m stress -s tests/wings/cluster/answers/test_churn.py`.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.support.keys import bearer, entry
from tests.support.process import ServerProcess, loop_name
from tests.support.redis_server import RedisServer
from tests.support.referee import Referee
from tests.support.server import CONCURRENCY, SIM_HTTP_CLIENT, UVICORN, write
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

pytestmark = [pytest.mark.stress, pytest.mark.real_time, pytest.mark.timeout(300)]
LIMIT, CLIENTS, SECONDS = 20, 20, 60.0
# Two keys, of which one alone cannot use all places.
KEYS = (
    entry("some", max_concurrent=15, requests_per_minute=1_000_000),
    entry("rest", requests_per_minute=1_000_000),
)
# Seconds for which an instance or the server is stopped: shorter and longer than a lease.
SHORT, LONG = 2.0, 10.0


class Churn:
    """Three servers and their clients."""

    def __init__(self, path: Path, redis: RedisServer, referee: Referee) -> None:
        self.path, self.redis, self.referee = path, redis, referee
        self.servers: list[ServerProcess] = []
        self.answered, self.lost, self.refused = 0, 0, 0
        self.rows: list[str] = []
        self._began = time.monotonic()
        self._stack = AsyncExitStack()

    async def start(self, number: int) -> ServerProcess:
        file = self.path / f"{number}.yaml"
        changes = {
            "logging.level": "INFO",
            "cluster.redis_url": self.redis.url,
            f"{SIM_HTTP_CLIENT}.max_connections": 2 * LIMIT,
            f"{SIM_HTTP_CLIENT}.concurrent_requests": LIMIT,
            f"{SIM_HTTP_CLIENT}.queue_size": 200,
            f"{SIM_HTTP_CLIENT}.queue_timeout": 60.0,
            f"{CONCURRENCY}.max_connections": 100,
            f"{CONCURRENCY}.connection_queue_size": 100,
            f"{UVICORN}.backlog": 128,
            "auth.keys": list(KEYS),
        }
        write(self.referee.url, changes, file)
        process = await ServerProcess.start(
            *("-m", "aioserver", "serve", "--config", file, "--loop", loop_name())
        )
        await self._stack.enter_async_context(process)
        return await process.ready()

    async def client(self, number: int, session: aiohttp.ClientSession, key: str) -> None:
        body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
        while True:
            url = f"{self.servers[number].base}/v1/chat/completions"
            try:
                async with session.post(url, json=body, headers=bearer(key)) as answer:
                    text = await answer.text()
            except (aiohttp.ClientError, OSError):
                self.lost += 1
                await asyncio.sleep(0.1)
                continue
            if answer.status != 200:
                self.refused += 1
                await asyncio.sleep(0.05)
            elif "[DONE]" in text:
                self.answered += 1
            else:
                self.lost += 1

    async def row(self, what: str, during: Callable[[], Awaitable[None]]) -> int:
        """Do something, and note what was in flight meanwhile; return the peak."""
        referee = self.referee
        referee.peak, starts, began = referee.inside, referee.starts, time.monotonic()
        await during()
        seconds = time.monotonic() - began
        line = (
            f"{began - self._began:6.1f} s  {what:<44} {seconds:5.1f} s  peak {referee.peak:3}  "
            f"{(referee.starts - starts) / seconds:6.1f} starts/s  now {referee.inside:3}"
        )
        print(line)
        self.rows.append(line)
        return referee.peak

    async def full(self) -> None:
        """Wait until all places are used."""
        await until(lambda: self.referee.inside == LIMIT, 30.0, lambda: self.referee.inside)

    async def close(self) -> None:
        for server in self.servers:
            server.signal(signal.SIGCONT)
            server.signal(signal.SIGTERM)
        for server in self.servers:
            assert await server.ended() == 0
        await self._stack.aclose()


async def test_a_minute_of_churn(tmp_path: Path) -> None:
    seed = random.randrange(1000)
    chance = random.Random(seed)
    print(f"\nseed {seed}, {LIMIT} places, 3 instances with {CLIENTS} clients each")
    with RedisServer(tmp_path) as redis:
        async with Referee(0.2) as referee:
            churn = Churn(tmp_path, redis, referee)
            churn.servers = [await churn.start(number) for number in range(3)]
            await churn_for(churn, chance)


async def churn_for(churn: Churn, chance: random.Random) -> None:
    redis = churn.redis

    async def for_(seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def killed() -> None:
        number = chance.randrange(3)
        churn.servers[number].signal(signal.SIGKILL)
        await churn.servers[number].ended()
        churn.servers[number] = await churn.start(number)
        await churn.full()

    def stopped(seconds: float) -> Callable[[], Awaitable[None]]:
        async def stop() -> None:
            server = chance.choice(churn.servers)
            server.signal(signal.SIGSTOP)
            await for_(seconds)
            server.signal(signal.SIGCONT)
            await for_(1.0)

        return stop

    def paused(seconds: float) -> Callable[[], Awaitable[None]]:
        async def pause() -> None:
            redis.pause()
            await for_(seconds)
            redis.go_on()
            await for_(1.0)

        return pause

    def away(seconds: float) -> Callable[[], Awaitable[None]]:
        async def kill() -> None:
            redis.kill()
            await for_(seconds)
            redis.start()
            await churn.full()

        return kill

    async def emptied() -> None:
        redis.call("FLUSHALL")
        await for_(4.0)

    # What may be in flight beyond the limit: what an instance had that was stopped for longer than
    # its lease.
    events: list[tuple[str, Callable[[], Awaitable[None]], bool]] = [
        ("an instance killed and started again", killed, False),
        ("an instance stopped, shortly", stopped(SHORT), False),
        ("an instance stopped, longer than its lease", stopped(LONG), True),
        ("the server paused, shortly", paused(SHORT), False),
        ("the server paused, longer than a lease", paused(LONG), False),
        ("the server emptied", emptied, False),
        ("the server killed, back at once", away(0.0), False),
        ("the server killed, back after a lease", away(LONG), False),
    ]
    over: list[tuple[str, int]] = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        clients = [
            asyncio.create_task(churn.client(number, session, KEYS[turn % len(KEYS)]["name"]))
            for number in range(3)
            for turn in range(CLIENTS)
        ]
        try:
            await churn.row("it begins", churn.full)
            end = time.monotonic() + SECONDS
            chance.shuffle(events)
            queue: list[Any] = list(events)
            while time.monotonic() < end or queue:
                queue = queue or chance.sample(events, len(events))
                name, event, may_exceed = queue.pop()
                peak = await churn.row(name, event)
                if peak > LIMIT and not may_exceed:
                    over.append((name, peak))
                await churn.row("  all is well", lambda: for_(2.0))
            await churn.full()
        finally:
            for client in clients:
                client.cancel()
            await asyncio.wait(clients)
    print(f"answered {churn.answered}, lost {churn.lost}, refused {churn.refused}")
    await until(lambda: churn.referee.inside == 0)
    await churn.close()
    assert over == []
