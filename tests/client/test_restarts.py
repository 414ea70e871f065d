"""The client library while its server is replaced, reloaded, killed and started again, as
processes.
"""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Literal

import pytest

from aioserver.client import AnswerError, Client, faults
from tests.support.process import serving
from tests.support.server import CONCURRENCY, ENDLESS, UVICORN, places
from tests.support.simulator import Behaviour, Simulator
from tests.support.waiting import until
from tests.support.worker_processes import gone, workers

if TYPE_CHECKING:
    from pathlib import Path

Transport = Literal["websocket", "sse"]

# An answer of 0.3 s, so that some run whenever a process begins to drain.
PACED = Behaviour(ttft=0, interval=0.01, tokens=30)
REPLACING = "replacing 2 workers"
TWO = {f"{UVICORN}.workers": 2, "logging.level": "INFO"}


class Chats:
    """Clients that ask one question after the other, and check that each answer is *whole*."""

    def __init__(self, url: str, whole: str, clients: int) -> None:
        self.answers = 0
        self.faults: list[object] = []
        self._over = False
        transports: tuple[Transport, ...] = ("websocket", "sse")
        self._tasks = [
            asyncio.ensure_future(self._chat(url, transports[number % 2], whole))
            for number in range(clients)
        ]

    async def _chat(self, url: str, transport: Transport, whole: str) -> None:
        async with Client(url, transport=transport, deadline=60.0) as client:
            while not self._over:
                try:
                    pieces = [piece async for piece in client.chat("Hello")]
                except AnswerError as error:
                    self.faults.append((error.code, error.message, transport))
                else:
                    if "".join(pieces) != whole:
                        self.faults.append(pieces)
                self.answers += 1

    async def more(self, count: int, within: float = 30.0) -> None:
        """Wait until so many more answers have come."""
        wanted = self.answers + count
        await until(lambda: self.answers >= wanted, within, lambda: self.faults)

    async def end(self) -> None:
        self._over = True
        await asyncio.gather(*self._tasks)


async def whole_answer(url: str) -> str:
    async with Client(url) as client:
        return await client.chat("Hello").text()


@pytest.mark.real_time
async def test_replacement_of_all_processes_goes_unnoticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "RESTART_LEAST", 0.1)
    monkeypatch.setattr(faults, "RESTART_SPAN", 0.1)
    async with (
        Simulator(PACED) as simulator,
        serving(tmp_path / "c.yaml", simulator.base_url, changes=TWO) as process,
    ):
        await process.ready()
        whole = await whole_answer(process.base)
        former = workers(process)
        chats = Chats(process.base, whole, 8)
        await chats.more(8)
        process.signal(signal.SIGUSR2)
        await until(lambda: all(map(gone, former)), 30.0, lambda: process.log)
        await chats.more(16)
        await chats.end()

        assert chats.faults == []
        assert simulator.stats().requests == chats.answers + 1
        assert not {*former} & {*workers(process)}


@pytest.mark.real_time
async def test_server_that_is_killed_and_started_again(tmp_path: Path) -> None:
    """The part of a running answer is kept, and a question waits for the next server."""
    async with Simulator(ENDLESS) as simulator:
        file = tmp_path / "c.yaml"
        async with serving(file, simulator.base_url) as process:
            await process.ready()
            port = process.port
            clients = [
                Client(process.base, transport=transport, deadline=60.0)
                for transport in ("websocket", "sse")
            ]
            running = [client.chat("Hello") for client in clients]
            reading = [asyncio.ensure_future(answer.text()) for answer in running]
            await until(lambda: all(len(answer.received) > 20 for answer in running))
            process.signal(signal.SIGKILL)
            await process.ended()
        await simulator.until(lambda stats: stats.active == 0)
        simulator.behaviour = PACED
        waiting = [asyncio.ensure_future(client.chat("Hello").text()) for client in clients]
        async with serving(file, simulator.base_url, "--port", str(port)) as process:
            await process.ready()
            for answer, task in zip(running, reading, strict=True):
                with pytest.raises(AnswerError) as caught:
                    await task
                assert caught.value.code == "stream_not_found"
                assert "the server has lost the rest of this answer" in caught.value.message
                assert caught.value.text == answer.received != ""
            assert len({*await asyncio.gather(*waiting)}) == 1
            for client in clients:
                await client.close()
    assert simulator.stats().requests == 4


@pytest.mark.stress
@pytest.mark.real_time
@pytest.mark.timeout(200)
async def test_minute_of_reloads_replacements_and_drains(tmp_path: Path) -> None:
    changes = {**TWO, **places(300, 300), f"{UVICORN}.backlog": 512}
    loop = asyncio.get_running_loop()
    async with (
        Simulator(PACED) as simulator,
        serving(tmp_path / "c.yaml", simulator.base_url, changes=changes) as process,
    ):
        await process.ready()
        whole = await whole_answer(process.base)
        chats = Chats(process.base, whole, 30)
        limit, end = 299, loop.time() + 60.0
        while loop.time() < end:
            former, begun = workers(process), process.log.count(REPLACING)
            process.signal(signal.SIGUSR2)
            # It has read the file, which is written anew now.
            await until(lambda count=begun: process.log.count(REPLACING) > count)  # type: ignore[misc]
            for _ in range(4):
                limit -= 1
                process.change({**changes, f"{CONCURRENCY}.max_connections": limit})
                process.signal(signal.SIGHUP)
                await chats.more(10)
            await until(
                lambda gone_by=former: not {*gone_by} & {*workers(process)},  # type: ignore[misc]
                60.0,
                lambda: process.log,
            )
        await chats.end()

        assert chats.faults == []
        assert chats.answers > 300
        assert simulator.stats().requests == chats.answers + 1
