"""One process on a system that is no Linux, as a developer's laptop: it has neither /proc, nor the
names of `os` and `socket` that Linux alone has (tests/support/no_linux.py).
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Literal

from aiohttp import ClientSession

from aioserver.client import Client
from tests.support.process import serving
from tests.support.server import CONCURRENCY, NOWHERE, UVICORN
from tests.support.simulator import Behaviour, Simulator

if TYPE_CHECKING:
    from pathlib import Path

NO_LINUX = "tests.support.no_linux"
Transport = Literal["websocket", "sse"]


async def test_one_process_starts_chats_reloads_and_stops(tmp_path: Path) -> None:
    whole: set[str] = set()
    transports: tuple[Transport, ...] = ("websocket", "sse")

    async with (
        Simulator(Behaviour(ttft=0, interval=0, tokens=20)) as provider,
        serving(tmp_path / "c.yaml", provider.base_url, module=NO_LINUX) as process,
    ):
        await process.ready()
        for transport in transports:
            async with Client(process.base, transport=transport) as client:
                whole.add(await client.chat("Who are you?").text())
        async with ClientSession(process.base) as session:
            async with session.get("/stats") as response:
                stats = await response.json()
            for face in ("/metrics", "/health", "/ready", "/dashboard"):
                async with session.get(face) as response:
                    assert response.status == 200, face
                    await response.read()
        process.change({"logging.level": "INFO", f"{CONCURRENCY}.max_connections": 50})
        process.signal(signal.SIGHUP)
        await process.logs("configuration applied")
        async with Client(process.base) as client:
            whole.add(await client.chat("Who are you?").text())
        process.signal(signal.SIGTERM)
        assert await process.ended() == 0

    assert len(whole) == 1
    assert "simulated model" in whole.pop()
    assert stats["process"]["rss_bytes"] is None, "this is Linux after all"
    assert '"ERROR"' not in process.log
    assert "Traceback" not in process.log


async def test_several_workers_are_refused_with_what_to_do(tmp_path: Path) -> None:
    changes = {f"{UVICORN}.workers": 2}

    async with serving(tmp_path / "c.yaml", NOWHERE, changes=changes, module=NO_LINUX) as process:
        assert await process.ended() == 2

    assert "several workers need Linux" in process.log
    assert "workers to 1" in process.log
