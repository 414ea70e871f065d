"""What a client of the Responses API over WebSocket is told while nothing comes for it."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from socket import SO_SNDBUF, SOL_SOCKET
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.streams.writer import WRITE_BYTES
from aioserver.wings.responses.lanes import MAX_RUNNING, MAX_WAITING
from aioserver.wings.responses.socket import ResponsesSocket
from tests.support.instances import World, instances
from tests.support.raw import SMALL, TEXT, Raw
from tests.support.responses import ENDS, connect, create, to_end
from tests.support.server import SILENT, SIM_HTTP_CLIENT
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aiohttp import ClientWebSocketResponse

    from tests.support.server import MakeServer, RunningServer

pytestmark = pytest.mark.virtual_time

PING = {"chat.websocket.ping_interval": 1.0}
# A client may read nothing for long.
PATIENT = {"chat.websocket.ping_timeout": 100.0, "chat.streams.send_timeout": 100.0}
# An answer takes four seconds.
FOUR_SECONDS = Behaviour(ttft=4.0, interval=0.0, tokens=1)


async def news(ws: ClientWebSocketResponse, count: int) -> list[dict[str, Any]]:
    """The next *count* frames that are made here."""
    frames: list[dict[str, Any]] = []
    while len(frames) < count:
        frame = json.loads(await ws.receive_str(timeout=100))
        if frame["type"].startswith("aioserver:"):
            frames.append(frame)
    return frames


async def test_a_silent_provider_is_told_by_heartbeats_on_each_lane(
    make_server: MakeServer,
) -> None:
    server = await make_server(SILENT, **PING)
    clock = asyncio.get_running_loop().time
    async with connect(server) as ws:
        began = clock()
        for lane in (None, "a"):
            await ws.send_json(create(lane=lane))
        times = []
        for _ in range(3):
            frames = await news(ws, 2)
            times.append(clock() - began)
            assert {frame["type"] for frame in frames} == {"aioserver:heartbeat"}
            assert {frame.get("stream_id") for frame in frames} == {None, "a"}

    for number, time in enumerate(times, 1):
        assert number <= time <= 1 + 2 * number


@pytest.mark.parametrize("originator", ["codex_cli_rs", "codex_exec", "other", ""])
async def test_over_http_codex_gets_events_and_others_comments(
    make_server: MakeServer, originator: str
) -> None:
    server = await make_server(Behaviour(ttft=3.5, interval=0.0), **PING)
    headers = {"originator": originator} if originator else {}
    body = {"input": "Hi", "stream": True}
    async with server.session.post(
        f"{server.v1}/responses", json=body, headers=headers
    ) as response:
        answer = await response.text()

    event = 'event: aioserver:heartbeat\ndata: {"type":"aioserver:heartbeat"}\n\n'
    assert (event in answer) is originator.startswith("codex")
    assert (": keep-alive" in answer) is not originator.startswith("codex")
    assert '"sequence_number":0' in answer.replace(" ", "")


async def test_an_answer_that_comes_has_no_heartbeats(make_server: MakeServer) -> None:
    server = await make_server(Behaviour(ttft=0.5, interval=0.5, tokens=20), **PING)
    async with connect(server) as ws:
        await ws.send_json(create())
        kinds: list[str] = []
        while not kinds or kinds[-1] not in ENDS:
            kinds.append(json.loads(await ws.receive_str(timeout=100))["type"])

    assert not [kind for kind in kinds if kind.startswith("aioserver:")]


async def test_a_wait_at_the_provider_is_told_again(make_server: MakeServer) -> None:
    server = await make_server(SILENT, **PING, **{f"{SIM_HTTP_CLIENT}.concurrent_requests": 1})
    async with connect(server) as first, connect(server) as second:
        await first.send_json(create())
        await server.simulator.until(lambda stats: stats.active == 1)
        await second.send_json(create(lane="a"))
        frames = await news(second, 3)

    for frame in frames:
        assert frame.pop("eta") >= 0
        assert frame == {
            "type": "aioserver:queued",
            "at": "provider",
            "position": 1,
            "stream_id": "a",
        }


async def test_who_waits_on_its_lane_is_told_at_once_and_again(make_server: MakeServer) -> None:
    server = await make_server(SILENT, **PING)
    clock = asyncio.get_running_loop().time
    async with connect(server) as ws:
        for _ in range(3):
            await ws.send_json(create(lane="a"))
        began = clock()
        at_once = await news(ws, 2)
        assert clock() - began < 0.5
        later = await news(ws, 4)
        assert clock() - began >= 1.0

    assert [(each["at"], each["position"], each["eta"]) for each in at_once] == [
        ("connection", 1, None),
        ("connection", 2, None),
    ]
    queued = [each for each in later if each["type"] == "aioserver:queued"]
    assert {each["position"] for each in queued} == {1, 2}


async def test_who_waits_behind_sixteen_is_told_its_position_and_its_time(
    make_server: MakeServer,
) -> None:
    server = await make_server(FOUR_SECONDS, **PING)
    more = 3
    async with connect(server) as ws:
        # How long a response takes is not known yet.
        await ws.send_json(create(lane="q0"))
        while json.loads(await ws.receive_str(timeout=100))["type"] not in ENDS:
            pass
        for number in range(MAX_RUNNING + more):
            await ws.send_json(create(lane=f"q{number}"))
        frames = await news(ws, more)
        ended = 0
        while ended < MAX_RUNNING + more:
            ended += json.loads(await ws.receive_str(timeout=100))["type"] in ENDS

    assert [
        (frame["stream_id"], frame["at"], frame["position"], round(frame["eta"]))
        for frame in frames
    ] == [(f"q{MAX_RUNNING + number}", "connection", 1 + number, 4) for number in range(more)]


async def test_a_position_that_has_changed_is_told(make_server: MakeServer) -> None:
    server = await make_server(FOUR_SECONDS, **{"chat.websocket.ping_interval": 100.0})
    async with connect(server) as ws:
        for _ in range(3):
            await ws.send_json(create(lane="a"))
        frames = await news(ws, 3)

    assert [frame["position"] for frame in frames] == [1, 2, 1]
    assert round(frames[2]["eta"]) == 4


def answered_with(size: int) -> dict[str, Any]:
    """The form of an answer of that many bytes, which are one word."""
    schema = {"const": "x" * size}
    return {"format": {"type": "json_schema", "name": "x", "schema": schema}}


@asynccontextmanager
async def unread(server: RunningServer) -> AsyncIterator[Raw]:
    """A client that reads nothing of a response without a lane, the last event of which is more
    than fits in the buffers.
    """
    async with Raw(server, receive_buffer=SMALL) as raw:
        await raw.upgrade(path="/v1/responses")
        [socket] = server.owners.context.sockets
        assert isinstance(socket, ResponsesSocket)
        transport = socket._transport  # noqa: SLF001 - nothing else has it
        kernel = transport.get_extra_info("socket")
        kernel.setsockopt(SOL_SOCKET, SO_SNDBUF, SMALL)
        await raw.send_json({**create(), "text": answered_with(WRITE_BYTES)})
        await until(lambda: transport.get_write_buffer_size() > WRITE_BYTES)
        yield raw


async def kinds_until(raw: Raw, *ends: str) -> list[tuple[str, str | None]]:
    """What comes, and on which lanes, up to the last of *ends*."""
    raw.widen()
    kinds: list[tuple[str, str | None]] = []
    while not {*ends} <= {kind for kind, _ in kinds}:
        opcode, data = await raw.frame()
        if opcode == TEXT:
            event = json.loads(data)
            kinds.append((event["type"], event.get("stream_id")))
    return kinds


async def test_a_client_that_is_not_reading_is_told_once_it_reads(make_server: MakeServer) -> None:
    server = await make_server(Behaviour(ttft=0.0, interval=0.0), **PING, **PATIENT)
    async with unread(server) as raw:
        server.simulator.behaviour = SILENT
        for _ in range(MAX_WAITING):
            await raw.send_json(create(lane="a"))
        await asyncio.sleep(20.0)
        kinds = await kinds_until(raw, "aioserver:heartbeat")

    assert ("response.completed", None) in kinds
    assert kinds.count(("aioserver:queued", "a")) <= 2 * MAX_WAITING


async def test_nothing_is_told_of_a_response_behind_its_end(tmp_path: Path) -> None:
    world, often = World(), {"chat.websocket.ping_interval": 0.2, **PATIENT}
    behaviour = Behaviour(ttft=0.0, interval=0.0)
    async with instances(tmp_path, 1, behaviour, world, **often) as [only]:
        # The last event is written some time before the response has ended for this server: it
        # waits until the other instances can find it.
        world.slow = 0.9
        async with unread(only.server) as raw:
            await asyncio.sleep(5.0)
            kinds = await kinds_until(raw, "response.completed")
            assert {kind for kind, _ in kinds if kind.startswith("aioserver:")} == set()
            # What is answered at once comes next.
            await raw.send_json({"type": "response.cancel"})
            assert await kinds_until(raw, "error") == [("error", None)]


async def test_a_search_on_a_lane_is_told_of_like_a_response(tmp_path: Path) -> None:
    world, often = World(), {"chat.websocket.ping_interval": 0.2}
    behaviour = Behaviour(ttft=0.0, interval=0.0)
    async with (
        instances(tmp_path, 1, behaviour, world, **often) as [only],
        connect(only.server) as ws,
    ):
        await ws.send_json(create())
        await to_end(ws)
        world.slow = 0.9
        await ws.send_json({"type": "response.resume", "response_id": "resp_none"})
        kinds = [""]
        while kinds[-1] != "error":
            kinds.append(json.loads(await ws.receive_str(timeout=100))["type"])

    assert "aioserver:heartbeat" in kinds
