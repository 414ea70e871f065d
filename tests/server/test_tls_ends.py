"""The end of a process whose handshakes are not finished: none is lost where others go on."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from aioserver.server.listener import ListeningSocket
from aioserver.workers.balance import Balance
from aioserver.workers.loads import Loads
from tests.support.raw import Raw
from tests.support.server import running
from tests.support.tls import TLS, TlsClient, pair
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import MakeServer, RunningServer

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def unfinished(server: RunningServer) -> int:
    assert server.owners.tls is not None
    return len(server.owners.tls.handshakes)


async def begun(stack: AsyncExitStack, server: RunningServer) -> TlsClient:
    """A client that has connected, and has said nothing."""
    client = TlsClient(server.port)
    stack.callback(client.socket.close)
    await client.connect()
    return client


@pytest.mark.both_loops
async def test_hand_over_loses_no_handshake(make_server: MakeServer, tmp_path: Path) -> None:
    server = await make_server(**{TLS: pair(tmp_path)})
    async with AsyncExitStack() as stack:
        clients = [await begun(stack, server) for _ in range(5)]
        await until(lambda: unfinished(server) == 5)

        end = asyncio.create_task(server.runner.retire(asyncio.Event()))
        await until(lambda: not server.runner.sites)
        for client in clients:
            await client.handshake()
            await client.send(GET)

        for client in clients:
            answer = await client.to_the_end()
            assert answer.startswith(b"HTTP/1.1 200 OK")
        await end


@pytest.mark.virtual_time
async def test_hand_over_does_not_wait_for_ever(make_server: MakeServer, tmp_path: Path) -> None:
    """A silent socket holds it up for half of `shutdown_timeout` at most."""
    grace = {"chat.websocket.shutdown_timeout": 2.0}
    server = await make_server(**{TLS: pair(tmp_path)}, **grace)
    async with Raw(server) as silent:
        await until(lambda: unfinished(server) == 1)
        await server.runner.retire(asyncio.Event())
        assert await silent.to_the_end() == b""


@pytest.mark.virtual_time
async def test_stop_lets_handshakes_end_as_a_new_connection_does(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = await make_server(**{TLS: pair(tmp_path), "chat.websocket.drain_delay": 0.5})
    async with AsyncExitStack() as stack:
        client = await begun(stack, server)
        silent = await stack.enter_async_context(Raw(server))
        await until(lambda: unfinished(server) == 2)

        end = asyncio.create_task(server.runner.end())
        await client.handshake()
        await client.send(GET)
        assert (await client.until(b"200 OK")).startswith(b"HTTP/1.1")
        await end
        assert await silent.to_the_end() == b""


@pytest.mark.virtual_time
async def test_handshake_is_a_connection_for_the_balance(tmp_path: Path) -> None:
    """From accept on: a worker with silent sockets takes fewer of the others."""
    loads = Loads.create(1)
    sock = ListeningSocket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    balance = Balance(Loads(loads.fd, 0))
    async with running(
        tmp_path / "config.yaml",
        changes={TLS: pair(tmp_path)},
        balance=balance,
        inherited=[sock],
    ) as server:
        async with Raw(server) as silent:
            await until(lambda: balance.connections == 1)
            async with TlsClient(server.port) as client:
                await client.send(GET)
                await client.until(b"200 OK")
                assert balance.connections == 2
            silent.close()
        await until(lambda: balance.connections == 0)
