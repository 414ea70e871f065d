"""In front of every handler: versions, hosts, methods, an upgrade where there is no WebSocket."""

from __future__ import annotations

import re
from collections import Counter
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


async def test_a_websocket_among_other_protocols_is_one(server: RunningServer) -> None:
    for value in ("WebSocket", "h2c, websocket", "x/1 ,WEBSOCKET"):
        lines = f"Upgrade: {value}", "Connection: Upgrade"

        assert (await asked(server, "GET", "/v1/models", *lines)).status == 426, value


async def test_an_upgrade_to_another_protocol_is_ignored(server: RunningServer) -> None:
    settings = "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"
    for value in ("h2c", "TLS/1.0", "", "websocket2"):
        lines = (f"Upgrade: {value}", "Connection: Upgrade, HTTP2-Settings", settings)
        async with Raw(server) as raw:
            for _ in range(2):
                await raw.post("/v1/chat/completions", CHAT, *lines)
                assert (await raw.answer()).status == 200, value
                await raw.get("/v1/models", *lines)
                assert (await raw.answer()).status == 200, value


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


REFUSED_LINES = {
    "GET /health HTTP/2.0": (505, "http_version_not_supported"),
    "POST /v1/chat/completions HTTP/2.0": (505, "http_version_not_supported"),
    "GET /nowhere HTTP/2.0": (505, "http_version_not_supported"),
    "GET /health HTTP/3.0": (400, "invalid_request"),
    "GET /health": (400, "invalid_request"),
    "CONNECT x:80 HTTP/1.1": (405, "method_not_allowed"),
    "GET * HTTP/1.1": (400, "invalid_request"),
}


@pytest.mark.parametrize("changes", [{}, keys_of("web"), {"auth.open": True}])
async def test_a_request_line_of_another_protocol_is_refused_and_ends_the_connection(
    make_server: MakeServer, changes: dict[str, Any]
) -> None:
    server = await make_server(**{"auth.allowed_hosts": ["x"], **changes})
    for line, (status, code) in REFUSED_LINES.items():
        async with Raw(server) as raw:
            await raw.send(f"{line}\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
            answer = await raw.answer()

        assert (answer.status, answer.code) == (status, code), line
    codes = Counter((code,) for _, code in REFUSED_LINES.values())
    assert await server.counted("bad_requests", "code") == codes
    await server.nothing_held()


@pytest.mark.parametrize("changes", [{}, keys_of("web"), {"auth.open": True}])
async def test_a_host_that_is_none_is_refused_whoever_may_ask(
    make_server: MakeServer, changes: dict[str, Any]
) -> None:
    server = await make_server(**changes)
    for host in ["a b", "a/b", "a@b", "a:x", "a:123456", "[::1", "::1", "a?b#"]:
        async with Raw(server) as raw:
            await raw.send(f"GET /livez HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            answer = await raw.answer()

        assert (answer.status, answer.code) == (400, "invalid_request"), host


# The rest of such a body is awaited for 30 s.
@pytest.mark.virtual_time
@pytest.mark.parametrize("path", ["/session", "/", "/nowhere"])
@pytest.mark.parametrize(
    ("version", "codings"), [("1.0", "chunked"), ("1.0", ""), ("1.1", ""), ("1.1", " \t")]
)
async def test_a_body_that_two_servers_could_read_differently_is_refused_at_any_path(
    server: RunningServer, path: str, version: str, codings: str
) -> None:
    coding = f"Transfer-Encoding: {codings}\r\n"
    length = "" if codings == "chunked" else "Content-Length: 5\r\n"

    async with Raw(server) as raw:
        head = f"POST {path} HTTP/{version}\r\nHost: x\r\nConnection: keep-alive\r\n"
        await raw.send(f"{head}{coding}{length}\r\n0\r\n\r\n".encode())
        answer = await raw.answer()

        assert (answer.status, answer.code) == (400, "invalid_request")
        assert await raw.to_the_end() == b""


async def test_a_name_or_an_address_with_or_without_a_port_is_a_host(
    server: RunningServer,
) -> None:
    for host in ["localhost", "127.0.0.1:8000", "[::1]:80", "[::1]", "LOCALHOST.", "localhost:"]:
        async with Raw(server) as raw:
            await raw.send(f"GET /livez HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert (await raw.answer()).status == 200, host


@pytest.mark.parametrize("changes", [{}, keys_of("web")])
async def test_options_of_the_server_itself_are_its_methods(
    make_server: MakeServer, changes: dict[str, Any]
) -> None:
    server = await make_server(**changes)
    async with Raw(server) as raw:
        await raw.send(b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = await raw.head()
        assert answer.status == 204
        assert answer.headers["allow"] == "GET, POST, DELETE, OPTIONS"
        # The connection goes on.
        await raw.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await raw.answer()).status == 200
