"""The WebSocket face: many questions at once on one socket, each resumable.

The commands of protocol/client_frames.py come as text messages. Their answers are streams, which
the socket's writer follows. The code that any WebSocket needs is in socket.py.
"""

from __future__ import annotations

import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

from aiohttp import WSCloseCode, web
from msgspec.structs import replace

from aioserver.errors import AioserverError, ConcurrencyExceeded, ServerShutdown, StreamNotFound
from aioserver.faces.intake import end_visit
from aioserver.faces.socket import Socket
from aioserver.faces.upgrade import serve
from aioserver.gateway.contracts.instances import Start
from aioserver.protocol import client_frames, frames
from aioserver.protocol.client_frames import BadCommand, Cancel, Chat, Ping, Resume
from aioserver.protocol.sound import NotUtf8
from aioserver.protocol.steps import LARGE_BYTES
from aioserver.streams.formats import MESSAGES, WS_TEXT, ws_frame

if TYPE_CHECKING:
    from aioserver.faces.admission import BodyHold
    from aioserver.faces.context import Context
    from aioserver.protocol.client_frames import Command
    from aioserver.streams.cursor import Cursor
    from aioserver.streams.stream import Stream
    from aioserver.telemetry.tracer import Visit

# Answers that may run at once on one socket.
MAX_ANSWERS = 32


def routes(context: Context) -> list[web.RouteDef]:
    """Return the route of this face."""
    endpoint = context.settings.chat.websocket.endpoint
    return [web.get(endpoint, partial(serve, context, kind=ChatSocket), allow_head=False)]


class ChatSocket(Socket):
    """One client's socket on this face.

    Always: the writer follows the streams in `_following`, at most MAX_ANSWERS.
    """

    __slots__ = ("_conversation", "_following", "_visits")

    face = "websocket"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # The conversation of questions that name none; "" before the first question.
        self._conversation = ""
        self._following: dict[str, Cursor] = {}
        # The visits to answers that other requests have begun, by cursor; None without one.
        self._visits: dict[Cursor, Visit] | None = None

    @property
    def busy(self) -> bool:
        """Whether answers run on this socket."""
        return bool(self._following)

    async def receive(self, data: bytes, hold: BodyHold) -> None:
        """Carry out one command."""
        try:
            command = await client_frames.parsing(data)
        except BadCommand as fault:
            self._refuse(fault.request_id, fault.error)
        else:
            # While a large message is read, the socket may be closed.
            if len(data) <= LARGE_BYTES or self.open:
                self._carry_out(command, hold)

    def _carry_out(self, command: Command, hold: BodyHold) -> None:
        request_id: str | None = None
        try:
            match command:
                case Ping():
                    self._send(command.request_id, "pong", {})
                case Chat():
                    request_id = command.request_id
                    self._chat(command, hold)
                case Cancel():
                    request_id = command.request_id
                    self._cancel(command.request_id)
                case Resume():
                    request_id = command.request_id
                    with self._context.metrics.resuming():
                        self._resume(command)
        except AioserverError as error:
            self._refuse(request_id, error)

    def show_position(self, position: int, eta: float) -> None:
        """Send a `queued` frame that belongs to no request."""
        self._send(None, "queued", {"position": position, "eta": round(eta, 1)})

    def show_error(self, error: AioserverError) -> None:
        """Send an `error` frame that belongs to no request."""
        self._send(None, "error", error.as_chunk())

    def _chat(self, command: Chat, hold: BodyHold) -> None:
        self.check_token()
        self._last_request = self._loop.time()
        # This is checked before a provider is asked for anything.
        self._check_room(command.request_id)
        if self._client_headers:
            command = replace(command, client_headers=self._client_headers)
        hold.request_options = self._request_options.joined(command.request_options)
        self._conversation = self._conversation or uuid.uuid4().hex
        gateway = self._context.gateway
        stream = gateway.ask(self.caller, command, self._conversation, face=self.face, hold=hold)
        self._follow(stream, 0)

    def _resume(self, command: Resume) -> None:
        request_id, after = command.request_id, command.last_event_id
        gateway = self._context.gateway
        try:
            stream = gateway.find(self.caller, request_id, after=after)
        except StreamNotFound:
            if gateway.instances is None:
                raise
            self._check_room(request_id)
            stream = gateway.instances.mirror(self.caller, request_id, Start(after))
        self._follow(stream, after)

    def _cancel(self, request_id: str) -> None:
        gateway = self._context.gateway
        try:
            stream = gateway.cancel(self.caller, request_id)
        except StreamNotFound:
            if gateway.instances is None:
                raise
            self._check_room(request_id)
            start = Start(None, cancel=True)
            stream = gateway.instances.mirror(self.caller, request_id, start)
            if request_id in self._following:
                # The end arrives through the mirror that is followed already.
                if stream.remote is not None:
                    stream.remote.expected = False
            else:
                self._follow(stream, 0)
            return
        # The end of the stream is the answer, also to a second `cancel`.
        if request_id not in self._following:
            self._follow(stream, stream.last - 1 if stream.ended else stream.last)

    def _check_room(self, request_id: str) -> None:
        if request_id not in self._following and len(self._following) >= MAX_ANSWERS:
            raise ConcurrencyExceeded(
                f"{MAX_ANSWERS} answers run on this socket already",
                retry_after=1.0,  # no event tells when one of them ends
            )

    def _follow(self, stream: Stream, after: int) -> None:
        self._check_room(stream.request_id)
        cursor = self._writer.follow(stream, after, MESSAGES, on_end=self._ended)
        tracer, request_id = self._context.tracer, stream.request_id
        if tracer is not None and (
            visit := tracer.visit(stream.record.trace, self._client_headers, request_id, after)
        ):
            self._visits = {**(self._visits or {}), cursor: visit}
        old = self._following.get(stream.request_id)
        self._following[stream.request_id] = cursor
        self._context.gateway.lifetime.reader_added(stream)
        if old is not None:
            self._writer.unfollow(old)
            self._end_visit(old)
        self._context.admission.idle_sockets.asked(self)

    def _end_visit(self, cursor: Cursor) -> None:
        if self._visits and (visit := self._visits.pop(cursor, None)) is not None:
            end_visit(visit, cursor.stream)

    async def finish(self) -> None:
        """Complete the close, and end the visits that the client has broken off."""
        try:
            await super().finish()
        finally:
            # Only answers that had not ended are left: their cursors hold a reference to this
            # socket.
            self._following.clear()
            for cursor in tuple(self._visits or ()):
                self._end_visit(cursor)

    def _ended(self, cursor: Cursor) -> None:
        self._end_visit(cursor)
        if self._following.get(cursor.stream.request_id) is cursor:
            del self._following[cursor.stream.request_id]
            self._context.admission.idle_sockets.asked(self)
        self.answers_ended()

    def _send(self, request_id: str | None, status: str, chunk: dict[str, object]) -> None:
        self._writer.send(ws_frame(WS_TEXT, frames.loose_frame(request_id, status, chunk)))

    def _refuse(self, request_id: str | None, error: AioserverError) -> None:
        self._context.metrics.count_error(error)
        if isinstance(error, NotUtf8):
            self.close(WSCloseCode.INVALID_TEXT, b"")
            return
        # While answers run the socket stays open for them, and closes after the last one.
        if isinstance(error, ServerShutdown) and not self._following:
            self.end(error)
        else:
            self._send(request_id, "error", error.as_chunk())
