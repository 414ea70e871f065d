"""Uploads of bodies that are still coming, over connections that break meanwhile."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, cast

import pytest

from aioserver.providers.upload import upload
from tests.support.waiting import ticks

if TYPE_CHECKING:
    from aioserver.providers.connections import ConnectionProtocol

pytestmark = pytest.mark.both_loops


class Connection(asyncio.Protocol):
    """A connection to a provider, whose upload is done once it is lost."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.resumed: asyncio.Future[None] | None = None
        self.writing_paused = False
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is no `asyncio.Transport`.
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(None)

    def write_soon(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)


class BreakingBody:
    """A body whose piece comes in the turn of the loop in which *transport* breaks."""

    chunked = True

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    async def read(self) -> bytes:
        reading = asyncio.current_task()
        assert reading is not None
        # After the upload has been told of the piece, and before it goes on.
        reading.add_done_callback(lambda _task: self._transport.abort())
        return b"piece"

    async def begin(self) -> None:
        """Nothing comes first."""

    def rewind(self) -> bool:
        return False


async def test_nobody_watches_the_descriptor_of_a_connection_that_broke_in_an_upload() -> None:
    loop = asyncio.get_running_loop()
    near, far = socket.socketpair()
    descriptor = near.fileno()
    with far:
        transport, connection = await loop.create_connection(Connection, sock=near)
        body = BreakingBody(transport)
        protocol = cast("ConnectionProtocol", connection)
        await upload([b"head"], protocol, connection.lost, 5.0, transport.abort, body)
        await connection.lost
        await ticks()

        # Otherwise the next connection that gets this number would never be read.
        assert not loop.remove_writer(descriptor)
