"""Whoever reads that an answer is complete may go on with it at any instance: it is there."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat import chat, frames_of
from tests.support.chat import to_end as to_end_of_chat
from tests.support.instances import MemoryStore, World, instances
from tests.support.responses import connect, create, to_end
from tests.support.simulator import Behaviour

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tests.support.server import RunningServer

# A provider whose whole answer may come in one read.
AT_ONCE = Behaviour(ttft=0, interval=0)
DONE = b"event: response.completed\n"
# Turns of the event loop that a write takes: many more than an event takes to its client.
SLOW = 300


async def streamed(server: RunningServer, **fields: Any) -> None:
    body = {"input": "Hello", "stream": True, **fields}
    async with server.session.post(f"{server.v1}/responses", json=body) as response:
        async for line in response.content:
            if line == DONE:
                return
    raise AssertionError("it was not completed")


async def background(server: RunningServer) -> None:
    await streamed(server, background=True)


async def polled(server: RunningServer) -> None:
    url = f"{server.v1}/responses"
    body = {"input": "Hello", "background": True, "stream": True}
    async with server.session.post(url, json=body) as response:
        line = b""
        while not line.startswith(b"data: "):
            line = await response.content.readline()
        name = line.split(b'"id":"', 1)[1].split(b'"', 1)[0].decode()
    status = "queued"
    while status in {"queued", "in_progress"}:
        async with server.session.get(f"{url}/{name}") as response:
            status = (await response.json())["status"]
    assert status == "completed"


async def whole(server: RunningServer) -> None:
    async with server.session.post(f"{server.v1}/responses", json={"input": "Hello"}) as response:
        assert (await response.json())["status"] == "completed"


async def replayed(server: RunningServer) -> None:
    body = {"input": "Hello", "stream": True}
    url, headers = f"{server.v1}/responses", {"Idempotency-Key": "once"}

    async def read() -> None:
        async with server.session.post(url, json=body, headers=headers) as response:
            async for line in response.content:
                if line == DONE:
                    return

    await asyncio.wait(
        [asyncio.create_task(read()) for _ in range(4)], return_when=asyncio.FIRST_COMPLETED
    )


async def socket(server: RunningServer) -> None:
    async with connect(server) as ws:
        await ws.send_json(create("Hello", store=True))
        assert (await to_end(ws))[-1]["type"] == "response.completed"


RESPONSES = (streamed, background, polled, whole, replayed, socket)


async def websocket(server: RunningServer) -> None:
    async with server.connect() as ws:
        await ws.send_json(chat("a", conversation_id="talk"))
        assert (await to_end_of_chat(ws))[-1]["status"] == "complete"


async def sse(server: RunningServer) -> None:
    body = {"request_id": "a", "text": "Hello", "conversation_id": "talk"}
    async with server.session.post(server.sse, json=body) as response:
        assert frames_of(await response.read())[-1]["status"] == "complete"


@pytest.fixture
def slow_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shared gets there after a while, for which each answer waits, however busy the
    machine is.
    """
    monkeypatch.setattr("aioserver.gateway.contracts.commands.WRITE_TIMEOUT", 60.0)

    def late(write: Any) -> Any:
        async def after_a_while(*args: Any, **kwargs: Any) -> Any:
            for _ in range(SLOW):
                await asyncio.sleep(0)
            return await write(*args, **kwargs)

        return after_a_while

    for name in ("put_response", "keep_turn"):
        monkeypatch.setattr(MemoryStore, name, late(getattr(MemoryStore, name)))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("ask", RESPONSES)
@pytest.mark.usefixtures("slow_writes")
async def test_a_response_is_there_for_all_when_its_client_hears_that_it_is_complete(
    tmp_path: Path, ask: Callable[[RunningServer], Awaitable[None]], native: bool
) -> None:
    world = World()
    changes: dict[str, Any] = {"llm.providers.sim.responses": native}
    async with instances(tmp_path, 2, AT_ONCE, world, **changes) as (here, _there):
        await ask(here.server)

        assert len(world.responses) == 1


@pytest.mark.parametrize("ask", [websocket, sse])
@pytest.mark.usefixtures("slow_writes")
async def test_a_turn_is_there_for_all_when_its_client_hears_that_it_is_complete(
    tmp_path: Path, ask: Callable[[RunningServer], Awaitable[None]]
) -> None:
    world = World()
    async with instances(tmp_path, 2, AT_ONCE, world) as (here, _there):
        await ask(here.server)

        assert len(world.conversations) == 1
