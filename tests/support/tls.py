"""Certificates, and TLS clients that do what no library does."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Self

import trustme

if TYPE_CHECKING:
    from pathlib import Path

TLS = "chat.websocket.tls"


@cache
def authority(name: str) -> trustme.CA:
    """An authority of that *name*; to make one takes milliseconds."""
    return trustme.CA(organization_name=name)


def pair(
    folder: Path,
    name: str = "tls.pem",
    *,
    of: str = "ours",
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1"),
    days: float = 100.0,
) -> dict[str, Any]:
    """Write a certificate with its key to *name*, and its authority to `ca.pem`, in *folder*.

    It expires in so many *days*. Returns the settings of `chat.websocket.tls`.
    """
    ours = authority(of)
    end = datetime.now(UTC) + timedelta(days=days)
    certificate = ours.issue_cert(*hosts, not_after=end)
    put(folder / name, certificate.private_key_and_cert_chain_pem.bytes())
    put(folder / "ca.pem", ours.cert_pem.bytes())
    return {"cert_file": str(folder / name)}


def put(path: Path, content: bytes) -> None:
    """Put a new file with *content* in the place of *path*."""
    path.with_suffix(".new").write_bytes(content)
    os.replace(path.with_suffix(".new"), path)  # noqa: PTH105


def trusting(of: str = "ours", **options: Any) -> ssl.SSLContext:
    """The context of a client that trusts the authority *of*; *options* are set in it."""
    context = ssl.create_default_context()
    authority(of).configure_trust(context)
    for option, value in options.items():
        setattr(context, option, value)
    return context


class TlsClient:
    """One TLS connection to *port*, byte by byte: `async with TlsClient(port) as client`.

    Nothing is read ahead. `incoming` and `outgoing` are what OpenSSL reads and writes.
    """

    def __init__(
        self,
        port: int,
        context: ssl.SSLContext | None = None,
        *,
        receive_buffer: int | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        self._port = port
        self._loop = asyncio.get_running_loop()
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = (context or trusting()).wrap_bio(
            self.incoming, self.outgoing, server_hostname="localhost", session=session
        )

    async def connect(self) -> None:
        """Connect, and begin no handshake."""
        await self._loop.sock_connect(self.socket, ("127.0.0.1", self._port))

    async def __aenter__(self) -> Self:
        await self.connect()
        try:
            await self.handshake()
        except BaseException:
            self.socket.close()
            raise
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self.socket.close()

    async def handshake(self) -> None:
        """Do the handshake.

        Raises:
            ssl.SSLError: the server refuses.
        """
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                await self.flush()
                await self.more()
            else:
                await self.flush()
                return

    async def flush(self) -> None:
        """Send what OpenSSL has written."""
        if self.outgoing.pending:
            await self.raw(self.outgoing.read())

    async def raw(self, data: bytes) -> None:
        """Send *data* as it is."""
        await self._loop.sock_sendall(self.socket, data)

    async def more(self) -> None:
        """Give OpenSSL what comes next."""
        if data := await self._loop.sock_recv(self.socket, 65536):
            self.incoming.write(data)
        else:
            self.incoming.write_eof()

    async def send(self, data: bytes) -> None:
        """Send *data* encrypted."""
        self.tls.write(data)
        await self.flush()

    async def receive(self, most: int = 65536) -> bytes:
        """Return what comes next, *most* bytes at most; empty after the server's `close_notify`.

        Raises:
            ssl.SSLEOFError: the connection has ended without.
        """
        while True:
            try:
                return self.tls.read(most)
            except ssl.SSLWantReadError:
                await self.more()
            except ssl.SSLZeroReturnError:
                return b""

    async def until(self, mark: bytes) -> bytes:
        """Read until *mark* has come."""
        data = b""
        while mark not in data:
            part = await self.receive()
            assert part, data
            data += part
        return data

    async def to_the_end(self) -> bytes:
        """Read until the server's `close_notify`."""
        data = b""
        while part := await self.receive():
            data += part
        return data
