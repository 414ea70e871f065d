"""OpenAI's Responses API over WebSocket: many responses on one connection, in lanes.

A `response.create` frame (protocol/response_frames.py) is the body of a `POST /v1/responses`, and is answered by the
events of that response, each one a frame with the bytes of the provider's event. It takes the same way as the POST:
nothing about a provider, a place or a limit belongs to the connection.

A *lane* is what a `stream_id` names. What comes on one lane is answered in its order, and different lanes are answered at
once, as far as MAX_RUNNING allows. The lane whose turn comes next is the one that has waited longest.

A client that leaves ends its responses at once, but for those with `store: true`: they are found by their ids, over HTTP
or by `response.resume` on another connection.
"""

from __future__ import annotations

import uuid
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from aiohttp import WSCloseCode, hdrs, web

from aioserver.errors import (
    AioserverError,
    ConcurrencyExceeded,
    MethodNotAllowed,
    ServerShutdown,
    StreamLimitReached,
    StreamNotFound,
)
from aioserver.faces import openai, responses
from aioserver.faces.socket import Socket
from aioserver.faces.upgrade import serve
from aioserver.gateway.elsewhere import Start
from aioserver.limits.turns import in_turns
from aioserver.protocol import response_frames
from aioserver.protocol.response_frames import (
    BadFrame,
    Cancel,
    Create,
    Processed,
    Refused,
    Resume,
    Steer,
)
from aioserver.protocol.responses import ResponseEvents
from aioserver.protocol.top_level import NotUtf8
from aioserver.streams.formats import WS_TEXT, response_messages, ws_frame

if TYPE_CHECKING:
    import asyncio

    from aioserver.faces.admission import BodyHold
    from aioserver.faces.context import Context
    from aioserver.protocol.response_frames import Command
    from aioserver.streams.cursor import Cursor
    from aioserver.streams.stream import Stream

# Responses under way at once on one connection, and its lanes with a name, as OpenAI has them.
MAX_RUNNING, MAX_NAMED_LANES = 16, 32
# Responses that wait on one connection, on all of its lanes: two for each lane that may have a name.
MAX_WAITING = 64
PATH = f"/v1/{responses.PATH}"


def routes(context: Context) -> list[web.RouteDef]:
    """Return the route of this face."""
    return [web.get(PATH, partial(answer, context), allow_head=False)]


async def answer(context: Context, request: web.Request) -> web.StreamResponse:
    """Answer a handshake, and serve the socket to its end.

    Raises:
        MethodNotAllowed: *request* is no handshake.
    """
    if hdrs.UPGRADE not in request.headers:
        raise MethodNotAllowed(
            f"GET {PATH} is for WebSockets: POST a request, or GET {PATH}/{{id}}", ("POST",)
        )
    return await serve(context, request, ResponsesSocket)


class Turn(NamedTuple):
    """A command that waits on its lane, and the count of its bytes."""

    command: Create | Refused | Resume
    hold: BodyHold


class Lane:
    """One lane of a connection; *name* is None for the one without a `stream_id`.

    *stream* is the response that was begun last. *under_way* counts what its end still has to wait for: events that
    are not written, and a producer that has not settled.
    """

    __slots__ = ("format", "name", "stream", "turns", "under_way")

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.format = response_messages(name)
        self.turns: deque[Turn] = deque()
        self.stream: Stream | None = None
        self.under_way = 0


class ResponsesSocket(Socket):
    """One client's socket on this face.

    Always: `_running` lanes have a response under way, at most MAX_RUNNING; `_waiting_turns` commands wait, at most
    MAX_WAITING; a lane with a turn and nothing under way is in `_due`.
    """

    face = "responses_ws"
    protocols = ("realtime", "responses")
    # A shorter one has ended long turns of agents, whose machines are busy meanwhile.
    min_ping_timeout = 30.0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._lanes: dict[str | None, Lane] = {}
        # The lanes that may go on as soon as fewer responses are under way.
        self._due: dict[Lane, None] = {}
        self._running = 0
        self._waiting_turns = 0
        # What looks for the responses that are resumed.
        self._searches: set[asyncio.Task[None]] = set()
        self._over = False

    @property
    def busy(self) -> bool:
        """Whether a response is under way on this socket, or waits."""
        return bool(self._running or self._waiting_turns)

    def receive(self, data: bytes, hold: BodyHold) -> None:
        """Carry out one frame."""
        try:
            command = response_frames.parse(data)
        except BadFrame as fault:
            self._refuse(fault.lane, fault.error)
        else:
            self._carry_out(command, hold)

    async def receive_in_turns(self, data: bytes, hold: BodyHold) -> None:
        """Carry out one frame, which is read in several turns of the event loop."""
        try:
            command = await in_turns(response_frames.parsing(data))
        except BadFrame as fault:
            self._refuse(fault.lane, fault.error)
        else:
            # Meanwhile the socket may have been closed.
            if self.open:
                self._carry_out(command, hold)

    def show_position(self, position: int, eta: float) -> None:
        """Send an `aioserver:queued` frame that belongs to no response."""
        self._send(response_frames.queued(None, position, eta))

    def show_error(self, error: AioserverError) -> None:
        """Send an `error` frame that belongs to no response."""
        self._send(response_frames.error(error, None))

    async def finish(self) -> None:
        """Forget what waits, and leave nothing behind."""
        self._over = True
        for search in self._searches:
            search.cancel()
        for lane in self._lanes.values():
            if lane.stream is not None:
                lane.stream.attachment.on_settled = None
            for turn in lane.turns:
                turn.hold.release()
            lane.turns.clear()
        self._due.clear()
        self._waiting_turns = 0
        await super().finish()

    # Commands.

    def _carry_out(self, command: Command, hold: BodyHold) -> None:
        match command:
            case Create() | Refused() | Resume():
                try:
                    self._take_turn(command, hold)
                except AioserverError as error:
                    self._refuse(command.lane, error)
            case Cancel():
                try:
                    self._cancel(command)
                except AioserverError as error:
                    self._refuse(command.lane, error)
            case Steer():
                self._send(response_frames.not_steered(command))
            case Processed():
                pass

    def _take_turn(self, command: Create | Refused | Resume, hold: BodyHold) -> None:
        self._last_request = self._loop.time()
        lane = self._lane(command.lane)
        if not (lane.under_way or lane.turns or self._running >= MAX_RUNNING):
            self._begin(lane, command, hold)
            return
        if self._waiting_turns >= MAX_WAITING:
            raise ConcurrencyExceeded(f"{MAX_WAITING} responses wait on this socket already")
        # Its bytes count for as long as it waits.
        hold.given = True
        lane.turns.append(Turn(command, hold))
        self._waiting_turns += 1
        if not lane.under_way:
            self._due[lane] = None

    def _lane(self, name: str | None) -> Lane:
        lane = self._lanes.get(name)
        if lane is None:
            named = len(self._lanes) - (None in self._lanes)
            if name is not None and named >= MAX_NAMED_LANES:
                raise StreamLimitReached(
                    f"{MAX_NAMED_LANES} lanes of this socket have a name already",
                    param="stream_id",
                )
            lane = self._lanes[name] = Lane(name)
        return lane

    def _begin(self, lane: Lane, command: Create | Refused | Resume, hold: BodyHold) -> None:
        """Carry out what has its turn on *lane*, where nothing is under way."""
        match command:
            case Refused():
                raise command.error
            case Resume():
                search = self._loop.create_task(self._resume(lane, command))
                self._searches.add(search)
                search.add_done_callback(self._searches.discard)
                search.add_done_callback(lambda _search: self._done(lane))
                self._count(lane, 1)
            case Create():
                if command.generate:
                    self._ask(lane, command, hold)
                else:
                    self._prepare(lane, command)

    def _ask(self, lane: Lane, command: Create, hold: BodyHold) -> None:
        """Ask a provider, as a POST does."""
        context = self._context
        request = openai.make_request(
            context,
            responses.PATH,
            command.body,
            face=self.face,
            caller=self.caller,
            name=uuid.uuid4().hex,
            hold=hold,
            client_headers=self._client_headers,
        )
        stream = context.gateway.relay(request)
        stream.details.error_format = ResponseEvents()
        # The limits of the caller's key count this response until then.
        stream.attachment.on_settled = partial(self._done, lane)
        self._count(lane, 1)
        self._follow(lane, stream, 0)

    def _prepare(self, lane: Lane, command: Create) -> None:
        """Answer a request for which nothing is generated."""
        route = self._context.router.route(command.body.model)
        model = route.model or route.provider.settings.model
        for event in response_frames.prepared(command, f"resp_{uuid.uuid4().hex}", model):
            self._send(event if lane.name is None else response_frames.in_lane(event, lane.name))

    async def _resume(self, lane: Lane, command: Resume) -> None:
        gateway = self._context.gateway
        start = Start() if command.after is None else Start(sequence=command.after)
        try:
            with self._context.metrics.resuming():
                stream = await gateway.reach(self.caller, command.response_id, start)
                if stream.details.path != responses.PATH or stream.details.whole is not None:
                    raise StreamNotFound(responses.NOT_FOUND)
                after = 0 if start.sequence is None else responses.event_of(stream, start.sequence)
                if not self._over:
                    self._follow(lane, stream, after)
        except AioserverError as error:
            if not self._over:
                self._refuse(lane.name, error)

    def _cancel(self, command: Cancel) -> None:
        """Cancel a response of this socket; the end of its events is the answer."""
        for lane in self._lanes.values():
            stream = lane.stream
            if stream is None or stream.ended or not lane.under_way:
                continue
            if command.response_id is None:
                wanted = lane.name == command.lane
            else:
                wanted = command.response_id in {stream.attachment.alias, _id_of(stream)}
            if wanted:
                self._context.gateway.lifetime.end(stream, abandoned=False)
                return
        raise StreamNotFound(f"no such response is under way here: POST {PATH}/{{id}}/cancel")

    # Turns.

    def _follow(self, lane: Lane, stream: Stream, after: int) -> None:
        """Write the events of *stream* after event *after* on *lane*.

        Raises:
            ResumeGap: those events are no longer kept.
        """
        name = lane.name
        self._writer.follow(
            stream,
            after,
            lane.format,
            render_position=lambda position, eta: ws_frame(
                WS_TEXT, response_frames.queued(name, position, eta)
            ),
            on_end=partial(self._written, lane),
        )
        lane.stream = stream
        self._count(lane, 1)
        self._context.gateway.lifetime.reader_added(stream)
        self._context.admission.idle_sockets.asked(self)

    def _written(self, lane: Lane, _cursor: Cursor) -> None:
        """Note that all events of the response under way on *lane* are written."""
        self._context.admission.idle_sockets.asked(self)
        self._done(lane)

    def _count(self, lane: Lane, step: int) -> None:
        if not lane.under_way:
            self._running += 1
        lane.under_way += step
        if not lane.under_way:
            self._running -= 1

    def _done(self, lane: Lane) -> None:
        """Note that something is over for which the next turn on *lane* has waited."""
        self._count(lane, -1)
        if self._over:
            return
        if lane.turns and not lane.under_way:
            self._due[lane] = None
        while self._due and self._running < MAX_RUNNING and not self._over:
            due = next(iter(self._due))
            del self._due[due]
            self._go_on(due)
        if not self.busy and self._context.lifecycle.stopping.is_set():
            self.drain()

    def _go_on(self, lane: Lane) -> None:
        """Carry out what waits on *lane*, up to the next response that takes its time."""
        while lane.turns and not lane.under_way:
            command, hold = lane.turns.popleft()
            self._waiting_turns -= 1
            hold.given = False
            with hold:
                try:
                    self._begin(lane, command, hold)
                except AioserverError as error:
                    self._refuse(lane.name, error)

    def _send(self, event: bytes) -> None:
        self._writer.send(ws_frame(WS_TEXT, event))

    def _refuse(self, lane: str | None, error: AioserverError) -> None:
        self._context.metrics.count_error(error)
        if isinstance(error, NotUtf8):
            self.close(WSCloseCode.INVALID_TEXT, b"")
            return
        self._send(response_frames.error(error, lane))
        # While responses are under way the socket stays open for them, and closes after the last one.
        if isinstance(error, ServerShutdown) and not self.busy:
            self.close(ServerShutdown.close or 1012, ServerShutdown.close_reason)


def _id_of(stream: Stream) -> object:
    """Return the id that the provider has given to the response, None if it has not come."""
    events = stream.details.error_format
    response = events.response if isinstance(events, ResponseEvents) else None
    return None if response is None else response.get("id")
