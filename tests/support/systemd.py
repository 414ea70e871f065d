"""The socket on which systemd hears from a service (sd_notify(3))."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Self


class Systemd:
    """A service manager that listens on *address*: a path, or `@` and an abstract name."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(address.replace("@", "\0", 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    async def message(self) -> dict[str, str]:
        """Wait for the next message."""
        data = await self._loop.sock_recv(self._socket, 4096)
        return dict(line.split("=", 1) for line in data.decode().split("\n"))

    async def message_with(self, name: str, value: str = "1") -> dict[str, str]:
        """Wait for the next message with *name* set to *value*; those before it are skipped."""
        while (message := await self.message()).get(name) != value:
            pass
        return message

    def unread(self) -> list[bytes]:
        """Take every message that has come and was not read."""
        messages = []
        with contextlib.suppress(BlockingIOError):
            while True:
                messages.append(self._socket.recv(4096))
        return messages
