"""Web pages: what a page of another origin may not do, on any route."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat import until_status
from tests.support.keys import bearer, code_of, keys_of
from tests.support.raw import Raw
from tests.support.server import ENDLESS
from tests.support.tls import TLS, pair
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import MakeServer, RunningServer

SAFE = {"GET", "HEAD", "OPTIONS", "TRACE"}
WEB_PAGE = "https://page.example"
PAGES = {"chat.websocket.allow_origins": [WEB_PAGE]}
# A page elsewhere; a sandboxed frame or a file; a page on another port of this machine; no
# origins.
FOREIGN = ("https://evil.example", "null", "http://127.0.0.1:1", "file://", "http://[", "x")


def unsafe_routes(server: RunningServer) -> list[tuple[str, str]]:
    """Method and path of each route that may change something."""
    pairs = []
    for route in server.app.router.routes():
        assert route.resource is not None
        if route.method not in SAFE:
            method = "POST" if route.method == "*" else route.method
            pairs.append((method, re.sub(r"\{[^}]+\}", "x", route.resource.canonical)))
    return pairs


async def status_of(
    server: RunningServer, method: str, path: str, headers: dict[str, str]
) -> tuple[int, str]:
    """Status, and the code of our error body."""
    async with server.session.request(method, server.base + path, headers=headers) as response:
        return response.status, await code_of(response) if response.status >= 400 else ""


@pytest.mark.parametrize("changes", [{}, keys_of("web", "root")])
async def test_no_route_lets_a_foreign_page_change_anything(
    make_server: MakeServer, changes: dict[str, Any]
) -> None:
    server = await make_server(**PAGES, **changes)
    table = unsafe_routes(server)
    key = bearer("root") if changes else {}

    assert {("POST", "/v1/responses/x/cancel"), ("DELETE", "/session")} < set(table)
    for method, path in table:
        for origin in FOREIGN:
            refused = await status_of(server, method, path, {"Origin": origin, **key})
            assert refused == (403, "origin_not_allowed"), f"{method} {path} from {origin}"
        for page in ({}, {"Origin": server.base}, {"Origin": WEB_PAGE}):
            assert (await status_of(server, method, path, {**page, **key}))[0] != 403, path


async def test_a_foreign_page_is_refused_on_paths_that_are_not_there(
    make_server: MakeServer,
) -> None:
    server = await make_server(**PAGES)

    for method in ["POST", "PUT", "PATCH", "DELETE", "MOVE"]:
        for path in ("/nothing", "/v1/nothing", "/stats"):
            refused = await status_of(server, method, path, {"Origin": FOREIGN[0]})
            assert refused == (403, "origin_not_allowed"), method
            assert (await status_of(server, method, path, {"Origin": WEB_PAGE}))[0] in {
                404,
                405,
            }, method


async def test_every_page_may_change_something_where_every_page_may_connect(
    make_server: MakeServer,
) -> None:
    server = await make_server(**{"chat.websocket.allow_origins": ["*"]})

    for origin in FOREIGN:
        outcome = await status_of(server, "DELETE", "/sse/chat/x", {"Origin": origin})
        assert outcome == (404, "stream_not_found")


@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_a_foreign_page_ends_no_answer(make_server: MakeServer, method: str) -> None:
    server = await make_server(ENDLESS, **PAGES)
    path = "/sse/chat/r" if method == "DELETE" else "/v1/responses/r/cancel"
    async with server.connect() as ws:
        await ws.send_json({"action": "chat", "request_id": "r", "payload": {"text": "Hello"}})
        await until_status(ws, "chunk")
        refused = await status_of(server, method, path, {"Origin": FOREIGN[0]})
        await until_status(ws, "chunk")
        running = server.held()["running"]

        await ws.send_json({"action": "cancel", "request_id": "r"})
        await until_status(ws, "cancelled")

    assert refused == (403, "origin_not_allowed")
    assert running == 1
    await until(lambda: server.held()["running"] == 0)


async def test_a_handshake_of_a_foreign_page_is_refused_before_its_key(
    make_server: MakeServer,
) -> None:
    server = await make_server(**keys_of("web"), **PAGES)

    for origin in (*FOREIGN, "https://page.example.evil.example"):
        async with Raw(server) as raw:
            assert (await raw.upgrade(f"Origin: {origin}")).status == 403
    async with Raw(server) as raw:
        assert (await raw.upgrade(f"Origin: {WEB_PAGE}")).status == 401


async def test_page_that_came_in_plain_text_is_none_of_ours_over_tls(
    make_server: MakeServer, tmp_path: Path
) -> None:
    """Somebody on the way may have written it: the same host and port are not enough."""
    server = await make_server(**PAGES, **keys_of("web"), **{TLS: pair(tmp_path)})
    plain = server.base.replace("https://", "http://")
    table = [("DELETE", "/session"), ("POST", "/v1/chat/completions")]

    for method, path in table:
        key = bearer("web")
        refused = await status_of(server, method, path, {"Origin": plain, **key})
        assert refused == (403, "origin_not_allowed")
        for origin in (server.base, server.base.upper().replace("HTTPS", "https"), WEB_PAGE):
            assert (await status_of(server, method, path, {"Origin": origin, **key}))[0] != 403
    async with server.session.get(server.base + "/health", headers={"Origin": plain}) as response:
        assert "Access-Control-Allow-Origin" not in response.headers


async def test_cookie_is_for_tls_alone_where_it_was_given_over_tls(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = await make_server(**keys_of("web"), **{TLS: pair(tmp_path)})

    async with server.session.post(server.base + "/session", headers=bearer("web")) as response:
        assert response.cookies["aioserver_session"]["secure"] is True
        cookie = {"Cookie": f"aioserver_session={response.cookies['aioserver_session'].value}"}

    for origin, status in ((server.base, 200), (server.base.replace("https", "http"), 403)):
        headers = {"Origin": origin, **cookie}
        async with server.session.get(server.v1 + "/models", headers=headers) as response:
            assert response.status == status
