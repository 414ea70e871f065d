"""Raw sockets, for clients that do what no library does.

Nothing is read ahead: a socket that a test does not read is a client that has stopped reading.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.process import ServerProcess
    from tests.support.server import RunningServer

SMALL = 4096  # bytes of a receive buffer that is soon full
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response; header names are lower case."""

    version: str
    status: int
    headers: dict[str, str]
    body: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of our error body."""
        return str(self.json()["error"]["code"])


class Raw:
    """One TCP connection to a server: `async with Raw(server) as raw`."""

    def __init__(
        self,
        server: RunningServer | ServerProcess,
        *,
        receive_buffer: int | None = None,
        segment: int | None = None,
    ) -> None:
        self._port = server.port
        self._path = server.settings.chat.websocket.endpoint
        self._sse = server.settings.chat.sse.endpoint
        self._loop = asyncio.get_running_loop()
        self._rest = b""
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        # As every library does: what is small would wait for the kernel's clock, which does not
        # jump.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if segment is not None:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, segment)

    async def __aenter__(self) -> Self:
        await self._loop.sock_connect(self._socket, ("127.0.0.1", self._port))
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._socket.close()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def reset(self) -> None:
        """Reset the connection: RST instead of FIN."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def half_close(self) -> None:
        """Send nothing more, but go on reading."""
        self._socket.shutdown(socket.SHUT_WR)

    # Bytes.

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._socket, data)

    async def _more(self) -> bool:
        data = await self._loop.sock_recv(self._socket, 65536)
        self._rest += data
        return bool(data)

    async def some(self, most: int) -> bytes:
        """Read what there is, *most* bytes at most; empty at the end."""
        return await self._loop.sock_recv(self._socket, most)

    async def exactly(self, count: int) -> bytes:
        while len(self._rest) < count:
            if not await self._more():
                raise EOFError(self._rest)
        data, self._rest = self._rest[:count], self._rest[count:]
        return data

    async def until(self, mark: bytes) -> bytes:
        while mark not in self._rest:
            if not await self._more():
                raise EOFError(self._rest)
        data, _, self._rest = self._rest.partition(mark)
        return data + mark

    def widen(self) -> None:
        """Widen the receive buffer: megabytes take long through a small one."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)

    async def to_the_end(self) -> bytes:
        """Read until the server closes or resets the connection."""
        try:
            while await self._more():
                pass
        except ConnectionError:
            pass
        data, self._rest = self._rest, b""
        return data

    # HTTP.

    async def get(self, path: str, *lines: str) -> None:
        head = "".join(f"{line}\r\n" for line in (f"GET {path} HTTP/1.1", "Host: x", *lines))
        await self.send(f"{head}\r\n".encode("latin-1"))

    async def post(self, path: str, body: object, *lines: str, version: str = "1.1") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request_lines = (
            f"POST {path} HTTP/{version}",
            "Host: x",
            "Content-Type: application/json",
        )
        head = "".join(
            f"{line}\r\n" for line in (*request_lines, f"Content-Length: {len(data)}", *lines)
        )
        await self.send(f"{head}\r\n".encode("latin-1") + data)

    async def ask_sse(self, request_id: str, **fields: Any) -> None:
        await self.post(self._sse, {"request_id": request_id, **fields})

    async def head(self) -> Answer:
        """Read the head of a response."""
        head = (await self.until(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        version, status, *_ = first.split(" ")
        headers = dict(line.split(": ", 1) for line in lines)
        return Answer(version, int(status), {k.lower(): v for k, v in headers.items()})

    async def answer(self) -> Answer:
        """Read a whole response."""
        head = await self.head()
        if head.headers.get("transfer-encoding") == "chunked":
            body = b"".join([chunk async for chunk in self.chunks()])
        elif "content-length" in head.headers:
            body = await self.exactly(int(head.headers["content-length"]))
        elif head.status == 204:
            body = b""
        else:
            body = await self.to_the_end()
        return Answer(head.version, head.status, head.headers, body)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Read the chunks of a body to its end."""
        while size := int(await self.until(b"\r\n"), 16):
            yield await self.exactly(size)
            assert await self.exactly(2) == b"\r\n"
        assert await self.exactly(2) == b"\r\n"

    # WebSocket.

    async def upgrade(self, *lines: str, path: str = "") -> Answer:
        await self.get(
            path or self._path,
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            *lines,
        )
        return await self.head()

    async def send_frame(self, opcode: int, payload: bytes = b"", *, fin: bool = True) -> None:
        await self.send(masked(opcode, payload, fin=fin))

    async def send_json(self, data: object) -> None:
        await self.send_frame(TEXT, json.dumps(data).encode())

    async def frame(self) -> tuple[int, bytes]:
        """Read the next frame; returns opcode and payload.

        Raises:
            EOFError: the server has closed the connection.
        """
        first, size = await self.exactly(2)
        assert first & 0x70 == 0, "reserved bits"
        assert size < 128, "a server masks nothing"
        if size == 126:
            size = struct.unpack("!H", await self.exactly(2))[0]
        elif size == 127:
            size = struct.unpack("!Q", await self.exactly(8))[0]
        return first & 0x0F, await self.exactly(size)

    async def frames(self) -> list[tuple[int, bytes]]:
        """Read frames until the server closes the connection."""
        collected = []
        while True:
            try:
                collected.append(await self.frame())
            except (EOFError, ConnectionError):
                return collected

    async def json_frame(self) -> Any:
        opcode, payload = await self.frame()
        assert opcode == TEXT, (opcode, payload)
        return json.loads(payload)


def masked(opcode: int, payload: bytes, *, fin: bool = True) -> bytes:
    """The bytes of a client's frame (RFC 6455, 5.2), masked with zeros."""
    size = len(payload)
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 65536:
        length = struct.pack("!BH", 0xFE, size)
    else:
        length = struct.pack("!BQ", 0xFF, size)
    return bytes([(0x80 if fin else 0) | opcode]) + length + b"\0\0\0\0" + payload


def closing(payload: bytes) -> tuple[int, bytes]:
    """Code and reason in the payload of a close frame."""
    return struct.unpack("!H", payload[:2])[0], payload[2:]
