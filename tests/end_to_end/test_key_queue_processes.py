"""A key's queue in a server of two processes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.support.chat import CHAT, STREAMED
from tests.support.keys import bearer, keys_of
from tests.support.process import serving
from tests.support.server import CONCURRENCY, UVICORN
from tests.support.simulator import Behaviour, Simulator
from tests.support.waiting import until_result

if TYPE_CHECKING:
    from pathlib import Path

# Processes take seconds to start.
pytestmark = [pytest.mark.real_time, pytest.mark.timeout(150)]


async def test_requests_of_two_keys_wait_at_both_workers_within_the_limits_of_all(
    tmp_path: Path,
) -> None:
    changes = {
        f"{UVICORN}.workers": 2,
        # Half of each worker's part can wait at keys, and all may come to one of them.
        f"{CONCURRENCY}.connection_queue_size": 128,
        **keys_of("web", "app", "root", max_concurrent=2, queue_size=40),
    }
    paced = Behaviour(ttft=0.02, interval=0.002, tokens=5)
    async with (
        Simulator(paced) as simulator,
        serving(tmp_path / "config.yaml", simulator.base_url, changes=changes) as server,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        await server.ready()
        url = f"{server.base}/v1/chat/completions"
        most = 0

        async def ask(name: str, number: int) -> int:
            nonlocal most
            body = STREAMED if number % 2 else CHAT
            async with session.post(url, json=body, headers=bearer(name)) as response:
                most = max(most, simulator.stats().active)
                await response.read()
                return response.status

        asked = [ask(name, number) for number in range(16) for name in ("web", "app")]
        assert set(await asyncio.gather(*asked)) == {200}
        # Of each key two, at both workers together.
        assert most <= 4

        async def at_rest() -> bool:
            async with session.get(f"{server.base}/stats", headers=bearer("root")) as response:
                keys = (await response.json())["keys"]
            return not any(keys[name][what] for name in keys for what in ("running", "waiting"))

        await until_result(at_rest, bool)
