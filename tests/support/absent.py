"""A provider that is away, and comes: its address refuses every connection until then."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Self

from tests.support.writing import write


class AbsentProvider:
    """An address at which nothing listens, until `come` puts the server at *port* behind it."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._socket.close()
        if self._server is not None:
            self._server.close()
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)
            await self._server.wait_closed()

    async def come(self, port: int) -> None:
        """Pass every connection on to *port* from now on."""

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            there, here = await asyncio.open_connection("127.0.0.1", port)
            try:
                await asyncio.gather(_copy(reader, here), _copy(there, writer))
            finally:
                for writer_ in (here, writer):
                    writer_.close()
                    with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                        await writer_.wait_closed()

        # A duplicate: the server closes its socket, and this one holds the address.
        self._server = await asyncio.start_server(relay, sock=self._socket.dup())


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            write(writer, data)
            await writer.drain()
    writer.close()
