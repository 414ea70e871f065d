"""What a client of the Responses API over WebSocket is told while nothing comes for it."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.wings.responses.lanes import MAX_RUNNING
from aioserver.wings.simulator.exchange import Behaviour
from tests.support.responses import ENDS, connect, create
from tests.support.server import SILENT, SIM_HTTP_CLIENT

if TYPE_CHECKING:
    from aiohttp import ClientWebSocketResponse

    from tests.support.server import MakeServer

pytestmark = pytest.mark.virtual_time

PING = {"chat.websocket.ping_interval": 1.0}
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
