"""Everybody at once: clients that all reconnect, and dashboards and pollers beside the work."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.support.chat import CHAT, cancel, chat, numbers, to_end
from tests.support.faces import ask_every_face
from tests.support.raw import CLOSE, PING, PONG, SMALL, TEXT, Raw, closing
from tests.support.server import CONCURRENCY, ENDLESS, UVICORN
from tests.support.simulator import Behaviour
from tests.support.waiting import patience, until

if TYPE_CHECKING:
    from tests.support.server import MakeServer, RunningServer

# Clients that are on their way at once: each needs two descriptors of this process.
AT_ONCE = 300


async def reconnect(server: RunningServer, number: int) -> float:
    """Connect and ask; returns the seconds after which to come back, 0 if it was served."""
    async with Raw(server) as raw:
        if number % 2:
            await raw.post("/v1/chat/completions", CHAT)
            answer = await raw.answer()
            if answer.status == 200:
                return 0.0
            assert (answer.status, answer.code) == (503, "server_at_capacity")
            return float(answer.headers["retry-after"])
        upgraded = await raw.upgrade()
        # Plain HTTP while too many refused sockets are still closing.
        if upgraded.status == 503:
            return float(upgraded.headers["retry-after"])
        await raw.send_json(chat(f"again-{number}"))
        wait = 0.0
        while True:
            opcode, payload = await raw.frame()
            if opcode == PING:
                await raw.send_frame(PONG, payload)
                continue
            if opcode == CLOSE:
                assert closing(payload)[0] == 1013
                await raw.send_frame(CLOSE, payload[:2])
                return wait
            assert opcode == TEXT
            frame = json.loads(payload)
            if frame["status"] == "complete":
                return 0.0
            if frame["status"] == "error":
                assert frame["chunk"]["code"] == "server_at_capacity"
                wait = frame["chunk"]["retry_after"]


async def follow(server: RunningServer, name: str, seen: list[Any], over: asyncio.Event) -> None:
    """Read an answer that does not end until *over* is set; *seen* gets its frames."""
    async with server.connect() as ws:
        await ws.send_json(chat(name))
        while not over.is_set():
            seen.append(await ws.receive_json(timeout=patience(20)))
        await ws.send_json(cancel(name))
        seen += await to_end(ws)


@pytest.mark.parametrize(
    "count", [200, pytest.param(10_000, marks=[pytest.mark.stress, pytest.mark.timeout(600)])]
)
async def test_when_all_reconnect_the_rest_is_sent_away_and_running_answers_go_on(
    make_server: MakeServer, count: int
) -> None:
    places, running = 4, 2
    server = await make_server(
        ENDLESS,
        **{
            f"{CONCURRENCY}.max_connections": places,
            f"{CONCURRENCY}.connection_queue_size": places,
            f"{CONCURRENCY}.queue_timeout": 0.1,
            f"{UVICORN}.backlog": 1024,
        },
    )
    frames_of_clients: list[list[Any]] = [[] for _ in range(running)]
    over = asyncio.Event()
    answers = [
        asyncio.create_task(follow(server, f"runs-{number}", seen, over))
        for number, seen in enumerate(frames_of_clients)
    ]
    await server.simulator.until(lambda stats: stats.active == running)
    server.simulator.behaviour = Behaviour(ttft=0, interval=0)
    room = asyncio.Semaphore(AT_ONCE)

    async def ask_one(number: int) -> float:
        async with room:
            return await reconnect(server, number)

    before = [len(seen) for seen in frames_of_clients]
    waits = await asyncio.gather(*(ask_one(number) for number in range(count)))
    meanwhile = [len(seen) - begun for seen, begun in zip(frames_of_clients, before, strict=True)]
    over.set()
    await asyncio.gather(*answers)

    refused = [wait for wait in waits if wait]
    assert len(refused) > count // 2
    assert all(1 <= wait <= 60 for wait in refused)
    assert len(set(refused)) > 5, "they do not all come back at the same moment"
    assert min(meanwhile) > 0
    for seen in frames_of_clients:
        assert numbers(seen) == [*range(1, len(seen) + 1)]
        assert seen[-1]["status"] == "cancelled"
    assert await server.counted("connections_rejected") == {(): len(refused)}
    assert await server.counted("rejections", "code") == {("server_at_capacity",): len(refused)}
    await server.nothing_held()


# The kernel's own deadline for the client that reads nothing is a second later, in the machine's
# time.
@pytest.mark.real_time
@pytest.mark.parametrize(
    "count", [20, pytest.param(200, marks=[pytest.mark.stress, pytest.mark.timeout(300)])]
)
async def test_dashboards_and_pollers_do_not_disturb_the_work(
    make_server: MakeServer, count: int
) -> None:
    # All of them share one event loop with the server, and must read within that time.
    server = await make_server(**{"chat.streams.send_timeout": max(1.0, count / 40)})
    monitor = server.context.monitor
    received: list[bytearray] = [bytearray() for _ in range(count)]

    async def watch(seen: bytearray) -> None:
        async with programs.get(f"{server.base}/events") as response:
            async for data in response.content.iter_any():
                seen += data

    async def poll(path: str) -> int:
        polls = 0
        while watching:
            async with programs.get(server.base + path) as response:
                assert response.status == 200
                await response.read()
            polls += 1
        return polls

    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(connector=connector) as programs,
        Raw(server, receive_buffer=SMALL) as stalled,
    ):
        watching = [asyncio.create_task(watch(seen)) for seen in received]
        polling = [asyncio.create_task(poll(path)) for path in ("/metrics", "/stats") * 2]
        await stalled.get("/events")
        await until(lambda: server.watchers == count + 1)
        answers, incidents = [], 0
        while server.watchers > count:
            for _ in range(20):
                monitor.incident("test", "x" * 10_000)
                incidents += 1
            answers += await ask_every_face(server, f"m-{incidents}")
        await until(lambda: all(seen.count(b"event: incident") >= incidents for seen in received))
        everyone, watching_now = [*watching], server.watchers
        watching.clear()
        polls = await asyncio.gather(*polling)
        for task in everyone:
            task.cancel()
        await asyncio.wait(everyone)

    assert watching_now == count, "only the one that reads nothing was dropped"
    assert {answer.end for answer in answers} == {"complete"}
    assert min(polls) > 1
    assert await server.counted("slow_clients") == {(): 1}
    await until(lambda: not server.watchers)
    assert not await server.counted("errors")
