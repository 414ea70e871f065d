"""The listening socket: what the kernel gave, and that every limit reached the connections."""

from __future__ import annotations

import asyncio
import inspect
import logging
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import http_parser, web
from aiohttp.web_protocol import RequestHandler

from aioserver import app as application
from aioserver import kernel, listener
from tests.faces.raw import Raw
from tests.house import configured

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from tests.house import House

    Make = Callable[..., Awaitable[House]]

WEBSOCKET = "chat.websocket"
UVICORN = "chat.websocket.concurrency.uvicorn"


@asynccontextmanager
async def runner_of(path: Path, **changes: Any) -> AsyncIterator[tuple[listener.Runner, Any]]:
    """A runner that does not listen yet, and the settings of its listener."""
    settings = configured("http://127.0.0.1:9/v1", changes, path / "config.yaml").settings
    app = application.build(settings)
    runner = listener.Runner(app, settings.chat.websocket)
    await runner.setup()
    try:
        yield runner, settings.chat.websocket
    finally:
        await runner.cleanup()


def sockets_of(runner: listener.Runner) -> list[Any]:
    return [
        sock
        for site in runner.sites
        for sock in site._server.sockets  # type: ignore[union-attr]  # the kernel is asked
    ]


async def test_the_backlog_reaches_the_kernel(tmp_path: Path) -> None:
    async with runner_of(tmp_path, **{f"{UVICORN}.backlog": 77}) as (runner, given):
        (one,) = await listener.listen(runner, given)

        assert (one.host, one.backlog, one.queue_limit) == ("127.0.0.1", 77, 77)
        assert one.url == f"http://127.0.0.1:{one.port}"
        assert {kernel.accept_queue(sock) for sock in sockets_of(runner)} == {(0, 77)}


async def test_many_that_come_at_once_are_let_in_within_few_turns_of_the_loop(
    tmp_path: Path,
) -> None:
    async with runner_of(tmp_path, **{f"{UVICORN}.backlog": 512}) as (runner, given):
        (one,) = await listener.listen(runner, given)
        server = runner.server
        assert server is not None
        clients = [socket.create_connection((one.host, one.port)) for _ in range(200)]
        turns = 0
        while len(server.connections) < len(clients):
            await asyncio.sleep(0)
            turns += 1
            assert turns < 100, "a connection a turn starves newcomers under load"
        for client in clients:
            client.close()


async def test_a_backlog_that_the_kernel_cuts_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    somaxconn = int(listener.SOMAXCONN.read_text())
    async with runner_of(tmp_path, **{f"{UVICORN}.backlog": somaxconn + 5}) as (runner, given):
        (one,) = await listener.listen(runner, given)

    assert one.queue_limit == somaxconn
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "net.core.somaxconn" in warning.getMessage()
    assert f"{somaxconn} instead of backlog={somaxconn + 5}" in warning.getMessage()


async def test_a_backlog_that_fits_is_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with runner_of(tmp_path) as (runner, given):
        await listener.listen(runner, given)

    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_port_in_use_is_one_clear_error_and_leaves_nothing_open(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with runner_of(tmp_path, **{f"{WEBSOCKET}.port": port}) as (runner, given):
            with pytest.raises(OSError, match="in use"):
                await listener.listen(runner, given)
            assert not runner.sites


async def test_a_host_that_is_not_ours_is_an_error(tmp_path: Path) -> None:
    changes = {f"{WEBSOCKET}.host": "192.0.2.1", "auth.open": True}
    async with runner_of(tmp_path, **changes) as (runner, given):
        with pytest.raises(OSError):  # noqa: PT011 - the kernel's words
            await listener.listen(runner, given)


async def test_a_port_may_be_bound_again_at_once(tmp_path: Path) -> None:
    async with runner_of(tmp_path) as (runner, given):
        (first,) = await listener.listen(runner, given)
        reader, writer = await asyncio.open_connection("127.0.0.1", first.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        await reader.read()  # the server closes first: its side stays in TIME_WAIT
        writer.close()
        await writer.wait_closed()
    async with runner_of(tmp_path, **{f"{WEBSOCKET}.port": first.port}) as (runner, given):
        (second,) = await listener.listen(runner, given)

    assert second.port == first.port


async def test_localhost_is_every_loopback_address_with_one_port(tmp_path: Path) -> None:
    async with runner_of(tmp_path, **{f"{WEBSOCKET}.host": "localhost"}) as (runner, given):
        listening = await listener.listen(runner, given)

    assert {one.host for one in listening} <= {"127.0.0.1", "::1"}
    assert "127.0.0.1" in {one.host for one in listening}
    assert len({one.port for one in listening}) == 1


async def test_every_option_reaches_the_connections(tmp_path: Path) -> None:
    changes = {
        f"{UVICORN}.keepalive_timeout": 7,
        f"{UVICORN}.h11_max_request_line_size": 4321,
        f"{UVICORN}.h11_max_header_size": 5432,
        f"{UVICORN}.h11_max_incomplete_event_size": 3210,
    }
    async with runner_of(tmp_path, **changes) as (runner, _):
        assert runner.server is not None
        connection = runner.server()

        assert isinstance(connection, listener.Connection)
        assert connection._keepalive_timeout == 7
        assert connection.max_line_size == 4321
        assert connection.max_field_size == 3210
        assert connection.max_headers == listener.MAX_HEADERS
        assert connection._lingering_time == listener.LINGERING
        assert connection._timeout_ceil_threshold == float("inf")
        assert connection.access_log is None
        assert runner.server.handler_cancellation is True


async def test_a_field_is_never_larger_than_all_headers_together(tmp_path: Path) -> None:
    async with runner_of(tmp_path, **{f"{UVICORN}.h11_max_header_size": 2000}) as (runner, _):
        assert runner.server is not None
        assert runner.server().max_field_size == 2000


async def test_an_option_that_aiohttp_does_not_know_is_an_error(tmp_path: Path) -> None:
    async with runner_of(tmp_path) as (runner, _):
        assert runner.server is not None
        runner.server._kwargs["keepalive_timeoot"] = 1
        with pytest.raises(TypeError):
            runner.server()


async def test_an_access_log_is_written_when_asked_for(
    make_house: Make, caplog: pytest.LogCaptureFixture
) -> None:
    house = await make_house(**{f"{UVICORN}.access_log": True})
    with caplog.at_level(logging.INFO, "aioserver.access"):
        async with house.session.get(house.base + "/health") as response:
            assert response.status == 200
        async with Raw(house) as raw:
            await raw.get("/health", "Connection: close")
            await raw.to_the_end()

    lines = [one for one in caplog.records if one.name == "aioserver.access"]
    assert len(lines) == 2
    told = lines[0].fields  # type: ignore[attr-defined]
    assert (told["method"], told["path"], told["status"]) == ("GET", "/health", 200)
    assert told["address"] == "127.0.0.1"
    assert told["bytes"] > 0


@pytest.mark.parametrize(
    ("trusted", "address"), [(["127.0.0.1"], "203.0.113.9"), ([], "127.0.0.1")]
)
async def test_the_access_log_has_the_address_that_a_trusted_proxy_gives(
    make_house: Make, caplog: pytest.LogCaptureFixture, trusted: list[str], address: str
) -> None:
    house = await make_house(**{f"{UVICORN}.access_log": True, "auth.trusted_proxies": trusted})
    headers = {"X-Forwarded-For": "203.0.113.9", "Referer": "canary", "User-Agent": "canary"}
    with caplog.at_level(logging.INFO, "aioserver.access"):
        async with house.session.get(f"{house.base}/health?q=canary", headers=headers) as response:
            assert response.status == 200
        async with Raw(house) as raw:
            await raw.send(b"GET /canary x HTTP/1.1\r\n\r\n")  # nothing that has an application
            await raw.to_the_end()

    lines = [one.fields for one in caplog.records if one.name == "aioserver.access"]  # type: ignore[attr-defined]
    assert [one["address"] for one in lines] == [address, "127.0.0.1"]
    assert "canary" not in str(lines[0])


def test_the_private_names_of_aiohttp_are_what_we_take_them_for() -> None:
    """See the head of `listener.py`."""
    assert inspect.iscoroutinefunction(web.AppRunner._make_server)
    assert list(inspect.signature(web.AppRunner._make_server).parameters) == ["self"]
    source = inspect.getsource(web.Server.__init__)
    assert "self._kwargs = kwargs" in source
    assert "self._loop" in source
    for name in ("_runner", "_server", "_backlog"):
        assert name in web.BaseSite.__slots__
    assert "_sock" in web.SockSite.__slots__
    parameters = inspect.signature(RequestHandler.__init__).parameters
    for name in (
        "access_log",
        "keepalive_timeout",
        "max_line_size",
        "max_field_size",
        "max_headers",
        "lingering_time",
        "auto_decompress",
        "timeout_ceil_threshold",
    ):
        assert name in parameters
    assert inspect.signature(RequestHandler.handle_error).parameters.keys() == {
        "self",
        "request",
        "status",
        "exc",
        "message",
    }


def test_the_parser_is_the_one_in_c() -> None:
    assert http_parser.HttpRequestParser is not http_parser.HttpRequestParserPy
