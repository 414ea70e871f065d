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
from aioserver.streams.cursor import Cursor
from aioserver.streams.formats import MESSAGES, WS_TEXT, ws_frame
from aioserver.streams.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from aioserver.faces.admission import BodyHold
    from aioserver.faces.context import Context
    from aioserver.gateway.contracts.instances import Instances, Lost, Reading
    from aioserver.protocol.client_frames import Command
    from aioserver.telemetry.tracer import Visit

# Answers that may run at once on one socket.
MAX_ANSWERS = 32


def routes(context: Context) -> list[web.RouteDef]:
    """Return the route of this face."""
    endpoint = context.settings.chat.websocket.endpoint
    return [web.get(endpoint, partial(serve, context, kind=ChatSocket), allow_head=False)]


class ChatSocket(Socket):
    """One client's socket on this face.

    Always: the writer follows the streams in `_following`, and passes on the answers of other
    instances in it. Other instances are asked for the ids in `_asking`. Both together have at most
    MAX_ANSWERS. Commands of one id are carried out in order.
    """

    __slots__ = ("_asking", "_conversation", "_following", "_visits")

    face = "websocket"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # The conversation of questions that name none; "" before the first question.
        self._conversation = ""
        self._following: dict[str, Cursor | Reading] = {}
        # The commands that wait for the answer of another instance about their id.
        self._asking: dict[str, list[tuple[Command, BodyHold]]] = {}
        # The visits to answers that other requests have begun, by cursor; None without one.
        self._visits: dict[Cursor, Visit] | None = None

    @property
    def busy(self) -> bool:
        """Whether answers run on this socket, or are asked for."""
        return bool(self._following or self._asking)

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
        if isinstance(command, Ping):
            self._send(command.request_id, "pong", {})
            return
        request_id = command.request_id
        try:
            if request_id in self._asking:
                self._wait(command, hold)
                return
            match command:
                case Chat():
                    self._chat(command, hold)
                case Cancel() if self._may_be_elsewhere(request_id):
                    self._ask(request_id, self._cancel_elsewhere(request_id))
                case Cancel():
                    self._show_end(
                        request_id, self._context.gateway.cancel(self.caller, request_id)
                    )
                case Resume() if self._may_be_elsewhere(request_id):
                    self._ask(request_id, self._resume_elsewhere(command))
                case Resume():
                    with self._context.metrics.resuming():
                        after = command.last_event_id
                        gateway = self._context.gateway
                        self._follow(gateway.find(self.caller, request_id), after)
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
        if self._context.gateway.undecided(self.caller, command.request_id):
            hold.given = True
            self._ask(command.request_id, self._chat_anywhere(command, hold))
        else:
            self._follow(self._begin(command, hold), 0)

    def _begin(self, command: Chat, hold: BodyHold) -> Stream:
        gateway, conversation = self._context.gateway, self._conversation
        return gateway.ask(self.caller, command, conversation, face=self.face, hold=hold)

    def _check_room(self, request_id: str) -> None:
        if len((self._following.keys() | self._asking.keys()) - {request_id}) >= MAX_ANSWERS:
            raise ConcurrencyExceeded(
                f"{MAX_ANSWERS} answers run on this socket already",
                retry_after=1.0,  # no event tells when one of them ends
            )

    # Answers of other instances.

    def _may_be_elsewhere(self, request_id: str) -> bool:
        """Return whether other instances are to be asked for a stream, since it is not here.

        Raises:
            ConcurrencyExceeded: too many answers run.
        """
        gateway = self._context.gateway
        if gateway.instances is None:
            return False
        try:
            gateway.find(self.caller, request_id)
        except StreamNotFound:
            self._check_room(request_id)
            return True
        return False

    def _ask(self, request_id: str, work: Coroutine[Any, Any, None]) -> None:
        """Do *work*, for which the commands of the same id wait."""
        self._asking[request_id] = []

        def refuse(error: AioserverError) -> None:
            # It is the end of another instance that it may tell of: this socket goes on.
            self._context.metrics.count_error(error)
            self._send(request_id, "error", error.as_chunk())

        self.work(work, refuse).add_done_callback(lambda _task: self._go_on(request_id))

    def _wait(self, command: Chat | Cancel | Resume, hold: BodyHold) -> None:
        """Let *command* wait until other instances have answered about its id.

        Raises:
            ConcurrencyExceeded: too many commands wait.
        """
        if sum(map(len, self._asking.values())) >= MAX_ANSWERS:
            raise ConcurrencyExceeded(
                f"{MAX_ANSWERS} commands wait on this socket already", retry_after=1.0
            )
        hold.given = True
        self._asking[command.request_id].append((command, hold))

    def _go_on(self, request_id: str) -> None:
        """Carry out the commands that have waited."""
        waiting = self._asking.pop(request_id)
        while waiting:
            command, hold = waiting.pop(0)
            hold.given = False
            with hold:
                if self.open:
                    self._carry_out(command, hold)
        self.answers_ended()

    async def _chat_anywhere(self, command: Chat, hold: BodyHold) -> None:
        start = Start(digest=command.digest())

        async def find(lost: Lost | None) -> Stream:
            await self._others.claim(self.caller, command.request_id, lost)
            return self._begin(command, hold)

        # It is released then, unless a request has it.
        hold.given = False
        with hold:
            answer = await self.reach(find, start)
        self._show(command.request_id, answer, 0)

    async def _resume_elsewhere(self, command: Resume) -> None:
        request_id, after = command.request_id, command.last_event_id
        self._show(request_id, await self._reach(request_id, Start(after)), after)

    async def _cancel_elsewhere(self, request_id: str) -> None:
        await self._others.cancel(self.caller, request_id)
        if request_id not in self._following:
            self._show_end(request_id, await self._reach(request_id, Start(None)))

    async def _reach(self, request_id: str, start: Start) -> Stream | Reading:
        async def find(lost: Lost | None) -> Stream:
            with self._context.metrics.resuming():
                return await self._others.route(self.caller, request_id, lost)

        return await self.reach(find, start)

    @property
    def _others(self) -> Instances:
        instances = self._context.gateway.instances
        assert instances is not None
        return instances

    def _show_end(self, request_id: str, answer: Stream | Reading) -> None:
        """Write the end of *answer*: it is the answer to a `cancel`, also to a second one. One that
        is read already gets it so.
        """
        after = 0
        if isinstance(answer, Stream):
            after = answer.last - 1 if answer.ended else answer.last
        if request_id not in self._following:
            self._show(request_id, answer, after)

    def _show(self, request_id: str, answer: Stream | Reading, after: int) -> None:
        """Write the events of *answer*."""
        if isinstance(answer, Stream):
            self._follow(answer, after)
        elif not self.open:
            answer.leave()
        else:
            self._leave(request_id)
            self._following[request_id] = answer
            answer.start(self._writer.pass_on, partial(self._passed, request_id, answer))
            self._context.admission.idle_sockets.asked(self)

    def _passed(self, request_id: str, answer: Reading, error: AioserverError | None) -> None:
        """Note the end of an *answer*, or that its rest does not come, with *error*."""
        if error is not None:
            self._context.metrics.count_error(error)
            self._send(request_id, "error", error.as_chunk())
        self._over(request_id, answer)

    # The streams of this instance.

    def _follow(self, stream: Stream, after: int) -> None:
        self._check_room(stream.request_id)
        cursor = self._writer.follow(stream, after, MESSAGES, on_end=self._ended)
        tracer, request_id = self._context.tracer, stream.request_id
        if tracer is not None and (
            visit := tracer.visit(stream.record.trace, self._client_headers, request_id, after)
        ):
            self._visits = {**(self._visits or {}), cursor: visit}
        self._context.gateway.lifetime.reader_added(stream)
        self._leave(request_id)
        self._following[request_id] = cursor
        self._context.admission.idle_sockets.asked(self)

    def _leave(self, request_id: str) -> None:
        """Read an answer no more, if it is read."""
        old = self._following.pop(request_id, None)
        if isinstance(old, Cursor):
            self._writer.unfollow(old)
            self._end_visit(old)
        elif old is not None:
            old.leave()

    def _end_visit(self, cursor: Cursor) -> None:
        if self._visits and (visit := self._visits.pop(cursor, None)) is not None:
            end_visit(visit, cursor.stream)

    async def finish(self) -> None:
        """Complete the close, and end the visits that the client has broken off."""
        try:
            await super().finish()
        finally:
            # Only answers that had not ended are left: their readers refer to this socket.
            for request_id in tuple(self._following):
                self._leave(request_id)
            for cursor in tuple(self._visits or ()):
                self._end_visit(cursor)

    def _ended(self, cursor: Cursor) -> None:
        self._end_visit(cursor)
        self._over(cursor.stream.request_id, cursor)

    def _over(self, request_id: str, answer: Cursor | Reading) -> None:
        if self._following.get(request_id) is answer:
            del self._following[request_id]
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
