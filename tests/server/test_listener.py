"""The listening socket: what the kernel gave, and that every limit reached the connections."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.server import listener
from aioserver.telemetry import kernel
from tests.support.server import UVICORN, runner_of

if TYPE_CHECKING:
    from aioserver.server.runner import Runner

pytestmark = pytest.mark.both_loops


# The limit of the kernel.
SOMAXCONN = Path("/proc/sys/net/core/somaxconn")
WEBSOCKET = "chat.websocket"


def sockets_of(runner: Runner) -> list[Any]:
    return [
        sock
        for site in runner.sites
        for sock in site._accepting.sockets  # type: ignore[union-attr]  # the kernel is asked
    ]


async def test_the_backlog_reaches_the_kernel(tmp_path: Path) -> None:
    async with runner_of(tmp_path, **{f"{UVICORN}.backlog": 77}) as (runner, websocket):
        (listening,) = await listener.listen(runner.server, websocket)

        assert (listening.host, listening.backlog, listening.queue_limit) == ("127.0.0.1", 77, 77)
        assert listening.url == f"http://127.0.0.1:{listening.port}"
        assert {kernel.accept_queue(sock) for sock in sockets_of(runner)} == {(0, 77)}


async def test_many_that_come_at_once_are_let_in_within_few_turns_of_the_loop(
    tmp_path: Path,
) -> None:
    async with runner_of(tmp_path, **{f"{UVICORN}.backlog": 512}) as (runner, websocket):
        (listening,) = await listener.listen(runner.server, websocket)
        server = runner.server
        clients = [socket.create_connection((listening.host, listening.port)) for _ in range(200)]
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
    somaxconn = int(SOMAXCONN.read_text())  # noqa: ASYNC240 - before anything runs
    async with runner_of(tmp_path, **{f"{UVICORN}.backlog": somaxconn + 5}) as (runner, websocket):
        (listening,) = await listener.listen(runner.server, websocket)

    assert listening.queue_limit == somaxconn
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "net.core.somaxconn" in warning.getMessage()
    assert f"{somaxconn} instead of backlog={somaxconn + 5}" in warning.getMessage()


async def test_a_backlog_that_fits_is_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with runner_of(tmp_path) as (runner, websocket):
        await listener.listen(runner.server, websocket)

    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_port_in_use_is_one_clear_error_and_leaves_nothing_open(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with runner_of(tmp_path, **{f"{WEBSOCKET}.port": port}) as (runner, websocket):
            with pytest.raises(OSError, match="in use"):
                await listener.listen(runner.server, websocket)
            assert not runner.sites


async def test_a_host_that_is_not_ours_is_an_error(tmp_path: Path) -> None:
    changes = {f"{WEBSOCKET}.host": "192.0.2.1", "auth.open": True}
    async with runner_of(tmp_path, **changes) as (runner, websocket):
        with pytest.raises(OSError):  # noqa: PT011 - the kernel's words
            await listener.listen(runner.server, websocket)


async def test_a_port_may_be_bound_again_at_once(tmp_path: Path) -> None:
    async with runner_of(tmp_path) as (runner, websocket):
        (first,) = await listener.listen(runner.server, websocket)
        reader, writer = await asyncio.open_connection("127.0.0.1", first.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        await reader.read()  # the server closes first: its side stays in TIME_WAIT
        writer.close()
        await writer.wait_closed()
    async with runner_of(tmp_path, **{f"{WEBSOCKET}.port": first.port}) as (runner, websocket):
        (second,) = await listener.listen(runner.server, websocket)

    assert second.port == first.port


async def test_localhost_is_every_loopback_address_with_one_port(tmp_path: Path) -> None:
    async with runner_of(tmp_path, **{f"{WEBSOCKET}.host": "localhost"}) as (runner, websocket):
        listening = await listener.listen(runner.server, websocket)

    assert {address.host for address in listening} <= {"127.0.0.1", "::1"}
    assert "127.0.0.1" in {address.host for address in listening}
    assert len({address.port for address in listening}) == 1


@pytest.mark.parametrize("turns", range(4))
async def test_a_client_that_connects_as_the_server_stops_is_answered_or_refused(
    tmp_path: Path, turns: int
) -> None:
    async with runner_of(tmp_path) as (runner, websocket):
        (listening,) = await listener.listen(runner.server, websocket)
        with socket.create_connection((listening.host, listening.port)) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            client.setblocking(False)
            # asyncio accepts in one turn, and makes a connection of it in the next one.
            for _ in range(turns):
                await asyncio.sleep(0)

            await runner.end()

            loop = asyncio.get_running_loop()
            try:
                answer = await loop.sock_recv(client, 1000)
            except ConnectionResetError:
                answer = b""
    assert answer[:15] in {b"", b"HTTP/1.1 200 OK"}


async def test_a_socket_that_is_paused_accepts_nothing() -> None:
    with listener.ListeningSocket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        sock.setblocking(False)
        with socket.create_connection(sock.getsockname()):
            sock.paused = True
            with pytest.raises(BlockingIOError):
                sock.accept()
            sock.paused = False
            sock.accept()[0].close()
    assert sock.accepted == 1
