"""The memory of the server that instances share: what is nice to have never takes the room of what
is needed.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from aioserver.gateway.contracts.commands import Commands
from aioserver.wings.cluster.answers.claims import Claims
from aioserver.wings.cluster.limits.leases import Leases
from aioserver.wings.cluster.limits.renewer import Renewer
from aioserver.wings.cluster.redis_commands import RedisCommands
from aioserver.wings.conversations.redis import RedisTurns
from tests.support.redis_server import RedisServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.real_time
# A server takes 1 to 2 MB for itself.
MAX_MEMORY = 8 << 20
TURN = b"x" * 10_000
BOUNDS = (1 << 20, 100, 60.0)


class Instance:
    """An instance of a cluster."""

    def __init__(self, url: str) -> None:
        self.renewer = Renewer(lambda on_due: Leases("host-1", on_due=on_due), url, "test")
        self.connection = RedisCommands(url)
        commands = Commands(self.connection, self.renewer.prefix)
        self.claims, self.turns = Claims(commands, "host-1"), RedisTurns(commands)


@pytest.fixture
async def instance(tmp_path: Path) -> AsyncIterator[Instance]:
    """An instance whose server has little memory."""
    with RedisServer(
        tmp_path, "--maxmemory", str(MAX_MEMORY), "--maxmemory-policy", "noeviction"
    ) as server:
        instance = Instance(server.url)
        yield instance
        await instance.renewer.close()
        await instance.connection.close()


async def test_conversations_that_fill_the_server_make_room_for_newer_ones(
    instance: Instance,
) -> None:
    turns = instance.turns

    for number in range(2 * MAX_MEMORY // len(TURN)):
        await turns.keep_turn(f"c{number}", TURN, BOUNDS)

    assert (await turns.turns("c0"))[:2] == ([], False)
    assert (await turns.turns(f"c{number}"))[:2] == ([TURN], False)
    assert await instance.renewer.open() is None


async def test_a_conversation_for_which_there_is_no_room_is_forgotten_as_a_whole(
    instance: Instance,
) -> None:
    turns = instance.turns
    await turns.keep_turn("c", TURN, BOUNDS)

    await turns.keep_turn("c", TURN * 800, (1 << 30, 100, 60.0))

    # Otherwise the next question would be asked without the last turn.
    assert (await turns.turns("c"))[:2] == ([], False)


async def test_logs_that_are_handed_over_leave_room(instance: Instance) -> None:
    claims = instance.claims

    for number in range(2 * MAX_MEMORY // (1 << 20)):
        await claims.put_log(f"n{number}", b"x" * (1 << 20), 60.0)

    assert await claims.get_log("n0") is not None
    assert await claims.get_log(f"n{number}") is None
    assert await instance.renewer.open() is None


async def test_small_writes_rarely_ask_how_much_memory_is_used(instance: Instance) -> None:
    async def asked() -> int:
        text = (await instance.connection.execute("INFO", "commandstats")).decode()
        return int(text.partition("cmdstat_info:calls=")[2].partition(",")[0] or 0)

    before, began = await asked(), time.monotonic()
    for number in range(200):
        await instance.claims.take(f"n{number}")

    # Each answer counts for a tenth of a second; one of them is that to `asked`.
    assert await asked() - before <= 3 + 10 * (time.monotonic() - began)
