"""Our connections: every limit reaches them, and a request is found the handler that aiohttp would
find.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import ClientSession, ServerDisconnectedError, web
from aiohttp.test_utils import make_mocked_request

from aioserver.config.validators import TAKEN
from aioserver.faces.http import Request
from aioserver.server.app import open_server
from aioserver.server.connection import UPGRADED, Connection
from aioserver.server.connections import LINGERING, MAX_HEADERS
from aioserver.server.middleware import Dispatcher
from aioserver.server.runner import Runner
from tests.support.raw import Raw
from tests.support.server import NOWHERE, UVICORN, MakeServer, configured, runner_of
from tests.support.transport import FakeTransport
from tests.support.waiting import ticks, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tests.support.server import RunningServer


async def test_every_option_reaches_the_connections(tmp_path: Path) -> None:
    changes = {
        f"{UVICORN}.keepalive_timeout": 7,
        f"{UVICORN}.h11_max_request_line_size": 4321,
        f"{UVICORN}.h11_max_header_size": 5432,
        f"{UVICORN}.h11_max_incomplete_event_size": 3210,
    }
    async with runner_of(tmp_path, **changes) as (runner, _):
        connection = runner.server()

        assert isinstance(connection, Connection)
        assert connection._keepalive_timeout == 7
        assert connection.max_line_size == 4321
        assert connection.max_field_size == 3210
        assert connection.max_headers == MAX_HEADERS
        assert connection._lingering_time == LINGERING
        assert connection._timeout_ceil_threshold == float("inf")
        assert connection.access_log is None
        assert runner.server.handler_cancellation is True


async def test_a_field_is_never_larger_than_all_headers_together(tmp_path: Path) -> None:
    async with runner_of(tmp_path, **{f"{UVICORN}.h11_max_header_size": 2000}) as (runner, _):
        assert runner.server().max_field_size == 2000


async def test_an_option_that_aiohttp_does_not_know_is_an_error(tmp_path: Path) -> None:
    async with runner_of(tmp_path) as (runner, _):
        runner.server.options["keepalive_timeoot"] = 1
        with pytest.raises(TypeError):
            runner.server()


@pytest.mark.both_loops
async def test_a_connection_is_idle_once_the_unread_body_of_its_last_request_has_come(
    make_server: MakeServer,
) -> None:
    server = await make_server()
    async with Raw(server) as raw:
        await until(lambda: len(server.http_server.connections) == 1)
        (connection,) = server.http_server.connections
        assert isinstance(connection, Connection)
        assert UPGRADED, "this aiohttp has other private names"
        assert connection.idle
        await raw.send(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf")
        assert (await raw.answer()).status == 404

        assert not connection.idle
        await raw.send(b" more")

        await until(lambda: connection.idle)


async def test_an_access_log_is_written_when_asked_for(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(**{f"{UVICORN}.access_log": True})
    with caplog.at_level(logging.INFO, "aioserver.access"):
        async with server.session.get(server.base + "/health") as response:
            assert response.status == 200
        async with Raw(server) as raw:
            await raw.get("/health", "Connection: close")
            await raw.to_the_end()

    lines = [record for record in caplog.records if record.name == "aioserver.access"]
    assert len(lines) == 2
    fields = lines[0].fields  # type: ignore[attr-defined]
    assert (fields["method"], fields["path"], fields["status"]) == ("GET", "/health", 200)
    assert fields["address"] == "127.0.0.1"
    assert fields["bytes"] > 0


@pytest.mark.parametrize(
    ("trusted", "address"), [(["127.0.0.1"], "203.0.113.9"), ([], "127.0.0.1")]
)
async def test_the_access_log_has_the_address_that_a_trusted_proxy_gives(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture, trusted: list[str], address: str
) -> None:
    server = await make_server(**{f"{UVICORN}.access_log": True, "auth.trusted_proxies": trusted})
    headers = {"X-Forwarded-For": "203.0.113.9", "Referer": "canary", "User-Agent": "canary"}
    with caplog.at_level(logging.INFO, "aioserver.access"):
        async with server.session.get(
            f"{server.base}/health?q=canary", headers=headers
        ) as response:
            assert response.status == 200
        async with Raw(server) as raw:
            await raw.send(b"GET /canary x HTTP/1.1\r\n\r\n")  # nothing that has an application
            await raw.to_the_end()

    lines = [
        record.fields  # type: ignore[attr-defined]
        for record in caplog.records
        if record.name == "aioserver.access"
    ]
    assert [line["address"] for line in lines] == [address, "127.0.0.1"]
    assert "canary" not in str(lines[0])


# At the client's end, the transport closes by itself.
@pytest.mark.both_loops
@pytest.mark.parametrize("close", ["force_close", "close", "eof_received"])
async def test_what_is_left_on_a_connection_that_is_closed_is_watched(
    make_server: MakeServer, close: str
) -> None:
    server = await make_server(**{"chat.streams.send_timeout": 0.05})
    connection, transport = server.http_server(), FakeTransport(slow=True)
    connection.connection_made(transport)
    await ticks()
    transport.held = 1

    getattr(connection, close)()
    await until(lambda: transport.aborted)

    connection.connection_lost(None)


# Handlers that are found without aiohttp's router.


async def test_a_path_without_parameters_has_the_handler_and_the_match_of_the_router(
    server: RunningServer,
) -> None:
    plain = {
        (route.method, route.resource.canonical)
        for route in server.app.router.routes()
        if isinstance(route.resource, web.PlainResource)
    }
    assert {("POST", "/v1/chat/completions"), ("GET", "/ws/chat"), ("GET", "/health")} <= plain

    for method, path in plain:
        match, handler = await found(server.app, method, path)
        request = make_mocked_request(method, path, app=server.app)
        resolved = await server.app.router.resolve(request)

        assert resolved.route is match.route
        assert resolved.handler is handler
        assert dict(resolved) == dict(match) == {}
        assert match.apps == (server.app,)
        assert match.current_app is server.app


async def test_of_two_routes_with_one_path_the_first_is_found() -> None:
    app = web.Application()
    first = app.router.add_get("/twice", page("first"))
    app.router.add_get("/between", page("between"))
    app.router.add_get("/twice", page("second"))
    app.freeze()

    match, handler = await found(app, "GET", "/twice")

    assert match.route is first
    assert handler is first.handler


async def found(
    app: web.Application, method: str, path: str
) -> tuple[web.UrlMappingMatchInfo, Any]:
    """The match and the handler that a request gets without aiohttp's router."""
    matches: list[tuple[web.UrlMappingMatchInfo, Any]] = []

    async def middleware(request: web.Request, handler: Any) -> web.StreamResponse:
        matches.append((request.match_info, handler))
        return web.Response()

    async def router(_request: web.Request) -> web.StreamResponse:
        raise AssertionError(f"{method} {path} is left to the router")

    request: Any = make_mocked_request(method, path, app=app)
    request.__class__ = Request
    await Dispatcher(app, router, middleware)(request)
    return matches[0]


def page(text: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def respond(_request: web.Request) -> web.StreamResponse:
        return web.Response(text=text)

    return respond


async def test_every_way_to_say_it_is_answered_as_aiohttp_would(server: RunningServer) -> None:
    for line, status in [
        ("GET /health", 200),
        ("HEAD /health", 200),
        ("GET /health?deep=1", 200),
        ("GET /%68ealth", 200),
        ("GET http://127.0.0.1/health", 200),
        ("POST /health", 405),
        ("HEAD /ws/chat", 405),
        ("GET /Health", 404),
        ("GET //health", 404),
        ("GET /v1/models/sim", 200),
        ("GET /nowhere", 404),
    ]:
        async with Raw(server) as raw:
            await raw.send(
                f"{line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
            )
            answer = await raw.to_the_end()

        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), line
        assert b"x-request-id: " in answer, line


async def test_an_expectation_that_is_unknown_is_refused_as_anything_else(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(**{"chat.websocket.allow_origins": ["http://a"]})
    for path in ["/stats", "/nowhere", "/v1/models/sim"]:
        for expect in [b"much", b"\xff", b"100-continue, much"]:
            async with Raw(server) as raw:
                for _ in range(2):
                    await raw.send(
                        f"GET {path} HTTP/1.1\r\nHost: x\r\nOrigin: http://a\r\nExpect: ".encode()
                        + expect
                        + b"\r\n\r\n"
                    )
                    answer = await raw.answer()

                    assert (answer.status, answer.code) == (417, "expectation_failed"), expect
                    assert answer.headers["access-control-allow-origin"] == "http://a", expect
                    assert answer.headers["x-request-id"], expect
            assert not caplog.records, expect


async def test_a_response_that_cannot_be_written_is_a_bug_that_is_logged_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def split(_request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(headers={"X-Name": "a\r\nb"})

    app = web.Application()
    app.router.add_post("/split", split)
    settings = configured(NOWHERE, {}, tmp_path / "config.yaml").settings
    async with open_server(settings, app) as owners, ClientSession() as session:
        runner = Runner(owners)
        await runner.setup()
        try:
            port = (await runner.listen([]))[0].port
            with pytest.raises(ServerDisconnectedError):
                # A client repeats a GET.
                await session.post(f"http://127.0.0.1:{port}/split")
        finally:
            await runner.cleanup()

        bugs = owners.context.metrics.bugs
        (place,) = bugs.places
        assert (bugs.value, place.partition(" ")[0]) == (1, "ValueError")
    lines = [record for record in caplog.records if record.name == "aioserver.runner"]
    assert [record.getMessage() for record in lines] == ["bug in a connection"]


async def test_no_face_can_be_put_where_something_else_is(server: RunningServer) -> None:
    chat = server.settings.chat
    plain = {
        resource.canonical
        for resource in server.app.router.resources()
        if isinstance(resource, web.PlainResource)
    } - {chat.websocket.endpoint, chat.sse.endpoint, "/"}  # which is no endpoint by its form

    assert plain == TAKEN


async def test_an_id_in_a_path_may_have_any_character(server: RunningServer) -> None:
    paths = {
        resource.canonical: resource.get_info()["pattern"]
        for resource in server.app.router.resources()
        if isinstance(resource, web.DynamicResource) and "id}" in resource.canonical
    }

    assert len(paths) >= 6
    for path, pattern in paths.items():
        for name in ("{6F96}", "}{", "a%2Fb", "...", "é"):
            assert pattern.fullmatch(re.sub(r"\{\w+\}", name, path)), (path, name)
