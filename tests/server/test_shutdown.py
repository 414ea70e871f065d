"""The end of a real process: SIGTERM and its kin, whatever is under way."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from aioserver.server.connections import FAREWELL
from tests.support.chat import CHAT, STREAMED, chat, frames_of, to_end
from tests.support.logs import without_lateness
from tests.support.process import serving
from tests.support.raw import CLOSE, Raw, closing
from tests.support.server import CONCURRENCY, QUICK, SIM_HTTP_CLIENT
from tests.support.simulator import Behaviour, Simulator
from tests.support.waiting import patience

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.process import ServerProcess

LONG = Behaviour(ttft=0, interval=0.05, tokens=4000)
GRACE = "chat.websocket.shutdown_timeout"


def room(number: int) -> dict[str, Any]:
    """Changes that let *number* clients in, and as many requests through."""
    client = ("max_connections", "max_keepalive", "concurrent_requests")
    return {
        f"{CONCURRENCY}.max_connections": number,
        f"{CONCURRENCY}.connection_queue_size": number,
        f"{CONCURRENCY}.uvicorn.backlog": max(128, number),
        **{f"{SIM_HTTP_CLIENT}.{name}": number for name in client},
        f"{SIM_HTTP_CLIENT}.read_timeout": 60.0,
    }


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(LONG) as made:
        yield made


def clean(process: ServerProcess) -> bool:
    """Assert that its log shows no bug."""
    log = without_lateness(process.log)
    for sign in ("Traceback", "never retrieved", "bug in", '"level":"ERROR"', " ERROR "):
        assert sign not in log, process.log
    return True


# What each client is told, and what it saw before.


async def on_websocket(process: ServerProcess, name: str, session: aiohttp.ClientSession) -> str:
    async with session.ws_connect(f"{process.base}/ws/chat") as ws:
        await ws.send_json(chat(name))
        frames = await to_end(ws, name)
        message = await ws.receive(timeout=patience(20))
        assert message.type is aiohttp.WSMsgType.CLOSE, message
        assert ws.close_code == 1012
        events = [frame["event_id"] for frame in frames]
        assert events == list(range(1, len(events) + 1))
        return str(frames[-1]["chunk"].get("code", frames[-1]["status"]))


async def on_sse(process: ServerProcess, name: str, session: aiohttp.ClientSession) -> str:
    body = {"request_id": name, "text": "x"}
    async with session.post(f"{process.base}/sse/chat", json=body) as response:
        frames = frames_of(await response.read())
        events = [frame["event_id"] for frame in frames if "event_id" in frame]
        assert events == list(range(1, len(events) + 1))
        return str(frames[-1]["chunk"].get("code", frames[-1]["status"]))


async def on_openai(process: ServerProcess, name: str, session: aiohttp.ClientSession) -> str:
    url = f"{process.base}/v1/chat/completions"
    async with session.post(url, json={**STREAMED, "user": name}) as response:
        body = await response.read()
        if response.status != 200:
            assert response.headers["Connection"] == "close"
            return str((await response.json())["error"]["code"])
    *_, last = body.strip().split(b"\n\n")
    if last == b"data: [DONE]":
        return "complete"
    assert b'"code":"server_shutdown"' in last
    return "server_shutdown"


async def on_openai_whole(
    process: ServerProcess, name: str, session: aiohttp.ClientSession
) -> str:
    url = f"{process.base}/v1/chat/completions"
    async with session.post(url, json={**CHAT, "user": name}) as response:
        body = await response.json()
        if response.status == 200:
            return "complete"
        assert response.status == 503
        assert response.headers["Connection"] == "close"
        return str(body["error"]["code"])


FACES = (on_websocket, on_sse, on_openai, on_openai_whole)


async def stop_with_many(tmp_path: Path, simulator: Simulator, each: int, grace: float) -> None:
    """*each* answers on each face that end in time, and as many that do not."""
    total = 2 * each * len(FACES)
    changes = room(total + 10) | {GRACE: grace}
    short = Behaviour(ttft=0, interval=grace / 60, tokens=20)  # a third of the grace
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        serving(tmp_path / "c.yaml", simulator.base_url, changes=changes) as process,
        aiohttp.ClientSession(connector=connector) as session,
    ):
        await process.ready()
        clients: dict[str, list[asyncio.Future[str]]] = {}
        for kind, behaviour in (("long", LONG), ("short", short)):
            before = simulator.stats().requests
            simulator.behaviour = behaviour
            clients[kind] = [
                asyncio.ensure_future(face(process, f"{kind} {face.__name__} {number}", session))
                for face in FACES
                for number in range(each)
            ]
            expected = before + each * len(FACES)
            await simulator.until(lambda stats, n=expected: stats.requests == n, 60.0)  # type: ignore[misc]

        asked = asyncio.get_running_loop().time()
        process.signal()

        ends = {kind: set(await asyncio.gather(*some)) for kind, some in clients.items()}
        assert ends == {"long": {"server_shutdown"}, "short": {"complete"}}
        assert await process.ended() == 0
        assert asyncio.get_running_loop().time() - asked < grace + 30
        assert clean(process)
        assert "stopped" in process.log
        await simulator.until(lambda stats: stats.active == 0)


@pytest.mark.both_loops
async def test_answers_finish_within_the_grace_or_end_with_server_shutdown(
    tmp_path: Path, simulator: Simulator
) -> None:
    # 20 answers that end in time, 20 that do not: takes as long as the grace.
    await stop_with_many(tmp_path, simulator, each=5, grace=2.0)


@pytest.mark.stress
@pytest.mark.timeout(300)
async def test_a_thousand_are_told(tmp_path: Path, simulator: Simulator) -> None:
    await stop_with_many(tmp_path, simulator, each=125, grace=30.0)


async def test_an_idle_server_ends_at_once(tmp_path: Path, simulator: Simulator) -> None:
    changes = {GRACE: 600.0}
    async with serving(tmp_path / "c.yaml", simulator.base_url, changes=changes) as process:
        await process.ready()
        async with Raw(process) as idle, Raw(process) as kept, Raw(process) as silent:
            await idle.upgrade()
            await kept.get("/health")
            assert (await kept.answer()).status == 200
            asked = asyncio.get_running_loop().time()

            process.signal(signal.SIGINT)

            opcode, payload = await idle.frame()
            assert (opcode, closing(payload)) == (CLOSE, (1012, b"server is stopping"))
            await idle.send_frame(CLOSE, payload)
            for raw in (kept, silent, idle):
                assert await raw.to_the_end() == b""
            assert await process.ended() == 0
            assert asyncio.get_running_loop().time() - asked < FAREWELL + 30
        assert clean(process)


SLOW_NAMES = """
import socket, time
found = socket.getaddrinfo

def getaddrinfo(host, *rest, **more):
    if host == "slow.invalid":
        time.sleep(60)
    return found(host, *rest, **more)

socket.getaddrinfo = getaddrinfo
"""


# uvloop does not ask Python for names.
@pytest.mark.virtual_time
async def test_a_name_that_is_still_looked_up_does_not_delay_the_end(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_NAMES)
    async with (
        serving(
            tmp_path / "c.yaml",
            "http://slow.invalid/v1",
            changes={GRACE: 1.0},
            environ={"PYTHONPATH": str(tmp_path)},
        ) as process,
        Raw(await process.ready()) as raw,
        aiohttp.ClientSession() as session,
    ):
        await raw.ask_sse("r1", text="x")
        busy = 0
        while not busy:
            async with session.get(f"{process.base}/metrics") as response:
                busy = b'aioserver_provider_in_flight{provider="sim"} 1.0' in await response.read()
        asked = asyncio.get_running_loop().time()

        process.signal()

        assert await process.ended() == 0
        assert asyncio.get_running_loop().time() - asked < 1.0 + 30
        assert "stopped" in process.log


async def test_a_second_signal_ends_it_at_once(tmp_path: Path, simulator: Simulator) -> None:
    async with (
        serving(tmp_path / "c.yaml", simulator.base_url, changes={GRACE: 600.0}) as process,
        Raw(await process.ready()) as raw,
    ):
        await raw.ask_sse("r1", text="x")
        await simulator.until(lambda stats: stats.active == 1)
        process.signal()
        await process.logs("stopping")

        process.signal(signal.SIGINT)

        assert await process.ended(10) == 1
        assert "Traceback" not in process.log


async def test_a_signal_while_it_starts_ends_it(tmp_path: Path, simulator: Simulator) -> None:
    codes = set()
    for delay in (0.0, 0.15, 0.3):
        async with serving(tmp_path / "c.yaml", simulator.base_url) as process:
            # Wherever it is by then: still importing, reading its file, or listening.
            await asyncio.sleep(delay)
            process.signal()

            codes.add(await process.ended())
            assert "Traceback" not in process.log, process.log
    assert codes <= {0, -signal.SIGTERM}


async def test_sighup_applies_the_file_with_its_options_and_delays_no_end(
    tmp_path: Path, simulator: Simulator
) -> None:
    simulator.behaviour = QUICK
    async with (
        serving(tmp_path / "c.yaml", simulator.base_url, "--port", "0") as process,
        aiohttp.ClientSession() as session,
    ):
        await process.ready()
        process.change({f"{CONCURRENCY}.max_connections": 7, "logging.level": "INFO"})
        process.signal(signal.SIGHUP)

        limit = 50
        while limit == 50:
            async with session.get(f"{process.base}/health") as response:
                limit = (await response.json())["connections"]["limit"]
        assert limit == 7
        process.change({f"{CONCURRENCY}.max_connections": 0})
        process.signal(signal.SIGHUP)
        await process.logs("max_connections: ")
        for _ in range(5):
            process.signal(signal.SIGHUP)
        process.signal()
        assert await process.ended(15) == 0
        assert "Traceback" not in process.log
        assert "until a restart" not in process.log, "--port holds, then as now"
