"""A proxy between a client and a server that breaks their connections, wherever in the bytes they
are.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Self

from tests.support.writing import write

if TYPE_CHECKING:
    from collections.abc import Callable


class FaultProxy:
    """Relays TCP to *port*, and cuts each connection after `allowance()` bytes that came from the
    server.

    The last of them have arrived when the client sees the cut. An allowance of 0 cuts before the
    server hears of the connection; None cuts never. `cuts` counts them.
    """

    def __init__(self, port: int, allowance: Callable[[], int | None]) -> None:
        self.port = 0
        self.cuts = 0
        # The port that it leads to, and whether it refuses connections as if nothing listened
        # there.
        self.target = port
        self._allowance = allowance
        self._server: asyncio.Server | None = None
        self._relays: set[asyncio.Task[None]] = set()
        self._closing = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._server is not None
        self._server.close()
        self._closing = True
        await self.cut()
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    async def cut(self) -> None:
        """Cut all connections."""
        # Only the connections of now: a client may have come back before they have ended.
        relays = set(self._relays)
        for relay in relays:
            relay.cancel()
        if relays:
            await asyncio.wait(relays)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._closing:
            # It was on its way when the listener was closed.
            writer.transport.abort()
            return
        task = asyncio.ensure_future(self._relay(reader, writer))
        self._relays.add(task)
        task.add_done_callback(self._relays.discard)
        # A task that is cancelled before its first step closes nothing.
        task.add_done_callback(lambda _task: writer.close())

    async def _relay(
        self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter
    ) -> None:
        allowance = self._allowance()
        to_server: asyncio.StreamWriter | None = None
        try:
            if allowance != 0:
                from_server, to_server = await asyncio.open_connection("127.0.0.1", self.target)
                up = asyncio.ensure_future(_pass_all(from_client, to_server))
                try:
                    await self._pass(from_server, to_client, allowance)
                finally:
                    up.cancel()
                    await asyncio.wait([up])
            else:
                self.cuts += 1
        except ConnectionError:
            pass
        finally:
            for writer in (to_server, to_client):
                if writer is not None:
                    # FIN, after what was written: bytes that a reset overtakes would be lost.
                    writer.close()
            for writer in (to_server, to_client):
                if writer is not None:
                    with contextlib.suppress(ConnectionError):
                        await writer.wait_closed()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, allowance: int | None
    ) -> None:
        """Pass bytes on to the end, or until *allowance* of them have passed."""
        while data := await reader.read(65536):
            if allowance is not None:
                data = data[:allowance]
                allowance -= len(data)
            write(writer, data)
            await writer.drain()
            if allowance == 0:
                self.cuts += 1
                return


async def _pass_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            write(writer, data)
            await writer.drain()
