"""Tunnels: a client's request that another instance answers, and the answer's bytes on their way
back (RFC 9110, 3.7).

The owner of an answer serves the same routes to its peers (peer_listener.py). This instance writes
the client's request there, with the client's own credentials, and passes what comes back on to the
client's socket, unread. It looks only for the place where the answer ends: an owner that is killed
breaks the connection off, and the client is then told so.

    102, then a response    the owner has the answer
    an error response       the owner refuses the request; the client gets that
    421, or no connection   the owner does not have the answer, or has ended

This file is one concept: a request on its way to its owner, and its answer on the way back.
"""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import hdrs, web
from aiohttp.http import HttpVersion11

from aioserver.auth.callers import ADDRESS
from aioserver.errors import InstanceUnavailable, ServerShutdown, StreamNotFound
from aioserver.faces.admission import ACCEPTED, MISDIRECTED
from aioserver.faces.http import request_id
from aioserver.faces.ready import HIGH_WATER, LAST_CHUNK
from aioserver.faces.whole import drained
from aioserver.gateway.contracts.instances import NOT_FOUND, Lost
from aioserver.gateway.contracts.timeouts import timeout
from aioserver.wings.cluster.answers.greeting import Follow, Forward, Greeting, encode, refused
from aioserver.wings.cluster.answers.peer_network import Gone, Unreachable
from aioserver.wings.cluster.answers.socket_tunnels import GONE, SocketTunnel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from aioserver.auth.callers import Caller
    from aioserver.faces.admission import Admission
    from aioserver.gateway.contracts.instances import Elsewhere, RenderError, Start
    from aioserver.streams.store import HeldBytes
    from aioserver.wings.cluster.answers.peer_network import PeerNetwork

# Seconds in which the owner says that it has the answer, and the bytes of a body that reach it in
# one of them, at least.
ACCEPT_TIMEOUT, BODY_RATE = 1.0, 1 << 23
# Bytes of the owner's head.
MAX_HEAD = 1 << 16
# Headers that hold for one connection (RFC 9110, 7.6.1), that belong to a body, or that this
# instance writes itself.
LEFT_OUT = frozenset(
    (
        *("connection", "keep-alive", "te", "trailer", "upgrade", "proxy-connection"),
        *("content-length", "transfer-encoding", "expect", "x-request-id"),
    )
)
# The last bytes that are kept, even if the last read was shorter: a read may end within the mark
# by which an answer ends.
KEPT = 64
# The first bytes of a response.
STATUS_LINE = b"HTTP/1.1 200 "
ACCEPTING = int(ACCEPTED[9:12])
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
# The end of a stream to a client of HTTP/1.0, whose body has no chunks: its last event. No quote
# stands like that in the text of an event.
_ENDS = re.compile(
    rb'"status":"(?:complete|error|cancelled)"|data: (?:\[DONE\]|{"error":)'
    rb"|event: (?:error|message_stop|response\.(?:completed|failed|incomplete|cancelled))\n"
)
_SILENT = "the process that has this answer has said nothing"


class Tunnel(asyncio.Protocol):
    """Passes the bytes of the owner of an answer on to the client's *transport*; `done` is done
    when there are no more.

    *drain* waits for the client, and raises a ConnectionError if it is dropped. *bodyless*: the
    response ends with its head. *chunked*: the client knows HTTP/1.1.

    Always: nothing is written after `done`. The owner is not read while the client reads nothing.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        drain: Callable[[], Awaitable[None]],
        *,
        bodyless: bool,
        chunked: bool,
    ) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._client, self._drain = transport, drain
        self._bodyless, self.chunked = bodyless, chunked
        # Whether the owner has the answer, or answers with an error; False: it is lost.
        self.accepted: asyncio.Future[bool] = loop.create_future()
        self.done: asyncio.Future[None] = loop.create_future()
        # The status of the response, once its head has come, and the bytes that came last.
        self.status = 0
        self.last = b""
        self.passed = 0
        # The bytes of the body that are still to come, if the head says how many there are.
        self._left: int | None = None
        self._ended = False
        self._owner: asyncio.Transport | None = None
        self._waiting: asyncio.Task[None] | None = None

    @property
    def _lost(self) -> bool:
        """Whether the owner does not have the answer."""
        accepted = self.accepted
        return accepted.done() and (accepted.cancelled() or not accepted.result())

    @property
    def whole(self) -> bool:
        """Whether the answer has come to its end."""
        if not self.status:
            return False
        if self._left is not None:
            return self._left == 0
        if self._bodyless or self.status in {204, 304}:
            return True
        return self.last.endswith(b"\r\n" + LAST_CHUNK) if self.chunked else self._ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the owner's transport."""
        # uvloop's transports are no instances of it.
        self._owner = transport  # type: ignore[assignment]

    def write(self, data: bytes) -> None:
        """Write *data* to the owner."""
        if self._owner is not None:
            self._owner.write(data)

    def data_received(self, data: bytes) -> None:
        """Pass *data* on."""
        if not self.status:
            data = self._begin(data)
            if not data:
                return
        elif self._left is not None:
            self._left -= len(data)
        if not self.chunked:
            self._ended = self._ended or _ENDS.search(self.last + data) is not None
        self.last = data if len(data) >= KEPT else self.last[-KEPT:] + data
        self.passed += len(data)
        client = self._client
        if client.is_closing():
            self.close()
            return
        client.write(data)
        if client.get_write_buffer_size() > HIGH_WATER and self._waiting is None:
            self._pause()

    def _begin(self, data: bytes) -> bytes:
        """Take in the first bytes; return those for the client, once the head is whole."""
        if self._lost:
            return b""
        data = self.last = self.last + data
        if not self.accepted.done():
            if len(data) < len(STATUS_LINE):
                return b""
            status = int(data[9:12])
            if status == ACCEPTING:
                if len(data) < len(ACCEPTED):
                    return b""
                data = self.last = data[len(ACCEPTED) :]
            self.accepted.set_result(status != MISDIRECTED)
            if status == MISDIRECTED:
                self.close()
                return b""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > MAX_HEAD:
                self.close()
            return b""
        self.status = int(data[9:12])
        if (length := _LENGTH.search(data, 0, end + 2)) is not None and not self._bodyless:
            self._left = int(length[1]) - (len(data) - end - 4)
        self.last = b""
        return data

    def connection_lost(self, _exc: Exception | None) -> None:
        """Note that nothing more comes."""
        if self._waiting is None:
            self._end()

    def _end(self) -> None:
        if not self.accepted.done():
            self.accepted.set_result(False)
        if not self.done.done():
            self.done.set_result(None)

    def _pause(self) -> None:
        assert self._owner is not None
        if not self._owner.is_closing():
            self._owner.pause_reading()
        self._waiting = self._loop.create_task(self._unblock())

    async def _unblock(self) -> None:
        """Read the owner again once the client reads, and not any more if it is dropped."""
        assert self._owner is not None
        try:
            await self._drain()
        except ConnectionError:
            self._owner.abort()
        finally:
            self._waiting = None
            if self._owner.is_closing():
                self._end()
            else:
                self._owner.resume_reading()

    def close(self) -> None:
        """Read nothing more: the owner notices that the client has left."""
        if self._waiting is not None:
            self._waiting.cancel()
        if self._owner is not None:
            self._owner.abort()


class Passed(web.StreamResponse):
    """A response that was passed on: aiohttp writes nothing of it, and closes the connection."""

    keep_alive = False
    prepared = True

    def __init__(self, status: int, size: int) -> None:
        super().__init__(status=status or 503)
        self._size = size

    @property
    def body_length(self) -> int:
        """The bytes that were passed on, with the head."""
        return self._size

    async def prepare(self, request: web.BaseRequest) -> None:
        """Do nothing."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing."""


class Tunnels:
    """The tunnels of one instance, by *network*. *secret* returns what all instances know, and
    *hold* what counts bytes that are kept.

    Always: there are at most half as many as `max_connections`.
    """

    def __init__(
        self,
        network: PeerNetwork,
        secret: Callable[[], bytes],
        admission: Admission,
        hold: Callable[[], HeldBytes],
    ) -> None:
        self._network, self._secret, self._admission = network, secret, admission
        self._hold = hold
        self._open: dict[Tunnel | SocketTunnel, str] = {}

    def __len__(self) -> int:
        return len(self._open)

    def keep(self, members: Collection[str]) -> None:
        """End the tunnels of owners that are no *members* any more: others may have their ids."""
        for tunnel, owner in tuple(self._open.items()):
            if owner not in members:
                tunnel.close()

    async def forward(
        self,
        elsewhere: Elsewhere,
        request: web.Request,
        render_error: RenderError,
        on_accept: Callable[[], None],
    ) -> web.StreamResponse:
        """Answer *request* with the answer of its owner: see `Elsewhere`.

        Raises:
            Lost, InstanceUnavailable, ServerShutdown: as `Elsewhere.forward`.
            ConnectionError: the client has left.
        """
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        self._check_room()
        send_timeout = self._admission.send_timeout
        drop = partial(self._admission.dropped, "http")
        tunnel = Tunnel(
            transport,
            partial(drained, transport, request.writer.drain, send_timeout, drop),
            bodyless=request.method == hdrs.METH_HEAD,
            chunked=request.version >= HttpVersion11,
        )
        self._open[tunnel] = elsewhere.owner
        try:
            peer = Forward(request.get(ADDRESS, request.remote) or "", request.secure)
            opening = head_of(request, len(elsewhere.body)) + elsewhere.body
            if not await self._dial(elsewhere.owner, tunnel, peer, opening):
                if tunnel.last:
                    raise Lost(elsewhere.owner, StreamNotFound(NOT_FOUND))
                raise _unavailable(_SILENT)
            # The owner counts the body from here on.
            elsewhere.body = opening = b""
            on_accept()
            await tunnel.done
        finally:
            del self._open[tunnel]
            tunnel.close()
        if not tunnel.whole and not transport.is_closing():
            self._break_off(transport, tunnel, render_error)
        return Passed(tunnel.status, tunnel.passed)

    async def follow(
        self,
        owner: str,
        caller: Caller,
        request_id: str,
        start: Start,
        api: str = "",
        lane: str | None = None,
    ) -> SocketTunnel:
        """Return the tunnel by which a socket reads an answer of *owner*: see `Elsewhere`.

        Raises:
            Lost, InstanceUnavailable, RequestConflict, ResumeGap: as `Elsewhere.follow`.
        """
        self._check_room()
        after, sequence, digest = start
        asked = Follow(caller.name, request_id, after, sequence, digest, api, lane)
        tunnel = SocketTunnel(self._hold(), self._forget)
        self._open[tunnel] = owner
        accepted = False
        try:
            accepted = await self._dial(owner, tunnel, asked)
        finally:
            if not accepted:
                self._forget(tunnel)
                tunnel.leave()
        if accepted:
            return tunnel
        if not tunnel.refusal:
            raise _unavailable(_SILENT)
        if isinstance(error := refused(tunnel.refusal), StreamNotFound):
            raise Lost(owner, error)
        raise error

    def _forget(self, tunnel: SocketTunnel) -> None:
        self._open.pop(tunnel, None)

    def _check_room(self) -> None:
        if len(self._open) >= self._admission.max_tunnels:
            raise _unavailable("too many answers of other processes are read here")

    async def _dial(
        self, owner: str, tunnel: Tunnel | SocketTunnel, word: Follow | Forward, rest: bytes = b""
    ) -> bool:
        """Return whether *owner* has the answer, or has begun one, when it has said so.

        Raises:
            Lost, InstanceUnavailable: as `Elsewhere`.
        """
        opening = encode(Greeting(self._secret(), word)) + rest
        try:
            async with timeout(ACCEPT_TIMEOUT + len(rest) / BODY_RATE):
                await self._network.dial(owner, lambda: tunnel)
                tunnel.write(opening)
                return await tunnel.accepted
        except Gone:
            raise Lost(owner, ServerShutdown(GONE, retry_after=1.0)) from None
        except (TimeoutError, Unreachable) as exc:
            raise _unavailable("the process that has this answer does not answer") from exc

    @staticmethod
    def _break_off(
        transport: asyncio.Transport, tunnel: Tunnel, render_error: RenderError
    ) -> None:
        """Tell the client that the owner has ended.

        Raises:
            ServerShutdown: nothing was written yet.
        """
        error = ServerShutdown(GONE, retry_after=1.0)
        if not tunnel.status:
            raise error
        end = b"\n\n\r\n" if tunnel.chunked else b"\n\n"
        event = render_error(error, tunnel.last) if tunnel.last.endswith(end) else b""
        if not event:
            # The last bytes are not a whole event, or no event may follow them.
            transport.abort()
        elif tunnel.chunked:
            transport.write(b"%x\r\n%b\r\n%b" % (len(event), event, LAST_CHUNK))
        else:
            transport.write(event)


def head_of(request: web.Request, size: int) -> bytes:
    """Return the head of *request*, as the owner of its answer gets it, for a body of *size* bytes
    behind it.
    """
    version = f"HTTP/{request.version.major}.{request.version.minor}"
    lines = [f"{request.method} {request.raw_path} {version}".encode("utf-8", "surrogateescape")]
    lines += [
        b"%b: %b" % header
        for header in request.raw_headers
        if header[0].decode("latin-1").lower() not in LEFT_OUT
    ]
    lines.append(f"X-Request-Id: {request_id(request)}".encode())
    if size:
        lines.append(b"Content-Length: %d" % size)
    lines += [b"Connection: close", b"", b""]
    return b"\r\n".join(lines)


def _unavailable(text: str) -> InstanceUnavailable:
    return InstanceUnavailable(text, retry_after=1.0)
