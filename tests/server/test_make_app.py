"""The application for programs that embed it: every face works on aiohttp's own runner."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import ClientSession, WSMsgType, WSServerHandshakeError, web
from aiohttp.test_utils import BaseTestServer, TestServer

from aioserver.server.app import make_app
from tests.support.chat import chat, frames_of, to_end, until_status
from tests.support.keys import bearer, keys_of
from tests.support.redis_server import RedisServer
from tests.support.server import ENDLESS, QUICK, configured
from tests.support.simulator import Simulator
from tests.support.waiting import patience

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from tests.support.simulator import Behaviour

QUESTION = {"messages": [{"role": "user", "content": "Hello"}]}


async def mine(_request: web.Request) -> web.Response:
    return web.json_response({"mine": True})


@contextlib.asynccontextmanager
async def embedded(
    path: Path,
    behaviour: Behaviour = QUICK,
    routes: Sequence[web.RouteDef] = (),
    **changes: Any,
) -> AsyncIterator[tuple[BaseTestServer, ClientSession]]:
    """Run the application, with a route of the program's own, as a program would."""
    async with Simulator(behaviour) as simulator:
        app = make_app(configured(simulator.base_url, changes, path / "config.yaml"))
        app.router.add_get("/mine", mine)
        app.add_routes(routes)
        app.router.add_route("*", "/change", mine)
        async with TestServer(app) as server, ClientSession(str(server.make_url("/"))) as session:
            yield server, session


async def test_every_face_answers(tmp_path: Path) -> None:
    async with embedded(tmp_path) as (_, session):
        async with session.ws_connect("/ws/chat") as ws:
            await ws.send_json(chat("r1", "Hello"))
            by_websocket = await to_end(ws)
        async with session.get("/sse/chat/r1") as response:
            by_sse = frames_of(await response.read())
        async with session.post("/v1/chat/completions", json=QUESTION) as response:
            whole = await response.json()
        streamed = {**QUESTION, "stream": True}
        async with session.post("/v1/chat/completions", json=streamed) as response:
            events = await response.text()
        async with session.get("/metrics") as response:
            metrics = await response.text()

    assert by_sse == by_websocket
    assert by_websocket[-1]["status"] == "complete"
    assert whole["object"] == "chat.completion"
    assert events.endswith("data: [DONE]\n\n")
    assert (
        'aioserver_requests_total{code="",face="websocket",outcome="ok",provider="sim"} 1.0'
        in metrics
    )


async def test_a_route_of_the_program_is_closed_to_foreign_pages_as_well(tmp_path: Path) -> None:
    foreign = {"Origin": "https://evil.example"}
    changes: dict[str, Any] = {"chat.websocket.allow_origins": []}
    async with embedded(tmp_path, **changes) as (_, session):
        for method, status in (("GET", 200), ("POST", 403), ("PUT", 403), ("DELETE", 403)):
            async with session.request(method, "/change", headers=foreign) as response:
                assert response.status == status
            async with session.request(method, "/change") as response:
                assert response.status == 200


async def test_a_websocket_of_the_program_is_left_to_it(tmp_path: Path) -> None:
    async def echo(request: web.Request) -> web.StreamResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        await ws.send_str(await ws.receive_str())
        return ws

    async with embedded(tmp_path, routes=[web.get("/echo", echo)]) as (_, session):
        async with session.ws_connect("/echo") as ws:
            await ws.send_str("Hello")
            assert await ws.receive_str() == "Hello"
        with pytest.raises(WSServerHandshakeError) as refused:
            await session.ws_connect("/health")

    assert refused.value.status == 426


async def test_responses_have_our_ids_and_errors(tmp_path: Path) -> None:
    async with embedded(tmp_path) as (_, session):
        async with session.get("/health", headers={"X-Request-Id": "mine"}) as response:
            assert response.headers["x-request-id"] == "mine"
        async with session.get("/nowhere") as response:
            assert response.status == 404
            assert (await response.json())["error"]["code"] == "not_found"
            assert response.headers["Server"] == "aioserver"


async def test_a_route_of_the_program_is_for_admins_where_keys_exist(tmp_path: Path) -> None:
    async with embedded(tmp_path, **keys_of("web", "root")) as (_, session):
        async with session.get("/mine") as response:
            assert response.status == 401
        async with session.get("/mine", headers=bearer("web")) as response:
            assert response.status == 403
        async with session.get("/mine", headers=bearer("root")) as response:
            assert await response.json() == {"mine": True}


async def test_the_end_of_the_program_ends_answers_and_sockets(tmp_path: Path) -> None:
    async with embedded(tmp_path, ENDLESS) as (server, session):
        ws = await session.ws_connect("/ws/chat")
        await ws.send_json(chat("r1", "Hello"))
        await until_status(ws, "chunk")

        ending = asyncio.ensure_future(server.close())
        frames = []
        while (message := await ws.receive(timeout=patience(20))).type is WSMsgType.TEXT:
            frames.append(message.json())
        await ending

    assert frames[-1]["status"] == "error"
    assert frames[-1]["chunk"]["code"] == "server_shutdown"
    assert ws.close_code == 1012


async def test_two_applications_share_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with embedded(tmp_path / "a") as (_, first), embedded(tmp_path / "b") as (_, other):
        async with first.post("/sse/chat", json={"request_id": "r1", "text": "Hello"}) as response:
            await response.read()
        async with first.get("/sse/chat/r1") as response:
            assert response.status == 200
        async with other.get("/sse/chat/r1") as response:
            assert response.status == 404


@pytest.mark.real_time
async def test_an_answer_of_another_embedded_server_is_passed_on(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as redis:
        async with contextlib.AsyncExitStack() as stack:
            sessions = []
            for name in "ab":
                (path := tmp_path / name).mkdir()
                changes: Any = {"cluster.redis_url": redis.url}
                _server, session = await stack.enter_async_context(
                    embedded(path, ENDLESS, **changes)
                )
                sessions.append(session)
            owner, other = sessions
            question = {"request_id": "r1", "text": "Hello"}
            async with owner.post("/sse/chat", json=question) as first:
                await first.content.readuntil(b"event: chunk")
                async with other.get("/sse/chat/r1") as second:
                    assert second.status == 200
                    await second.content.readuntil(b"event: chunk")
                async with other.post("/sse/chat", json=question) as third:
                    assert third.status == 200
                    async with other.delete("/sse/chat/r1") as cancelled:
                        assert cancelled.status == 204
                    assert frames_of(await third.read())[-1]["status"] == "cancelled"
