"""The WebSocket face (RFC 6455): many questions at once on one socket, each resumable.

One task reads, always: a reader that stops does not see its client go. Commands are carried out in
that task without waiting for anything; the answers are written by the socket's one writer, which
follows their streams. Frames go straight to the transport, ready-made: no compression, and no
masking from a server. Pings are ours: aiohttp's heartbeat has a fixed wait and closes without a
close frame. So is the closing handshake: aiohttp ends the connection together with its close
frame, and where the client is still sending then, the kernel's reset can destroy that frame.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import struct
import uuid
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import WebSocketError, WSCloseCode, WSMsgType, web

from aioserver.auth.callers import CALLER
from aioserver.auth.guard import KEY_PROTOCOL, offered_keys, offered_protocols
from aioserver.errors import (
    AioserverError,
    ConcurrencyExceeded,
    InvalidApiKey,
    InvalidRequest,
    RateLimitExceeded,
    RequestTooLarge,
    ServerAtCapacity,
    ServerShutdown,
)
from aioserver.faces.admission import MAX_REFUSED_CLOSING, SocketPlace
from aioserver.limits.gcra import Gcra
from aioserver.limits.quota import REVOKED
from aioserver.protocol import messages
from aioserver.protocol.messages import BadCommand, Cancel, Chat, Ping, Resume
from aioserver.streams.formats import MESSAGES, WS_CLOSE, WS_PING, WS_PONG, WS_TEXT, ws_frame
from aioserver.streams.writer import Writer

if TYPE_CHECKING:
    from aioserver.faces.context import Context
    from aioserver.streams.cursor import Cursor
    from aioserver.streams.stream import Stream

SUBPROTOCOL = "aioserver"
MAX_ANSWERS = 32  # running at once on one socket
MAX_WAITING_FRAMES = 16  # kept of a socket that waits for its place
MAX_WAITING_BYTES = 1 << 20
FRAMES_PER_SECOND, FRAMES_BURST = 100, 200  # beyond: a flood
FRAME_INTERVAL = 1 / FRAMES_PER_SECOND
FRAME_TOLERANCE = (FRAMES_BURST - 1) * FRAME_INTERVAL
CLOSE_TIMEOUT = 2.0  # seconds for a client to take what is left, and to answer a close frame


def routes(context: Context) -> list[web.RouteDef]:
    """Return the route of this face."""
    endpoint = context.settings.chat.websocket.endpoint
    return [web.get(endpoint, partial(handler, context), allow_head=False)]


class Upgraded(web.WebSocketResponse):
    """aiohttp's handshake and parser. It closes nothing itself: that is `Socket`'s."""

    async def close(
        self,
        *,
        code: int = WSCloseCode.OK,  # noqa: ARG002 - aiohttp's signature
        message: bytes = b"",  # noqa: ARG002
        drain: bool = True,  # noqa: ARG002
    ) -> bool:
        """Nothing."""
        return False


def subprotocols(request: web.Request) -> tuple[str, ...]:
    """Return the subprotocol to select of those that the client offers; never the one with its key.

    Raises:
        InvalidRequest: it offers a key and no protocol beside it: aiohttp would log the whole offer.
    """
    offered = offered_protocols(request)
    if SUBPROTOCOL in offered:
        return (SUBPROTOCOL,)
    if offered_keys(offered):
        raise InvalidRequest(f"offer the subprotocol {SUBPROTOCOL} beside {KEY_PROTOCOL}…")
    return ()


async def handler(context: Context, request: web.Request) -> web.StreamResponse:
    """One socket, from handshake to close."""
    context.origins.check(request.headers)
    admission = context.admission
    if admission.refused_closing >= MAX_REFUSED_CLOSING:
        raise ServerAtCapacity("too many refused sockets are still closing", retry_after=5.0)
    limits = context.settings.chat.websocket
    ws = Upgraded(
        autoping=False,
        autoclose=False,
        compress=False,
        protocols=subprotocols(request),
        max_msg_size=limits.max_message_size + 1,  # aiohttp refuses exactly the size it is given
    )
    payload_writer = await ws.prepare(request)
    ws.headers.clear()  # sent, and not needed for the hours to come
    assert request.transport is not None
    socket = Socket(context, request, ws, request.transport, payload_writer.drain)
    context.sockets.add(socket)
    try:
        with SocketPlace(
            admission,
            "websocket",
            on_entered=socket.entered,
            on_refused=socket.refused,
            on_position=socket.told,
        ):
            await socket.read()
    finally:
        context.sockets.discard(socket)
        await socket.close()
    return ws


class Socket:
    """One client's WebSocket.

    Always: an answer in `_following` is followed by the writer; frames that came before the place
    are kept in order, and carried out once it is there.
    """

    def __init__(
        self,
        context: Context,
        request: web.Request,
        ws: Upgraded,
        transport: asyncio.Transport,
        drain: object,
    ) -> None:
        self.bucket = 0  # the wheel's
        self._context = context
        self._ws = ws
        self._gateway = context.gateway
        self._admission = context.admission
        self._metrics = context.metrics
        self._limits = context.settings.chat.websocket
        self.caller = request[CALLER]  # another one of the same name, where its limits change
        self._scope = uuid.uuid4().hex  # the conversation of turns that name none
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._writer = Writer(
            transport,
            drain,  # type: ignore[arg-type]
            context.outbox,
            send_timeout=context.settings.chat.streams.send_timeout,
            on_drop=self._dropped,
            on_unfollow=self._gateway.lifetime.reader_removed,
        )
        self._following: dict[str, Cursor] = {}
        self._inside = False
        self._waiting: list[str] = []
        self._waiting_bytes = 0
        self._frames = Gcra(FRAME_INTERVAL, FRAME_TOLERANCE)
        self._pings = itertools.count(1)
        self._ping: bytes | None = None  # sent, its pong has not come
        self._pinged = False  # a ping was sent, its wait is not over
        self._last_request = self._loop.time()
        self._close_task: asyncio.Task[None] | None = None
        self._left: asyncio.Event | None = None  # the client has said that it closes, or is gone
        self._deaf = False  # after a fault in its frames nothing more is parsed
        self._refused_closing = False
        self._code = 1006  # with which it ends; this: without a close frame
        context.wheel.add(self, self._limits.ping_interval)

    # Admission.

    def entered(self) -> None:
        """The place is taken: carry out what came while waiting."""
        self._inside = True
        self._admission.opened("websocket", self.caller.name)
        waiting, self._waiting = self._waiting, []
        for text in waiting:
            if self._close_task is None:  # else it was sent away meanwhile: nothing is paid for it
                self._carry_out(text)

    def refused(self, error: AioserverError) -> None:
        """No place: say so, then close."""
        self._admission.log("refused", "websocket", logging.WARNING, caller=self.caller.name)
        self._metrics.count_error(error)
        if not self._refused_closing:
            self._refused_closing = True
            self._admission.refused_closing += 1
        self.end(error)

    def told(self, position: int, eta: float) -> None:
        """Where the socket stands in the line."""
        self._say(None, "queued", {"position": position, "eta": round(eta, 1)})

    # Reading.

    async def read(self) -> None:
        """Read until the client has gone, or has been sent away."""
        ws = self._ws
        while True:
            message = await ws.receive()
            match message.type:
                case WSMsgType.TEXT:
                    if self._close_task is None:
                        self._text(message.data)
                case WSMsgType.PONG:
                    if bytes(message.data) == self._ping:
                        self._ping = None
                case WSMsgType.PING:
                    if self._counts():
                        self._writer.send(ws_frame(WS_PONG, bytes(message.data)))
                case WSMsgType.BINARY:
                    self._end(WSCloseCode.UNSUPPORTED_DATA, b"text frames only")
                case _:
                    if message.type is WSMsgType.CLOSE and self._close_task is None:
                        self._code = message.data
                    if isinstance(message.data, WebSocketError):
                        self._deaf = True
                        self._end(message.data.code, b"")
                    return

    def _text(self, text: str) -> None:
        limit = self._limits.max_message_size
        if len(text) > limit or (not text.isascii() and len(text.encode()) > limit):
            self.end(RequestTooLarge(f"a message of more than {limit} bytes"))
        elif not self._counts():
            pass
        elif self._inside:
            self._carry_out(text)
        else:
            self._waiting.append(text)
            self._waiting_bytes += len(text)
            if len(self._waiting) > MAX_WAITING_FRAMES or self._waiting_bytes > MAX_WAITING_BYTES:
                self.end(RateLimitExceeded("too many messages before a place was free"))

    def _counts(self) -> bool:
        """Count a frame; a flood ends the socket."""
        if not self._frames.try_take():
            return True
        self.end(RateLimitExceeded(f"more than {FRAMES_PER_SECOND} frames a second"))
        return False

    def _carry_out(self, text: str) -> None:
        request_id: str | None = None
        try:
            command = messages.parse(text)
            match command:
                case Ping():
                    self._say(command.request_id, "pong", {})
                case Chat():
                    request_id = command.request_id
                    self._chat(command)
                case Cancel():
                    request_id = command.request_id
                    self._cancel(command.request_id)
                case Resume():
                    request_id = command.request_id
                    with self._metrics.resuming():
                        stream = self._gateway.find(self.caller, command.request_id)
                        self._follow(stream, command.last_event_id)
        except BadCommand as bad:
            self._complain(bad.request_id, bad.error)
        except AioserverError as error:
            self._complain(request_id, error)

    def _chat(self, chat: Chat) -> None:
        self._last_request = self._loop.time()
        self._check_room(chat.request_id)  # before anything is asked of a provider
        self._follow(self._gateway.ask(self.caller, chat, self._scope, face="websocket"), 0)

    def _cancel(self, request_id: str) -> None:
        stream = self._gateway.cancel(self.caller, request_id)
        if request_id not in self._following:  # its end is the answer, also when asked twice
            self._follow(stream, stream.last - 1 if stream.ended else stream.last)

    def _check_room(self, request_id: str) -> None:
        if request_id not in self._following and len(self._following) >= MAX_ANSWERS:
            raise ConcurrencyExceeded(f"{MAX_ANSWERS} answers run on this socket already")

    def _follow(self, stream: Stream, after: int) -> None:
        self._check_room(stream.request_id)
        cursor = self._writer.follow(
            stream,
            after,
            MESSAGES,
            render_position=lambda position, eta: ws_frame(
                WS_TEXT,
                messages.loose_frame(
                    stream.request_id, "queued", {"position": position, "eta": round(eta, 1)}
                ),
            ),
            on_end=self._finished,
        )
        old = self._following.get(stream.request_id)
        self._following[stream.request_id] = cursor
        self._gateway.lifetime.reader_added(stream)
        if old is not None:
            self._writer.unfollow(old)

    def _finished(self, cursor: Cursor) -> None:
        if self._following.get(cursor.stream.request_id) is cursor:
            del self._following[cursor.stream.request_id]
        if not self._following and self._context.lifecycle.stopping.is_set():
            self.drain()

    # Writing.

    def _say(self, request_id: str | None, status: str, chunk: dict[str, object]) -> None:
        self._writer.send(ws_frame(WS_TEXT, messages.loose_frame(request_id, status, chunk)))

    def _complain(self, request_id: str | None, error: AioserverError) -> None:
        self._metrics.count_error(error)
        if isinstance(error, ServerShutdown) and not self._following:
            self.end(error)  # else once the answers that run have had their time
        else:
            self._say(request_id, "error", error.as_chunk())

    def visit(self, now: float) -> float | None:
        """The wheel's call: ping, or see whether the last ping was answered."""
        if self._writer.closed or self._close_task is not None:
            return None
        limits = self._context.settings.chat.websocket  # as they are now
        idle = limits.idle_timeout
        if idle and now - self._last_request >= idle and not self._following and self._inside:
            self._end(WSCloseCode.OK, b"idle")
            return None
        if self._ping is not None:
            self._end(WSCloseCode.INTERNAL_ERROR, b"keepalive ping timeout", lost=True)
            return None
        if self._pinged:
            self._pinged = False
            pause = limits.ping_interval - limits.ping_timeout
            if pause > 0:
                return pause
        self._ping = struct.pack("!I", next(self._pings))
        self._pinged = True
        self._writer.send(ws_frame(WS_PING, self._ping))
        return limits.ping_timeout

    # Ending.

    def end(self, error: AioserverError) -> None:
        """Say *error*, then close with its code."""
        if self._close_task is None:
            self._say(None, "error", error.as_chunk())
            assert error.close is not None
            self._end(error.close, error.close_reason)

    def _end(self, code: int, reason: bytes, *, lost: bool = False) -> None:
        """Close with *code*. *lost*: the client answers nothing, the close frame is a courtesy."""
        if self._close_task is None:
            self._code = code
            self._left = (
                asyncio.Event()
            )  # not made for each socket: it is a twentieth of an idle one
            self._close_task = self._loop.create_task(
                self._close(code, reason, self._left, lost=lost)
            )

    async def _close(self, code: int, reason: bytes, left: asyncio.Event, *, lost: bool) -> None:
        if not lost:
            with contextlib.suppress(TimeoutError):  # an answer may go on, its reader be slow
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await self._writer.flush()
        self._last_frame(code, reason)
        if lost:
            self._transport.close()
            return
        if self._deaf and not self._transport.is_closing():
            self._transport.write_eof()  # its answer is not understood: its end will be
        # What the client still sends is read, and means nothing: an end of the connection before
        # it has read the close frame would be a reset, and that frame's loss.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await left.wait()
        if left.is_set():
            self._transport.close()
        else:
            self._transport.abort()  # close() would wait for ever for a client that reads nothing

    def _last_frame(self, code: int, reason: bytes) -> None:
        self._writer.end(ws_frame(WS_CLOSE, struct.pack("!H", code) + reason))

    async def close(self) -> None:
        """The socket is over: follow nothing, answer the client's close, leave nothing behind."""
        self._context.wheel.remove(self)
        if self._inside:
            self._admission.closed("websocket", str(self._code), self.caller.name)
        try:
            if self._close_task is None:
                self._last_frame(WSCloseCode.OK, b"")
                self._transport.close()
                return
            if not self._deaf and self._left is not None:
                self._left.set()
            await self._close_task
        finally:
            self._writer.close()
            if self._refused_closing:
                self._admission.refused_closing -= 1

    def drain(self) -> None:
        """The server ends: tell the client to come back. Who waits for its place is told by the gate."""
        if self._inside and not self._following:
            self._end(ServerShutdown.close or 1012, ServerShutdown.close_reason)

    def revoke(self) -> None:
        """Its key is no longer valid: say so, and close."""
        self.end(InvalidApiKey(REVOKED))

    def _dropped(self, why: str) -> None:
        self._admission.dropped("websocket", why)
