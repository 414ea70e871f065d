"""In front of every handler: an upgrade where there is no WebSocket."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import WSServerHandshakeError

from tests.support.chat import CHAT
from tests.support.keys import bearer, keys_of
from tests.support.raw import Answer, Raw

if TYPE_CHECKING:
    from tests.support.server import MakeServer, RunningServer

HANDSHAKE = (
    *("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"),
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


async def asked(server: RunningServer, method: str, path: str, *lines: str) -> Answer:
    async with Raw(server) as raw:
        head = "".join(f"{line}\r\n" for line in (f"{method} {path} HTTP/1.1", "Host: x", *lines))
        await raw.send(f"{head}\r\n".encode())
        answer = await raw.head() if method == "HEAD" else await raw.answer()
        assert await raw.to_the_end() == b""
    return answer


@pytest.mark.parametrize("changes", [{}, keys_of("web", "root")])
async def test_an_upgrade_is_426_wherever_there_is_no_websocket(
    make_server: MakeServer, changes: dict[str, Any]
) -> None:
    server = await make_server(**changes)
    key = [f"Authorization: {bearer('root')['Authorization']}"] if changes else []
    paths = {
        re.sub(r"\{[^}]+\}", "x", route.resource.canonical)
        for route in server.app.router.routes()
        if route.resource is not None
    }

    assert {"/v1/responses", "/v1/chat/completions", "/sse/chat", "/", "/stats"} < paths
    for path in (*sorted(paths - {"/ws/chat"}), "/v1/nothing", "/nothing", "/ws"):
        for method in ("GET", "POST", "HEAD"):
            if (method, path) == ("GET", "/v1/responses"):
                continue
            answer = await asked(server, method, path, *HANDSHAKE, *key)
            assert answer.status == 426, f"{method} {path}"
            assert answer.headers["upgrade"] == "HTTP/1.1"
            assert answer.headers["connection"] == "upgrade, close"
            if method == "HEAD":
                continue
            assert answer.code == "upgrade_required"
            error = answer.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert "/ws/chat" in error["message"]
    counted = await server.counted("bad_requests", "code") if not changes else None
    assert counted is None or counted["upgrade_required",] > 10


async def test_a_websocket_client_sees_426_and_may_ask_by_http(server: RunningServer) -> None:
    with pytest.raises(WSServerHandshakeError) as refused:
        await server.session.ws_connect(f"{server.v1}/chat/completions")
    async with server.session.post(f"{server.v1}/chat/completions", json=CHAT) as response:
        assert response.status == 200

    assert refused.value.status == 426


async def test_a_get_of_the_websocket_without_an_upgrade_says_what_it_is(
    server: RunningServer,
) -> None:
    async with server.session.get(f"{server.base}/ws/chat") as response:
        error = (await response.json())["error"]

    assert (response.status, response.headers["Upgrade"]) == (426, "websocket")
    assert error["code"] == "upgrade_required"
    assert error["message"] == "this is the WebSocket: upgrade, or POST /sse/chat"


@pytest.mark.parametrize("value", ["WebSocket", "h2c, websocket", "x/1 ,WEBSOCKET"])
async def test_a_websocket_among_other_protocols_is_one(server: RunningServer, value: str) -> None:
    answer = await asked(server, "GET", "/v1/models", f"Upgrade: {value}", "Connection: Upgrade")

    assert answer.status == 426


@pytest.mark.parametrize("value", ["h2c", "TLS/1.0", "", "websocket2"])
async def test_an_upgrade_to_another_protocol_is_ignored(
    server: RunningServer, value: str
) -> None:
    async with Raw(server) as raw:
        settings = "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"
        lines = (f"Upgrade: {value}", "Connection: Upgrade, HTTP2-Settings", settings)
        for _ in range(2):
            await raw.post("/v1/chat/completions", CHAT, *lines)
            assert (await raw.answer()).status == 200
            await raw.get("/v1/models", *lines)
            assert (await raw.answer()).status == 200


async def test_a_key_is_asked_for_before_anything_is_said_of_a_path(
    make_server: MakeServer,
) -> None:
    server = await make_server(**keys_of("web"))

    assert (await asked(server, "GET", "/stats", *HANDSHAKE, "Connection: close")).status == 401


@pytest.mark.parametrize("lines", [[], ["Upgrade: h2c", "Connection: Upgrade"]])
async def test_a_get_of_responses_that_is_no_handshake_says_what_is_there(
    server: RunningServer, lines: list[str]
) -> None:
    answer = await asked(server, "GET", "/v1/responses", *lines, "Connection: close")

    assert (answer.status, answer.code) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    assert "WebSocket" in answer.json()["error"]["message"]


async def test_the_websocket_is_still_one(make_server: MakeServer) -> None:
    server = await make_server(**{"chat.websocket.endpoint": "/v1/socket"})

    async with Raw(server) as raw:
        assert (await raw.upgrade()).status == 101
    assert (await asked(server, "GET", "/ws/chat", *HANDSHAKE)).status == 426
