"""What is kept at a server that all instances share, where that server is slow or hangs."""

from __future__ import annotations

import asyncio

import pytest

from aioserver.gateway.contracts.commands import (
    HURRIED,
    KNOWN_TIMEOUT,
    TIMEOUT,
    WRITE_TIMEOUT,
    Commands,
)
from tests.support.instances import MemoryStore, World


class Writer:
    """Ends answers, each of which is written at the server."""

    def __init__(self) -> None:
        self.world = World()
        self.commands = Commands(MemoryStore(self.world, "me"), "")
        self.loop = asyncio.get_running_loop()

    async def ask(self, seconds: float) -> object:
        return await self.commands.ask(self.commands.execute("DEL", "next:a"), seconds)

    async def delay(self) -> float:
        """The seconds by which the end of an answer comes later."""
        began = self.loop.time()
        await self.commands.written(self.loop.create_task(self.ask(KNOWN_TIMEOUT)))
        return self.loop.time() - began


@pytest.mark.virtual_time
async def test_a_server_that_hangs_delays_the_ends_of_few_answers() -> None:
    writer = Writer()
    writer.world.slow = 1000.0
    assert await writer.delay() == pytest.approx(WRITE_TIMEOUT, abs=0.01)
    await asyncio.sleep(KNOWN_TIMEOUT)

    assert [await writer.delay() for _ in range(9)] == [pytest.approx(HURRIED, abs=0.01)] * 9

    writer.world.slow = 0.0
    await writer.delay()
    writer.world.slow = 0.4
    assert await writer.delay() == pytest.approx(0.4, abs=0.01), (
        "it answers again, and is waited for"
    )


@pytest.mark.virtual_time
async def test_a_slow_server_is_waited_for_though_some_do_not_wait_so_long() -> None:
    writer = Writer()
    writer.world.slow = 0.3

    for _ in range(3):
        assert await writer.ask(TIMEOUT) is None
        assert await writer.delay() == pytest.approx(0.3, abs=0.01)
